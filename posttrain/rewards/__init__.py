"""Rewards: verifiers, reward models, LLM judges, and combinations of them."""
