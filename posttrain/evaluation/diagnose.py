"""What is wrong with a run: one verdict a check, with the evidence, the step where it began, and what to do.

`posttrain doctor RUN` shows it. The checks of this file read the run's curves; those of exploits.py its answers. A
check that the run has no numbers for says so and judges nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from posttrain.cli.tables import printable
from posttrain.evaluation import reward_hacking as exploits
from posttrain.evaluation.run_evidence import Diagnosis, Evidence, Level, ends, read_evidence, since

Check = Callable[[Evidence], Diagnosis]
SEVERITY = ("no data", "ok", "warn", "alarm")
BAD: tuple[Level, Level] = ("alarm", "warn")
KL_LIMITS = {"kl": (0.3, 1.0), "data_kl": (0.3, 1.0), "approx_kl": (0.05, 0.2), "kl_episode": (10.0, 30.0),
             "pair_kl": (10.0, 30.0)}  # fmt: skip
"""Metric → nats from which on it is a warning and an alarm: per token the first three, per answer the others."""
MISMATCH_LIMITS = (0.1, 0.5)  # nats in one token; float32 on both sides stays below 1e-3


def entropy(e: Evidence) -> Diagnosis:
    """The policy no longer explores, though there is something left to learn."""
    name = "entropy"
    steps, values = e.curve("entropy")
    found = ends(values)
    if found is None:
        return Diagnosis(name, "no data", "fewer than four steps have an entropy")
    before, after = found
    left = after / before if before > 0 else 1.0
    success = e.change(e.success)
    numbers = {"before": before, "after": after} | ({"success_after": success.after} if success else {})
    text = f"{before:.3g} → {after:.3g} nats per token" + (f", {success.after:.0%} succeed" if success else "")
    learned = success is not None and (success.after >= 0.9 or (success.rose and success.after >= 0.5))
    if left > 0.2 or success is None or learned:  # without sampled answers nothing explores
        return Diagnosis(name, "ok", text, "", None, numbers)
    level = "alarm" if left <= 0.05 else "warn"
    advice = "Raise algo.entropy_coef or algo.clip_high, lower train.lr, or add a KL penalty (algo.kl_coef)."
    return Diagnosis(name, level, text, advice, since(steps, values <= 0.2 * before), numbers)


def flat_groups(e: Evidence) -> Diagnosis:
    """Most groups have equal rewards, so that they teach nothing, and not because everything is right."""
    name = "flat groups"
    steps, values = e.curve("flat_groups")
    found = ends(values)
    if found is None:
        return Diagnosis(name, "no data", "fewer than four steps have groups")
    success = e.change(e.success)
    numbers = {"before": found[0], "after": found[1]} | ({"success_after": success.after} if success else {})
    text = f"{found[0]:.0%} → {found[1]:.0%} of groups" + (
        f", {success.after:.0%} of answers succeed" if success else ""
    )
    if found[1] < 0.7 or (success and success.after >= 0.9):
        return Diagnosis(name, "ok", text, "", None, numbers)
    advice = "Choose tasks that some answers solve and others do not, raise algo.group_size, set algo.max_refills, or "
    advice += "let the reward tell answers apart."
    return Diagnosis(name, "alarm" if found[1] >= 0.9 else "warn", text, advice, since(steps, values >= 0.7), numbers)


def truncation(e: Evidence) -> Diagnosis:
    """More and more answers are cut at the longest length."""
    name = "truncation"
    steps, values = e.curve("truncated")
    found = ends(values)
    if found is None:
        return Diagnosis(name, "no data", "fewer than four steps have sampled answers")
    before, after = found
    numbers = {"before": before, "after": after}
    text = f"{before:.1%} → {after:.1%} of answers are cut at rollout.max_tokens"
    if after >= 0.25 and after - before >= 0.15:
        level, limit = "alarm", max(0.25, before + 0.15)
    elif (after >= 0.05 and after - before >= 0.05) or after >= 0.25:
        level, limit = "warn", min(0.25, max(0.05, before + 0.05))
    else:
        return Diagnosis(name, "ok", text, "", None, numbers)
    advice = (
        "If the cut answers were on their way, raise rollout.max_tokens; if they ramble, the reward pays for length."
    )
    return Diagnosis(name, level, text, advice, since(steps, values >= limit), numbers)


def kl(e: Evidence) -> Diagnosis:
    """The policy leaves its starting model, or its own last version, faster than rewards are worth."""
    found = [one for metric in KL_LIMITS if (one := _kl_of(e, metric))]
    if not found:
        return Diagnosis("KL", "no data", "no KL is measured; algo.kl_coef above 0 measures one")
    return max(found, key=lambda one: SEVERITY.index(one.level))


def _kl_of(e: Evidence, metric: str) -> Diagnosis | None:
    """One KL metric: not finite, above its limits, or one step far above those before it."""
    steps, values = e.curve(metric)
    if not len(values):
        return None
    warn, alarm = KL_LIMITS[metric]
    if not np.isfinite(values).all():
        first = int(steps[~np.isfinite(values)][0])
        return Diagnosis("KL", "alarm", f"{metric} is not finite", "Lower train.lr; resume before this step.", first)
    numbers = {"last": float(values[-1]), "largest": float(values.max())}
    text = f"{metric} {values[0]:.3g} → {values[-1]:.3g} nats, at most {values.max():.3g}"
    advice = "Lower train.lr or raise algo.kl_coef; a reward that rises with so much KL is often being exploited."
    for level, limit in zip(BAD, (alarm, warn), strict=True):
        if (began := since(steps, values >= limit)) is not None:
            return Diagnosis("KL", level, text, advice, began, numbers)
    jumps = [i for i in range(4, len(values)) if values[i] >= max(warn / 2, 10 * float(np.median(values[:i])))]
    if jumps:
        return Diagnosis("KL", "warn", f"{text}, with a jump", advice, int(steps[jumps[0]]), numbers)
    return Diagnosis("KL", "ok", text, "", None, numbers)


def mismatch(e: Evidence) -> Diagnosis:
    """Sampler and learner do not agree on what was likely."""
    name = "mismatch"
    steps, values = e.curve("mismatch")
    lag = e.curve("lag")[1]
    if not len(values) or (lag > 0).any():
        text = "the sampler lags by choice, so the two differ" if len(values) else "no mismatch is measured"
        return Diagnosis(name, "no data", text)
    numbers = {"last": float(values[-1]), "largest": float(values.max())}
    text = f"at most {values.max():.2g} nats in one token's log-probability"
    advice = "Sample in the learner's precision (rollout.dtype), or correct for it with algo.is_cap."
    for level, limit in zip(BAD, (MISMATCH_LIMITS[1], MISMATCH_LIMITS[0]), strict=True):
        high = values >= limit
        if high[-1] or high.mean() >= 0.25:
            return Diagnosis(name, level, text, advice, int(steps[high][0]), numbers)
    return Diagnosis(name, "ok", text, "", None, numbers)


def unscored(e: Evidence) -> Diagnosis:
    """Answers that could not be judged and so are missing from what is learned."""
    name = "unscored"
    if not e.answers:
        return Diagnosis(name, "no data", "no sampled answers are stored")
    shares = np.array([float(np.isnan(a.reward).mean()) for a in e.answers])
    steps = [a.step for a in e.answers]
    numbers = {"largest": float(shares.max()), "mean": float(shares.mean())}
    text = f"{shares.mean():.1%} of attempts, at most {shares.max():.1%} of a step's"
    if not shares.any():
        return Diagnosis(name, "ok", text, "", None, numbers)
    reasons = Counter(error for a in e.answers for error in a.errors).most_common(1)
    said = f" Most often: {reasons[0][0][:160]}" if reasons else ""
    advice = f"A reward that fails on some answers selects among them. Fix it, or its time limit.{said}"
    level = "alarm" if shares.mean() >= 0.05 else "warn"
    return Diagnosis(name, level, text, advice, steps[int(np.flatnonzero(shares)[0])], numbers)


CHECKS: dict[str, Check] = {
    "divergence": exploits.divergence,
    "shortcut": exploits.shortcut,
    "length": exploits.length,
    "loops": exploits.loops,
    "duplicates": exploits.duplicates,
    "parts": exploits.parts,
    "entropy": entropy,
    "flat groups": flat_groups,
    "truncation": truncation,
    "KL": kl,
    "mismatch": mismatch,
    "unscored": unscored,
}
"""Name → check, in the order they are shown; docs/guides/reward-hacking.md has the rule of each."""


def diagnose(evidence: Evidence) -> list[Diagnosis]:
    """Every check's verdict, in the order of CHECKS."""
    return [check(evidence) for check in CHECKS.values()]


def diagnose_run(folder: Path) -> list[Diagnosis]:
    """The verdicts on a run folder, finished or not. Raises ResumeError where there is no run."""
    return diagnose(read_evidence(folder))


def at_least(found: Sequence[Diagnosis], level: str) -> bool:
    """Whether any verdict is as severe as `level`, or more."""
    return any(SEVERITY.index(one.level) >= SEVERITY.index(level) for one in found)


def show_diagnosis(out: Console, folder: str, found: Sequence[Diagnosis]) -> None:
    """The verdicts as a table, worst first; then what to do about each, and which checks had nothing to read."""
    marks = {"alarm": ("✗ alarm", "red"), "warn": ("! warn", "yellow"), "ok": ("✓ ok", "green")}
    table = Table(title=folder, title_justify="left", show_lines=True)
    for name in ("check", "verdict", "since step", "evidence and what to do"):
        table.add_column(name, overflow="fold")
    judged = [one for one in found if one.level != "no data"]
    for one in sorted(judged, key=lambda one: -SEVERITY.index(one.level)):
        mark, style = marks[one.level]
        said = Text(printable(one.evidence)) + Text(f"\n→ {printable(one.advice)}" if one.advice else "", style="bold")
        table.add_row(one.name, Text(mark, style=style), "" if one.since is None else str(one.since), said)
    if judged:
        out.print(table)
    for one in found:
        if one.level == "no data":
            out.print(Text(f"{one.name}: no data ({one.evidence})", style="dim"), soft_wrap=True)
