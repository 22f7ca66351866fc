"""Run folders and checkpoints that survive kill -9."""
