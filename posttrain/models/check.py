"""The load check: which forward pass computes a model as transformers does, found by comparing the two.

The packed pass is tried as training uses it: rows with a shared prefix, the learner's mode, and every attention layer
calling our attention once. Models it cannot express are computed by transformers' own attention, one row at a time.
Sampling is checked where it is set up (rollout/engines/embedded.py).
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from posttrain.models import decoder, lora
from posttrain.models.attention import NAME, Unsupported
from posttrain.models.packing import Packed
from posttrain.models.policy import (
    LogitRule,
    Policy,
    Route,
    advance,
    by_rows,
    hidden_states,
    learner_mode,
    states,
    use_attention,
)
from posttrain.types import ConfigError, Json, JsonView

TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 0.25}  # on logits; a wrong mask or position gives errors above 1
PREFIX, TAILS, ALONE = 9, (7, 3), 72  # tokens of the rows compared: a prefix that two rows share, and a longer row
SMALL = 200_000_000  # a bfloat16 model of at most this many parameters is also compared in float32
LONGEST = 128  # lengths at which a model changes are crossed by the check's rows up to this many tokens
WINDOWS = r"(?!.*(pattern|layers)).*(window|attention_chunk_size).*"  # names of settings that limit attention
STEPS = 4  # tokens that are decoded one by one

Rows = list[torch.Tensor]


def check_forward(policy: Policy) -> float:
    """Sets `policy.route` to the fastest pass that agrees with transformers' own, and adds a note unless it is packed.

    Returns the largest difference of a logit; raises ConfigError if no pass agrees.
    """
    name = type(lora.unwrap(policy.model)).__name__
    check_finite(policy)
    try:
        with torch.no_grad():
            route, difference, note = _route(policy)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"{name} is not supported: its forward pass fails ({first_line(error)}).") from None
    policy.route = route
    if note:
        policy.notes.append(f"{name}: {note}")
    use_attention(policy.body, NAME if route.reach else route.own)
    return difference


def _route(policy: Policy) -> tuple[Route, float, str]:
    """The route, the largest difference found on it, and a note (may be empty)."""
    model = lora.unwrap(policy.model)
    model.eval()
    own, config = str(policy.body.config._attn_implementation), policy.config  # type: ignore[union-attr]
    own = "sdpa" if own == NAME else own
    use_attention(policy.body, own)
    limits = thresholds(config.to_dict())
    rows = _rows(policy, min(limits.values(), default=math.inf))
    truth = [model(input_ids=row.unsqueeze(0), use_cache=False).logits[0].float() for row in rows]
    rule, general = _rule(policy, own, rows, truth)
    route = Route(own=own, turn=limits.get("longrope", 0), rule=rule)
    probe = replace(policy, route=route)
    reach = min(limits.values(), default=math.inf)
    short = [i for i, row in enumerate(rows) if len(row) <= reach]
    reason, packed = _packed_agrees(probe, [rows[i] for i in short], [truth[i] for i in short])
    if not reason and reach == math.inf:
        return route, packed, ""
    longest = max(range(len(rows)), key=lambda i: len(rows[i]))
    cached = _cache_agrees(probe, rows[longest], truth[longest])
    how = "by transformers' own attention, one row at a time"
    how += " (slower)" if cached else " and, as its own cache gives other logits, whole rows for each token (slowest)"
    if reason:
        return replace(route, reach=0, cached=cached), general, f"computed {how}: {reason}."
    which = " and ".join(sorted(key for key, limit in limits.items() if limit == reach))
    note = f"rows longer than {reach} tokens ({which}) are computed {how}."
    return replace(route, reach=reach, cached=cached), max(general, packed), note


def thresholds(config: JsonView) -> dict[str, int]:
    """Row lengths beyond which a model computes something that the packed pass does not, by the setting's name.

    These are attention windows and chunks, and the lengths at which rotary frequencies change: for `longrope` the
    original context (Ding et al., arXiv 2402.13753), for `dynamic` scaling one token less than the context.
    """
    found: dict[str, int] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            kind = str(value.get("rope_type", value.get("type", "")))
            original = value.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
            if kind == "longrope" and original:
                found["longrope"] = int(original)
            elif "dynamic" in kind and config.get("max_position_embeddings"):
                found["dynamic"] = int(config["max_position_embeddings"]) - 1
            inner = {} if "quantization" in key else thresholds({**_contexts(config), **value})
            found |= {name: min(size, found.get(name, size)) for name, size in inner.items()}
        elif type(value) is int and value > 0 and re.fullmatch(WINDOWS, key):
            found[key] = value
    return found


def _contexts(config: JsonView) -> Json:
    names = ("max_position_embeddings", "original_max_position_embeddings")
    return {name: config[name] for name in names if name in config}


def _rows(policy: Policy, threshold: float) -> Rows:
    """Two rows that share a prefix, and one that is longer, and than the threshold if that is small."""
    large = sum(p.numel() for p in policy.model.parameters()) > 5 * SMALL
    alone = PREFIX + 1 if large else ALONE
    if threshold <= LONGEST:
        alone = max(alone, int(threshold) + STEPS + 2)
    context = getattr(policy.config, "max_position_embeddings", None) or alone
    sizes = [PREFIX + TAILS[0], PREFIX + TAILS[1], max(min(alone, context), 1)]
    stream = torch.arange(5, 5 + max(sizes), device=policy.device)
    rows = [stream[: sizes[0]], torch.cat([stream[:PREFIX], stream[:PREFIX].flip(0)])[: sizes[1]], stream.flip(0)]
    return [row[:size] % policy.vocab for row, size in zip(rows, sizes, strict=True)]


def short_rows(policy: Policy) -> Rows:
    """Token ids, (7,) and (3,), on which a sampling engine is compared with the policy."""
    return [torch.arange(5, 5 + n, device=policy.device) % policy.vocab for n in (7, 3)]


def _rule(policy: Policy, own: str, rows: Rows, truth: Rows) -> tuple[LogitRule, float]:
    """What the model does to its output layer's product, and the largest difference of a logit that is left.

    Raises ConfigError if it is not a scale or a soft cap that the configuration names.
    """
    probe = replace(policy, route=Route(own=own))
    hidden = by_rows(probe, torch.cat(rows), torch.tensor([len(row) for row in rows]))
    product, wanted = policy.head(hidden).float(), torch.cat(truth)
    tried = {rule: _difference(rule.apply(product), wanted) for rule in _rules(policy.config)}
    best = min(tried, key=lambda rule: tried[rule] if tried[rule] == tried[rule] else math.inf)
    if not wanted.isfinite().all():
        dtype = policy.head.weight.dtype
        raise ConfigError(f"model {policy.source!r} computes logits that are not finite in {dtype}.")
    if not tried[best] <= allowed(policy.head.weight.dtype, wanted):
        raise ConfigError(
            f"{type(lora.unwrap(policy.model)).__name__} is not supported: its logits differ by {tried[best]:.2g} from "
            "the product of its output layer and its last hidden states (after the scale or soft cap of its config)."
        )
    return best, tried[best]


def check_finite(policy: Policy) -> None:
    """Raises ConfigError if a weight is NaN or infinite, also where the check's rows would not show it."""
    bad = [name for name, weight in policy.model.named_parameters() if not weight.detach().isfinite().all()]
    if bad:
        raise ConfigError(
            f"model {policy.source!r} is damaged: {len(bad)} of its parameters hold NaN or infinity (the first is "
            f"{bad[0]!r}). Use an earlier checkpoint, or download it again."
        )


def _rules(config: Any) -> list[LogitRule]:
    """The rules that the configuration names: Cohere multiplies logits, Granite divides them, Gemma caps them."""

    def number(*names: str) -> list[float]:
        values = [getattr(config, name, None) for name in names]
        return [float(v) for v in values if isinstance(v, int | float) and v]

    scales = [1.0, *number("logit_scale", "lm_head_multiplier"), *(1 / v for v in number("logits_scaling"))]
    caps = [None, *number("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")]
    return list(dict.fromkeys(LogitRule(scale, cap) for scale in scales for cap in caps))


class _Counting(Packed):
    """A packed layout that records which layers asked it for attention."""

    def __init__(self, lengths: torch.Tensor, shared: Sequence[tuple[int, int]]) -> None:
        super().__init__(lengths, shared)
        self.called: list[int] = []

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        self.called.append(layer)
        return super().attend(layer, query, key, value, scale)


def _packed_agrees(policy: Policy, rows: Rows, truth: Rows) -> tuple[str, float]:
    """Why the packed pass cannot be used, or an empty text; and the largest difference of a logit."""
    if not rows:
        return "its attention changes after a few tokens", math.nan
    body, wanted = policy.body, torch.cat(truth)
    shared = [(2, PREFIX), *[(1, 0)] * (len(rows) - 2)] if len(rows) >= 2 else [(1, 0)]
    layout = _Counting(torch.tensor([len(row) for row in rows], device=policy.device), shared)
    tokens = torch.cat(rows)[layout.kept].unsqueeze(0)
    try:
        learner_mode(policy)
        hidden = hidden_states(policy, tokens, layout.positions, layout)[0][layout.index]
        difference = _difference(policy.logits(hidden), wanted)
        layers = policy.config.num_hidden_layers
        if sorted(layout.called) != list(range(layers)):
            missed = sorted({*range(layers)} - {*layout.called})
            if not missed:
                return f"some of its {layers} layers use attention more than once", difference
            return f"{len(missed)} of {layers} layers do not use transformers' attention interface", difference
        if not difference <= allowed(policy.head.weight.dtype, wanted):
            return f"its logits differ by {difference:.2g} in a packed pass", difference
        if policy.head.weight.dtype != torch.float32 and not decoder.fits(body):
            return _agrees_in_float32(policy, rows, layout), difference
        return "", difference
    except Unsupported as error:
        return str(error), math.nan
    except Exception as error:
        return f"its layers do not take packed rows ({first_line(error)})", math.nan
    finally:
        policy.model.eval()
        use_attention(body, policy.route.own)


def _agrees_in_float32(policy: Policy, rows: Rows, layout: Packed) -> str:
    """The comparison of a small model on a copy in float32, where rounding cannot hide a difference."""
    if sum(p.numel() for p in policy.model.parameters()) > SMALL:
        return ""
    wide = replace(policy, model=copy.deepcopy(lora.unwrap(policy.model)).float())
    use_attention(wide.body, policy.route.own)
    wanted = torch.cat([wide.model(input_ids=row.unsqueeze(0), use_cache=False).logits[0] for row in rows])
    use_attention(wide.body, NAME)
    tokens = torch.cat(rows)[layout.kept].unsqueeze(0)
    out = wide.body(input_ids=tokens, position_ids=layout.positions, use_cache=False, layout=layout)
    difference = _difference(wide.logits(out.last_hidden_state[0][layout.index]), wanted)
    agrees = difference <= allowed(torch.float32, wanted)
    return "" if agrees else f"its logits differ by {difference:.2g} in a packed pass in float32"


def _cache_agrees(policy: Policy, row: torch.Tensor, truth: torch.Tensor) -> bool:
    """Whether a prefill and single tokens with the model's own cache give the whole row's logits."""
    begun = max(1, len(row) - STEPS)
    turn = policy.route.turn
    if begun <= turn < len(row):  # the whole row has other rotary angles than its beginning
        row, truth, begun = row[:turn], by_rows_logits(policy, row[:turn]), max(1, turn - STEPS)
    try:
        hidden, cache = advance(policy, row[:begun], {})
        parts = [hidden]
        for token in row[begun:].split(1):
            hidden, cache = advance(policy, token, cache)
            parts.append(hidden)
        difference = _difference(policy.logits(torch.cat(parts)), truth)
    except Exception:
        return False  # any failure means the same: whole rows are computed instead
    return bool(cache) and difference <= allowed(policy.head.weight.dtype, truth)


@torch.no_grad()
def check_runs(policy: Policy) -> None:
    """Computes a short row; raises whatever the model raises."""
    tokens = short_rows(policy)[0]
    states(
        policy,
        tokens,
        torch.tensor([len(tokens)], device=tokens.device),
        (),
        torch.arange(len(tokens), device=tokens.device),
    )


def by_rows_logits(policy: Policy, row: torch.Tensor) -> torch.Tensor:
    """Logits (n, V) of one row (n,) by its own call of the unchanged model."""
    return policy.logits(by_rows(policy, row, torch.tensor([len(row)]))).float()


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours.float() - theirs.float()).abs().max())


def allowed(dtype: torch.dtype, logits: torch.Tensor) -> float:
    """Largest difference that counts as rounding: TOLERANCE, in proportion for logits above 10."""
    return TOLERANCE[dtype] * max(1.0, float(logits.float().abs().max()) / 10)


def first_line(error: Exception) -> str:
    """The type and first line of an error, with the second if the first only introduces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1])
    if len(line) > 160:
        sentence = line[:160].rpartition(". ")[0]
        line = f"{sentence}." if sentence else f"{line[:160]}…"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
