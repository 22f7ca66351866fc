"""abacus: a very small language model that ships with the package, and the code that regenerates it."""

from pathlib import Path

PATH = Path(__file__).parent
"""Folder of the shipped model, for ``AutoTokenizer`` and ``AutoModelForCausalLM``."""
