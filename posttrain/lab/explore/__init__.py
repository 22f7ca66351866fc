"""The five interactive explorers, each backed by real computation."""
