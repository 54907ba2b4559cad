"""A run that is killed over and over, and what it must come to all the same."""
