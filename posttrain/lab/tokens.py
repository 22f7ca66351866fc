"""An episode's tokens as pieces of text, with their author and log-probability.

Only `tokenizer.json` is read, from the run's own model if it has one, else from the model it started from; no model is
loaded. Without a tokenizer the pieces are token ids.
"""

from __future__ import annotations

import threading
from functools import lru_cache
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from posttrain.lab.episodes import read_group, read_neighbours, read_values
from posttrain.store.run import EpisodeRow, Run
from posttrain.types import Json, JsonView, ResumeError

UNFINISHED = "\N{REPLACEMENT CHARACTER}"
SHIPPED = Path(__file__).parents[1] / "models"
_lock = threading.Lock()


def read_episode(folder: Path, kind: str, step: int, group: int, index: int) -> Json:
    """One episode for its page, with the other completions of its task. Raises ResumeError if it does not exist."""
    row = read_row(folder, kind, step, group, index)
    source = find_tokenizer(folder)
    texts = pieces(source, row.tokens) if source else [f"⟨{token}⟩" for token in row.tokens]
    tokens = [
        {"text": text, "id": int(token), "model": bool(own), "logp": float(f"{logp:.5g}") if own else None}
        for text, token, own, logp in zip(texts, row.tokens, row.loss_mask, row.logprobs, strict=True)
    ]
    shown = ("kind", "step", "group", "index", "task_id", "prompt", "text", "reward", "passed", "stop", "length")
    return {
        **{name: getattr(row, name) for name in (*shown, "error", "advantage")},
        "parts": [{"name": name, "value": value} for name, value in sorted(row.parts.items())],
        "tokens": tokens,
        "tokenizer": source is not None,
        "answers": read_group(folder, kind, step, group),
        **read_neighbours(folder, kind, step, group, index),
    }


def read_row(folder: Path, kind: str, step: int, group: int, index: int) -> EpisodeRow:
    """A stored episode. Raises ResumeError if it does not exist."""
    values = read_values(folder, kind, step, group, index)
    if values is None:
        raise ResumeError(f"{folder} contains no {kind} episode {group}.{index} of step {step}.")
    return EpisodeRow.from_values(values)


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer.json of a run's own model, or of the model it started from if that is on this machine."""
    with Run.read(folder) as run:
        places = [folder / "model", *start_folders(folder, run.header)]
    return next((path for place in places if (path := place / "tokenizer.json").is_file()), None)


def start_folders(folder: Path, header: JsonView) -> list[Path]:
    """Possible folders of the model that a run started from: the recipe's path, the package, or, if a pipeline's folder
    was moved or copied, the neighbouring stage."""
    start = str(header.get("recipe", {}).get("model", {}).get("path", ""))
    if not start:
        return []
    beside = folder.parent / Path(start).parent.name / "model"
    return [Path(start), Path(start) / "model", SHIPPED / start, *([beside] if Path(start).name == "model" else ())]


@lru_cache(maxsize=8)
def _load(path: Path, changed: float) -> Tokenizer:
    return Tokenizer.from_file(str(path))


def pieces(source: Path, tokens: np.ndarray) -> list[str]:
    """The text of each of the L tokens; joined, they give the whole text.

    A character made up of several tokens belongs to the last of them; the others are empty.
    """
    with _lock:
        tokenizer = _load(source, source.stat().st_mtime)
    known = tokenizer.get_vocab_size()
    ids = [int(token) for token in tokens]
    found: list[str] = []
    waiting: list[int] = []
    before = ""  # text of the last complete token: some tokenizers drop a space at the start of a text
    context: list[int] = []
    for number, token in enumerate(ids):
        if not 0 <= token < known:
            found.append(f"⟨{token}⟩")
            waiting, context, before = [], [], ""
            continue
        waiting.append(token)
        text = tokenizer.decode([*context, *waiting], skip_special_tokens=False)
        piece = text[len(before) :] if text.startswith(before) else tokenizer.decode(waiting, skip_special_tokens=False)
        last = number == len(ids) - 1
        if piece.endswith(UNFINISHED) and not last and len(waiting) < 4:
            found.append("")
            continue
        found.append(piece)
        context, waiting = waiting, []
        before = tokenizer.decode(context, skip_special_tokens=False)
    return found
