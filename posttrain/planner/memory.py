"""Memory model of a run: from model shape and settings to bytes by part.

Nothing is loaded or measured here, so the same functions work for other machines. Each part is one small function that
names the file whose tensors it counts. `posttrain/planner/estimate.py` adds measurements; `bench/memory.py` compares
the result with real runs.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from posttrain.config import Recipe, RolloutConfig, Sampling
from posttrain.models.shapes import ModelShape, shape_of

BASELINE = 356 << 20
"""Resident bytes of a process that has only imported torch, transformers and posttrain.api."""
HEAP_BLOCK = 32 << 20
"""glibc allocates smaller blocks from the heap; larger ones are mapped individually and unmapped when freed. A freed
heap block leaves a gap: torch requests aligned blocks, and before glibc 2.38 a gap does not fit the next block of its
size."""
HEAP_KEPT = 0.9
"""Share of the heap that stays resident between passes."""
LOGITS_PER_CHUNK = 1 << 24
"""As in posttrain/train/forward.py."""
DRAW_BYTES = 28
"""Bytes per logit in posttrain/rollout/generator.py:draw: two float64 and three float32 values."""
TILE, CACHE_BLOCK, WORTH, PACKED_HEAD, PREFILL, PREFILL_ROWS = 32, 64, 16, 8192, 4096, 1024
"""As in posttrain/models/invariance.py, rollout and data/batching.py. PACKED_HEAD: larger output layers are read in
place. PREFILL and PREFILL_ROWS: prompt tokens per prefill pass with and without kernels."""


@dataclass(frozen=True)
class Rows:
    """Row lengths in tokens: `prompt` and `answer` of the longest row, and means, which determine the time."""

    prompt: int
    answer: int
    mean_prompt: float = 0.0
    mean_answer: float = 0.0

    @property
    def longest(self) -> int:
        return self.prompt + self.answer

    @property
    def mean(self) -> float:
        return (self.mean_prompt or self.prompt) + (self.mean_answer or self.answer)


@dataclass(frozen=True)
class Where:
    """Hardware of a run. `fused`: posttrain/models/kernels are available (float32 on a CPU with a C compiler)."""

    gpus: int = 1
    cuda: bool = False
    fused: bool = True
    baseline: int = BASELINE


@dataclass(frozen=True)
class Memory:
    """Bytes by part: `held` for the whole run, and what each phase adds."""

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """Peak bytes of the run."""
        return self.of(self.peak_phase)

    def of(self, phase: str) -> int:
        """Peak bytes of a phase."""
        return sum(self.held.values()) + sum(self.phases[phase].values())


def plan_memory(recipe: Recipe, shape: ModelShape, rows: Rows, where: Where | None = None) -> Memory:
    """Estimates the memory of a resolved recipe for a model of `shape` and rows of length `rows`."""
    where = where or Where()
    held = {"process": where.baseline, **states(recipe, shape, where)}
    if samples(recipe):
        copies = 2 if lags(recipe) else 1  # one generator for training, one for evaluation
        held |= {name: size * copies for name, size in generator(recipe, shape, rows, where).items()}
    training = training_pass(recipe, shape, largest_pass(recipe, rows), where)
    phases: dict[str, dict[str, int]] = {"training pass": training}
    if scores(recipe):
        whole = largest_pass(recipe, rows, all_rows=True)
        phases["scoring"] = scoring_phase(recipe, shape, whole, where)
    if samples(recipe):
        phases["sampling"] = sampling_phase(recipe, shape, rows, where)
    if not where.cuda:  # later phases reuse heap memory that the passes left
        left = HEAP_KEPT * (training["activations"] + training["gaps in the heap"])
        for parts in list(phases.values())[1:]:
            parts["heap kept by the allocator"] = max(0, round(left) - sum(parts.values()))
    return Memory(held, phases)


# --- held for the whole run ------------------------------------------------------------------------------------------


def width_of(recipe: Recipe) -> int:
    """Bytes per weight."""
    return 4 if recipe.model.dtype == "float32" else 2


def trainable(recipe: Recipe, shape: ModelShape) -> int:
    """Number of trainable parameters."""
    return shape.adapters(recipe.model.lora_rank) if recipe.model.lora_rank else shape.parameters


def samples(recipe: Recipe) -> bool:
    """Whether training completions are sampled, in every step or before the first."""
    return recipe.facts().samples != "never"


def scores(recipe: Recipe) -> bool:
    """Whether there are no-grad passes: reference and old log-probabilities, values, held-out rows."""
    facts = recipe.facts()
    return facts.scoring_passes > 0 or facts.held_out_pass


def states(recipe: Recipe, shape: ModelShape, where: Where) -> dict[str, int]:
    """Weights of all models and optimizer states: posttrain/train/learners/local.py, reference.py and critic.py.

    Gradients exist from the first pass of a step to its update, so they count towards the training pass. Each of N
    devices holds 1/N of the total.
    """
    size, learns, facts = width_of(recipe), trainable(recipe, shape), recipe.facts()
    model = shape.parameters * size
    adapters = learns * 4 if recipe.model.lora_rank else 0  # PEFT keeps adapters in float32
    lanes = recipe.train.lanes > 1  # their masters are one flat vector
    masters = learns * 4 if lanes or (size == 2 and not recipe.model.lora_rank) else 0
    found = {"weights": model + adapters, "float32 masters": masters, "optimizer": learns * 8}
    if keeps_reference(recipe):
        found["reference model"] = reference_bytes(recipe, shape)
    if facts.critic == "separate":
        found["critic"] = model + adapters + masters + learns * 8
    if lags(recipe):
        waiting = learns * (4 if recipe.model.lora_rank else size)  # only what is trained
        found["sampler's copy"] = model + adapters + (facts.sampler_copies - 1) * waiting
    if facts.starting_weights:
        found["starting weights"] = learns * (4 if recipe.model.lora_rank else size)
    if facts.teacher:
        found["teacher"] = model
    for folder in reward_folders(recipe):
        found["reward model"] = found.get("reward model", 0) + shape_of(folder).parameters * 4
    return {name: -(-count // where.gpus) for name, count in found.items() if count}


def reference_bytes(recipe: Recipe, shape: ModelShape) -> int:
    """Bytes of a frozen copy of the starting model; 0 with LoRA, where the policy without adapters is the reference."""
    return 0 if recipe.model.lora_rank else shape.parameters * width_of(recipe)


def keeps_reference(recipe: Recipe) -> bool:
    """Whether a frozen copy of the model stays in memory (train/reference.py); not needed with LoRA."""
    return recipe.facts().reference == "frozen" and not recipe.model.lora_rank


def rollout_of(recipe: Recipe) -> RolloutConfig:
    """The rollout section of a recipe; defaults if it has none."""
    return recipe.rollout if isinstance(recipe, Sampling) else RolloutConfig()


def reward_folders(recipe: Recipe) -> list[Path]:
    """Model folders named by `model:A+B` in `reward.name` (posttrain/rewards/models.py)."""
    name = recipe.reward.name if isinstance(recipe, Sampling) else ""
    said = re.findall(r"model:([^\s&*(),='\"]+)", name)
    if name.startswith("model:") and " & " not in name and all(Path(f).is_dir() for f in name[6:].split("+")):
        said = [name.removeprefix("model:")]  # folder names may contain any character
    folders = [Path(part) for spec in said for part in spec.split("+")]
    return [f / "model" if (f / "run.json").is_file() else f for f in folders]


def lags(recipe: Recipe) -> bool:
    """Whether completions are sampled from a copy of the policy (`algo.max_lag` or `algo.ahead`)."""
    return recipe.facts().sampler_copies > 0


def by_kernels(recipe: Recipe, where: Where) -> bool:
    """Whether posttrain/models/kernels are used between matrix products."""
    return where.fused and not where.cuda and recipe.model.dtype == "float32"


def generator(recipe: Recipe, shape: ModelShape, rows: Rows, where: Where) -> dict[str, int]:
    """Memory a generator keeps between steps: posttrain/rollout/fused.py with kernels, else plain.py.

    With kernels: a packed copy of the weights, a KV cache for completions and one for prompts, and the latest logits.
    """
    prompts, answers = at_once(recipe)
    kv = token_kv(shape, recipe)
    if by_kernels(recipe, where):
        cache = (answers * -(-rollout_of(recipe).max_tokens // CACHE_BLOCK) * CACHE_BLOCK + prompts * rows.prompt) * kv
        head = shape.head * 4 if shape.vocab <= PACKED_HEAD else 0
        packed = shape.matrices * (2 if rollout_of(recipe).dtype == "bfloat16" else 4) + head
        return {"weights for decoding": packed, "KV cache": cache, "newest logits": answers * shape.vocab * 4}
    capacity = -(-(rows.prompt + rollout_of(recipe).max_tokens) // CACHE_BLOCK) * CACHE_BLOCK
    return {"KV cache": -(-answers // TILE) * TILE * capacity * kv}


def at_once(recipe: Recipe) -> tuple[int, int]:
    """Maximum number of prompts and completions in a generator at once, over training steps and evaluation."""
    facts, slots = recipe.facts(), rollout_of(recipe).slots
    batches = [(facts.prompts, facts.group_size)]
    batches += [(recipe.eval.problems or slots, recipe.eval.samples)] if isinstance(recipe, Sampling) else []
    prompts = max(min(count, -(-slots // each) + 1) for count, each in batches)
    return prompts, min(slots, max(count * each for count, each in batches))


def token_kv(shape: ModelShape, recipe: Recipe) -> int:
    """KV cache bytes per token, all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width_of(recipe)


def batch_rows(recipe: Recipe) -> int:
    """Rows in one optimizer batch."""
    return max(1, recipe.facts().batch_rows)


@dataclass(frozen=True)
class Pass:
    """One forward pass: number of tokens, how many are trained, and whether it is the only pass of the update."""

    tokens: int
    trained: int
    alone: bool = True


def largest_pass(recipe: Recipe, rows: Rows, all_rows: bool = False) -> Pass:
    """The largest pass of an optimizer batch, or over all rows of a step (posttrain/data/batching.py:plan).

    Rows with the same prompt form a unit whose prompt is computed once. Passes have equal size and as many units as
    fit; a unit that does not fit is split, and each part recomputes the prompt.
    """
    room = recipe.train.micro_batch_tokens
    alike = sharing(recipe, rows)
    units = max(1, batch_rows(recipe) // alike)
    if all_rows:
        units = units * recipe.facts().minibatches if samples(recipe) else max(units, room)
    unit = rows.prompt + alike * rows.answer
    if unit <= room:
        passes = -(-units // (room // unit))
        count = -(-units // passes)
        return Pass(count * unit, count * alike * rows.answer, passes == 1)
    fits = 2 if planned_in_pairs(recipe) else max(1, (room - rows.prompt) // rows.answer)  # pairs stay whole
    count = -(-alike // -(-alike // fits))
    return Pass(rows.prompt + count * rows.answer, count * rows.answer, False)


def sharing(recipe: Recipe, rows: Rows) -> int:
    """Number of rows that share one computed prompt."""
    return 1 if rows.prompt < WORTH else recipe.facts().shared_prompt


def planned_in_pairs(recipe: Recipe) -> bool:
    """Whether rows 2i and 2i + 1 are two completions of one prompt."""
    return recipe.facts().paired


def layer_tensors(recipe: Recipe, shape: ModelShape, tokens: int, where: Where) -> list[tuple[float, float]]:
    """(bytes, count) of the tensors that one layer saves for its backward pass.

    posttrain/models/decoder.py with kernels, else transformers' Llama. Attention (posttrain/models/packing.py) saves
    queries, keys and values; its output is saved by the output projection, and probabilities are recomputed.
    """
    size, keys = width_of(recipe), tokens * shape.kv_heads * shape.head_dim
    attention, stream, unit = tokens * shape.attention, tokens * shape.width, tokens * shape.ffn
    if by_kernels(recipe, where):
        return [(attention * 4, 2), (keys * 4, 2), (stream * 4, 4), (unit * 4, 3)]
    if size == 4:
        return [(attention * 4, 4), (keys * 4, 2), (stream * 4, 6), (unit * 4, 4)]
    if not recipe.model.lora_rank:  # norms are computed in float32
        return [(attention * 2, 4), (keys * 2, 2), (stream * 2, 4), (stream * 4, 2), (unit * 2, 4)]
    casts = [(attention * 4, 1), (stream * 4, 5), (unit * 4, 1)]  # PEFT saves adapter inputs in float32
    return [*casts, (attention * 2, 3), (keys * 2, 2), (stream * 4, 2), (unit * 2, 3)]


def layer_gaps(recipe: Recipe, shape: ModelShape, tokens: int, where: Where) -> float:
    """Bytes of heap gaps left by temporaries that a layer frees between saved tensors.

    Temporaries are queries and keys before the rotary embedding, and the outputs of attention and MLP before they are
    added to the residual stream. With LoRA, each product leaves one more gap of the size of its output. Without
    kernels, each norm leaves one in float32, and attention one.
    """
    if where.cuda:
        return 0.0
    unit, keys = tokens * width_of(recipe), shape.kv_heads * shape.head_dim
    freed: list[float] = [shape.attention, keys, shape.width, shape.width]
    if not by_kernels(recipe, where):
        freed += [shape.attention, *[shape.width * 4 / width_of(recipe)] * 2]
    if recipe.model.lora_rank:
        freed += [shape.attention, keys, keys, shape.width, shape.ffn, shape.ffn, shape.width]
    return sum(unit * size * max(0.0, 1 - unit * size / HEAP_BLOCK) for size in freed)


def activations(recipe: Recipe, shape: ModelShape, tokens: int, where: Where) -> tuple[int, int]:
    """Bytes that the layers save for the backward pass of `tokens` tokens, and the heap gaps between them."""
    gaps = round(shape.layers * layer_gaps(recipe, shape, tokens, where))
    if not recipe.model.gradient_checkpointing:
        return shape.layers * one_layer(recipe, shape, tokens, where), gaps
    inputs = tokens * shape.width * width_of(recipe) * (2 if by_kernels(recipe, where) else 1)
    return shape.layers * inputs, gaps


def one_layer(recipe: Recipe, shape: ModelShape, tokens: int, where: Where) -> int:
    """Bytes that one layer saves."""
    return round(sum(each * count for each, count in layer_tensors(recipe, shape, tokens, where)))


def projection(recipe: Recipe, shape: ModelShape, trained: int, where: Where) -> int:
    """Bytes of logit chunks in posttrain/train/projection.py; 0 for models with a score head.

    With kernels, a chunk is overwritten with its gradient, and with several chunks the last one is alive while the next
    is computed. Without kernels, log-probabilities, their exponentials and a product of both need chunks of their own.
    """
    if recipe.facts().trains == "scorer":
        return 0
    chunk = min(trained, max(1, LOGITS_PER_CHUNK // shape.vocab))
    blocks = 2.0 if trained > chunk else 1.0
    if where.cuda or not where.fused:
        blocks = 4.0
    elif width_of(recipe) == 2:
        blocks *= 1.5  # each also in the weights' dtype
    return round(chunk * shape.vocab * 4 * blocks)


def training_pass(recipe: Recipe, shape: ModelShape, update: Pass, where: Where) -> dict[str, int]:
    """One forward and backward pass: posttrain/train/learners/local.py:forward_backward.

    In a single pass, gradients reuse memory freed by activations; with several passes, gradients are already allocated.
    """
    size, learns = width_of(recipe), trainable(recipe, shape)
    whole = not recipe.model.lora_rank
    head = shape.head * (4 if size == 4 else 6) if whole and recipe.facts().trains == "policy" else 0
    low = learns * 2 if size == 2 and whole else 0  # bf16 gradients before they are added to the fp32 ones
    kept, gaps = activations(recipe, shape, update.tokens, where)
    accumulated = 0 if update.alone else learns * 4
    if recipe.train.lanes > 1:  # the sums of train/lanes.py:tree beside a pass's own gradient
        accumulated = learns * 4 * (1 + recipe.train.lanes.bit_length())
    if recipe.facts().critic == "separate":
        accumulated += learns * 4  # the critic's gradients; its passes alternate with the policy's
    late = low + learns * 4 if update.alone else low
    working = update.tokens * (3 * shape.ffn + 2 * shape.width) * size
    if recipe.model.gradient_checkpointing:  # one layer is recomputed at a time
        working += one_layer(recipe, shape, update.tokens, where)
    logits = projection(recipe, shape, update.trained, where)
    return {
        "gradients": -(-(accumulated + max(0, late - kept)) // where.gpus),
        "activations": kept,
        "gaps in the heap": gaps,
        "logits, or gradients of activations": max(working, logits),
        "the output layer's gradient": head,
        "gathered weights": 2 * shape.parameters * size // shape.layers if where.gpus > 1 else 0,
    }


def sampling_phase(recipe: Recipe, shape: ModelShape, rows: Rows, where: Where) -> dict[str, int]:
    """Prefill passes and the logits of a decode step: posttrain/rollout/engines/embedded.py, plain.py and fused.py.

    Prefill computes one layer at a time and keeps the keys and values of all layers, stacked if there are no kernels.
    """
    prompts, answers = at_once(recipe)
    tokens, kv = prompts * rows.prompt, token_kv(shape, recipe)
    layer = (3 * shape.ffn + 6 * shape.width) * width_of(recipe)
    if by_kernels(recipe, where):
        made = min(tokens, max(rows.prompt, PREFILL)) * (layer + kv)
        return {"prompts' passes": made, "decode logits": answers * shape.vocab * 4}
    found = {"prompts' passes": min(tokens, max(rows.prompt, PREFILL_ROWS)) * (layer + 2 * kv)}
    return {**found, "prompts' keys and values": tokens * kv, "decode logits": answers * shape.vocab * DRAW_BYTES}


def scoring_phase(recipe: Recipe, shape: ModelShape, one: Pass, where: Where) -> dict[str, int]:
    """A no-grad pass (posttrain/train/forward.py): one layer at a time, then a chunk of logits."""
    layer = one_layer(recipe, shape, one.tokens, where)
    return {"one layer": layer, "logits": projection(recipe, shape, one.trained, where)}
