"""abacus: a very small language model that ships with the package, and everything that regenerates it."""

from pathlib import Path

PATH = Path(__file__).parent
"""Folder of the shipped model; give it to ``AutoTokenizer`` and ``AutoModelForCausalLM``."""
