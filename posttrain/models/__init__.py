"""Hugging Face models, and the little that RL adds to them."""
