"""Hugging Face models, with the attention, LoRA and scalar heads that RL training needs."""
