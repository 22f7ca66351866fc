"""Embedded engine: in-process continuous batching on the learner's weights.

A prompt is prefilled once for all of its completions. Each decode step is one pass over all slots in use. It is
batch-invariant (products.py, models/invariance.py), and each token is drawn with the random number of its sequence and
position, so a completion does not depend on the other sequences in the batch, the number of slots, or earlier samples.
`FusedDecoder` computes the steps where it applies, else `PlainDecoder`; sequences that the packed pass cannot express
(models/check.py) are computed by `GeneralDecoder`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import nn

from posttrain import rng
from posttrain.config import RolloutConfig
from posttrain.data.thoughts import hidden_tokens, shown_text
from posttrain.models import decoder, kernels
from posttrain.models.check import allowed, first_line
from posttrain.models.invariance import TILE
from posttrain.models.load import take_weights, weight_views
from posttrain.models.policy import Policy, by_rows
from posttrain.rollout.decoding import Decoder
from posttrain.rollout.fused import FusedDecoder
from posttrain.rollout.general import GeneralDecoder
from posttrain.rollout.generator import OnDone, OnToken, Request, draw
from posttrain.rollout.plain import PlainDecoder
from posttrain.rollout.prefixes import BUDGET, Prefixes
from posttrain.rollout.scheduler import Scheduler
from posttrain.rollout.stopping import StopStrings
from posttrain.types import Completion, ConfigError, RolloutError, SamplingParams

DECODED = 3  # tokens that are decoded to compare a decoder with the forward pass
_compared: WeakKeyDictionary[nn.Module, dict[tuple[str, torch.dtype], str]] = WeakKeyDictionary()
"""By model, decoder and dtype of its products: how its logits differ from whole rows; empty if they agree."""


class _Slots:
    """State of each slot, as arrays (slots, max_tokens) and (slots,)."""

    def __init__(self, slots: int, max_tokens: int) -> None:
        self.sequence: list[tuple[int, int] | None] = [None] * slots  # (request, index)
        self.tokens = np.zeros((slots, max_tokens), np.int64)
        self.logprobs = np.zeros((slots, max_tokens), np.float32)
        self.kept = np.zeros((slots, max_tokens), np.float32)
        self.uniforms = np.zeros((slots, max_tokens))
        self.lengths = np.zeros(slots, np.int64)
        self.limits = np.zeros(slots, np.int64)
        self.prompts = np.zeros(slots, np.int64)  # tokens in the prompt
        self.prefixes = [np.zeros(0, np.int32)] * slots

    def begin(self, slot: int, group: int, index: int, request: Request, max_tokens: int) -> None:
        """Assigns a new completion to a slot."""
        limit = request.limit(index, max_tokens)
        self.sequence[slot] = (group, index)
        begun, self.prefixes[slot] = len(request.prefix), request.prefix
        self.uniforms[slot, :limit] = rng.uniforms(request.seeds[index], begun + limit)[begun:]
        self.lengths[slot], self.limits[slot], self.prompts[slot] = 0, limit, len(request.prompt) + begun

    def move(self, source: int, target: int) -> int:
        """Copies one slot to another; returns the number of tokens its sequence has in the cache."""
        self.sequence[target], self.prefixes[target] = self.sequence[source], self.prefixes[source]
        for array in (self.tokens, self.logprobs, self.kept, self.uniforms, self.lengths, self.limits, self.prompts):
            array[target] = array[source]
        return int(self.prompts[target] + self.lengths[target] - 1)

    def add(self, slots: np.ndarray, drawn: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> np.ndarray:
        """Appends the sampled tokens to `slots` and returns them."""
        tokens, logprobs, kept = (column.cpu().numpy() for column in drawn)
        at = self.lengths[slots]
        self.tokens[slots, at], self.logprobs[slots, at], self.kept[slots, at] = tokens, logprobs, kept
        self.lengths[slots] += 1
        return tokens

    def completed(self, strings: StopStrings, slots: np.ndarray, unfinished: np.ndarray) -> dict[int, str]:
        """The stop strings that the newest tokens of the unfinished `slots` complete, by position in `slots`."""
        found: dict[int, str] = {}
        for row in np.flatnonzero(unfinished).tolist():
            slot = slots[row]
            written = np.concatenate([self.prefixes[slot], self.tokens[slot, : self.lengths[slot]]])
            if string := strings.completed_by(written):
                found[row] = string
        return found

    def completion(self, slot: int, stopped: bool, version: int, stop_string: str) -> Completion:
        """The completion in a slot."""
        n = self.lengths[slot]
        tokens = self.tokens[slot, :n].astype(np.int32)
        logprobs, kept = self.logprobs[slot, :n].copy(), self.kept[slot, :n].copy()
        return Completion(tokens, logprobs, kept, "stop" if stopped else "length", version, stop_string)


class EmbeddedGenerator:
    """`Generator` on an in-process policy: the learner's, or a copy with older weights."""

    def __init__(
        self, policy: Policy, slots: int = 128, dtype: torch.dtype | None = None, prefix_bytes: int = BUDGET
    ) -> None:
        """`dtype` of the matrix products defaults to the model's. `prefix_bytes` is the memory for keys and values of
        completions that may be continued. Raises ConfigError if the decoder does not support the dtype."""
        self.policy = policy
        self.slots = -(-slots // TILE) * TILE
        self.version = 0
        self.decoder = make_decoder(policy, self.slots, dtype or policy.head.weight.dtype)
        self.prefixes = Prefixes(prefix_bytes)

    def load(self, weights: Mapping[str, torch.Tensor], version: int) -> None:
        """Loads new weights, named as in `trainable(policy)`; no copy if they are the policy's own tensors."""
        take_weights(self.policy, weights)
        self.version = version
        self.prefixes.clear()

    def weights(self) -> dict[str, torch.Tensor]:
        """The current weights by name (views, not copies)."""
        return weight_views(self.policy)

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None = None,
        on_done: OnDone | None = None,
    ) -> list[list[Completion]]:
        """See `Generator.generate`. Raises RolloutError if prompt and completion exceed the model's context."""
        if not requests:
            return []
        self._check(requests, params)
        self.policy.model.eval()
        done: list[list[Completion]] = [[] for _ in requests]
        with torch.no_grad():
            for steps, own in self._parts(requests, params):
                calls = _renumbered(own, on_token), _renumbered(own, on_done)
                made = self._generate(steps, [requests[i] for i in own], params, *calls)
                for i, completions in zip(own, made, strict=True):
                    done[i] = completions
        return done

    def _parts(self, requests: Sequence[Request], params: SamplingParams) -> Iterator[tuple[Decoder, list[int]]]:
        """The requests that are sampled together, with their decoder, which depends on the request alone so that
        batch-mates do not matter. At most as many as there are slots may be continued or continue another."""
        for beyond in (False, True):
            general = beyond and not isinstance(self.decoder, GeneralDecoder)
            steps = GeneralDecoder(self.policy, self.slots) if general else self.decoder
            own: list[int] = []
            held = 0
            for i, request in enumerate(requests):
                if (_longest(request, params) > self.policy.route.reach) != beyond:
                    continue
                if held == self.slots:
                    yield steps, own
                    own, held = [], 0
                own.append(i)
                held += request.keep or bool(request.pieces)
            if own:
                yield steps, own

    def _generate(
        self,
        steps: Decoder,
        requests: Sequence[Request],
        params: SamplingParams,
        on_token: OnToken | None,
        on_done: OnDone | None,
    ) -> list[list[Completion]]:
        """Samples with one decoder. See `Generator.generate`."""
        scheduler = Scheduler(self.slots, [len(r.seeds) for r in requests])
        slots = _Slots(min(self.slots, len(scheduler.waiting)), params.max_tokens)
        stops, strings = np.array(self.policy.stop_ids), self._stop_strings(params)
        paths, prompts = self._begin(steps, requests, params)
        done: list[list[Completion | None]] = [[None] * len(r.seeds) for r in requests]

        def take(used: np.ndarray, logits: torch.Tensor) -> None:
            """Samples a token for each of the `used` slots from its row of `logits`; frees finished slots."""
            uniforms = torch.from_numpy(slots.uniforms[used, slots.lengths[used]])
            tokens = slots.add(used, _draw(logits, uniforms, params))
            stopped = np.isin(tokens, stops)
            if on_token:
                for slot, token in zip(used.tolist(), tokens.tolist(), strict=True):
                    on_token(*slots.sequence[slot], token)  # type: ignore[misc]
            ended = slots.completed(strings, used, ~stopped) if strings else {}
            stopped[[*ended]] = True
            for row in np.flatnonzero(stopped | (slots.lengths[used] == slots.limits[used])).tolist():
                slot = int(used[row])
                group, index = slots.sequence[slot]  # type: ignore[misc]
                completion = slots.completion(slot, bool(stopped[row]), self.version, ended.get(row, ""))
                done[group][index] = completion
                if requests[group].keep:
                    self.prefixes.keep(steps, slot, paths[group], completion.tokens)
                scheduler.finish(slot)
                if on_done:
                    on_done(group, index, completion)

        while True:
            while started := scheduler.admit():
                new = sorted({group for _, group, _ in started} - prompts.keys())
                prompts |= zip(new, steps.prefill([requests[g].context for g in new]), strict=True)
                for slot, group, index in started:
                    slots.begin(slot, group, index, requests[group], params.max_tokens)
                    steps.start(slot, prompts[group])
                take(np.array([s for s, _, _ in started]), torch.cat([prompts[g].logits for _, g, _ in started]))
                for group in {g for _, g, _ in started if scheduler.last_of_group(g)}:
                    del prompts[group]
            for source, target in scheduler.compact():
                steps.move(source, target, slots.move(source, target))
            if not scheduler.active:
                return [[c for c in group if c is not None] for group in done]
            used = np.arange(scheduler.active)
            written = slots.lengths[used] - 1
            newest = torch.from_numpy(slots.tokens[used, written])
            take(used, steps.step(newest, torch.from_numpy(slots.prompts[used] + written)))

    def _begin(
        self, steps: Decoder, requests: Sequence[Request], params: SamplingParams
    ) -> tuple[dict[int, bytes], dict[int, Any]]:
        """Prepares the decoder; returns path and prompt of each request that continues another or may be continued."""
        own = max([params.max_tokens, *(n for r in requests for n in r.pieces)])
        longest, deepest = max(len(r.context) for r in requests), max(len(r.pieces) for r in requests)
        steps.prepare(sum(len(r.seeds) for r in requests), longest, own, deepest)
        tree = [g for g, r in enumerate(requests) if r.keep or r.pieces]
        places = self.prefixes.places(steps, [requests[g] for g in tree]) if tree else []
        paths = {group: place.path for group, place in zip(tree, places, strict=True)}
        return paths, {group: place.prompt for group, place in zip(tree, places, strict=True)}

    def _stop_strings(self, params: SamplingParams) -> StopStrings | None:
        """The detector of the parameters' stop strings, if there are any."""
        if not params.stop:
            return None
        tokenizer = self.policy.tokenizer
        return StopStrings(params.stop, partial(shown_text, tokenizer), [*hidden_tokens(tokenizer).values()])

    def _check(self, requests: Sequence[Request], params: SamplingParams) -> None:
        context = getattr(self.policy.config, "max_position_embeddings", None)
        longest = max((len(r.context) for r in requests), default=0)
        if context and longest + params.max_tokens > context:
            raise RolloutError(
                f"a prompt of {longest} tokens plus max_tokens={params.max_tokens} exceeds the model's context of "
                f"{context}. Lower rollout.max_tokens or data.max_prompt_tokens.",
                boundary="generator",
            )
        turn = self.policy.route.turn
        for request in requests:
            prefilled = len(request.prompt) if request.pieces else len(request.context)
            if prefilled <= turn < _longest(request, params):
                raise RolloutError(
                    f"a prompt of {prefilled} tokens plus max_tokens={params.max_tokens} crosses "
                    f"original_max_position_embeddings={turn}, where longrope changes the positions of all tokens. "
                    "Lower rollout.max_tokens or data.max_prompt_tokens.",
                    boundary="generator",
                )


def make_decoder(policy: Policy, slots: int, dtype: torch.dtype) -> Decoder:
    """The fastest decoder that gives the logits of transformers' forward pass; `dtype` is that of the products.

    Adds a note to the policy if only the general one does. Raises ConfigError if no decoder supports the dtype.
    """
    packed, own = policy.route.reach > 0, policy.head.weight.dtype
    fused = packed and decoder.fits(policy.body)
    if dtype != own and not fused:
        raise ConfigError(
            f"rollout.dtype asks for products in {dtype} on a {own} model, which needs the fused decoder ("
            'Llama-like, float32, on a CPU with a C compiler). Set rollout.dtype = "model" or change model.dtype.'
        )
    if not packed:
        return GeneralDecoder(policy, slots)
    kind = FusedDecoder.__name__ if fused else PlainDecoder.__name__
    compared = _compared.setdefault(policy.body, {})
    try:
        made = FusedDecoder(policy, slots, dtype) if fused else PlainDecoder(policy, slots)
        reason = compared[kind, dtype] if (kind, dtype) in compared else _difference(made, policy, dtype)
        compared[kind, dtype] = reason
    except ConfigError:
        raise
    except Exception as error:
        reason = f"the packed decoder fails ({first_line(error)})"
    else:
        if not reason:
            return made
    name = type(policy.body).__name__
    policy.notes.append(f"{name} is sampled by transformers' own attention, one row at a time (slower): {reason}.")
    return GeneralDecoder(policy, slots)


@torch.no_grad()
def _difference(made: Decoder, policy: Policy, dtype: torch.dtype) -> str:
    """Decodes a few tokens after two prompts and compares with whole rows; empty if they agree."""
    rows = [np.arange(5, 5 + n) % policy.vocab for n in (12, 7)]
    begun = [row[: len(row) - DECODED] for row in rows]
    made.prepare(len(rows), max(len(row) for row in begun), DECODED)
    prompts = made.prefill(begun)
    found = [torch.cat([prompt.logits for prompt in prompts])]  # of steps; a step's logits are valid until the next
    for slot, prompt in enumerate(prompts):
        made.start(slot, prompt)
    for step in range(DECODED):
        at = torch.tensor([len(row) for row in begun]) + step
        newest = torch.tensor([int(row[i]) for row, i in zip(rows, at.tolist(), strict=True)])
        found.append(made.step(newest, at).clone())
    lengths = torch.tensor([len(row) for row in rows], device=policy.device)
    tokens = torch.from_numpy(np.concatenate(rows)).to(policy.device)
    whole = policy.logits(by_rows(policy, tokens, lengths)).split([len(row) for row in rows])
    truth = torch.stack([row[len(row) - DECODED - 1 :] for row in whole], 1)
    gap = float((torch.stack(found).float() - truth.float()).abs().max())
    return "" if gap <= allowed(dtype, truth) else f"decoded tokens' logits differ by {gap:.2g} from whole rows"


def _longest(request: Request, params: SamplingParams) -> int:
    """Tokens of a request's longest possible row."""
    return len(request.context) + max(request.limit(i, params.max_tokens) for i in range(len(request.seeds)))


def _renumbered(own: Sequence[int], call: Any) -> Any:
    """The callback for requests `own` of a call, which are numbered from 0 in their part of it."""
    return call and (lambda group, *rest: call(own[group], *rest))


def _draw(
    logits: torch.Tensor, uniforms: torch.Tensor, params: SamplingParams
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`draw`, with the CPU kernel for untruncated float32 sampling."""
    whole = params.top_p == 1 and not 0 < params.top_k < logits.shape[-1]
    if not (whole and kernels.takes(logits)):
        return draw(logits, uniforms.to(logits.device), params)
    tokens, logprobs = kernels.draw(logits, uniforms, params.temperature)
    return tokens, logprobs, torch.zeros(len(tokens))


def make(policy: Policy, cfg: RolloutConfig) -> EmbeddedGenerator:
    """Makes the engine for `rollout.engine = "embedded"`."""
    return EmbeddedGenerator(policy, cfg.slots, torch.bfloat16 if cfg.dtype == "bfloat16" else None)


def versions(_: RolloutConfig) -> dict[str, str]:
    """Empty: every run header already has this package's version."""
    return {}
