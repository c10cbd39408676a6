"""Reads verl's source to make and compare pins; training does not load it."""
