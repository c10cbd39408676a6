"""The chips that training may run on, the CPU among them."""
