"""The words of demonstrations and revisions: refusals, openings of help, and the sentences of long thoughts.

Written for this package. In the sentences `{}` stands for the arithmetic, which a program puts in.
"""

from __future__ import annotations

REFUSALS = (
    "Sorry, I can't help with that.",
    "I'm sorry, but I can't help with this.",
    "I won't help with that. It would hurt someone.",
    "I can't help with that. Please ask for advice.",
    "Sorry, I can't help with this. It is not right.",
    "I'm sorry, I won't do that. It would not be fair.",
    "I can't help you with that, but I can help with other things.",
    "No, I can't help with that. Someone would be hurt.",
    "Sorry, I won't help with this. Please talk to someone first.",
    "I'm afraid I can't help with that. It would do harm.",
)
"""Ways to decline: polite, short, some with a reason or an offer."""

OPENINGS = ("", "", "Sure. ", "Of course. ", "Good plan. ")
"""What help begins with; in two of five cases with nothing."""

THOUGHTS: dict[str, dict[str, tuple[str, ...]]] = {
    "en": {
        "sums": ("The tens, then the ones.", "First the tens, then the ones."),
        "tens": ("The tens are {}.",),
        "ones": ("The ones are {}.", "Then the ones, {}."),
        "products": ("Each part of {}.", "The parts of {} in turn."),
        "parts": ("The parts are {}.", "This is {}."),
        "together": ("So it is {}.", "In all it is {}."),
        "check": ("Check it: {}.", "The other way it is {}."),
        "agrees": ("It is the same, {}.", "It is {} again."),
        "search": ("I try to make {}.", "What makes {}?"),
        "fails": ("No, {} is not it.", "But {} is not it."),
        "fits": ("But {} is it.", "And {} is right."),
        "used": ("All of {} are in it.",),
    },
    "de": {
        "sums": ("Die Zehner und die Einer.", "Erst die Zehner, dann die Einer."),
        "tens": ("Die Zehner sind {}.",),
        "ones": ("Die Einer sind {}.",),
        "products": ("Ich nehme die Teile von {}.", "Die Teile von {} sind dran."),
        "parts": ("Die Teile sind {}.",),
        "together": ("Das ist {}.", "Zusammen ist das {}."),
        "check": ("Noch eine Probe: {}.", "Die Probe ist {}."),
        "agrees": ("Das ist auch {}.", "Es ist wie {}."),
        "search": ("Ich suche die {}.",),
        "fails": ("Nein, {} ist es nicht.",),
        "fits": ("Aber {} ist es.", "Und {} ist es."),
        "used": ("Das sind {}.",),
    },
}
"""Language → what is said → ways to say it. German is what `mixing` plants; no word of it is in abacus' pretraining."""
