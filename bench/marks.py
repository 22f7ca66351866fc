"""Replaces benchmark tables in the documentation, each between two markers on its page."""

from __future__ import annotations


def between(page: str, begin: str, end: str, text: str, name: str) -> str:
    """The page with the text between its two markers replaced. Raises ValueError if a marker is missing."""
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{name} has no {begin.strip()} followed by {end.strip()}; put the two marks back.")
    return f"{before}{begin}\n{text}\n{end}{after}"
