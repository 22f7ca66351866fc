"""A reward as a user would write one: the share of vowels in the answer."""


def vowels(completion: str, answer: str, **task: object) -> float:
    """Between 0 and 1, so that a random model's answers differ."""
    return sum(c in "aeiou" for c in completion) / max(1, len(completion))
