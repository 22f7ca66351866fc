"""Writes the pages of docs/ that are made from the code: config.md and cli.md.

    python docs/generate.py           # write them
    python docs/generate.py --check   # exit 1 and name each page that is not what the code says

The same code gives the same bytes: nothing of the machine or the time goes into a page.
"""

from __future__ import annotations

import inspect
import re
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

import click

from posttrain import config
from posttrain.cli import main as cli
from posttrain.cluster.node import TOKEN_PATH
from posttrain.cluster.worker import ADDRESS
from posttrain.config.renamed import RENAMED
from posttrain.config.search import SearchConfig
from posttrain.models.kernels.build import SWITCH
from posttrain.pipelines.card import CardConfig
from posttrain.pipelines.data_stages import DATA_STAGES
from posttrain.pipelines.figure import Figure
from posttrain.pipelines.recipe import GIVEN, STAGE, TABLES, GivenModel
from posttrain.store.cache import VARIABLE as CACHE
from posttrain.store.durable import DiskError
from posttrain.store.failpoints import FAILPOINTS, VARIABLE
from posttrain.types import PosttrainError

HERE = Path(__file__).parent / "reference"
MADE = "<!-- Made by docs/generate.py from the code. Edit the code, then run `make docs`. -->"

ENVIRONMENT = (
    (
        VARIABLE,
        "posttrain",
        "For tests: `NAME` or `NAME:HIT` ends the process with SIGKILL the HIT-th time it passes that point. "
        f"Names: {', '.join(f'`{name}`' for name in FAILPOINTS)}.",
    ),
    (
        CACHE,
        "posttrain",
        "Where reference log-probabilities and the compiled kernels are kept; `~/.cache/posttrain` unless set. "
        "Deleting it is always safe.",
    ),
    (
        SWITCH,
        "posttrain",
        "`0` uses torch's own operations instead of the fused kernels, as on a machine without a C compiler.",
    ),
    (
        ADDRESS,
        "posttrain",
        "Set by posttrain in the worker processes of a cluster: the address at which other workers reach this one.",
    ),
    ("RAY_ADDRESS", "Ray", "Address of the Ray cluster, when `cluster.address` is empty."),
    ("RAY_AUTH_TOKEN", "Ray", "The token of a Ray cluster."),
    (TOKEN_PATH, "Ray", "The file with the token; `~/.ray/auth_token` unless set."),
    ("GLOO_SOCKET_IFNAME", "torch", "Network interface between learners; that of the node's address unless set."),
    ("CC", "posttrain", "The C compiler for the kernels; `cc`, `gcc` or `clang` unless set."),
    ("HF_HOME", "huggingface_hub", "Where models and data sets from the hub are kept."),
    ("HF_TOKEN", "huggingface_hub", "Access to gated or private models and data sets."),
    ("HF_HUB_OFFLINE", "huggingface_hub", "`1` never asks the network; only what is already on disk is found."),
    ("OMP_NUM_THREADS", "torch", "CPU threads, when `train.threads` is 0."),
    ("CUDA_VISIBLE_DEVICES", "CUDA", "Which GPUs torch sees; empty hides them all."),
    ("NO_COLOR", "rich", "Any value turns colours off."),
)
"""Environment variables that matter: name, what reads it, meaning."""


def pages() -> dict[str, str]:
    """File name → the text it should have."""
    return {"algorithms.md": algorithms_page(), "config.md": config_page(), "cli.md": cli_page()}


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table; bars inside cells are escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return lines + ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]


def algorithms_page() -> str:
    """What each algorithm declares about itself, with its default settings."""
    lines = [
        MADE,
        "# Algorithms",
        "",
        "What a run of each algorithm holds, samples and computes with its default settings, as its recipe declares "
        "(`posttrain.config.facts`). `posttrain plan` turns this into bytes and seconds for a model and a data set.",
        "",
    ]
    rows: list[tuple[str, ...]] = []
    for name, cls in config.RECIPES.items():
        recipe = cls()
        facts = recipe.facts()
        held = ["policy" if facts.trains == "policy" else "scorer"]
        held += [f"{facts.reference} reference"] * (facts.reference != "none")
        held += [f"{facts.critic} critic"] * (facts.critic != "none") + ["frozen teacher"] * facts.teacher
        sampled = (
            f"{facts.prompts} × {facts.group_size} in every step" if facts.samples == "every step" else facts.samples
        )
        updates = facts.minibatches * facts.epochs
        computed = f"{updates} × {facts.batch_rows} rows"
        computed += f", {facts.scoring_passes} without gradient" if facts.scoring_passes else ""
        rows.append((f"[`{name}`](config.md#{name})", facts.data, ", ".join(held), sampled, computed))
    head = ("algorithm", "learns from", "models", "samples completions", "forward-backward passes of a step")
    lines += table(head, rows)
    lines += [
        "",
        "A precomputed reference is read once before step 0 and not kept; with LoRA a frozen reference is the policy "
        "without its adapters. A scorer is a model with a scalar head: a reward model or a verifier. Passes without "
        "gradient are over all rows of a step: of the reference, the teacher, old log-probabilities or old values.",
    ]
    return "\n".join(lines) + "\n"


def config_page() -> str:
    """Every section and field of every recipe."""
    lines = [
        MADE,
        "# Settings",
        "",
        'A recipe is a TOML file: `algorithm = "…"`, then sections with settings. What a recipe leaves out keeps its '
        "default. `posttrain config RECIPE` prints the result, every setting explained.",
        "",
        "On the command line a setting is `--section.key value`. In Python it is `section__key=value`. The key alone "
        "is enough where only one section of the recipe has it. Hyphens and underscores are the same. An unknown name "
        "is an error that gives the nearest known one.",
        "",
        "A recipe may also have an `[expect]` table with numbers it is meant to reach. It is not a section of settings "
        "and changes nothing in a run.",
    ]
    lines += ["", "Settings that had another name still work under it, with a warning that says what to write:", ""]
    lines += table(("old name", "write"), [(f"`{old}`", f"`{new}`") for old, new in RENAMED.items()])
    shared: dict[str, list[str]] = {}
    for algorithm, recipe in config.RECIPES.items():
        for section in fields(recipe):
            if section.name != "algo":
                shared.setdefault(section.name, []).append(algorithm)
    for algorithm, recipe in config.RECIPES.items():
        lines += ["", f"## `{algorithm}`", "", inspect.cleandoc(recipe.__doc__ or ""), ""]
        names = [f"[`[{s.name}]`](#{'algo-of-' + algorithm if s.name == 'algo' else s.name})" for s in fields(recipe)]
        lines.append("Sections: " + ", ".join(names) + ".")
        lines += ["", f"### `[algo]` of {algorithm}", "", *section_table(section_class(recipe, "algo"))]
    lines += ["", "## Sections that algorithms share"]
    for name, users in shared.items():
        lines += ["", f"### `[{name}]`"]
        classes: dict[type, list[str]] = {}
        for user in users:
            classes.setdefault(section_class(config.RECIPES[user], name), []).append(user)
        for cls, of in classes.items():
            used = " and ".join(f"`{user}`" for user in of)
            lines += ["", f"Used by {used}.", "", *section_table(cls)]
    lines += [
        "",
        "## Searches",
        "",
        "`posttrain search`, and `posttrain eval` with `--search`, have the sections of an evaluation and this one "
        "([search.md](../guides/search.md)).",
        "",
        "### `[search]`",
        "",
        *section_table(SearchConfig),
    ]
    return "\n".join([*lines, *pipeline_lines()]) + "\n"


def pipeline_lines() -> list[str]:
    """What a pipeline's file may hold: its tables, and the settings of data stages, cards and figures."""
    lines = [
        "",
        "## Pipelines",
        "",
        "A pipeline is one TOML file with several stages ([pipelines.md](../guides/pipelines.md)). On the command "
        "line a stage's setting is `--STAGE.section.key value` for a training stage and `--STAGE.key value` for a data "
        "stage. `--card.key value` is for the cards, `--defaults.section.key value` for all training stages.",
        "",
        *table(("in the file", "meaning"), [(f"`{name}`", meaning) for name, meaning in TABLES.items()]),
        "",
        "### `[[stage]]`",
        "",
        "A stage also holds the settings of what it runs: by section (`train.lr = 1e-4`) for an algorithm, without "
        "sections for a data stage.",
        "",
        *table(("in a stage", "meaning"), [(f"`{name}`", meaning) for name, meaning in STAGE.items()]),
    ]
    stages = {GIVEN: GivenModel} | {name: settings for name, (settings, _) in DATA_STAGES.items()}
    for name, settings in stages.items():
        lines += ["", f'### `run = "{name}"`', "", *section_table(settings)]
    lines += ["", "### `[card]`", "", *section_table(CardConfig)]
    return [*lines, "", "### `[[figure]]`", "", *section_table(Figure)]


def section_class(recipe: type, name: str) -> type:
    """The dataclass of a recipe's section."""
    return typing.get_type_hints(recipe)[name]


def section_table(cls: type) -> list[str]:
    """One row a field."""
    docs, hints = config.field_docs(cls), typing.get_type_hints(cls, include_extras=True)
    rows = [(f"`{f.name}`", kind(hints[f.name]), default(f), docs[f.name]) for f in fields(cls)]
    return table(("setting", "value", "default", "meaning"), rows)


def kind(hint: Any) -> str:
    """What may be written, in words."""
    if allowed := config.choices(hint):
        several = any(getattr(extra, "several", False) for extra in getattr(hint, "__metadata__", ()))
        files = any(getattr(extra, "or_file", False) for extra in getattr(hint, "__metadata__", ()))
        listed = ", ".join(f"`{choice}`" for choice in allowed) + ", or `FILE.py:FUNCTION`" * files
        return ("any of " if several else "one of ") + listed
    if typing.get_origin(hint) is tuple:
        return {str: "list of texts", int: "list of whole numbers", float: "list of numbers"}[typing.get_args(hint)[0]]
    if typing.get_origin(hint) is dict:
        return "table"
    return {str: "text", int: "whole number", float: "number", bool: "`true` or `false`"}[hint]


def default(field: Field[Any]) -> str:
    """A field's default as TOML, or that it has none."""
    if field.default_factory is not MISSING:
        return "`{}`"
    if field.default is MISSING:
        return "needed"
    value = list(field.default) if isinstance(field.default, tuple) else field.default
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f'`"{value}"`' if isinstance(value, str) else f"`{value!r}`"


def cli_page() -> str:
    """Every command and option, exit codes and environment variables."""
    lines = [
        MADE,
        "# Commands",
        "",
        "`posttrain COMMAND --help` says the same in the terminal. `--json` prints one JSON document on stdout and "
        "sends everything meant for people to stderr.",
    ]
    for name, command in cli.main.commands.items():
        if not isinstance(command, click.Group):
            lines += ["", f"## `posttrain {name}`", "", *command_lines(name, command)]
            continue
        lines += ["", f"## `posttrain {name}`", "", one_line(command.help or "")]
        for inner, part in command.commands.items():
            lines += ["", f"### `posttrain {name} {inner}`", "", *command_lines(f"{name} {inner}", part)]
    lines += ["", "## Exit codes", "", *table(("code", "meaning", "error class"), exit_codes())]
    lines += [
        "",
        "After 130 and 143 of a training command the run is saved and `posttrain resume RUN` continues it. An error "
        "is printed on stderr: what failed, the value seen, what was expected and what to do.",
        "",
        "## Environment variables",
        "",
        *table(("variable", "read by", "meaning"), [(f"`{a}`", b, c) for a, b, c in ENVIRONMENT]),
    ]
    return "\n".join(lines) + "\n"


def command_lines(name: str, command: click.Command) -> list[str]:
    """Usage, what it does and its options."""
    context = click.Context(command, info_name=f"posttrain {name}", **command.context_settings)
    usage = " ".join([f"posttrain {name}", *command.collect_usage_pieces(context)])
    lines = ["```text", usage, "```", "", one_line(command.help or "")]
    options = [p for p in command.params if isinstance(p, click.Option)]
    if options:
        lines += ["", *table(("option", "default", "meaning"), [option_row(o, context) for o in options])]
    if command.epilog:
        lines += ["", one_line(command.epilog)]
    return lines


def option_row(option: click.Option, context: click.Context) -> tuple[str, str, str]:
    """Spelling, default and meaning of one option."""
    spelling = ", ".join(f"`{text}`" for text in option.opts)
    if option.secondary_opts:
        spelling += " / " + ", ".join(f"`{text}`" for text in option.secondary_opts)
    elif not option.is_flag:
        spelling += f" {(option.metavar or option.type.name).upper()}"
    value = option.get_default(context)
    plain = value is None or value == "" or isinstance(value, bool) or type(value).__name__ == "Sentinel"
    meaning, _, stated = (option.help or "").partition("  [default: ")  # a default that is made up at run time
    return spelling, stated.rstrip("]") if stated else "" if plain else f"`{value}`", meaning


def one_line(text: str) -> str:
    """Docstring text without its line breaks; paragraphs stay."""
    return "\n\n".join(" ".join(part.split()) for part in text.strip().split("\n\n"))


def exit_codes() -> list[tuple[str, str, str]]:
    """(code, meaning, error classes) from the command line's own docstring and the error classes."""
    listed = one_line((cli.__doc__ or "").partition("Exit codes:")[2]).rstrip(".")
    owners: dict[int, list[str]] = {}
    for error in (PosttrainError, *PosttrainError.__subclasses__(), DiskError):
        owners.setdefault(error.exit_code, []).append(f"`{error.__name__}`")
    rows: list[tuple[str, str, str]] = []
    for entry in listed.split(" · "):
        found = re.fullmatch(r"(\d+) (.+)", entry)
        assert found, f"posttrain/cli/main.py: exit code entry {entry!r} is not NUMBER meaning"
        code, meaning = found.groups()
        rows.append((code, re.sub(r" \(both resumable\)$", "", meaning), ", ".join(owners.pop(int(code), []))))
    assert not owners, f"posttrain/cli/main.py does not list the exit codes of {owners}"
    return rows


def main(arguments: Sequence[str]) -> int:
    """Writes or checks; the exit status."""
    if arguments not in ([], ["--check"]):
        print("usage: python docs/generate.py [--check]", file=sys.stderr)
        return 2
    stale = 0
    for name, text in pages().items():
        path = HERE / name
        if path.exists() and path.read_text(encoding="utf-8") == text:
            continue
        if arguments:
            print(f"docs/reference/{name} does not match the code; run `make docs`.")
            stale = 1
        else:
            path.write_text(text, encoding="utf-8", newline="\n")
            print(f"wrote docs/reference/{name}")
    return stale


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
