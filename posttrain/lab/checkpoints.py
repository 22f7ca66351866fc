"""Models of a folder: the bundled one, those exported by finished runs, and those of pipeline stages.

A model's name is the name of its run (see folders.py), or `abacus` for the bundled model, and is looked up among the
existing ones. An opened model is shared by the whole lab, so code that trains one copies it first. torch is imported
when the first model is opened.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from posttrain.lab.folders import SEPARATOR, Place
from posttrain.store.pipeline import read_record
from posttrain.store.run import Run
from posttrain.types import ConfigError, Json, Message, PosttrainError, ResumeError, SamplingParams

if TYPE_CHECKING:
    from posttrain.data.chat import ChatFormat
    from posttrain.models.load import Policy
    from posttrain.rollout.generator import Generator

SHIPPED = "abacus"
FOLDER = Path(__file__).parents[1] / "models" / SHIPPED
SCORER = "scalar_head.safetensors"
"""File that marks a model that only scores and so cannot answer (models/heads.py)."""
AT_ONCE = 4
"""Models kept open; the least recently used one is dropped."""


class _Stopped(Exception):
    """Stops generation."""


@dataclass(frozen=True)
class Reply:
    """Why an answer ended (`stop`: stop token, `length`: token limit, `stopped`: by the user), and the number of
    tokens read and written, stop token included."""

    stop: str
    read: int
    written: int


@dataclass
class Opened:
    """An opened model. `policy` holds model and tokenizer; `chat` is `plain` if the tokenizer has no chat template, in
    which case the model reads only the last message, not the conversation. `stop` are the stop strings of its run."""

    name: str
    policy: Policy
    chat: ChatFormat
    stop: tuple[str, ...] = ()
    _idle: list[Generator] = field(default_factory=lambda: [])
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def format(self) -> str:
        return self.chat.format

    @property
    def context(self) -> int:
        """Context length in tokens; 0 if the model states none."""
        return int(getattr(self.policy.config, "max_position_embeddings", 0) or 0)

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.policy.model.parameters())

    @contextmanager
    def generator(self) -> Iterator[Generator]:
        """A generator with one slot, for exclusive use until the block ends."""
        from posttrain.rollout.engines.embedded import EmbeddedGenerator

        with self._lock:
            generator = self._idle.pop() if self._idle else None
        generator = generator or EmbeddedGenerator(self.policy, slots=1)
        yield generator  # not kept after an error
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
        """Answers a conversation. `write` gets each piece of text with its number of tokens; `stopped` is called after
        every token. The same seed gives the same answer as `posttrain chat`.

        The answer ends at the context length. Raises ConfigError if the conversation alone is longer.
        """
        from posttrain.rollout.generator import Request, completion_seed
        from posttrain.rollout.text import Stream, text_of

        read = messages if self.chat.format == "chat" else messages[-1:]
        prompt = self.chat.prompt_tokens(read)
        room = self.context - len(prompt) if self.context else params.max_tokens
        if room < 1:
            raise ConfigError(
                f"this conversation has {len(prompt)} tokens, but the context of {self.name} is {self.context} tokens. "
                "Start a new conversation or shorten the message."
            )
        heard = 0  # tokens passed to `write` so far

        def tell(text: str) -> None:
            nonlocal heard
            write(text, len(stream.tokens) - heard)
            heard = len(stream.tokens)

        def add(request: int, index: int, token: int) -> None:
            stream.add(request, index, token)
            if stopped():
                raise _Stopped

        stream = Stream(self.policy, tell, self.stop)
        if opening := self.chat.opening(read):
            write(opening, 0)
        own = completion_seed(seed, "chat", len(messages), messages[-1].content, 0)
        with self.generator() as generator:
            try:
                request = Request(prompt, (own,))
                shortened = replace(params, max_tokens=min(params.max_tokens, room), stop=self.stop)
                ((done,),) = generator.generate([request], shortened, on_token=add)
            except _Stopped:
                return Reply("stopped", len(prompt), len(stream.tokens))
        text = text_of(self.policy, done)
        rest = text[len(stream.written) :] if text.startswith(stream.written) else ""
        write(rest, len(stream.tokens) - heard)
        return Reply(done.stop, len(prompt), len(done.tokens))


@dataclass
class _Entry:
    opened: Opened | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


_entries: OrderedDict[tuple[Path, int], _Entry] = OrderedDict()
_lock = threading.Lock()
_warming = threading.Lock()


def warm() -> None:
    """Makes imports happen in one thread at a time: two threads that import the same modules in opposite orders can see
    unfinished ones."""
    with _warming:
        pass


def models(place: Place) -> dict[str, Path]:
    """Name → folder of every model that can answer. A run called abacus is listed as `abacus~`."""
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
    """The folder of a model. Raises ResumeError if there is no model of that name."""
    found = models(place)
    if name not in found:
        raise ResumeError(f"there is no model named {name!r} in {place.root}. Choose one from the list.")
    return found[name]


def list_models(place: Place) -> list[dict[str, str]]:
    """Every model's name and label: the bundled model first, then by pipeline and run."""
    stages = {f"{name}{SEPARATOR}{folder}": f"{name}: {stage}" for name, folder, stage in _stages(place)}
    folders = {folder: name for name, folder in models(place).items()}  # a stage's run may have two names
    labels = {name: stages.get(name, name) for name in folders.values()}
    labels[SHIPPED] = f"{SHIPPED} (ships with posttrain)"
    rows = [{"name": name, "label": label} for name, label in labels.items()]
    return rows[:1] + sorted(rows[1:], key=lambda row: row["label"])


def open_model(place: Place, name: str) -> Opened:
    """Opens a model, or returns it if it is already open. Takes seconds the first time.

    Raises ResumeError for an unknown name, ConfigError or TemplateError if the files are not a valid model.
    """
    folder = find_model(place, name)
    warm()
    key = (folder.resolve(), (folder / "config.json").stat().st_mtime_ns)
    with _lock:
        entry = _entries.setdefault(key, _Entry())
        _entries.move_to_end(key)
        while len(_entries) > AT_ONCE:
            _entries.popitem(last=False)  # answers in progress keep their reference
    with entry.lock:
        if entry.opened is None:
            entry.opened = _open(folder, name)
        return entry.opened


def describe_model(place: Place, name: str) -> Json:
    """Opens a model and describes it for the page."""
    opened = open_model(place, name)
    about = {"name": name, "context": opened.context, "parameters": opened.parameters, "format": opened.format}
    return {**about, "world": _world(find_model(place, name).parent)}


def _open(folder: Path, name: str) -> Opened:
    from posttrain.config import ModelConfig
    from posttrain.models.load import chat_format_of, load_policy, stops_of
    from posttrain.train.device import resolve

    policy = load_policy(ModelConfig(path=str(folder)), resolve("auto"))
    form = "chat" if policy.tokenizer.chat_template else "plain"
    return Opened(name, policy, chat_format_of(policy, folder, form), stops_of(policy, folder))


def _can_answer(folder: Path) -> bool:
    """Whether the export is complete (the tokenizer is written last) and the model is not a scorer."""
    return (
        all((folder / name).is_file() for name in ("config.json", "tokenizer.json")) and not (folder / SCORER).exists()
    )


def _stages(place: Place) -> list[tuple[str, str, str]]:
    """(pipeline, folder, stage) of all pipelines' latest stages; damaged records are skipped."""
    found: list[tuple[str, str, str]] = []
    for name, folder in place.pipelines().items():
        try:
            stages = read_record(folder)["stages"]
            found += [(name, str(stage["folder"]), str(stage["name"])) for stage in stages]
        except (ResumeError, KeyError, TypeError):
            continue
    return found


def _world(run: Path) -> str:
    """The environment that a run trained in, which a chat does not run; empty for most runs."""
    try:
        with Run.read(run) as store:
            return str(store.header.get("recipe", {}).get("env", {}).get("name", ""))
    except (PosttrainError, OSError, ValueError):
        return ""
