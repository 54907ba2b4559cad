"""What the learner, the actors and the environments share."""

__version__ = "0.1.0"

PROTOCOL = 4
"""The number of the wire contract. Both sides of a Join must speak the same."""
