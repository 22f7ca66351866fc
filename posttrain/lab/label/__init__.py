"""Labelling: people say which of two answers is better, and a reward model learns from what they said."""
