"""What a run will hold in memory, as arithmetic: a model's shape and settings → bytes by part.

Nothing is loaded or measured here and only the standard library is imported, so the same functions answer for a machine
that is not here. Each part is one small function that names the file whose tensors it counts. `posttrain/plan.py` adds
what has to be measured; `bench/memory.py` holds the result against real runs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.types import ConfigError

BASELINE = 356 << 20
"""Resident bytes of a process that has imported torch, transformers and posttrain.api and done nothing yet."""
HEAP_BLOCK = 32 << 20
"""Blocks below this come from glibc's heap; larger ones are mapped one by one and given back when freed."""
HEAP_GROWTH = 0.3
"""What the heap takes besides the smallest of those blocks: torch asks for aligned ones, and until glibc 2.38 a freed
aligned block does not fit the next request of its own size. Larger blocks leave smaller gaps."""
HEAP_KEPT = 0.85
"""Share of that heap which stays resident between passes."""
LOGITS_PER_CHUNK, BLOCKS_OF_LOGITS = 1 << 24, 6
"""As in posttrain/train/forward.py, and how many such blocks are alive at once in its backward pass."""
DRAW_BYTES = 28
"""Per logit while posttrain/rollout/generator.py:draw makes tokens of them: two in float64, three in float32."""
EXACT_KEYS, TILE, CACHE_BLOCK, WORTH = 512, 32, 64, 16
"""As in posttrain/models/attention.py and invariance.py, posttrain/rollout and posttrain/data/batching.py."""


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a Llama-like decoder: `width` of the residual stream, `ffn` of the gated unit, `vocab` rows."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    tied: bool

    @property
    def attention(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def matrices(self) -> int:
        """Weights of the layers' matrices; embedding and output layer are not among them."""
        keys = self.kv_heads * self.head_dim
        return self.layers * self.width * (2 * self.attention + 2 * keys + 3 * self.ffn)

    @property
    def head(self) -> int:
        """Weights of the output layer."""
        return self.vocab * self.width

    @property
    def parameters(self) -> int:
        """All weights: matrices, norms, embedding, and the output layer where it is one of its own."""
        return self.matrices + (2 * self.layers + 1) * self.width + self.head * (1 if self.tied else 2)

    def adapters(self, rank: int) -> int:
        """Weights of LoRA adapters on every matrix of the layers (posttrain/models/lora.py)."""
        keys = self.kv_heads * self.head_dim
        ends = 2 * (self.width + self.attention) + 2 * (self.width + keys) + 3 * (self.width + self.ffn)
        return self.layers * rank * ends


SHAPES = {
    "smollm2-135m": ModelShape(30, 576, 9, 3, 64, 1536, 49152, True),
    "smollm2-360m": ModelShape(32, 960, 15, 5, 64, 2560, 49152, True),
    "smollm2-1.7b": ModelShape(24, 2048, 32, 32, 64, 8192, 49152, True),
    "qwen2.5-0.5b": ModelShape(24, 896, 14, 2, 64, 4864, 151936, True),
    "qwen2.5-1.5b": ModelShape(28, 1536, 12, 2, 128, 8960, 151936, True),
    "qwen2.5-7b": ModelShape(28, 3584, 28, 4, 128, 18944, 152064, False),
    "qwen3-0.6b": ModelShape(28, 1024, 16, 8, 128, 3072, 151936, True),
    "llama-3.2-1b": ModelShape(16, 2048, 32, 8, 64, 8192, 128256, True),
    "llama-3.1-8b": ModelShape(32, 4096, 32, 8, 128, 14336, 128256, False),
}
"""Well-known shapes, for models that are not on this machine; a hub id's last part finds them."""


def shape_of(source: str | Path) -> ModelShape:
    """The shape that a model folder's config.json states, or a well-known one by name. Raises ConfigError."""
    file = Path(source) / "config.json"
    if not file.is_file():
        name = str(source).rpartition("/")[2].lower()
        for known in (name, name.removesuffix("-instruct"), name.removesuffix("-base")):
            if known in SHAPES:
                return SHAPES[known]
        raise ConfigError(
            f"the shape of model {str(source)!r} is not known: there is no folder of that name with a config.json. "
            f"Give a model folder, or one of {', '.join(SHAPES)}."
        )
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
        width, heads = int(raw["hidden_size"]), int(raw["num_attention_heads"])
        return ModelShape(
            layers=int(raw["num_hidden_layers"]),
            width=width,
            heads=heads,
            kv_heads=int(raw.get("num_key_value_heads") or heads),
            head_dim=int(raw.get("head_dim") or width // heads),
            ffn=int(raw["intermediate_size"]),
            vocab=int(raw["vocab_size"]),
            tied=bool(raw.get("tie_word_embeddings", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{file} does not describe a Llama-like model: {type(error).__name__} {error}.") from None


@dataclass(frozen=True)
class Rows:
    """Tokens of one row of data: `prompt` and `answer` of the longest, and their means, which decide the time."""

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
    """What a run is on. `fused` says that posttrain/kernels are used: float32 on a CPU with a C compiler."""

    gpus: int = 1
    cuda: bool = False
    fused: bool = True
    baseline: int = BASELINE


@dataclass(frozen=True)
class Memory:
    """Bytes by part: `held` throughout, and what each phase adds to it."""

    held: Mapping[str, int]
    phases: Mapping[str, Mapping[str, int]]

    @property
    def peak_phase(self) -> str:
        return max(self.phases, key=lambda name: sum(self.phases[name].values()))

    @property
    def peak(self) -> int:
        """The most bytes held at once."""
        return self.of(self.peak_phase)

    def of(self, phase: str) -> int:
        """The most bytes held in a phase."""
        return sum(self.held.values()) + sum(self.phases[phase].values())


def memory(algorithm: str, recipe: Any, shape: ModelShape, rows: Rows, where: Where | None = None) -> Memory:
    """The memory of a resolved recipe on a model of `shape` whose rows of data are `rows` tokens long."""
    where = where or Where()
    held = {"process": where.baseline, **states(algorithm, recipe, shape, where)}
    if samples(algorithm, recipe):
        copies = 2 if lags(algorithm, recipe) else 1  # one generator samples, another examines
        held |= {name: size * copies for name, size in generator(algorithm, recipe, shape, rows, where).items()}
    update = largest_pass(algorithm, recipe, rows)
    training = training_pass(algorithm, recipe, shape, update, where)
    scoring = scoring_phase(algorithm, recipe, shape, largest_pass(algorithm, recipe, rows, all_rows=True), where)
    kept = {} if where.cuda else {"heap kept by the allocator": round(HEAP_KEPT * training["activations"])}
    phases: dict[str, Mapping[str, int]] = {"training pass": training, "scoring": {**scoring, **kept}}
    if samples(algorithm, recipe):
        phases["sampling"] = {**sampling_phase(algorithm, recipe, shape, rows, where), **kept}
    return Memory(held, phases)


# --- what is held throughout ----------------------------------------------------------------------------------------


def width_of(recipe: Any) -> int:
    """Bytes of one weight."""
    return 4 if recipe.model.dtype == "float32" else 2


def trainable(recipe: Any, shape: ModelShape) -> int:
    """Weights that learn."""
    return shape.adapters(recipe.model.lora_rank) if recipe.model.lora_rank else shape.parameters


def samples(algorithm: str, recipe: Any) -> bool:
    """Whether answers are sampled: for feedback only where data.tasks names a task."""
    if algorithm in ("dpo", "reward", "prm"):
        return not ("." in recipe.data.tasks or "/" in recipe.data.tasks)
    return algorithm != "sft"


def states(algorithm: str, recipe: Any, shape: ModelShape, where: Where) -> dict[str, int]:
    """Weights of every model and the optimizer's numbers: posttrain/train/learner.py, frozen.py and critic.py.

    On N devices each holds one Nth of them.
    """
    size, learns, cfg = width_of(recipe), trainable(recipe, shape), recipe.algo
    model = shape.parameters * size
    adapters = learns * 4 if recipe.model.lora_rank else 0  # PEFT keeps adapters in float32
    masters = learns * 4 if size == 2 and not recipe.model.lora_rank else 0
    found = {"weights": model + adapters, "float32 masters": masters, "gradients": learns * 4}
    found["optimizer"] = learns * 8
    if keeps_reference(algorithm, recipe):
        found["reference model"] = model
    if algorithm == "ppo" and cfg.critic == "separate":
        found["critic"] = model + adapters + masters + learns * 12
    if lags(algorithm, recipe):
        found["sampler's copy"] = model + adapters
    if algorithm == "raft" and cfg.restart:
        found["starting weights"] = learns * (4 if recipe.model.lora_rank else size)
    if algorithm == "distill":
        found["teacher"] = model
    for folder in reward_folders(recipe):
        found["reward model"] = found.get("reward model", 0) + shape_of(folder).parameters * 4
    return {name: -(-count // where.gpus) for name, count in found.items() if count}


def keeps_reference(algorithm: str, recipe: Any) -> bool:
    """Whether a frozen copy stays (train/frozen.py); with LoRA it is the policy, and DPO's is read once and cached."""
    if recipe.model.lora_rank:
        return False
    return algorithm == "online-dpo" or (algorithm in ("grpo", "ppo") and recipe.algo.kl_coef > 0)


def reward_folders(recipe: Any) -> list[Path]:
    """Model folders that `reward.name = "model:A+B"` names (posttrain/rewards/models.py)."""
    name = getattr(getattr(recipe, "reward", None), "name", "")
    if not name.startswith("model:"):
        return []
    folders = [Path(part) for part in name.removeprefix("model:").split("+")]
    return [f / "model" if (f / "run.json").is_file() else f for f in folders]


def lags(algorithm: str, recipe: Any) -> bool:
    """Whether answers are sampled from a copy of the policy (posttrain/algos/grpo.py)."""
    return algorithm == "grpo" and bool(recipe.algo.max_lag or recipe.algo.overlap)


def by_kernels(recipe: Any, where: Where) -> bool:
    """Whether posttrain/kernels do the work between products."""
    return where.fused and not where.cuda and recipe.model.dtype == "float32"


def generator(algorithm: str, recipe: Any, shape: ModelShape, rows: Rows, where: Where) -> dict[str, int]:
    """What a generator keeps between steps: posttrain/rollout/fused.py with kernels, else plain.py.

    With kernels: weights once more in the order decoding reads them, slots for answers alone, and the newest logits.
    """
    slots = -(-recipe.rollout.slots // TILE) * TILE
    if by_kernels(recipe, where):
        answers = slots * -(-recipe.rollout.max_tokens // CACHE_BLOCK) * CACHE_BLOCK * token_kv(shape, recipe)
        prompts = waiting_prompts(algorithm, recipe) * rows.prompt * token_kv(shape, recipe)
        packed = (shape.matrices + shape.head) * 4
        return {"weights for decoding": packed, "KV cache": answers + prompts, "newest logits": slots * shape.vocab * 4}
    capacity = -(-(rows.prompt + recipe.rollout.max_tokens) // CACHE_BLOCK) * CACHE_BLOCK
    return {"KV cache": slots * capacity * token_kv(shape, recipe)}


def waiting_prompts(algorithm: str, recipe: Any) -> int:
    """Prompts whose keys and values are kept at once."""
    group = getattr(recipe.algo, "group_size", 1)
    return min(getattr(recipe.algo, "prompts", 1), -(-recipe.rollout.slots // group) + 1)


def token_kv(shape: ModelShape, recipe: Any) -> int:
    """Bytes of one token's keys and values in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * width_of(recipe)


def batch_rows(algorithm: str, recipe: Any) -> int:
    """Rows of data in one optimizer batch."""
    cfg = recipe.algo
    if algorithm in ("sft", "prm", "raft"):
        return cfg.batch_rows
    if algorithm in ("dpo", "reward"):
        return cfg.batch_pairs * (1 if getattr(cfg, "loss", "") == "kto" else 2)
    return (
        2 * cfg.prompts
        if algorithm == "online-dpo"
        else max(1, cfg.prompts * cfg.group_size // getattr(cfg, "minibatches", 1))
    )


@dataclass(frozen=True)
class Pass:
    """One call of the model: tokens it computes, and how many of them are trained."""

    tokens: int
    trained: int


def largest_pass(algorithm: str, recipe: Any, rows: Rows, all_rows: bool = False) -> Pass:
    """The largest pass of an optimizer batch, or over any number of rows (posttrain/data/batching.py:plan).

    Rows with one prompt are a unit whose prompt is computed once. As many units as fit make a pass, and the passes are
    of equal size; a unit that does not fit is split, and each part computes the prompt again.
    """
    room, cfg = recipe.train.tokens_per_pass, recipe.algo
    alike = 2 if planned_in_pairs(algorithm, recipe) else getattr(cfg, "group_size", 1)
    alike = 1 if algorithm == "raft" or rows.prompt < WORTH else alike
    units = max(1, batch_rows(algorithm, recipe) // alike)
    if all_rows:
        units = max(units, room)
    unit = rows.prompt + alike * rows.answer
    if unit <= room:
        passes = -(-units // (room // unit))
        count = -(-units // passes)
        return Pass(count * unit, count * alike * rows.answer)
    fits = 2 if planned_in_pairs(algorithm, recipe) else max(1, (room - rows.prompt) // rows.answer)  # pairs stay whole
    count = -(-alike // -(-alike // fits))
    return Pass(rows.prompt + count * rows.answer, count * rows.answer)


def planned_in_pairs(algorithm: str, recipe: Any) -> bool:
    """Whether rows 2i and 2i + 1 are two answers to one prompt."""
    return algorithm in ("dpo", "online-dpo", "reward") and getattr(recipe.algo, "loss", "") != "kto"


def heap(each: float, count: float, where: Where) -> float:
    """Resident bytes of `count` tensors of `each` bytes that live together; never less for larger ones."""
    small = 0 if where.cuda else max(0.0, 1 - each / HEAP_BLOCK)
    return each * count * (1 + HEAP_GROWTH * small)


def layer_tensors(recipe: Any, shape: ModelShape, tokens: int, where: Where) -> list[tuple[float, float]]:
    """(bytes, number) of the tensors that one layer keeps for its backward pass.

    posttrain/models/decoder.py with kernels, else transformers' Llama. Attention (posttrain/models/packing.py) keeps
    queries, keys and values, and its result is what the output projection keeps; probabilities are computed again.
    """
    size, keys = width_of(recipe), shape.kv_heads * shape.head_dim
    attention, stream, unit = tokens * shape.attention * size, tokens * shape.width, tokens * shape.ffn * size
    kept: list[tuple[float, float]] = [(attention, 2), (tokens * keys * size, 2)]
    if by_kernels(recipe, where):
        return [*kept, (stream * 4, 4), (unit, 3)]
    if size == 4:
        return [*kept, (stream * 4, 6), (unit, 4)]
    return [*kept, (attention, 1), (stream * 4, 2), (stream * 2, 4), (unit, 4)]  # bf16 norms are computed in float32


def activations(recipe: Any, shape: ModelShape, tokens: int, where: Where) -> int:
    """What the layers keep between the forward and the backward pass of `tokens` tokens."""
    layer = sum(heap(each, count, where) for each, count in layer_tensors(recipe, shape, tokens, where))
    if not recipe.model.gradient_checkpointing:
        return round(shape.layers * layer)
    inputs = heap(tokens * shape.width * width_of(recipe), 2 if by_kernels(recipe, where) else 1, where)
    return round(shape.layers * inputs + layer)


def projection(algorithm: str, shape: ModelShape, trained: int) -> int:
    """Blocks of logits in posttrain/train/forward.py:project; scores of whole rows need none."""
    if algorithm in ("reward", "prm"):
        return 0
    chunk = min(trained, max(1, LOGITS_PER_CHUNK // shape.vocab))
    return chunk * shape.vocab * 4 * BLOCKS_OF_LOGITS


def training_pass(algorithm: str, recipe: Any, shape: ModelShape, update: Pass, where: Where) -> dict[str, int]:
    """One forward and backward pass: posttrain/train/learner.py:forward_backward."""
    size, learns = width_of(recipe), trainable(recipe, shape)
    new = 0 if recipe.model.lora_rank or algorithm in ("reward", "prm") else shape.head * size  # before it is added
    low = learns * 2 if size == 2 and not recipe.model.lora_rank else 0  # bf16 gradients before they join the masters'
    return {
        "activations": activations(recipe, shape, update.tokens, where),
        "gradients of activations": update.tokens * (3 * shape.ffn + 2 * shape.width) * size,
        "logits": projection(algorithm, shape, update.trained),
        "gradients on their way": new + low,
        "gathered weights": 2 * shape.parameters * size // shape.layers if where.gpus > 1 else 0,
    }


def sampling_phase(algorithm: str, recipe: Any, shape: ModelShape, rows: Rows, where: Where) -> dict[str, int]:
    """One prompt's pass and a decode step's logits: posttrain/rollout/engine.py, plain.py and fused.py."""
    slots = min(recipe.rollout.slots, getattr(recipe.algo, "prompts", 1) * getattr(recipe.algo, "group_size", 1))
    exact = width_of(recipe) == 4 and rows.prompt <= EXACT_KEYS
    scores = 3 * shape.heads * rows.prompt**2 * 4 if exact else 0
    found = {"a prompt's pass": round(rows.prompt * (shape.ffn * 3 + shape.width * 6) * width_of(recipe) + scores)}
    if by_kernels(recipe, where):
        return {**found, "decode logits": slots * shape.vocab * 4}
    prompts = waiting_prompts(algorithm, recipe) * rows.prompt * token_kv(shape, recipe)
    return {**found, "prompts' keys and values": prompts, "decode logits": slots * shape.vocab * DRAW_BYTES}


def scoring_phase(algorithm: str, recipe: Any, shape: ModelShape, one: Pass, where: Where) -> dict[str, int]:
    """A pass without gradient (posttrain/train/forward.py): one layer at a time, and a chunk of logits."""
    layer = sum(each * count for each, count in layer_tensors(recipe, shape, one.tokens, where))
    return {"one layer": round(layer), "logits": round(projection(algorithm, shape, one.trained) * 5 / 6)}
