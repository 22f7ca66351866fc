"""The five explorers, each on real computation."""
