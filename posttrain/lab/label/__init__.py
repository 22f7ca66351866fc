"""Labelling: people choose the better of two answers, and a reward model is trained on their labels."""
