"""Tasks and environments."""
