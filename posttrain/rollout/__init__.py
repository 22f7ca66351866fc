"""Rollouts: sampling and scoring completions."""
