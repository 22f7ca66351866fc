"""Sandbox for model-written code: it gets inputs, never expected values; its outputs are compared outside."""
