"""Diagnosis of a run: one verdict per check, with evidence, the step where the problem began, and advice.

`posttrain doctor RUN` prints it. The checks in this file read the run's curves, those in reward_hacking.py its
completions. A check whose data the run lacks returns "no data".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from posttrain.evaluation import reward_hacking as exploits
from posttrain.evaluation.run_evidence import Diagnosis, Evidence, Level, ends, read_evidence, since

Check = Callable[[Evidence], Diagnosis]
SEVERITY = ("no data", "ok", "warn", "alarm")
BAD: tuple[Level, Level] = ("alarm", "warn")
KL_LIMITS = {"kl": (0.3, 1.0), "data_kl": (0.3, 1.0), "approx_kl": (0.05, 0.2), "kl_episode": (10.0, 30.0),
             "pair_kl": (10.0, 30.0)}  # fmt: skip
"""Metric → thresholds in nats for a warning and an alarm: per token for the first three, else per completion."""
MISMATCH_LIMITS = (0.1, 0.5)  # nats in one token; float32 on both sides stays below 1e-3


def entropy(e: Evidence) -> Diagnosis:
    """Entropy collapse: the policy stops exploring before it has learned the task."""
    name = "entropy"
    steps, values = e.curve("entropy")
    found = ends(values)
    if found is None:
        return Diagnosis(name, "no data", "fewer than four steps have an entropy value")
    before, after = found
    left = after / before if before > 0 else 1.0
    success = e.change(e.success)
    numbers = {"before": before, "after": after} | ({"success_after": success.after} if success else {})
    text = f"{before:.3g} → {after:.3g} nats per token" + (f", {success.after:.0%} success" if success else "")
    learned = success is not None and (success.after >= 0.9 or (success.rose and success.after >= 0.5))
    if left > 0.2 or success is None or learned:  # without sampling there is no exploration to lose
        return Diagnosis(name, "ok", text, "", None, numbers)
    level = "alarm" if left <= 0.05 else "warn"
    advice = "Raise algo.entropy_coef or algo.clip_high, lower train.lr, or add a KL penalty (algo.kl_coef)."
    return Diagnosis(name, level, text, advice, since(steps, values <= 0.2 * before), numbers)


def flat_groups(e: Evidence) -> Diagnosis:
    """Most groups have equal rewards and so no advantage, and not because every completion is right."""
    name = "flat groups"
    steps, values = e.curve("flat_groups")
    found = ends(values)
    if found is None:
        return Diagnosis(name, "no data", "fewer than four steps have groups")
    success = e.change(e.success)
    numbers = {"before": found[0], "after": found[1]} | ({"success_after": success.after} if success else {})
    text = f"{found[0]:.0%} → {found[1]:.0%} of groups have equal rewards"
    text += f", {success.after:.0%} success" if success else ""
    if found[1] < 0.7 or (success and success.after >= 0.9):
        return Diagnosis(name, "ok", text, "", None, numbers)
    advice = "Choose tasks that are only sometimes solved, raise algo.group_size, set algo.max_resamples, or use a "
    advice += "finer-grained reward."
    return Diagnosis(name, "alarm" if found[1] >= 0.9 else "warn", text, advice, since(steps, values >= 0.7), numbers)


def truncation(e: Evidence) -> Diagnosis:
    """More and more completions are truncated at the length limit."""
    name = "truncation"
    steps, values = e.curve("truncated")
    found = ends(values)
    if found is None:
        return Diagnosis(name, "no data", "fewer than four steps have sampled completions")
    before, after = found
    numbers = {"before": before, "after": after}
    text = f"{before:.1%} → {after:.1%} of completions are truncated at rollout.max_tokens"
    if after >= 0.25 and after - before >= 0.15:
        level, limit = "alarm", max(0.25, before + 0.15)
    elif (after >= 0.05 and after - before >= 0.05) or after >= 0.25:
        level, limit = "warn", min(0.25, max(0.05, before + 0.05))
    else:
        return Diagnosis(name, "ok", text, "", None, numbers)
    advice = "If truncated completions made progress, raise rollout.max_tokens; else the reward pays for length."
    return Diagnosis(name, level, text, advice, since(steps, values >= limit), numbers)


def kl(e: Evidence) -> Diagnosis:
    """The policy moves too far from the reference model, or too far in one update."""
    found = [one for metric in KL_LIMITS if (one := _kl_of(e, metric))]
    if not found:
        return Diagnosis("KL", "no data", "no KL was measured; set algo.kl_coef above 0 to measure it")
    return max(found, key=lambda one: SEVERITY.index(one.level))


def _kl_of(e: Evidence, metric: str) -> Diagnosis | None:
    """Checks one KL metric for values that are not finite or above a threshold, and for sudden jumps."""
    steps, values = e.curve(metric)
    if not len(values):
        return None
    warn, alarm = KL_LIMITS[metric]
    if not np.isfinite(values).all():
        first = int(steps[~np.isfinite(values)][0])
        return Diagnosis("KL", "alarm", f"{metric} is not finite", "Lower train.lr; resume before this step.", first)
    numbers = {"last": float(values[-1]), "largest": float(values.max())}
    text = f"{metric} {values[0]:.3g} → {values[-1]:.3g} nats, max {values.max():.3g}"
    advice = "Lower train.lr or raise algo.kl_coef; a reward that rises at this much KL is often being hacked."
    for level, limit in zip(BAD, (alarm, warn), strict=True):
        if (began := since(steps, values >= limit)) is not None:
            return Diagnosis("KL", level, text, advice, began, numbers)
    jumps = [i for i in range(4, len(values)) if values[i] >= max(warn / 2, 10 * float(np.median(values[:i])))]
    if jumps:
        return Diagnosis("KL", "warn", f"{text}, with a jump", advice, int(steps[jumps[0]]), numbers)
    return Diagnosis("KL", "ok", text, "", None, numbers)


def mismatch(e: Evidence) -> Diagnosis:
    """Sampler and learner disagree on the log-probabilities of the sampled tokens."""
    name = "mismatch"
    steps, values = e.curve("mismatch", with_nan=True)
    lag = e.curve("lag")[1]
    if not len(values) or (lag > 0).any():
        text = "the sampler lags by design, so the two differ" if len(values) else "no mismatch was measured"
        return Diagnosis(name, "no data", text)
    numbers = {"last": float(values[-1]), "largest": float(values.max())}
    text = f"log-probabilities differ by at most {values.max():.2g} nats per token"
    advice = "Sample in the learner's precision (rollout.dtype), or correct for the mismatch with algo.is_cap."
    for level, limit in zip(BAD, (MISMATCH_LIMITS[1], MISMATCH_LIMITS[0]), strict=True):
        high = ~(values < limit)  # NaN is a mismatch too
        if high[-1] or high.mean() >= 0.25:
            return Diagnosis(name, level, text, advice, int(steps[high][0]), numbers)
    return Diagnosis(name, "ok", text, "", None, numbers)


def unscored(e: Evidence) -> Diagnosis:
    """Completions that could not be scored and are therefore missing from training."""
    name = "unscored"
    if not e.answers:
        return Diagnosis(name, "no data", "no sampled completions are stored")
    shares = np.array([float(np.isnan(a.reward).mean()) for a in e.answers])
    steps = [a.step for a in e.answers]
    numbers = {"largest": float(shares.max()), "mean": float(shares.mean())}
    text = f"{shares.mean():.1%} of completions are unscored, at most {shares.max():.1%} in one step"
    if not shares.any():
        return Diagnosis(name, "ok", text, "", None, numbers)
    reasons = Counter(error for a in e.answers for error in a.errors).most_common(1)
    common = f" Most common error: {reasons[0][0][:160]}" if reasons else ""
    advice = f"A reward that fails on some completions biases the training data. Fix it or its time limit.{common}"
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
"""Name → check, in display order; docs/guides/reward-hacking.md explains the rule of each."""


def diagnose(evidence: Evidence) -> list[Diagnosis]:
    """The verdicts of all checks, in the order of CHECKS."""
    return [check(evidence) for check in CHECKS.values()]


def diagnose_run(folder: Path) -> list[Diagnosis]:
    """The verdicts on a run, finished or not. Raises ResumeError if the folder holds no run."""
    return diagnose(read_evidence(folder))


def at_least(found: Sequence[Diagnosis], level: str) -> bool:
    """Whether any verdict is at least as severe as `level`."""
    return any(SEVERITY.index(one.level) >= SEVERITY.index(level) for one in found)
