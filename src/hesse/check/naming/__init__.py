"""What is wrong with a gradient that is known to be wrong: element by element, and in a word."""
