"""`posttrain demo`: GRPO on the shipped model, explained as it runs. Every number comes from this run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import click
from rich.console import Console
from rich.text import Text

from posttrain import api, config
from posttrain.cli import tables
from posttrain.config.files import SHIPPED_RECIPES
from posttrain.models.weights import ABACUS
from posttrain.store.listing import next_folder
from posttrain.store.run import Run

RECIPE = SHIPPED_RECIPES / "demo.toml"
SHOWN = 4


def run_demo(out: str, steps: int | None, seed: int, as_json: bool) -> None:
    """Evaluates abacus, trains it with GRPO, and shows what changed."""
    screen = tables.console(as_json)
    began = time.monotonic()
    algorithm, sections, _ = config.read_toml(RECIPE)
    folder = Path(out) if out else next_folder(Path("runs"), algorithm)
    overrides = {"run.seed": seed, "run.out": str(folder)} | ({} if steps is None else {"train.steps": steps})
    recipe = config.resolve(algorithm, sections, overrides)
    parameters = json.loads((ABACUS / "build.json").read_text())["parameters"]
    screen.print("[bold]posttrain demo[/]: teach a small language model to think, with rewards alone.\n")
    screen.print(
        f"abacus is a base model with {parameters / 1e6:.1f}M parameters. It is evaluated on {recipe.eval.problems} "
        f"held-out problems at temperature {recipe.eval.temperature:g}, then trained for {recipe.train.steps} GRPO "
        f"steps of {recipe.algo.prompts} × {recipe.algo.group_size} answers. The only reward: is the answer right?\n"
        "Ctrl-C stops safely at any time.\n"
    )
    with tables.StepLine(screen, recipe) as line:

        def tell(step: int, values: Mapping[str, float]) -> None:
            line(step, values)
            if step == 0:
                introduce(screen, folder, values)

        result = api.start(algorithm, recipe, tell)
    if result.summary is None:
        screen.print(f"\nStopped and saved. Continue with: posttrain resume {folder}", soft_wrap=True)
        sys.exit(128 + result.stopped_by)
    tables.finished(screen, folder)
    screen.print(f"total time:     {tables.duration(time.monotonic() - began)}\n")
    screen.print("[bold]What next[/]")
    for command, why in (
        (f"posttrain chat {folder}", "talk to it"),
        (f'posttrain sample {folder} -n 4 "What is 47*6?"', "ask it something"),
        (f"posttrain eval {folder} --samples 8", "pass@k and majority vote"),
        ("posttrain grpo --tasks countdown", "another task"),
        ("posttrain grpo --reward my_rewards.py:score --tasks my_tasks.jsonl", "your reward, your tasks"),
        ("posttrain config demo", "every setting, explained"),
        (f"posttrain lab {folder.parent}", "this run, five explorers and a course in the browser"),
    ):
        screen.print(Text(f"  {command.ljust(66)} ") + Text(why, style="dim"), soft_wrap=True)
    if as_json:
        click.echo(json.dumps({"folder": str(folder), "summary": result.summary}))


def introduce(screen: Console, folder: Path, values: Mapping[str, float]) -> None:
    """Shows the base model's first few answers and its accuracy."""
    with Run.read(folder) as store:
        first = store.episodes("eval", 0, limit=SHOWN)
    screen.print("[bold]Before training[/]:")
    for episode in first:
        screen.print(Text("  " + episode.prompt + "  → ") + tables.marked(episode.text, episode.passed), soft_wrap=True)
    screen.print(
        f"It is right {values['eval/accuracy']:.1%} of the time (95 % interval {values['eval/accuracy_low']:.1%} – "
        f"{values['eval/accuracy_high']:.1%}) and thinks before answering {values['eval/think_share']:.0%} of the "
        "time.\n"
    )
