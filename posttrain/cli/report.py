"""`posttrain report`: a training run or pipeline as one HTML page.

Either may be unfinished; the page then shows what there is so far.
"""

from __future__ import annotations

import json
import math
import tempfile
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

from posttrain import config, rng
from posttrain.cli import tables
from posttrain.cli.html import Html, box, join, model_text, page, picture, put, table, tag
from posttrain.evaluation.diagnose import SEVERITY, diagnose_run
from posttrain.pipelines.card import LABELS
from posttrain.pipelines.figure import Figure, Finished, label
from posttrain.pipelines.figures import draw, read_figure
from posttrain.store import durable, workers
from posttrain.store.pipeline import is_pipeline, read_record
from posttrain.store.run import EpisodeRow, Run
from posttrain.types import ConfigError, Json, JsonView

PAGE = "report.html"
MAIN = (
    "reward", "accuracy", "eval/accuracy", "think_share", "length", "kl_episode", "kl", "entropy", "truncated", "nll",
    "eval/nll", "divergence", "preference_accuracy", "eval/preference_accuracy", "pair_accuracy", "eval/pair_accuracy",
    "step_accuracy", "eval/step_accuracy", "loss", "grad_norm",
)  # fmt: skip
"""Metrics whose curves a run's page shows, if the run has them."""
MOST_CURVES, SHOWN = 10, 3
MARKS = {"alarm": "✗ alarm", "warn": "! warn", "ok": "✓ ok", "no data": "no data"}


def write_report(folder: Path, out: Path | None = None) -> Path:
    """Writes the page of a run or pipeline folder to `out`, by default its `report.html`, and returns the path.

    Raises ResumeError if the folder holds neither, ConfigError if the page cannot be written.
    """
    path = out or folder / PAGE
    if not path.parent.is_dir():
        raise ConfigError(f"the report cannot be written to {path}: the folder {path.parent} does not exist.")
    made = pipeline_page(folder) if is_pipeline(folder) else run_page(folder)
    try:
        durable.publish_file(path, made)
    except OSError as error:
        raise ConfigError(f"the report cannot be written to {path}: {error.strerror or error}.") from None
    return path


# --- a run ----------------------------------------------------------------------------------------------------------


def run_page(folder: Path) -> str:
    """The page of a training run, finished or not."""
    with Run.read(folder) as run, tempfile.TemporaryDirectory() as drawings:
        about = f"{run.header.get('algorithm', '')} · {run.status()} · step {run.last_step() or 0}"
        seconds = sum(value for _, _, value in run.timings("seconds"))
        about += (
            f" · {tables.duration(seconds)} of training · started {run.header.get('created', 'at an unknown time')}"
        )
        sections = [
            ("Before and after", changes(run)),
            ("Curves", run_curves(run, Path(drawings))),
            ("Verdicts", verdicts(folder)),
            ("Samples", samples(run)),
            ("Held-out answers", held_out(run)),
            ("Settings", settings(run)),
            ("Processes", processes(folder)),
            ("Events", events(run)),
        ]
    return page(f"Run {folder.resolve().name}", tag("p", about), sections)


def changes(run: Run) -> Html:
    """Held-out metrics before training and at the last evaluation, with intervals."""
    before, after, last = evaluations(run)
    rows: list[list[str]] = []
    for name, text, form in tables.CHANGES:
        if name in before or name in after:
            rows.append([text, *(_measured(values, name, form) for values in (before, after))])
    if not rows:
        return Html()
    return table("Held-out metrics, with 95 % intervals where known", ["", "before", f"after step {last}"], rows)


def evaluations(run: Run) -> tuple[dict[str, float], dict[str, float], int]:
    """Held-out metrics of the first and last evaluation, and the step of the last."""
    steps = sorted({step for step, name, _ in run.metrics() if name.startswith("eval/")})
    if not steps:
        return {}, {}, 0
    return run.at(0), run.at(steps[-1]) if steps[-1] else {}, steps[-1]


def _measured(values: Mapping[str, float], name: str, form: str) -> str:
    if name not in values:
        return "–"
    low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
    span = "" if low is None or high is None else f" [{form.format(low)}, {form.format(high)}]"
    return form.format(values[name]) + span


def run_curves(run: Run, drawings: Path) -> Html:
    """The main metrics over the steps, one plot each."""
    known = [name for name in MAIN if any(math.isfinite(v) for v in run.curve(name)[1])]
    stage = Finished("", run.folder)  # one line needs no name
    made: list[Html] = []
    for i, name in enumerate(known[:MOST_CURVES]):
        figure = Figure("curves", f"curve-{i}", label(name)[0], metrics=(name,))
        numbers = draw(figure, [stage], drawings)
        made.append(
            tag("figure", picture(drawings / f"curve-{i}.svg", f"{label(name)[0]} over steps"), _values(numbers))
        )
    return tag("div", *made, class_="wide") if made else Html()


def verdicts(folder: Path) -> Html:
    """The verdicts of `posttrain doctor`, worst first."""
    found = sorted(diagnose_run(folder), key=lambda one: -SEVERITY.index(one.level))
    rows = [
        [one.name, MARKS[one.level], "" if one.since is None else str(one.since), one.evidence, one.advice]
        for one in found
    ]
    return table(
        "Checks of the run's curves and completions", ["check", "verdict", "since step", "evidence", "what to do"], rows
    )


def samples(run: Run) -> Html:
    """The best, the worst and some random completions of the latest step that stored any."""
    newest = run.episodes("train", limit=1, order="-step")
    if not newest:
        return Html()
    step = newest[0].step
    rows = run.episodes("train", step)
    picks = {
        "highest reward": _of_different_tasks(run.episodes("train", step, order="-reward")),
        "lowest reward": _of_different_tasks(run.episodes("train", step, order="reward")),
        "random": [rows[int(i)] for i in rng.permutation(len(rows), "report", step)[:SHOWN]],
    }
    made = [tag("p", f"Training completions of step {step}, {len(rows)} in total.")]
    for name, chosen in picks.items():
        made += [tag("h3", name.capitalize()), tag("div", *(answer(row) for row in chosen), class_="grid")]
    return join(*made)


def _of_different_tasks(rows: Sequence[EpisodeRow]) -> list[EpisodeRow]:
    """The first completions, at most one per task."""
    first: dict[int, EpisodeRow] = {}
    for row in rows:
        first.setdefault(row.group, row)
    return [*first.values()][:SHOWN]


def answer(row: EpisodeRow) -> Html:
    """One stored completion with its reward."""
    reward = "unscored" if row.reward is None else f"reward {row.reward:.3g}"
    parts = ", ".join(f"{name} {value:.3g}" for name, value in sorted(row.parts.items()))
    facts = f"{'✓ passed' if row.passed else '✗ not passed'} · {reward} · {row.length} tokens"
    facts += " · truncated" if row.stop == "length" else ""
    notes = [tag("div", text, class_="note") for text in (facts, parts, row.error or "") if text]
    return box(row.prompt, model_text(row.text), *notes)


def held_out(run: Run) -> Html:
    """The same held-out questions at the first and last evaluation."""
    last = run.episodes("eval", limit=1, order="-step")
    if not last or last[0].step == 0:
        return Html()
    found = tables.side_by_side(run.episodes("eval", 0), run.episodes("eval", last[0].step))
    rows = [[q, _marked(a, a_right), _marked(b, b_right)] for q, a, a_right, b, b_right in found]
    return table("The first held-out questions, whatever their result", ["question", "before", "after"], rows)


def _marked(text: str, right: bool) -> Html:
    return join("✓ " if right else "✗ ", tag("span", text, class_="text"))


def settings(run: Run) -> Html:
    """All settings of the run, those that differ from the algorithm's defaults first."""
    algorithm, recipe = str(run.header.get("algorithm", "")), run.header.get("recipe", {})
    default = config.as_dict(config.resolve(algorithm, {})) if algorithm in config.RECIPES else {}
    changed: list[list[str]] = []
    same: list[list[str]] = []
    for part, values in recipe.items():
        for name, value in values.items():
            usual = default.get(part, {}).get(name, "–")
            if value == usual:
                same.append([f"{part}.{name}", str(value)])
            else:
                changed.append([f"{part}.{name}", str(value), str(usual)])
    rest = tag("details", tag("summary", f"{len(same)} settings at their defaults"),
               table("Settings at their defaults", ["setting", "value"], same))  # fmt: skip
    return join(table("Settings that differ from their defaults", ["setting", "value", "default"], changed), rest)


def processes(folder: Path) -> Html:
    """Who worked for the run, where it had learners, samplers or judges of their own: what each did, and deaths."""
    found = workers.read(folder)
    if found is None:
        return Html()
    rows = [
        [row["name"], row["where"], row["state"], f"{row['done']:,} {workers.DONE[row['role']]}", row["reason"]]
        for row in found["workers"]
    ]
    lost = ", ".join(
        f"{role}: {dead} died, {anew} started anew" for role, (dead, anew) in workers.counts(found).items()
    )
    about = f"Backend {found['backend']}. {lost}."
    return join(tag("p", about), table("By start", ["process", "where", "state", "did", "ended because"], rows))


def events(run: Run) -> Html:
    """Events that the run logged about its data, its memory and errors."""
    rows = [[event.kind, str(event.step), event.level, event.message] for event in run.events()]
    return table("In order of step", ["kind", "step", "level", "message"], rows) if rows else Html()


# --- a pipeline -----------------------------------------------------------------------------------------------------


def pipeline_page(folder: Path) -> str:
    """The page of a pipeline, with the stages that have finished."""
    record = read_record(folder)
    stages = cast(list[Json], record["stages"])
    with tempfile.TemporaryDirectory() as drawings:
        sections = [
            ("Models", cards(stages)),
            ("Expected results", expectations(record)),
            ("Figures", figures(record, folder, Path(drawings))),
            ("Answers", answers(stages, folder)),
            ("Stages", stage_table(stages)),
            ("Recipe", tag("div", record.get("recipe", ""), class_="text")),
        ]
    state = "not finished" if record.get("results") is None else "finished"
    about = f"{state} · stages done: {len(stages)}" + (" · miniature" if record.get("mini") else "")
    title = f"Pipeline {record.get('pipeline', folder.resolve().name)}"
    return page(title, join(tag("p", record.get("about", "")), tag("p", about)), sections)


def cards(stages: Sequence[JsonView]) -> Html:
    """Every evaluated model's card, one column each; the best value of a row is starred."""
    evaluated = [stage for stage in stages if stage.get("card")]
    rows: list[list[object]] = []
    for name, (text, share) in LABELS.items():
        found = [stage["card"].get(name) for stage in evaluated]
        known = [one["value"] for one in found if one]
        if known:
            best = max(known) if "higher is better" in text else min(known) if "lower is better" in text else None
            best = None if len(set(known)) == 1 else best
            rows.append([text, *(_estimate(one, share, best) for one in found)])
    if not rows:
        return Html()
    caption = "The same held-out tasks for every model, with 95 % intervals over tasks. ★ is the best value of a row; "
    return table(caption + "where intervals overlap, it may be chance.", ["", *(s["name"] for s in evaluated)], rows)


def _estimate(one: Mapping[str, float] | None, share: bool, best: float | None) -> Html:
    if not one:
        return put("–")
    form = "{:.1%}" if share else "{:.3g}"
    text = f"{form.format(one['value'])} [{form.format(one['low'])}, {form.format(one['high'])}]"
    return tag("strong", text, " ★") if one["value"] == best else put(text)


def expectations(record: JsonView) -> Html:
    """The recipe's expected results against the measured ones."""
    results = record.get("results")
    rows: list[list[str]] = []
    for name, (low, high) in record.get("expect", {}).items():
        value = (results or {}).get(name)
        verdict = "not measured yet" if value is None else "✓ met" if low <= value <= high else "✗ missed"
        rows.append([name, f"{low:g} to {high:g}", "–" if value is None else f"{value:.4g}", verdict])
    return (
        table("Results and the bounds stated in the recipe", ["result", "expected", "found", ""], rows)
        if rows
        else Html()
    )


def figures(record: JsonView, folder: Path, drawings: Path) -> Html:
    """The recipe's figures, each with its numbers as tables."""
    stages = cast(list[Json], record["stages"])
    finished = [Finished(stage["name"], folder / stage["folder"], stage.get("card")) for stage in stages]
    recipe = tomllib.loads(record.get("recipe", ""))
    names = [table.get("name", "") for table in recipe.get("stage", [])]
    made: list[Html] = []
    for given in recipe.get("figure", []):
        figure = read_figure(given, names)
        numbers = draw(figure, finished, drawings)
        shown = picture(drawings / f"{figure.name}.svg", f"{numbers['title']}; its numbers follow below")
        made.append(tag("figure", shown, _values(numbers)))
    return tag("div", *made, class_="wide") if made else Html()


def _values(numbers: JsonView) -> Html:
    """The numbers of a figure as tables, collapsed."""
    tables = [_panel(panel) for panel in numbers["panels"]]
    if fits := numbers.get("fits"):
        rows = [
            [name, fit["form"], _range(fit["alpha"]), _range(fit["beta"]), f"{fit['base']:.3g}", f"{fit['rms']:.2g}",
             "none" if fit["peak"] is None else f"{fit['peak']:.3g}"]
            for name, fit in fits.items()
        ]  # fmt: skip
        tables.append(
            table("Fits over d = √KL", ["stage", "form", "α", "β", "at d = 0", "residual", "peak at d"], rows)
        )
    for name, ends in numbers.get("counts", {}).items():
        keys = [key for key in ends["first"] if key != "words"]
        rows = [[key, str(ends["first"][key]), str(ends["last"][key])] for key in keys]
        rows += [[f'"{w}"', str(ends["first"]["words"][w]), str(n)] for w, n in ends["last"]["words"].items()]
        tables.append(table(f"{name}: counts over all answers of a step", ["", "first step", "last step"], rows))
    notes = [tag("p", text, class_="note") for text in numbers.get("notes", [])]
    return tag("details", tag("summary", f"Numbers of “{numbers['title']}”"), *tables, *notes)


def _panel(panel: JsonView) -> Html:
    form = "{:.1%}" if panel["share"] else "{:.4g}"

    def point(series: JsonView, i: int) -> str:
        text = form.format(series["y"][i])
        return text + (f" [{form.format(series['low'][i])}, {form.format(series['high'][i])}]" if series["low"] else "")

    drawn = [series for series in panel["series"] if series["y"] and series["kind"] != "fit"]
    if panel["labels"]:
        rows = [[name, point(drawn[0], i)] for i, name in enumerate(panel["labels"])] if drawn else []
        return table(f"{panel['title']}: {panel['x_label']}", ["stage", "value"], rows)
    rows = [
        [s["name"], f"{point(s, 0)} at {s['x'][0]:.3g}", f"{point(s, -1)} at {s['x'][-1]:.3g}",
         form.format(min(s["y"])), form.format(max(s["y"])), str(len(s["y"]))]
        for s in drawn
    ]  # fmt: skip
    head = ["", "first", "last", "lowest", "highest", "points"]
    return table(f"{panel['title']}: {panel['y_label']} over {panel['x_label']}", head, rows)


def _range(one: Mapping[str, float]) -> str:
    return f"{one['value']:.3g} [{one['low']:.3g}, {one['high']:.3g}]"


def answers(stages: Sequence[JsonView], folder: Path) -> Html:
    """The kept answers to the fixed prompts, grouped by prompt across stages."""
    asked: dict[tuple[str, str], list[Html]] = {}
    for stage in stages:
        file = folder / (stage.get("card_folder") or stage["folder"]) / "answers.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            row = json.loads(line)
            mark = "✓ passed" if row["passed"] else "✗ not passed"
            notes = tag("div", f"{row['tokens']} tokens{'. ' if row['detail'] else ''}{row['detail']}", class_="note")
            asked.setdefault((row["capability"], row["prompt"]), []).append(
                box(f"{stage['name']} · {mark}", model_text(row["answer"]), notes)
            )
    made = [
        join(tag("h3", f"{capability.replace('_', ' ')}: {prompt}"), tag("div", *boxes, class_="grid"))
        for (capability, prompt), boxes in asked.items()
    ]
    return join(*made)


def stage_table(stages: Sequence[JsonView]) -> Html:
    """What ran, how long it took, its peak memory and its result."""
    rows: list[list[str]] = []
    for stage in stages:
        seconds, peak = stage.get("seconds"), stage.get("peak_mib")
        took = "–" if seconds is None else tables.duration(seconds)
        held = "–" if peak is None else f"{peak:,.0f} MiB"
        rows.append([stage["name"], stage["run"], took, held, outcome(stage)])
    total = sum(stage.get("seconds") or 0 for stage in stages)
    caption = f"{tables.duration(total)} in total, without evaluations; – if a stage did not run in one go"
    return table(caption, ["stage", "kind", "time", "peak memory", "result"], rows)


def outcome(stage: JsonView) -> str:
    """A data stage's counts, or the change in a run's held-out metrics."""
    made, summary = stage.get("made"), stage.get("summary")
    if made:
        counts = [(name, value) for name, value in made.items() if isinstance(value, int | float)]
        return ", ".join(f"{name.replace('_', ' ')} {value:g}" for name, value in counts)
    before, after = ((summary or {}).get(at) or {} for at in ("before", "after"))
    shown = [(text, form, name) for name, text, form in tables.CHANGES if name in before and name in after]
    return "; ".join(f"{text} {form.format(before[n])} → {form.format(after[n])}" for text, form, n in shown[:2])
