"""What torch asks of an optimizer, one promise a function."""
