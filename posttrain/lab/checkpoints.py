"""The models that a folder gives: the one that ships, what finished runs exported, what a pipeline's stages made.

A model's name is the address of its run (see folders.py), `abacus` for the one that ships, and is looked up among
those that are there. An opened model is shared by everything in the lab: who wants to train one copies it first.
Nothing here imports torch before the first model is opened.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from posttrain.lab.folders import SEPARATOR, Place
from posttrain.store.pipeline import read_record
from posttrain.store.run import Run
from posttrain.types import ConfigError, Message, PosttrainError, ResumeError, SamplingParams

if TYPE_CHECKING:
    from posttrain.data.chat import ChatFormat
    from posttrain.models.load import Policy
    from posttrain.rollout.generator import Generator

SHIPPED = "abacus"
FOLDER = Path(__file__).parents[1] / "models" / SHIPPED
SCORER = "scalar_head.safetensors"
"""In the folder of a model that gives scores and so cannot answer (models/heads.py)."""
THOUGHT = "<think>"
AT_ONCE = 4
"""Models that are kept open; one that was not used for longest makes room."""


class _Stopped(Exception):
    """Ends the writing of an answer."""


@dataclass(frozen=True)
class Reply:
    """How an answer ended: at its `stop` token, at the most tokens it may have (`length`), or because it was
    `stopped`. Tokens of what was read and of what was written, the stop token included."""

    stop: str
    read: int
    written: int


@dataclass
class Opened:
    """A model that is open. `policy` holds model and tokenizer; `chat` is `plain` where the tokenizer has no template,
    and then a model reads a message alone and not the conversation."""

    name: str
    policy: Policy
    chat: ChatFormat
    _idle: list[Generator] = field(default_factory=lambda: [])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def format(self) -> str:
        return self.chat.format

    @property
    def context(self) -> int:
        """Tokens that it reads and writes in all; 0 where it names no bound."""
        return int(getattr(self.policy.config, "max_position_embeddings", 0) or 0)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.policy.model.parameters())

    @contextmanager
    def generator(self) -> Iterator[Generator]:
        """A generator of one answer at a time, which nobody else uses until the block ends."""
        from posttrain.rollout.engine import EmbeddedGenerator

        with self._lock:
            generator = self._idle.pop() if self._idle else None
        generator = generator or EmbeddedGenerator(self.policy, slots=1)
        yield generator  # one that an error interrupted is not kept
        with self._lock:
            self._idle.append(generator)

    def reply(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        seed: int,
        write: Callable[[str, int], None],
        stopped: Callable[[], bool],
    ) -> Reply:
        """Answers a conversation. `write` hears pieces of text and how many tokens made each; `stopped` is asked at
        every token. With the same seed it is the answer of `posttrain chat`.

        The answer ends where the context does. Raises ConfigError where the conversation alone is longer.
        """
        from posttrain.cli.chat import Stream, text_of
        from posttrain.rollout.generator import Request, attempt_seed

        read = messages if self.chat.format == "chat" else messages[-1:]
        prompt = self.chat.prompt_tokens(read)
        room = self.context - len(prompt) if self.context else params.max_tokens
        if room < 1:
            raise ConfigError(
                f"this conversation is {len(prompt)} tokens long, and {self.name} reads and writes {self.context} at "
                "most. Begin a new conversation, or say less."
            )
        heard = 0  # tokens that `write` was told of

        def tell(text: str) -> None:
            nonlocal heard
            write(text, len(stream.tokens) - heard)
            heard = len(stream.tokens)

        def add(request: int, index: int, token: int) -> None:
            stream.add(request, index, token)
            if stopped():
                raise _Stopped

        stream = Stream(self.policy, tell)
        if self._begins_in_thought(prompt):
            write(THOUGHT, 0)
        own = attempt_seed(seed, "chat", len(messages), messages[-1].content, 0)
        with self.generator() as generator:
            try:
                request = Request(prompt, (own,))
                shortened = replace(params, max_tokens=min(params.max_tokens, room))
                ((done,),) = generator.generate([request], shortened, on_token=add)
            except _Stopped:
                return Reply("stopped", len(prompt), len(stream.tokens))
        text = text_of(self.policy, done)
        rest = text[len(stream.written) :] if text.startswith(stream.written) else ""
        write(rest, len(stream.tokens) - heard)
        return Reply(done.stop, len(prompt), len(done.tokens))

    def _begins_in_thought(self, prompt: np.ndarray) -> bool:
        """Whether the template itself opened the thought that the model goes on with."""
        return self.policy.tokenizer.decode(prompt[-8:]).rstrip().endswith(THOUGHT)


@dataclass
class _Entry:
    opened: Opened | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_entries: OrderedDict[tuple[Path, int], _Entry] = OrderedDict()
_lock = threading.Lock()
_warming = threading.Lock()


def warm() -> None:
    """Imports what a model needs, which takes seconds the first time. Two threads that import the same modules from
    both ends can see unfinished ones, so one does it and the others wait."""
    with _warming:
        pass


def models(place: Place) -> dict[str, Path]:
    """Name → folder of every model that can answer. A run that is itself called abacus is `abacus~` here."""
    found = {SHIPPED: FOLDER}
    for name, run in place.runs().items():
        if _can_answer(run / "model"):
            found[f"{name}{SEPARATOR}" if name == SHIPPED else name] = run / "model"
    for name, pipeline in place.pipelines().items():
        for path in sorted(pipeline.iterdir()):
            if _can_answer(path / "model"):
                found[f"{name}{SEPARATOR}{path.name}"] = path / "model"
    return found


def find_model(place: Place, name: str) -> Path:
    """The folder of a model. Raises ResumeError where there is none of that name."""
    found = models(place)
    if name not in found:
        raise ResumeError(f"there is no model named {name!r} in {place.root}. Choose one of those that the page lists.")
    return found[name]


def list_models(place: Place) -> list[dict[str, str]]:
    """Every model's name and what to call it, the one that ships first, then by pipeline and run."""
    stages = {f"{name}{SEPARATOR}{folder}": f"{name}: {stage}" for name, folder, stage in _stages(place)}
    folders = {folder: name for name, folder in models(place).items()}  # a stage's run may go by two names
    labels = {name: stages.get(name, name) for name in folders.values()}
    labels[SHIPPED] = f"{SHIPPED} (ships with posttrain)"
    rows = [{"name": name, "label": label} for name, label in labels.items()]
    return rows[:1] + sorted(rows[1:], key=lambda row: row["label"])


def open_model(place: Place, name: str) -> Opened:
    """A model, read from its files once while it is in use. Takes seconds the first time.

    Raises ResumeError for an unknown name, ConfigError and TemplateError for files that make no model.
    """
    folder = find_model(place, name)
    warm()
    key = (folder.resolve(), (folder / "config.json").stat().st_mtime_ns)
    with _lock:
        entry = _entries.setdefault(key, _Entry())
        _entries.move_to_end(key)
        while len(_entries) > AT_ONCE:
            _entries.popitem(last=False)  # whoever answers with it goes on
    with entry.lock:
        if entry.opened is None:
            entry.opened = _open(folder, name)
        return entry.opened


def describe_model(place: Place, name: str) -> dict[str, Any]:
    """What a page says about a model, which is opened for that."""
    opened = open_model(place, name)
    about = {"name": name, "context": opened.context, "parameters": opened.parameters, "format": opened.format}
    return {**about, "world": _world(find_model(place, name).parent)}


def _open(folder: Path, name: str) -> Opened:
    from posttrain.config import ModelConfig
    from posttrain.models.load import load_policy
    from posttrain.rollout.build import speak
    from posttrain.train import device as machine

    policy = load_policy(ModelConfig(path=str(folder)), machine.device("auto"))
    form = "chat" if policy.tokenizer.chat_template else "plain"
    return Opened(name, policy, speak(policy, form))


def _can_answer(folder: Path) -> bool:
    """Whether a model was exported whole, its tokenizer last, and is none that only gives scores."""
    return (
        all((folder / name).is_file() for name in ("config.json", "tokenizer.json")) and not (folder / SCORER).exists()
    )


def _stages(place: Place) -> list[tuple[str, str, str]]:
    """(pipeline, folder, stage) of every pipeline's newest stages; a damaged record has none."""
    found: list[tuple[str, str, str]] = []
    for name, folder in place.pipelines().items():
        try:
            stages = read_record(folder)["stages"]
            found += [(name, str(stage["folder"]), str(stage["name"])) for stage in stages]
        except (ResumeError, KeyError, TypeError):
            continue
    return found


def _world(run: Path) -> str:
    """The environment that a run trained in, which a chat does not play; empty for most."""
    try:
        with Run.read(run) as store:
            return str(store.header.get("recipe", {}).get("env", {}).get("name", ""))
    except (PosttrainError, OSError, ValueError):
        return ""
