"""Starts what `[cluster]` asks for, and gives the run its learners, samplers and judges.

The backend begins to load when the cluster is opened, while the driver loads the model and the data. Nothing here
changes a result: `[cluster]` settings are not part of what a run is a function of.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from posttrain.cluster.actors import RUN_ENDED, STARTED_ANEW, Actor, Start, ask_all
from posttrain.cluster.judges import Judges
from posttrain.cluster.learner import RemoteLearner
from posttrain.cluster.pool import Crew, Pool
from posttrain.cluster.record import Record
from posttrain.cluster.sharded_learner import RemoteShards
from posttrain.config import ClusterConfig, RolloutConfig, Sampling, TrainConfig
from posttrain.config.sections import SharedSections
from posttrain.models.load import Policy, trainable
from posttrain.rewards.judging import BatchVerifier, Verifier
from posttrain.rewards.scoring import scores_groups
from posttrain.rollout.build import make_generator
from posttrain.rollout.generator import Generator
from posttrain.train.device import resolve
from posttrain.train.forward import Forward
from posttrain.train.learner import Learner, make_learner

BACKENDS = {"processes": "posttrain.cluster.processes", "ray": "posttrain.cluster.on_ray"}
RANK, SAMPLER, JUDGE = (
    "posttrain.cluster.rank:Rank",
    "posttrain.cluster.sampler:Sampler",
    "posttrain.cluster.judges:Judge",
)


@dataclass
class Cluster:
    """The workers of one run."""

    recipe: SharedSections
    reward: Any = None  # a reward passed from Python
    ranks: list[Actor] = field(default_factory=list[Actor])
    crew: Crew | None = None
    judges: list[Judges] = field(default_factory=list[Judges])
    record: Record = field(init=False)
    notes: list[str] = field(default_factory=list[str])  # what a user should know: deaths and replacements
    _numbers: dict[str, int] = field(default_factory=dict[str, int])

    def __post_init__(self) -> None:
        self.record = Record(self.cfg.backend)

    def __enter__(self) -> Self:
        cfg = self.cfg
        if cfg.learners > 1 or cfg.samplers or cfg.judges:
            import_module(BACKENDS[cfg.backend]).open(cfg)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()
        self.record.close()

    def attach(self, folder: Path, notes: list[str]) -> None:
        """Tells the cluster of the run: its folder, for the record, and where notes go, with those not stored yet."""
        notes[:0] = self.notes  # from before the run, or of a step that a dead learner has kept from ending
        self.notes = notes
        self.record.write_to(folder)

    @property
    def cfg(self) -> ClusterConfig:
        return self.recipe.cluster

    @property
    def threads(self) -> int:
        """CPU threads of the driver, and so of every worker: sums can depend on their number."""
        return self.recipe.train.threads or torch.get_num_threads()

    def note(self, text: str) -> None:
        """Keeps a sentence for the run's events."""
        self.notes.append(text)

    def _start(self, role: str, kind: str, arguments: tuple[Any, ...]) -> Actor:
        number = self._numbers.get(role, 0)
        self._numbers[role] = number + 1
        start: Start = import_module(BACKENDS[self.cfg.backend]).start
        actor = start(f"{role}-{number}", kind, arguments)
        self.record.add(role, actor)
        return actor

    def learner(
        self, policy: Policy, cfg: TrainConfig, total_steps: int, temperature: float, forward: Forward
    ) -> Learner:
        """Makes a learner of a policy: on the ranks if there are several, else in this process."""
        if self.cfg.learners == 1:
            return make_learner(policy, cfg, total_steps, temperature, forward)
        if not self.ranks:
            self.start_ranks()
        remote = RemoteShards if self.cfg.shard == "full" else RemoteLearner
        return remote(self.ranks, self.cfg.timeout, str(id(policy)), policy, cfg, total_steps, temperature, forward)

    def start_ranks(self) -> None:
        """Starts the ranks and waits until they have found each other."""
        count, kind = self.cfg.learners, resolve(self.recipe.train.device).type
        self.ranks = [
            self._start("learner", RANK, (number, count, self.threads, kind, self.cfg.timeout))
            for number in range(count)
        ]
        ((host, port),) = ask_all(self.ranks[:1], self.cfg.timeout, "listen")
        ask_all(self.ranks, self.cfg.timeout, "join", host, port)

    def generator(self, policy: Policy, rollout: RolloutConfig) -> Generator:
        """Makes the sampler of a policy: a pool if there are samplers, else the engine in this process."""
        if not self.cfg.samplers:
            return make_generator(policy, rollout)
        if self.crew is None:
            start = partial(self._start, "sampler", SAMPLER, (policy, rollout, self.threads))
            limits = (rollout.slots, self.cfg.timeout, self.cfg.max_restarts)
            self.crew = Crew(start, self.cfg.samplers, *limits, self.note)
        return Pool(self.crew, {name: parameter.detach() for name, parameter in trainable(policy).items()})

    def verifier(self, verify: Verifier) -> Verifier:
        """The run's verifier on judges, if there are any; one that scores completions together stays here."""
        if not self.cfg.judges or isinstance(verify, BatchVerifier):
            return verify
        if scores_groups(verify):
            self.note("cluster.judges is not used: the reward compares completions of a group, in the run's process.")
            return verify
        assert isinstance(self.recipe, Sampling)
        start = partial(self._start, "judge", JUDGE, (self.recipe, self.reward))
        self.judges.append(made := Judges(start, self.cfg.judges, verify, self.cfg.timeout, self.note))
        return made

    def restart(self) -> None:
        """Ends all workers, after a learner has died; they start anew as they are asked for."""
        self.close(STARTED_ANEW)

    def close(self, reason: str = RUN_ENDED) -> None:
        """Ends all workers."""
        for rank in self.ranks:
            rank.kill(reason)
        for group in (*filter(None, [self.crew]), *self.judges):
            group.close(reason)
        self.ranks, self.crew, self.judges = [], None, []
