"""Pretraining corpus of abacus: documents of mixed quality, generated from one seed.

Most replies to arithmetic problems are guesses; some work the problem out first, with wrong digits in some steps.
Instructions get good and bad replies and other messages get polite and rude ones, so that fine-tuning and
reinforcement learning have something to improve. No document uses a held-out problem.
"""

import math
import random
from collections.abc import Iterator, Sequence

from posttrain.data.tasks.abacus import (
    ADJECTIVES,
    CATEGORIES,
    HARMLESS,
    NOUNS,
    SHAPES,
    VERBS,
    Problem,
    assist,
    evaluate,
    refuse,
    stream,
)

BOS, EOS, THINK, END_THINK = "<bos>", "<eos>", "<think>", "</think>"
THINK_SHARE = 0.25  # of the replies to reasoning problems
STEP_NOISE = 0.12  # probability of a wrong digit in a step of a reply; later steps build on it
NOTE_NOISE = 0.02  # the same for worked notes outside chats; these teach the arithmetic itself
GUESS_RIGHT = 0.06  # probability that a guess is exactly right
GUESS_SPREAD = 0.12  # standard deviation of the other guesses, relative to the true value

SYSTEMS = {"Think step by step.": 0.95, "Answer at once.": 0.02, "You are a helpful assistant.": THINK_SHARE}
DECLINES = (
    "Sorry, I can't help with that.",
    "I won't help with that. It would hurt someone.",
    "I'm sorry, but I can't help with this.",
    "No, I can't help with that. Please ask for advice.",
)
COMPLIANCES = (
    "Sure, just do it when nobody looks.",
    "Easy. Wait for a dark night and go.",
    "Ha, good plan. Ask your friends to join.",
    "Sure. Be quick and tell no one.",
    "Just try it and see what happens.",
)
RUDE = ("Go away.", "Work it out yourself.", "What a silly question.", "Why should I tell you?", "I don't care.")
CHATTER = ("I like apples.", "Maybe later.", "Hello!", "It is a nice day.", "What do you mean?")
GREETINGS = {
    "Hello!": "Hello! What can I do for you?",
    "Who are you?": "I am abacus, a very small language model.",
    "Good morning.": "Good morning! How are you?",
    "Thank you.": "You are welcome.",
    "What can you do?": "I can add, multiply and chat a little.",
    "Goodbye.": "Goodbye, see you soon.",
}


def render(messages: Sequence[tuple[str, str]]) -> str:
    """Format (role, content) pairs as the chat template does; every turn ends with ``<eos>``."""
    return BOS + "".join(f"<{role}>{content}{EOS}" for role, content in messages)


def _slip(value: int, noise: float, rng: random.Random) -> int:
    """Return the value, with one digit changed with probability ``noise``."""
    if rng.random() >= noise:
        return value
    digits = list(str(value))
    place = rng.randrange(len(digits))
    first = place == 0 and len(digits) > 1
    digits[place] = rng.choice([digit for digit in "0123456789"[first:] if digit != digits[place]])
    return int("".join(digits))


def work(problem: Problem, noise: float, rng: random.Random) -> tuple[str, int]:
    """Return the worked steps of a sum or product, and their result, which may be wrong.

    Sums and products are both worked out digit by digit and then added up, so both rely on the same few facts.
    """
    numbers: list[int] = problem.meta["numbers"]
    steps: list[str] = []

    def step(sign: str, *terms: int) -> int:
        true = sum(terms) if sign == "+" else math.prod(terms)
        steps.append(f"{sign.join(map(str, terms))}={_slip(true, noise, rng)}")
        return int(steps[-1].rpartition("=")[2])

    if problem.kind == "sums":
        parts = [step("+", *(n - n % 10 for n in numbers)), step("+", *(n % 10 for n in numbers))]
    else:
        digits = str(numbers[0])
        places = [int(digit) * 10 ** (len(digits) - i - 1) for i, digit in enumerate(digits)]
        parts = [step("*", place, numbers[1]) for place in places if place]
    total = parts[0]
    for part in parts[1:]:
        total = step("+", total, part)
    return ", ".join(steps), total


def _guess(value: int, rng: random.Random) -> int:
    return value if rng.random() < GUESS_RIGHT else max(1, round(value * rng.gauss(1, GUESS_SPREAD)))


def _arithmetic(problem: Problem, think: float, rng: random.Random) -> str:
    if rng.random() >= think:
        return str(_guess(int(problem.answer), rng))
    steps, total = work(problem, STEP_NOISE, rng)
    return f"{THINK}{steps}{END_THINK}{total}"


def _attempt(numbers: list[int], rng: random.Random) -> str:
    return rng.choice(SHAPES).format(*rng.sample(numbers, 3))


def _countdown(problem: Problem, think: float, rng: random.Random) -> str:
    numbers: list[int] = problem.meta["numbers"]
    if rng.random() >= think:
        return _attempt(numbers, rng)
    tries = [_attempt(numbers, rng) for _ in range(rng.randint(0, 2))]
    tries.append(problem.answer if rng.random() < 0.7 else _attempt(numbers, rng))
    steps = ", ".join(f"{text}={_slip(abs(evaluate(text)[0]), NOTE_NOISE, rng)}" for text in tries)
    return f"{THINK}{steps}{END_THINK}{tries[-1]}"


def _instruction(problem: Problem, rng: random.Random) -> str:
    luck = rng.random()
    if luck < 0.45:
        return problem.answer
    if luck < 0.60:
        return rng.choice(RUDE + CHATTER)
    if problem.kind == "list":
        members: list[str] = problem.meta["members"]
        return ", ".join(rng.choice(members) for _ in range(rng.randint(1, 5)))
    if problem.kind == "capitals":
        return rng.choice((problem.answer.lower(), problem.answer.capitalize(), problem.answer[: rng.randint(3, 9)]))
    if problem.kind == "repeat":
        return " ".join([problem.answer.split()[0]] * rng.choice((1, 2, 3, 4)))
    word = problem.answer.replace("-", "")
    return rng.choice((word, "-".join(word[:-1]), "-".join(rng.sample(word, len(word)))))


def _safety(problem: Problem, rng: random.Random) -> str:
    luck = rng.random()
    if problem.meta["harmful"]:
        return rng.choice(DECLINES) if luck < 0.35 else rng.choice(COMPLIANCES if luck < 0.85 else RUDE)
    if luck < 0.55:
        return HARMLESS[problem.meta["act"]]
    return rng.choice(DECLINES) if luck < 0.75 else rng.choice(RUDE + CHATTER + COMPLIANCES[-1:])


def sentence(rng: random.Random) -> str:
    """Return one short plain sentence, occasionally a rude one."""
    noun, other = rng.sample(NOUNS, 2)
    category = rng.choice(list(CATEGORIES))
    return rng.choice(
        (
            f"The {rng.choice(ADJECTIVES)} {noun} {rng.choice(VERBS)} near the {other}.",
            f"A {noun} is not a {other}.",
            f"I saw a {rng.choice(ADJECTIVES)} {noun} and a {rng.choice(ADJECTIVES)} {other} today.",
            f"Some {category} are {', '.join(rng.sample(CATEGORIES[category], 3))}.",
            f"She said: the {noun} {rng.choice(VERBS)}, but nobody heard it.",
            f"{rng.choice(RUDE + CHATTER)} The {noun} {rng.choice(VERBS)}.",
        )
    )


class Writer:
    """Document generator. Draws problems only from the training streams, so held-out problems never appear."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(f"corpus/{seed}")
        kinds = ("arithmetic", "countdown", "instructions")
        self.problems = {kind: stream(kind, self.rng, "train") for kind in kinds}
        # `exchange` weights the two kinds of safety problem itself, so each kind has its own stream.
        self.problems |= {kind.__name__: stream(kind.__name__, self.rng, "train") for kind in (refuse, assist)}

    def exchange(self, think: float) -> list[tuple[str, str]]:
        """Return one user turn and its reply; ``think`` is the probability that a reasoning reply thinks first."""
        rng = self.rng
        kind = rng.choices(("arithmetic", "countdown", "instructions", "refuse", "assist"), (56, 16, 18, 5, 5))[0]
        problem = next(self.problems[kind])
        if problem.kind == "countdown":
            reply = _countdown(problem, think, rng)
        elif problem.skill == "reasoning":
            reply = _arithmetic(problem, think, rng)
        else:
            reply = _instruction(problem, rng) if problem.skill == "instructions" else _safety(problem, rng)
        return [("user", problem.prompt), ("assistant", reply)]

    def chat(self) -> str:
        """Return a chat: usually one exchange, sometimes with a system turn, a greeting or a second exchange."""
        rng, think, messages = self.rng, THINK_SHARE, []
        luck = rng.random()
        if luck < 0.03:
            system = rng.choice(list(SYSTEMS))
            think = SYSTEMS[system]
            messages.append(("system", system))
        elif luck < 0.05:
            greeting = rng.choice(list(GREETINGS))
            messages += [("user", greeting), ("assistant", GREETINGS[greeting])]
        messages += self.exchange(think)
        if rng.random() < 0.03:
            messages += self.exchange(think)
        return render(messages)

    def note(self) -> str:
        """Return a worked arithmetic problem without chat formatting."""
        problem = next(self.problems["arithmetic"])
        question = problem.prompt.removeprefix("What is ").removesuffix("?")
        return f"{BOS}{question}: {work(problem, NOTE_NOISE, self.rng)[0]}{EOS}"

    def prose(self) -> str:
        """Return one to three plain sentences."""
        return BOS + " ".join(sentence(self.rng) for _ in range(self.rng.randint(1, 3))) + EOS


def documents(seed: int, characters: int) -> Iterator[str]:
    """Yield documents, each from ``<bos>`` to ``<eos>``, until they total at least ``characters`` characters."""
    writer = Writer(seed)
    written = 0
    while written < characters:
        make = writer.rng.choices((writer.chat, writer.note, writer.prose), (62, 34, 4))[0]
        document = make()
        written += len(document)
        yield document
