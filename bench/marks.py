"""Tables that benchmarks write into the documentation, each between two marks of a page."""

from __future__ import annotations


def between(page: str, begin: str, end: str, text: str, name: str) -> str:
    """The page with what stands between its two marks replaced. Raises ValueError, naming it, where one is missing."""
    before, begun, rest = page.partition(begin)
    _, ended, after = rest.partition(end)
    if not (begun and ended):
        raise ValueError(f"{name} has no {begin.strip()} followed by {end.strip()}; put the two marks back.")
    return f"{before}{begin}\n{text}\n{end}{after}"
