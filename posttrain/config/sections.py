"""The sections every recipe is made of, and the checks they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from posttrain.types import ConfigError


@dataclass(frozen=True)
class ModelConfig:
    path: str = "abacus"
    """Folder or hub id of a Hugging Face causal language model, or `abacus`, the tiny base model that ships here."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights, for sampling and for training alike."""
    lora_rank: int = 0
    """Rank of LoRA adapters on every linear layer; 0 trains all weights."""
    lora_alpha: int = 32
    """LoRA scale: adapters are multiplied by lora_alpha / lora_rank."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


@dataclass(frozen=True)
class DataConfig:
    tasks: str = "arithmetic"
    """What to train on: a built-in task, `gym:NAME`, a mixture (`a*3 + b`), a JSONL or Parquet file, a data set id."""
    eval_tasks: str = ""
    """What to evaluate on; empty uses the built-in task's held-out split, or holds out rows of the file."""
    holdout: float = 0.1
    """Share of a file's rows kept out of training for evaluation when eval_tasks is empty."""
    count: int = 4096
    """Problems to generate for a built-in task, or the most rows to read from a file (0 reads all)."""
    system: str = ""
    """System message put before every task; empty adds none."""
    instruction: str = ""
    """Text appended to each question after a blank line, e.g. how to format the answer."""
    max_prompt_tokens: int = 1024
    """Prompts longer than this are refused before step 0, or dropped and counted (see overlong)."""
    format: Literal["chat", "plain"] = "chat"
    """`chat` uses the tokenizer's chat template; `plain` feeds the text as it is, for base models without one."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """Rows of a file that cannot be used: refuse the file and list them, or drop and count them."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What to do with prompts over max_prompt_tokens; nothing is ever cut silently."""


@dataclass(frozen=True)
class RewardConfig:
    name: str = "auto"
    """`auto` (each task's own verifier), a verifier, `FILE.py:FUNCTION`, `model:FOLDER`, or `judge:FILE.toml`."""
    ensemble: Literal["mean", "min", "penalised"] = "mean"
    """How the scores of several reward models or heads are joined; `penalised` is their mean minus the next setting."""
    uncertainty_coef: float = 1.0
    """With `penalised`, how much of the variance between the scores is subtracted."""
    sandbox: Literal["auto", "namespaces", "landlock", "none"] = "auto"
    """What isolates code that the model wrote: `auto` takes the first tier that holds here, and else refuses."""
    accept_arbitrary_code: bool = False
    """With sandbox `none`, execute code that the model wrote with your rights and nothing in between."""
    max_failure_rate: float = 0.01
    """Stop when more than this share of a step's attempts could not be scored (and more than one attempt)."""


@dataclass(frozen=True)
class EnvConfig:
    name: str = ""
    """A world that answers over several turns: a built-in one, `FILE.py:NAME` or an adapter's; empty asks once."""
    max_turns: int = 8
    """Most replies in one episode; after the last the world is heard once more and the episode ends."""
    timeout: float = 30.0
    """Seconds that a world may take to answer; then the attempt is unscored and goes on no further."""
    workers: int = 16
    """Worlds that think at the same time; others wait."""
    tools: str = "calculator"
    """What `tools` offers, comma separated: `calculator`, `python`, `search:PATH`, `FILE.py:FUNCTION`."""
    call_syntax: Literal["json", "inline"] = "json"
    """How `tools` asks for calls: `<tool_call>` with JSON, or `<name>text</name>`; it understands both."""
    call_reward: float = 0.0
    """With `tools`, what an episode's first call that succeeds earns, beside the answer."""


@dataclass(frozen=True)
class RolloutConfig:
    engine: Literal["embedded", "vllm"] = "embedded"
    """What samples completions: this package's own generator, or vLLM in the same process (docs/guides/vllm.md)."""
    slots: int = 128
    """Sequences decoded at once; a slot is refilled the moment its sequence ends."""
    max_tokens: int = 256
    """Longest completion, stop token included; longer ones are cut and marked `length`."""
    dtype: Literal["model", "bfloat16"] = "model"
    """The embedded engine's matrix products: as the model, or bfloat16 beside a float32 learner."""
    temperature: float = 1.0
    """Sampling temperature; the learner's log-probabilities use the same one."""
    vllm_memory: float = 0.3
    """With vllm, the largest share of the device's memory that its key-value cache may take."""
    reward_workers: int = 1
    """Threads that call the reward while other answers are being written; 0 calls it when all are finished."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 60
    """Updates to run. For sft the default is 0: one pass over the data."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warm-up: constant, or falling so that it would be 0 one update after the last."""
    warmup_steps: int = 0
    """Optimizer updates over which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """AdamW weight decay, on matrices only."""
    beta1: float = 0.9
    """AdamW first-moment decay."""
    beta2: float = 0.95
    """AdamW second-moment decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this global norm; 0 leaves them."""
    tokens_per_pass: int = 8192
    """Most tokens in one forward-backward pass. Memory only: the gradient does not depend on it."""
    threads: int = 0
    """CPU threads; 0 leaves torch's choice."""
    device: str = "auto"
    """`auto` (cuda when present, else cpu), `cpu`, or a cuda device."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0
    """Evaluate on held-out tasks every this many steps; 0 evaluates only before and after."""
    problems: int = 256
    """Held-out tasks per evaluation."""
    samples: int = 1
    """Answers per task."""
    temperature: float = 1.0
    """Sampling temperature of evaluations."""


@dataclass(frozen=True)
class RunConfig:
    out: str = ""
    """Run folder; empty picks `runs/<algorithm>-<number>`."""
    seed: int = 0
    """Everything random in the run is a function of this number."""
    checkpoint_every: int = 10
    """Steps between checkpoints. A killed run loses at most this much work, and no exactness."""
    keep: int = 2
    """Newest checkpoints kept; the last one is always whole."""


def require_positive(section: Any, *names: str) -> None:
    for name in names:
        if getattr(section, name) <= 0:
            raise ConfigError(f"{name}={getattr(section, name)} must be 1 or more.")


def check_shared(recipe: Any) -> None:
    train, run, data = recipe.train, recipe.run, recipe.data
    if min(train.lr, train.warmup_steps, train.steps, train.max_grad_norm, train.weight_decay) < 0:
        raise ConfigError("train.lr, warmup_steps, steps, max_grad_norm and weight_decay cannot be negative.")
    if not (0 <= train.beta1 < 1 and 0 <= train.beta2 < 1):
        raise ConfigError(f"train.beta1={train.beta1} and beta2={train.beta2} must both be in [0, 1).")
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"data.holdout={data.holdout} is not in [0, 1).")
    if data.count < 0:
        raise ConfigError(f"data.count={data.count} is negative; 0 reads all rows of a file.")
    if hasattr(recipe, "rollout") and recipe.rollout.reward_workers < 0:
        raise ConfigError(f"rollout.reward_workers={recipe.rollout.reward_workers} is negative; 0 switches them off.")
    if hasattr(recipe, "rollout") and not 0 < recipe.rollout.vllm_memory < 1:
        raise ConfigError(f"rollout.vllm_memory={recipe.rollout.vllm_memory} is not a share between 0 and 1.")
    if recipe.model.lora_rank < 0:
        raise ConfigError(f"model.lora_rank={recipe.model.lora_rank} is negative; 0 trains all weights.")
    require_positive(train, "tokens_per_pass")
    require_positive(run, "checkpoint_every", "keep")
    if hasattr(recipe, "env") and not recipe.env.timeout > 0:
        raise ConfigError(f"env.timeout={recipe.env.timeout} leaves no time to answer; give it some seconds.")
    counts = {"rollout": ("slots", "max_tokens"), "eval": ("problems", "samples"), "env": ("max_turns", "workers")}
    for section, names in counts.items():
        if hasattr(recipe, section):
            require_positive(getattr(recipe, section), *names)
