"""Crash-safe run folders and checkpoints."""
