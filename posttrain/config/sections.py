"""Configuration sections shared by the recipes, and their checks."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from posttrain.config.best import is_lower_better
from posttrain.config.choices import FilesIn
from posttrain.types import ConfigError

GENERATED = 4096
"""Problems of a built-in task if `data.count` is 0."""


@dataclass(frozen=True)
class ModelConfig:
    path: str = "abacus"
    """Folder or hub id of a Hugging Face causal LM, or `abacus`, the tiny base model in this package."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision of the weights, for sampling and training."""
    lora_rank: int = 0
    """Rank of LoRA adapters on every linear layer and expert; 0 trains all weights."""
    lora_alpha: int = 32
    """LoRA scaling: adapter outputs are multiplied by lora_alpha / lora_rank."""
    continue_adapter: bool = False
    """If path is a PEFT adapter, train it further, instead of merging it into its base model before training."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: saves memory, takes about a third more time."""


@dataclass(frozen=True)
class DataConfig:
    tasks: str = "arithmetic"
    """Training data: a built-in task, `gym:NAME`, a file, a hub dataset, or a mixture of these (`a.jsonl*3 + b`)."""
    eval_tasks: str = ""
    """Evaluation data; empty uses the held-out split of a built-in task, or holds out rows of the file."""
    holdout: float = 0.1
    """Share of a file's rows held out for evaluation when eval_tasks is empty."""
    count: int = 0
    """Number of problems to generate for a built-in task (0: 4096), or maximum rows to read from a file (0: all)."""
    shuffle: bool = True
    """Draw training rows in a seeded random order, new in every epoch; false keeps the order of the file."""
    system: str = ""
    """System message to prepend to every task; empty adds none."""
    instruction: str = ""
    """Text to append to each question after a blank line, e.g. how to format the answer."""
    max_prompt_tokens: int = 1024
    """Maximum prompt length; longer prompts are an error before step 0, or are dropped and counted (see overlong)."""
    format: Literal["chat", "plain"] = "chat"
    """`chat` applies the tokenizer's chat template; `plain` uses the text as it is, for base models without one."""
    template_kwargs: dict[str, Any] = field(default_factory=dict[str, Any])
    """Arguments for the chat template, e.g. `{enable_thinking = false}`; a row's `chat_template_kwargs` come first."""
    bad_rows: Literal["refuse", "drop"] = "refuse"
    """What to do with unusable rows of a file: `refuse` the file and list them, or `drop` and count them."""
    overlong: Literal["refuse", "drop"] = "refuse"
    """What to do with prompts over max_prompt_tokens: `refuse` to start, or `drop` and count them."""

    @property
    def generated(self) -> int:
        """Number of problems to generate for a built-in task."""
        return self.count or GENERATED


@dataclass(frozen=True)
class RewardConfig:
    name: str = "auto"
    """`auto` (each task's own verifier), a verifier's name, `FILE.py:FUNCTION`, `model:FOLDER` or `judge:FILE.toml`."""
    weights: tuple[float, ...] = ()
    """Weights of the rewards in a list of functions, or of the terms of a sum in name; empty weighs each 1."""
    ensemble: Literal["mean", "min", "penalised"] = "mean"
    """How scores of several reward models or heads are combined; `penalised`: mean − uncertainty_coef × variance."""
    uncertainty_coef: float = 1.0
    """With `penalised`, the weight of the variance between the scores."""
    sandbox: Literal["auto", "namespaces", "landlock", "none"] = "auto"
    """How model-written code is isolated; `auto` uses the first kind that works on this machine, or refuses to run."""
    accept_arbitrary_code: bool = False
    """Required for sandbox `none`: run model-written code with your permissions and without isolation."""
    max_failure_rate: float = 0.01
    """Stop if more than this share of a step's completions, and more than one, could not be scored."""


@dataclass(frozen=True)
class EnvConfig:
    name: str = ""
    """Multi-turn environment: a built-in one, `FILE.py:NAME` or one of an adapter; empty for single-turn tasks."""
    max_turns: int = 8
    """Maximum replies per episode; after the last one the environment steps once more, then the episode ends."""
    timeout: float = 30.0
    """Maximum seconds per environment step; an episode that exceeds it ends unscored."""
    workers: int = 16
    """Maximum number of environments that step at the same time."""
    tools: str = "calculator"
    """Tools of the environment `tools`, comma-separated: `calculator`, `python`, `search:PATH`, `FILE.py:FUNCTION`."""
    call_syntax: Literal["json", "inline"] = "json"
    """Call format described to the model: `<tool_call>` with JSON, or `<name>text</name>`; both are accepted."""
    call_reward: float = 0.0
    """With `tools`, extra reward for the first successful call of an episode."""


@dataclass(frozen=True)
class RolloutConfig:
    engine: Annotated[str, FilesIn("rollout/engines")] = "embedded"
    """Sampling engine: `embedded`, this package's generator; `vllm` in this process; `vllm_server`, in its own."""
    slots: int = 128
    """Number of sequences decoded at once; a slot is refilled as soon as its sequence ends."""
    max_tokens: int = 256
    """Maximum completion length, stop token included; longer completions are truncated (stop reason `length`)."""
    dtype: Literal["model", "bfloat16"] = "model"
    """Precision of the embedded engine's matrix products: that of the model, or bfloat16 with a float32 learner."""
    temperature: float = 1.0
    """Sampling temperature; also used for the learner's log-probabilities."""
    stop: tuple[str, ...] = ()
    """Stop strings: a completion ends where its text contains one, which is not part of the text that is scored."""
    stop_token_ids: tuple[int, ...] = ()
    """Stop tokens besides the model's own."""
    vllm_memory: float = 0.3
    """With `vllm` and `vllm_server`, maximum share of the device's memory for the KV cache."""
    vllm_python: str = ""
    """With `vllm_server`, Python interpreter of an environment that has vLLM; empty uses the current one."""
    vllm_gpus: str = ""
    """With `vllm_server`, GPU of the server (its CUDA_VISIBLE_DEVICES), such as `1`; empty uses the learner's."""
    vllm_sync: Literal["files", "nccl"] = "files"
    """With `vllm_server`, how weights reach it: a folder on this machine's disk, or NCCL (not tested on a GPU)."""
    vllm_timeout: float = 600.0
    """With `vllm_server`, seconds for its start or one request after which it counts as hung and is replaced."""
    reward_workers: int = 1
    """Threads that compute rewards while other completions are still being sampled; 0 computes them afterwards."""


@dataclass(frozen=True)
class TrainConfig:
    steps: int = 60
    """Number of training steps."""
    lr: float = 1e-4
    """Peak learning rate of AdamW."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after warmup: constant, or decaying to reach 0 one update after the last."""
    warmup_steps: int = 0
    """Optimizer updates over which the learning rate increases linearly from 0."""
    weight_decay: float = 0.0
    """AdamW weight decay, applied to matrices only."""
    beta1: float = 0.9
    """AdamW β1."""
    beta2: float = 0.95
    """AdamW β2."""
    max_grad_norm: float = 1.0
    """Maximum global gradient norm for clipping; 0 disables clipping."""
    micro_batch_tokens: int = 8192
    """Maximum number of tokens per forward-backward pass; affects memory and speed, but not the gradient."""
    lanes: int = 1
    """Partial sums in which an update's gradient is added, a power of two; part of the result, whoever computes it."""
    learner: Annotated[str, FilesIn("train/learners")] = "local"
    """Learner that computes gradients and updates; `local` runs in this process."""
    threads: int = 0
    """Number of CPU threads; 0 uses torch's default."""
    device: str = "auto"
    """`auto` (cuda if available, else cpu), `cpu`, or a cuda device."""


@dataclass(frozen=True)
class ClusterConfig:
    """Who computes a run. These settings change its time, never its result."""

    learners: int = 1
    """Processes that compute gradients together, a power of two; with more than 1, `train.lanes` is a multiple."""
    samplers: int = 0
    """Processes that sample completions; 0 samples in the run's own process."""
    judges: int = 0
    """Processes that score completions; 0 scores them in the run's own process."""
    shard: Literal["optimizer", "full"] = "optimizer"
    """What learners divide: the optimizer, each with the whole model; or `full`, the model too, equal to rounding."""
    backend: Literal["processes", "ray"] = "processes"
    """`processes` on this machine, or `ray`, on one machine or several (docs/cluster.md)."""
    address: str = ""
    """Address of the Ray cluster; empty uses RAY_ADDRESS, or starts Ray on this machine."""
    timeout: float = 600.0
    """Seconds without an answer after which a process counts as lost."""
    max_restarts: int = 3
    """Deaths at the same step, or in a row, after which the run stops."""


@dataclass(frozen=True)
class EvalConfig:
    every: int = 0
    """Steps between evaluations on held-out tasks; 0 evaluates only before and after training."""
    problems: int = 256
    """Number of held-out tasks per evaluation, drawn from all held-out tasks; 0 evaluates all of them."""
    samples: int = 1
    """Completions per task."""
    temperature: float = 1.0
    """Sampling temperature for evaluation; 0 is greedy."""


@dataclass(frozen=True)
class RunConfig:
    out: str = ""
    """Run folder; empty uses `runs/<algorithm>-<number>`."""
    seed: int = 0
    """Random seed; all randomness in the run derives from it."""
    checkpoint_every: int = 10
    """Steps between checkpoints; a killed run resumes exactly from the last one."""
    keep: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: str = ""
    """Evaluation metric, such as `accuracy` or `nll`, whose best checkpoint is kept and exported; empty: the last."""
    patience: int = 0
    """End the run after this many evaluations in a row without a new best value of keep_best; 0 never does."""
    journal: bool = True
    """Keep the completions sampled since the last checkpoint, so that a killed run need not sample them again."""
    track: Annotated[str, FilesIn("store/trackers", several=True)] = ""
    """Experiment trackers that receive what the run stores, comma-separated (docs/guides/runs.md); empty for none."""


@dataclass(frozen=True)
class EpochTrainConfig(TrainConfig):
    """Training settings of algorithms that make passes over a fixed set of rows."""

    steps: int = 0
    """Number of training steps; 0 trains for `epochs`."""
    epochs: int = 1
    """Passes over the data, each in another order, if steps is 0."""


@dataclass(frozen=True)
class HeldOutConfig:
    every: int = 0
    """Steps between evaluations on held-out rows; 0 evaluates only before and after training."""


class SharedSections(Protocol):
    """The sections that every recipe has."""

    @property
    def model(self) -> ModelConfig: ...
    @property
    def data(self) -> DataConfig: ...
    @property
    def train(self) -> TrainConfig: ...
    @property
    def run(self) -> RunConfig: ...
    @property
    def cluster(self) -> ClusterConfig: ...


def require_positive(section: object, *names: str) -> None:
    for name in names:
        if getattr(section, name) <= 0:
            raise ConfigError(f"{name}={getattr(section, name)} must be 1 or more.")


def check_shared(recipe: SharedSections) -> None:
    train, run, data = recipe.train, recipe.run, recipe.data
    rollout: RolloutConfig | None = getattr(recipe, "rollout", None)
    env: EnvConfig | None = getattr(recipe, "env", None)
    if min(train.lr, train.warmup_steps, train.steps, train.max_grad_norm, train.weight_decay) < 0:
        raise ConfigError("train.lr, warmup_steps, steps, max_grad_norm and weight_decay cannot be negative.")
    if not (0 <= train.beta1 < 1 and 0 <= train.beta2 < 1):
        raise ConfigError(f"train.beta1={train.beta1} and beta2={train.beta2} must both be in [0, 1).")
    if not 0 <= data.holdout < 1:
        raise ConfigError(f"data.holdout={data.holdout} is not in [0, 1).")
    if data.count < 0:
        raise ConfigError(f"data.count={data.count} is negative. Use 0 to read all rows of a file.")
    if rollout and not all(rollout.stop):
        raise ConfigError("rollout.stop has an empty string, at which every completion would end at once. Remove it.")
    if rollout and rollout.stop and rollout.engine != "embedded":
        raise ConfigError(
            f'rollout.engine = "{rollout.engine}" cannot end at a string (rollout.stop={rollout.stop[0]!r}). Use the '
            "embedded engine, or rollout.stop_token_ids."
        )
    if rollout and rollout.stop and env and env.name:
        raise ConfigError(
            f"rollout.stop={rollout.stop[0]!r} would end a reply without the chat template's end of turn, after which "
            f"the environment {env.name!r} cannot answer. Leave it out."
        )
    evaluation: EvalConfig | HeldOutConfig | None = getattr(recipe, "eval", None)
    if isinstance(evaluation, EvalConfig) and evaluation.problems < 0:
        raise ConfigError(f"eval.problems={evaluation.problems} is negative. Use 0 to evaluate all held-out tasks.")
    if rollout and rollout.reward_workers < 0:
        raise ConfigError(f"rollout.reward_workers={rollout.reward_workers} is negative. Use 0 for none.")
    if rollout and not 0 < rollout.vllm_memory < 1:
        raise ConfigError(f"rollout.vllm_memory={rollout.vllm_memory} is not between 0 and 1.")
    if rollout and not 0 < rollout.vllm_timeout < math.inf:
        raise ConfigError(f"rollout.vllm_timeout={rollout.vllm_timeout} is not a positive number of seconds.")
    if recipe.model.lora_rank < 0:
        raise ConfigError(f"model.lora_rank={recipe.model.lora_rank} is negative. Use 0 to train all weights.")
    if recipe.model.continue_adapter and recipe.model.lora_rank:
        raise ConfigError(
            f"model.continue_adapter trains the adapter of model.path with its own rank, so model.lora_rank="
            f"{recipe.model.lora_rank} must be 0."
        )
    require_positive(train, "micro_batch_tokens")
    if train.lanes < 1 or train.lanes & (train.lanes - 1):
        raise ConfigError(f"train.lanes={train.lanes} is not a power of two. Use 1, 2, 4, 8 …")
    check_cluster(recipe.cluster, train)
    require_positive(run, "checkpoint_every", "keep")
    check_length(recipe)
    if env and not env.timeout > 0:
        raise ConfigError(f"env.timeout={env.timeout} must be above 0 seconds.")
    counts = {"rollout": ("slots", "max_tokens"), "eval": ("samples",), "env": ("max_turns", "workers")}
    for section, names in counts.items():
        if hasattr(recipe, section) and not isinstance(getattr(recipe, section), HeldOutConfig):
            require_positive(getattr(recipe, section), *names)


def check_cluster(cluster: ClusterConfig, train: TrainConfig) -> None:
    """Checks who computes a run."""
    require_positive(cluster, "learners", "timeout")
    if min(cluster.samplers, cluster.judges, cluster.max_restarts) < 0:
        raise ConfigError("cluster.samplers, judges and max_restarts cannot be negative.")
    if cluster.shard == "full" and (cluster.learners == 1 or train.lanes > 1):
        raise ConfigError(
            f'cluster.shard = "full" needs cluster.learners of 2 or more and train.lanes=1, not {cluster.learners} and '
            f"{train.lanes}: a sharded model cannot keep the order in which lanes are added."
        )
    if cluster.shard != "full" and cluster.learners > 1 and train.lanes % cluster.learners:
        raise ConfigError(
            f"cluster.learners={cluster.learners} does not divide train.lanes={train.lanes}, the partial sums in which "
            "a gradient is added. Set train.lanes to a power of two that it divides, such as 8; it is part of the "
            "result, whoever computes it."
        )
    if cluster.learners > 1 and train.learner != "local":
        raise ConfigError(f"cluster.learners={cluster.learners} needs train.learner=local, not {train.learner!r}.")


def check_length(recipe: SharedSections) -> None:
    """Checks what decides when a run ends and what it exports."""
    run, train = recipe.run, recipe.train
    every = getattr(getattr(recipe, "eval", None), "every", 0)
    if every < 0 or run.patience < 0:
        raise ConfigError(f"eval.every={every} and run.patience={run.patience} cannot be negative. Use 0 for never.")
    if run.keep_best:
        is_lower_better(run.keep_best)
        if not every:
            raise ConfigError(f"run.keep_best={run.keep_best!r} compares evaluations during training. Set eval.every.")
    elif run.patience:
        raise ConfigError(f"run.patience={run.patience} needs the metric to watch. Set run.keep_best.")
    if isinstance(train, EpochTrainConfig):
        require_positive(train, "epochs")
        if train.steps and train.epochs > 1:
            raise ConfigError(
                f"train.steps={train.steps} and train.epochs={train.epochs} both set the length of the run."
            )
