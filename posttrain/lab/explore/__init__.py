"""The six interactive explorers, each backed by real computation."""
