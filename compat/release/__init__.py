"""verl's releases from their source: pins made and compared; off the load path."""
