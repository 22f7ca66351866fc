"""Python API, also used by the command line: start and resume runs, evaluate models.

    import posttrain as pt
    pt.grpo(model="abacus", tasks="arithmetic", reward=my_reward, out="runs/x", steps=40)

Settings are the fields of `posttrain.config`, as `section__key`, or just the key if only one section has it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from datetime import date, datetime
from functools import partial
from pathlib import Path
from typing import Any, Literal

from posttrain import __version__, algos, config, rng
from posttrain.cluster.launch import Cluster
from posttrain.cluster.supervise import supervised
from posttrain.config import EvalRecipe, Recipe
from posttrain.data.reading import evaluation_settings
from posttrain.data.tasks.load import read_tasks, write_tasks
from posttrain.evaluation import bias_probes
from posttrain.evaluation.accuracy import Report
from posttrain.evaluation.accuracy import evaluate as evaluate_tasks
from posttrain.evaluation.bias_probes import Finding
from posttrain.models.export import export
from posttrain.models.load import load_policy, with_chat_format
from posttrain.models.opening import open_policy as open_policy
from posttrain.planner import estimate
from posttrain.rewards import combine
from posttrain.rewards.models import load_reward_model
from posttrain.rollout import journal
from posttrain.rollout.build import engine_versions
from posttrain.rollout.collector import check_failures
from posttrain.search.problems import held_out, search_recipe, side
from posttrain.search.solve import Progress, Searched, evaluated
from posttrain.store import checkpoint
from posttrain.store.extending import extend
from posttrain.store.listing import next_folder, run_date
from posttrain.store.run import Event, Run
from posttrain.store.tracker import open_trackers
from posttrain.train import device
from posttrain.train.interrupt import Interrupt
from posttrain.train.job import Job, Loop, OnStep, Setup, Workers
from posttrain.types import ConfigError, Episode, Json, JsonView, ResumeError, Task

GIVEN = "given from Python"
"""Placeholder in a run header's recipe for tasks or a reward passed as Python objects; `given` lists them."""
Reward = str | Callable[..., Any]
Rewards = Reward | Sequence[Reward]


@dataclass(frozen=True)
class Result:
    """Outcome of a run. If a signal stopped it early, `stopped_by` is its number and `summary` is None; `posttrain
    resume` continues the run."""

    folder: Path
    summary: Json | None
    stopped_by: int = 0

    @property
    def model(self) -> Path:
        """The trained model as a Hugging Face folder (written when the run finishes)."""
        return self.folder / "model"


def train(
    algorithm: str,
    model: str = "abacus",
    tasks: str | Sequence[Task] = "arithmetic",
    reward: Rewards | None = None,
    out: str | Path = "",
    on_step: OnStep | None = None,
    **settings: Any,
) -> Result:
    """Trains `model` with an algorithm of `config.RECIPES` on `tasks`: a built-in name, file, hub id or list of Task.

    `reward`, for algorithms that use one, is `auto`, a verifier's name, `FILE.py:FUNCTION`, `model:FOLDER`, a function
    `(completion, answer, **task) -> float`, or a list of these, which is summed with `reward__weights`; None keeps the
    recipe's. Raises ConfigError for an unknown algorithm or setting.
    """
    if algorithm not in config.RECIPES:
        raise ConfigError(f"unknown algorithm {algorithm!r}{config.nearest(algorithm, list(config.RECIPES))}")
    given = None if isinstance(tasks, str) else list(tasks)
    overrides = {"model.path": model, "data.tasks": tasks if given is None else GIVEN}
    function, name = _named_reward(reward)
    overrides |= {"run.out": str(out)} | ({} if name is None else {"reward.name": name})
    if function is not None and "reward.name" in _dotted(settings):
        raise ConfigError("reward is given as a Python object and as reward__name. Give one of them.")
    overrides |= _dotted(settings)
    recipe = config.resolve(algorithm, {}, overrides)
    return start(algorithm, recipe, on_step, given, function)


def grpo(
    model: str = "abacus",
    tasks: str | Sequence[Task] = "arithmetic",
    reward: Rewards = "auto",
    out: str | Path = "",
    on_step: OnStep | None = None,
    **settings: Any,
) -> Result:
    """`train("grpo", …)`: reinforcement learning with a verifier, reward function or reward model."""
    return train("grpo", model, tasks, reward, out, on_step, **settings)


def sft(
    model: str = "abacus",
    data: str = "arithmetic",
    out: str | Path = "",
    on_step: OnStep | None = None,
    **settings: Any,
) -> Result:
    """`train("sft", …)`: fine-tuning on a file of texts or conversations."""
    return train("sft", model, data, None, out, on_step, **settings)


def start(
    algorithm: str,
    recipe: Recipe,
    on_step: OnStep | None = None,
    given: list[Task] | None = None,
    reward: Any = None,
    on_warning: Callable[[str], None] | None = None,
) -> Result:
    """Creates a new run folder for a resolved recipe and runs it to the end.

    `on_warning` gets the text of `estimate.warning` before the model is loaded; it is also stored in the run folder.
    """
    warning = estimate.warning(recipe)
    if warning and on_warning:
        on_warning(warning)
    folder = Path(recipe.run.out) if recipe.run.out else next_folder(Path("runs"), algorithm)
    created = datetime.now().astimezone()
    with Cluster(recipe, reward) as cluster:
        return _start(algorithm, recipe, folder, created, cluster, on_step, given, reward, warning)


def _start(
    algorithm: str,
    recipe: Recipe,
    folder: Path,
    created: datetime,
    cluster: Cluster,
    on_step: OnStep | None,
    given: list[Task] | None,
    reward: Any,
    warning: str,
) -> Result:
    """Prepares a run, creates its folder, stores the notes and runs it."""
    prepared = partial(prepare, algorithm, recipe, folder, given, reward, created.date(), cluster)
    try:
        job, fingerprint = prepared()
    except BaseException:
        with suppress(OSError):  # removes the folder of a rejected run, unless it has files
            folder.rmdir()
        raise
    header = {
        "posttrain": __version__,
        "algorithm": algorithm,
        "recipe": config.as_dict(recipe),
        "data": job.data_hash,
        "given": [name for name, value in (("tasks", given), ("reward", reward)) if value is not None],
        "fingerprint": fingerprint,
        "created": created.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    with Run.create(folder, header) as store:
        if given is not None:
            write_tasks(folder / "tasks.jsonl", given)
        for note in dict.fromkeys(job.policy.notes):
            store.note(0, Event("info", "model", note))
        for note in job.notes:
            store.note(0, Event("info", "data", note))
        if warning:
            store.note(0, Event("warning", "memory", warning))
        return supervised(
            store,
            cluster,
            lambda again: _drive(store, recipe, prepared()[0] if again else job, on_step, cluster),
        )


def resume(
    folder: str | Path,
    reward: Any = None,
    on_step: OnStep | None = None,
    steps: int | None = None,
    cluster: JsonView | None = None,
) -> Result:
    """Continues a run from its newest checkpoint; on the same machine the result is bit-exact.

    `steps` is a new, larger `train.steps`, also for a run that has finished. A reward that was passed as a Python
    function must be passed again. `cluster` has settings of `[cluster]` that replace the run's. Raises ResumeError if
    the data has changed or another process has the run open.
    """
    folder = Path(folder)
    with Run.open(folder) as store, ExitStack() as stack:
        if steps is not None:
            extend(store, steps)
        header = store.header
        algorithm = header["algorithm"]
        asked = {**header["recipe"], "cluster": {**header["recipe"].get("cluster", {}), **(cluster or {})}}
        recipe: Recipe = config.stored(algorithm, asked)
        if done := store.summary():
            return Result(folder, done)
        if "reward" in header["given"] and reward is None:
            raise ResumeError(
                f"{folder} was started from Python with a reward function. Resume it from Python with "
                "posttrain.resume(folder, reward=function)."
            )
        device.set_threads(header["fingerprint"]["threads"])
        given = read_tasks(folder / "tasks.jsonl") if "tasks" in header["given"] else None
        workers = stack.enter_context(Cluster(recipe, reward))
        prepared = partial(prepare, algorithm, recipe, folder, given, reward, run_date(header), workers)
        job, fingerprint = prepared()
        if job.data_hash != header["data"]:
            raise ResumeError(
                f"the tasks or the reward of {folder} have changed since the run started (tasks: "
                f"{recipe.data.tasks!r}). Restore the files, or start a new run."
            )
        saved = checkpoint.latest(folder)
        step = saved.step if saved else 0
        for damaged in saved.skipped if saved else ():
            store.note(step, Event("warning", "checkpoint", f"skipped: {damaged}"))
        if changed := device.differences(header["fingerprint"], fingerprint):
            text = f"Resumed on a different setup ({'; '.join(changed)}): the result may differ by rounding."
            store.rewind(step + 1 if saved else 0)
            store.note(step, Event("warning", "fingerprint", text))
        return supervised(
            store,
            workers,
            lambda again: _drive(store, recipe, prepared()[0] if again else job, on_step, workers),
        )


def prepare(
    algorithm: str,
    recipe: Recipe,
    folder: Path,
    given: list[Task] | None,
    reward: Any,
    day: date | None = None,
    workers: Workers | None = None,
) -> tuple[Job, Json]:
    """Loads and checks the model and the data; invalid settings and data are rejected here, before step 0.

    `day` is the date that the chat template reads: that of the run's creation. Returns the job and the fingerprint of
    machine and model that bit-exact results depend on.
    """
    device.set_threads(recipe.train.threads)
    on = device.resolve(recipe.train.device)
    rng.seed_global(recipe.run.seed, "init")  # LoRA's initial weights
    policy = load_policy(recipe.model, on)
    chat = with_chat_format(policy, recipe.data.format, recipe.data.template_kwargs, day)
    versions = engine_versions(recipe.rollout) if isinstance(recipe, config.Sampling) else {}
    fingerprint = device.fingerprint(policy, on) | versions
    job = algos.load(algorithm).prepare(Setup(recipe, policy, chat, folder, given, reward, workers, fingerprint))
    if chat.dated:
        job.notes.append(f"The chat template reads the date; in this run it is {chat.day}, also when it is resumed.")
    return job, fingerprint


def _drive(store: Run, recipe: Recipe, job: Job, on_step: OnStep | None, cluster: Cluster) -> Result:
    with Interrupt() as interrupt, open_trackers(recipe.run.track, store):
        loop = Loop(store, recipe.run, on_step or (lambda step, values: None), interrupt, make_learner=cluster.learner)
        cluster.attach(store.folder, loop.notes)
        summary = job.run(loop)
        if summary is not None:
            export(job.policy, store.folder / "model")
            store.finish(summary)
            journal.remove(store.folder)
    return Result(store.folder, summary, interrupt.requested)


def evaluate(
    model: str = "abacus", tasks: str = "arithmetic", reward: Rewards = "auto", **settings: Any
) -> tuple[Report, list[list[Episode]]]:
    """Held-out accuracy of a model or run with confidence intervals, and the evaluated episodes.

    All rows of a file are held out.
    """
    function, name = _named_reward(reward)
    overrides = evaluation_settings({"data.tasks": tasks, "reward.name": name, **_dotted(settings)})
    return evaluate_recipe(model, config.resolve_as(EvalRecipe, {}, overrides), function)


def evaluate_recipe(
    model: str, recipe: EvalRecipe, reward: Any = None, progress: Progress | None = None
) -> tuple[Report, list[list[Episode]]]:
    """`evaluate` for a resolved recipe, with its data, rollout, eval, search and run.seed settings.

    With `data.eval_tasks`, only these are loaded; otherwise the held-out side of `data.tasks` is evaluated. With
    `search.strategy`, the one episode of a task is the completion that the search chose.
    """
    if isinstance(recipe, EvalRecipe) and recipe.search.strategy:  # a training recipe may be evaluated, too
        return evaluated(search_recipe(model, recipe, reward=reward, progress=progress))
    with Cluster(recipe, reward) as workers:
        sets, collector = held_out(model, recipe, reward, False, workers)
        report, groups = evaluate_tasks(collector, sets.test, recipe.eval.samples, 0)
    return replace(report, notes=sets.notes), groups


def search(
    model: str = "abacus",
    tasks: str = "arithmetic",
    strategy: str = "best-of-n",
    budget: int = 16,
    scorer: str = "",
    reward: Rewards = "auto",
    out: str | Path | None = None,
    **settings: Any,
) -> Searched:
    """Test-time search on held-out tasks: the report, and a result and a tree for each task (docs/guides/search.md).

    `reward` verifies the results; `scorer` steers the search. With a folder `out`, a killed search continues there.
    """
    function, name = _named_reward(reward)
    given = {"data.tasks": tasks, "reward.name": name, "search.strategy": strategy, "search.budget": budget}
    overrides = evaluation_settings({**given, "search.scorer": scorer, **_dotted(settings)})
    return search_recipe(model, config.resolve_as(EvalRecipe, {}, overrides), Path(out) if out else None, function)


def sample_many(
    model: str, recipe: EvalRecipe, split: Literal["held-out", "train"] = "held-out"
) -> tuple[list[Task], list[list[Episode]]]:
    """Samples and scores `eval.samples` completions of `eval.problems` tasks, as input of posttrain.search.best_of_n.

    Raises RolloutError if more than `reward.max_failure_rate` of them could not be scored.
    """
    if recipe.search.strategy:
        raise ConfigError(f"search.strategy={recipe.search.strategy!r} has no effect here; use `posttrain search`.")
    with Cluster(recipe) as workers:
        sets, collector = held_out(model, recipe, None, split == "train", workers)
        tasks = side(sets, recipe, split)
        groups = collector.groups(tasks, recipe.eval.samples, 0, "best-of-n")
    check_failures(groups, recipe.reward.max_failure_rate)
    return tasks, groups


def probe(model: str, tasks: str = "arithmetic", count: int = 64, seed: int = 0) -> list[Finding]:
    """Bias probes of the reward model in a folder (`A+B` for several), with confidence intervals and examples."""
    scorer = load_reward_model(model, config.RewardConfig(), device.resolve("auto"))
    return bias_probes.probe(
        scorer.scores, bias_probes.load_items(config.DataConfig(tasks=tasks, count=count), count, seed)
    )


def _named_reward(reward: Rewards | None) -> tuple[Any, str | None]:
    """A reward passed from Python as (function or list with functions, `reward.name`); the first is None for text."""
    if reward is None or isinstance(reward, str):
        return None, reward
    if not callable(reward) and all(isinstance(item, str) for item in reward):
        return None, " + ".join(combine.as_term(str(item)) for item in reward)
    return reward, GIVEN


def _dotted(settings: JsonView) -> Json:
    return {name.replace("__", "."): value for name, value in settings.items()}
