"""A whole run on one machine, small enough to watch."""
