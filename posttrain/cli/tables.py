"""Terminal output: progress line, learning curves, and tables of results."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from posttrain import config
from posttrain.evaluation.labels import CHANGES
from posttrain.store.listing import RunInfo
from posttrain.store.run import EpisodeRow, Run
from posttrain.types import Episode

if TYPE_CHECKING:
    from posttrain.cli.doctor import Fact
    from posttrain.evaluation.accuracy import Report
    from posttrain.evaluation.bias_probes import Finding
    from posttrain.evaluation.calibration import Bin
    from posttrain.search.best_of_n import Search

BLOCKS = " ▁▂▃▄▅▆▇█"


def terminal_curve(
    steps: Sequence[int], values: Sequence[float], title: str, width: int = 64, height: int = 8, top: float = 1.0
) -> str:
    """A filled curve of `values` in [0, top], drawn with block characters; NaN leaves a gap."""
    if not steps:
        return f"{title}: nothing measured yet"
    columns = min(width, len(values))
    edges = [round(i * len(values) / columns) for i in range(columns + 1)]
    means: list[float] = []
    for a, b in zip(edges, edges[1:], strict=False):
        part = [v for v in values[a:b] if math.isfinite(v)]
        means.append(sum(part) / len(part) if part else math.nan)
    lines = [title]
    for level in range(height - 1, -1, -1):
        cells = ""
        for mean in means:
            filled = 0.0 if math.isnan(mean) else min(1.0, max(0.0, mean / top)) * height - level
            cells += BLOCKS[round(8 * min(1.0, max(0.0, filled)))]
        label = f"{top * (level + 1) / height:5.0%}" if level % 2 else "     "
        lines.append(f"{label} │{cells}")
    lines.append("      └" + "─" * columns)
    lines.append(f"       step {steps[0]}" + f"{steps[-1]}".rjust(max(1, columns - len(f"step {steps[0]}"))))
    return "\n".join(lines)


def picture(curves: Mapping[str, tuple[Sequence[int], Sequence[float]]], path: Path, title: str) -> None:
    """Writes one small panel per curve to a PNG, readable without colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(curves), figsize=(4.2 * len(curves), 3.2), squeeze=False)
    for axis, (name, (steps, values)) in zip(axes[0], curves.items(), strict=True):
        axis.plot(steps, values, color="#0072B2", linewidth=1.6, marker="o" if len(steps) < 4 else None)
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("step")
        axis.set_ylim(bottom=0, top=1.02 if max(values, default=0) <= 1 else None)
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def answers_table(rows: Sequence[tuple[str, str, bool, str, bool]], title: str) -> Table:
    """Before/after answers side by side: (question, before, right before, after, right after)."""
    table = Table(title=title, show_lines=True, title_justify="left")
    for name in ("question", "before", "after"):
        table.add_column(name, overflow="fold")
    for question, before, before_ok, after, after_ok in rows:
        table.add_row(Text(question), marked(before, before_ok), marked(after, after_ok))
    return table


def marked(answer: str, right: bool) -> Text:
    """An answer with a tick or a cross; model text is never parsed as markup, and control characters are escaped."""
    mark = Text("✓ ", style="green") if right else Text("✗ ", style="red")
    return mark + Text(printable(answer))


def printable(text: str) -> str:
    """Makes model text safe for a terminal: control characters become visible escapes."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def console(json: bool = False) -> Console:
    """Console for human-readable output; with --json that goes to stderr."""
    return Console(stderr=json, highlight=False)


def duration(seconds: float) -> str:
    """`75` → `1m15s`."""
    whole = int(round(seconds))
    return f"{whole}s" if whole < 60 else f"{whole // 60}m{whole % 60:02d}s"


class LiveLine:
    """A line that is overwritten while work goes on; some are printed below each other if the output is no terminal."""

    def __init__(self, out: Console, first: str) -> None:
        self.out = out
        self._live = Live(Text(first), console=out, refresh_per_second=8)

    def __enter__(self) -> Self:
        if self.out.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live.is_started:
            self._live.stop()

    def show(self, line: str, printed: bool) -> None:
        """Overwrites the line; `printed` says whether it is shown where nothing can be overwritten."""
        if self.out.is_terminal:
            self._live.update(Text(line))
        elif printed:
            self.out.print(line, soft_wrap=True)


class StepLine(LiveLine):
    """Live progress line of a run."""

    def __init__(self, out: Console, recipe: config.Recipe) -> None:
        super().__init__(out, "loading, then evaluating before training …")
        self.total = recipe.train.steps
        self._began: tuple[int, float] | None = None
        self._every = max(1, self.total // 20) if self.total else 10  # 0: one pass, of unknown length

    def __call__(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a step's numbers."""
        now = time.monotonic()
        if self._began is None:
            self._began = (step, now)
        self.show(self.line(step, values, now), step == 0 or step % self._every == 0 or step == self.total)

    def line(self, step: int, values: Mapping[str, float], now: float) -> str:
        """The progress line of a step."""
        parts = [f"step {step}/{self.total}" if self.total else f"step {step}"]
        for name, label, form in FIELDS:
            if name in values and math.isfinite(values[name]):
                parts.append(f"{label} {form.format(values[name])}")
        assert self._began is not None
        first, start = self._began
        if self.total and step > first:
            parts.append(f"left {duration((now - start) / (step - first) * (self.total - step))}")
        return " · ".join(parts)


FIELDS = (
    ("reward", "reward", "{:.2f}"),
    ("accuracy", "accuracy", "{:.0%}"),
    ("think_share", "thinks", "{:.0%}"),
    ("length", "length", "{:.0f}"),
    ("kl_episode", "KL", "{:.2f}"),
    ("reverse_kl", "KL to the teacher", "{:.3f}"),
    ("nll", "loss", "{:.3f}"),
    ("pair_accuracy", "pair accuracy", "{:.0%}"),
    ("preference_accuracy", "preference accuracy", "{:.0%}"),
    ("chosen_logp", "log π(chosen)", "{:.1f}"),
    ("step_accuracy", "step accuracy", "{:.0%}"),
    ("eval/accuracy", "held-out accuracy", "{:.1%}"),
    ("eval/pair_accuracy", "held-out pair accuracy", "{:.1%}"),
    ("eval/step_accuracy", "held-out step accuracy", "{:.1%}"),
    ("eval/nll", "held-out loss", "{:.3f}"),
    ("tokens_per_second", "tokens/s", "{:,.0f}"),
)
"""Metrics of the progress line: name, label, format."""


def finished(out: Console, folder: Path) -> None:
    """Prints a finished run's held-out results and answers before and after, its learning curve and its files."""
    with Run.read(folder) as store:
        summary = store.summary() or {}
        before, after = summary.get("before", {}), summary.get("after", {})
        exported = summary.get("best", {}).get("step", summary["steps"])
        first, last = store.episodes("eval", 0), store.episodes("eval", exported)
        curves = {name: store.curve(name) for name in ("accuracy", "think_share", "length", "nll")}
        mismatch = store.curve("mismatch")[1]
        warnings = [e.message for e in store.events() if e.level != "info"]
        notes = [
            (e.kind, e.message) for e in store.events() if e.level == "info" and e.kind in ("model", "data", "extended")
        ]
    out.print()
    if first and last:
        out.print(answers_table(side_by_side(first, last), "The same held-out questions, before and after"))
        steps, values = curves["accuracy"]
        if steps:  # offline algorithms sample no training answers
            out.print(Text(terminal_curve(steps, values, "accuracy of the sampled training answers")))
    out.print(change_table(before, after))
    if mismatch:
        largest = math.nan if any(map(math.isnan, mismatch)) else max(mismatch)
        out.print(f"sampler and learner log-probabilities differ by at most {largest:.1g} per token\n", soft_wrap=True)
    if ended := summary.get("ended"):
        out.print(Text(f"note: the run ended after step {summary['steps']}. {ended}"), soft_wrap=True)
    if best := summary.get("best"):
        metric, value = next((name, value) for name, value in best.items() if name != "step")
        out.print(
            f"best checkpoint: step {best['step']}, {metric} {value:.4g}; this is the exported model", soft_wrap=True
        )
    for kind, message in dict.fromkeys(notes):
        out.print(Text(f"{kind}: {message}"), soft_wrap=True)
    for message in dict.fromkeys(warnings[-5:]):
        out.print(Text(f"note: {message}", style="yellow"))
    if table := summary.get("calibration"):
        out.print(calibration_table(table))
        calibration_picture(table, folder / "calibration.png", folder.name)
        out.print(f"calibration:    {folder / 'calibration.png'}", soft_wrap=True)
    drawn = {name: curve for name, curve in curves.items() if curve[0]}
    if drawn:
        picture(drawn, folder / "curve.png", folder.name)
        out.print(f"learning curve: {folder / 'curve.png'}", soft_wrap=True)
    out.print(f"trained model:  {folder / 'model'}", soft_wrap=True)


def change_table(before: Mapping[str, float], after: Mapping[str, float]) -> Table:
    """Metrics before and after training, with 95 % intervals of shares."""
    table = Table(title_justify="left")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    for name, label, form in CHANGES:
        if name in before and name in after:
            table.add_row(label, form.format(before[name]), form.format(after[name]))
            if f"{name}_low" in after:
                spans = [f"{v[f'{name}_low']:.1%} – {v[f'{name}_high']:.1%}" for v in (before, after)]
                table.add_row("  95 % interval", *spans)
    return table


def calibration_table(rows: Sequence[Bin]) -> Table:
    """Predicted against observed, one row per non-empty bin."""
    table = Table(title="Calibration on held-out data", title_justify="left")
    for name in ("predicted", "observed", "95 % interval", "number"):
        table.add_column(name, justify="right")
    for row in rows:
        span = f"{row['low']:.0%} – {row['high']:.0%}"
        table.add_row(f"{row['predicted']:.1%}", f"{row['observed']:.1%}", span, f"{row['count']:.0f}")
    return table


def calibration_picture(rows: Sequence[Bin], path: Path, title: str) -> None:
    """Writes observed share against predicted probability with intervals to a PNG, readable without colour."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    predicted, observed = ([row[name] for row in rows] for name in ("predicted", "observed"))
    bars = [[max(0.0, r["observed"] - r["low"]) for r in rows], [max(0.0, r["high"] - r["observed"]) for r in rows]]
    figure, axis = plt.subplots(figsize=(4.6, 4.4))
    axis.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, label="perfect calibration")
    axis.errorbar(predicted, observed, bars, color="#0072B2", marker="o", linestyle="", capsize=3, label="observed")
    for row in rows:
        axis.annotate(f"{row['count']:.0f}", (row["predicted"], row["observed"]), (5, -9), textcoords="offset points")
    low = 0.0 if min(predicted) < 0.5 else 0.5
    axis.set(xlim=(low - 0.02, 1.02), ylim=(-0.02, 1.02), xlabel="predicted probability", ylabel="observed share")
    axis.grid(alpha=0.3)
    axis.legend(loc="lower right", fontsize=8)
    axis.set_title(f"{title}: held-out calibration (number of cases beside each point)", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)


def findings(out: Console, model: str, found: Sequence[Finding]) -> None:
    """Prints bias probes of a reward model as a table, each with two example replies and their scores."""
    table = Table(title=f"{model}: {found[0].estimate.n} questions", title_justify="left", show_lines=True)
    for name in ("probe", "bias", "95 % interval", "example"):
        table.add_column(name, overflow="fold")
    for one in found:
        form = "{:+.1%}" if one.unit == "share" else "{:+.2f} SD"
        e, shown = one.estimate, one.example
        lines = [f"{n} ({s:+.2f}): {t}" for n, s, t in zip(shown.names, shown.scores, shown.texts, strict=True)]
        example = Text(printable("\n".join([shown.question, *lines])))
        table.add_row(one.name, form.format(e.value), f"{form.format(e.low)} to {form.format(e.high)}", example)
    out.print(table)


def side_by_side(
    first: Sequence[EpisodeRow], last: Sequence[EpisodeRow], count: int = 5
) -> list[tuple[str, str, bool, str, bool]]:
    """Answers to the same questions at two steps: the first `count`, one answer each, whatever their result."""
    after = {(e.group, e.index): e for e in last}
    rows = [(e, after[e.group, 0]) for e in first if e.index == 0 and (e.group, 0) in after]
    return [(a.prompt, a.text, a.passed, b.text, b.passed) for a, b in rows[:count]]


def report(out: Console, model: str, found: Report, groups: Sequence[Sequence[Episode]]) -> None:
    """Prints an evaluation as a table."""
    table = Table(title=f"{model}: {found.tasks} held-out tasks × {found.samples}", title_justify="left")
    table.add_column("")
    table.add_column("value", justify="right")
    table.add_column("95 % interval", justify="right")
    measured = {"accuracy": found.accuracy}
    measured |= {f"pass@{k}": e for k, e in found.pass_at.items()} | {f"maj@{k}": e for k, e in found.maj_at.items()}
    for name, estimate in measured.items():
        table.add_row(name, f"{estimate.value:.1%}", f"{estimate.low:.1%} – {estimate.high:.1%}")
    table.add_row("share that think", f"{found.think_share:.0%}", "")
    table.add_row("mean length (tokens)", f"{found.length:.1f}", "")
    table.add_row("truncated at max_tokens", f"{found.truncated:.1%}", "")
    for name, tokens in (("tokens generated per task", found.generated), ("tokens scored per task", found.scored)):
        if tokens is not None:
            table.add_row(name, f"{tokens.value:,.1f}", f"{tokens.low:,.1f} – {tokens.high:,.1f}")
    for name, mean in found.parts.items():
        table.add_row(Text(f"part {printable(name)}"), f"{mean:.3g}", "")
    for name, part in found.sources.items():
        interval = f"{part.accuracy.low:.1%} – {part.accuracy.high:.1%}"
        table.add_row(Text(f"accuracy {printable(name)}"), f"{part.accuracy.value:.1%}", interval)
    if found.unscored:
        table.add_row("unscored", str(found.unscored), "")
    out.print(table)
    for note in found.notes:
        out.print(Text(printable(note)), soft_wrap=True)
    errors = {e.error for group in groups for e in group if e.error}
    for error in sorted(errors)[:3]:
        out.print(Text(error, style="red"))


def best_of_n(out: Console, model: str, found: Search, written: Mapping[str, int]) -> None:
    """Prints best-of-n results and the files written."""
    table = Table(title=f"{model}: best of n answers, {found.tasks} tasks", title_justify="left")
    for name in ("n", "score", "95 % interval", "accuracy", "95 % interval", "KL at most"):
        table.add_column(name, justify="right")
    for row in found.rows:
        score, right = row.score, row.accuracy
        spans = f"{score.low:.3g} – {score.high:.3g}", f"{right.low:.1%} – {right.high:.1%}"
        table.add_row(str(row.n), f"{score.value:.3g}", spans[0], f"{right.value:.1%}", spans[1], f"{row.kl:.2f}")
    out.print(table)
    if found.left_out:
        out.print(f"{found.left_out} tasks are left out because an answer could not be scored")
    for path, count in written.items():
        out.print(f"{count} rows: {path}", soft_wrap=True)


def runs_table(found: Sequence[RunInfo]) -> Table:
    """One row per run."""
    table = Table()
    for name in ("run", "algorithm", "model", "tasks", "status", "step", "held-out accuracy"):
        table.add_column(name)
    for run in found:
        recipe = run.header.get("recipe", {})
        pair = [(run.summary or {}).get(at, {}).get("eval/accuracy") for at in ("before", "after")]
        change = " → ".join(f"{v:.1%}" for v in pair if v is not None)
        cells = (run.header.get("algorithm", ""), recipe.get("model", {}).get("path", ""))
        step = "" if run.last_step is None else str(run.last_step)
        table.add_row(
            str(run.path), *cells, recipe.get("data", {}).get("tasks", ""), run.status, step, change or run.note
        )
    return table


def presets(out: Console, algorithm: str) -> None:
    """Prints each preset's settings that differ from the defaults, and its source."""
    default = config.as_dict(config.resolve(algorithm, {}))
    found = config.PRESETS[algorithm]
    resolved = {name: config.as_dict(config.resolve(algorithm, {"algo": {"preset": name}})) for name in found}
    keys = [
        (section, key)
        for section, values in default.items()
        for key in values
        if key != "preset" and len({str(r[section][key]) for r in (default, *resolved.values())}) > 1
    ]
    table = Table(title=f"posttrain {algorithm} --preset NAME", title_justify="left", show_lines=True)
    table.add_column("preset")
    table.add_column("settings that differ from the defaults", overflow="fold")
    table.add_column("reproduces", overflow="fold")
    shown = ", ".join(f"{key} {default[section][key]}" for section, key in keys)
    table.add_row("(defaults)", shown, "")
    for name, preset in found.items():
        own = resolved[name]
        changed = [f"{key} {own[s][key]}" for s, key in keys if own[s][key] != default[s][key]]
        about = preset.source + (f". Not reproduced: {preset.differs}." if preset.differs else ".")
        table.add_row(name, ", ".join(changed), about)
    out.print(table)


def doctor(out: Console, findings: Sequence[Fact]) -> None:
    """Prints the machine's findings as a table."""
    table = Table()
    table.add_column("what")
    table.add_column("found")
    for finding in findings:
        mark = {True: "✓ ", False: "✗ ", None: ""}[finding["ok"]]
        table.add_row(str(finding["name"]), Text(mark + str(finding["value"])))
    out.print(table)
