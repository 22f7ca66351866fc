"""What an algorithm declares about itself is what its runs do, and is all that the rest of the package asks."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from posttrain import algos, api, config
from posttrain.cli.main import main
from posttrain.planner import estimate
from posttrain.rollout.collector import Collector
from posttrain.train import forward
from posttrain.train.job import Loop
from posttrain.train.learners.local import LocalLearner
from tests import run_server, tiny
from tests.test_docs import generator

NAMES = tuple(dict.fromkeys([*config.RECIPES, *run_server.SETTINGS]))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("facts")
    tiny.chatty(root / "model")
    rows = [{"prompt": f"Say {word}.", "completion": word * 2} for word in ("ab", "cd", "ef", "gh", "ij", "kl")] * 6
    pairs = [{**row, "chosen": row["completion"], "rejected": row["completion"][::-1]} for row in rows]
    pairs = [{**row, "steps": [row["chosen"], row["rejected"]], "labels": [1, 0]} for row in pairs]
    for name, made in (("rows.jsonl", rows), ("pairs.jsonl", pairs)):
        (root / name).write_text("".join(json.dumps(row) + "\n" for row in made))
    return root


def recipe_of(name: str, place: Path) -> Any:
    settings = {**run_server.SHARED, **run_server.settings_of(name), "model.path": str(place / "model")}
    settings |= {"train.steps": 2, "eval.every": 0} if "eval.every" in settings else {"train.steps": 2}
    if source := run_server.data_of(name):
        settings["data.tasks"] = " + ".join(
            str(place / part) if ".jsonl" in part else part for part in source.split(" + ")
        )
    if "algo.teacher" in settings:
        settings["algo.teacher"] = str(place / "model")
    return config.resolve(name.split("+")[0], {}, settings)


class Counted:
    """Counts models loaded, and what happens in steps, leaving out evaluation and what comes before step 0."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.models = 0
        self.training = False
        self.steps: Counter[str] = Counter()
        for name, module in list(sys.modules.items()):
            if name.startswith("posttrain.") and hasattr(module, "load_policy"):
                patch.setattr(module, "load_policy", self._loading(module.load_policy))
        self._count(patch, Collector, "groups", "samples", lambda args: 1)
        self._count(patch, LocalLearner, "step", "updates", lambda args: 1)
        rows = lambda args: sum(len(batch.tokens) for batch in args[1])
        self._count(patch, LocalLearner, "forward_backward", "rows", rows)
        self._count(patch, forward, "per_token", "scored", lambda args: len(args[0]))

    def _loading(self, load: Callable[..., Any]) -> Callable[..., Any]:
        def loaded(*args: Any, **more: Any) -> Any:
            self.models += 1
            return load(*args, **more)

        return loaded

    def _count(self, patch: pytest.MonkeyPatch, owner: Any, name: str, what: str, of: Callable[[Any], int]) -> None:
        inner = getattr(owner, name)

        def outer(*args: Any, **more: Any) -> Any:
            if self.training:
                self.steps[what] += of(args)
            return inner(*args, **more)

        patch.setattr(owner, name, outer)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counted]:
    found = Counted(monkeypatch)
    steps, end = Loop.steps, Loop.end

    def counting(self: Loop, *args: Any, **more: Any) -> Iterator[int]:
        for step in steps(self, *args, **more):
            found.training = True
            yield step

    def ending(self: Loop, *args: Any, **more: Any) -> None:
        found.training = False
        end(self, *args, **more)

    monkeypatch.setattr(Loop, "steps", counting)
    monkeypatch.setattr(Loop, "end", ending)
    yield found


@pytest.mark.parametrize("name", NAMES)
def test_a_run_holds_samples_and_computes_what_its_recipe_declares(
    name: str, place: Path, tmp_path: Path, counted: Counted
) -> None:
    recipe = recipe_of(name, place)
    facts = recipe.facts()
    result = api.start(name.split("+")[0], replace(recipe, run=replace(recipe.run, out=str(tmp_path / "run"))))
    assert result.summary is not None
    frozen = facts.reference == "frozen" and not recipe.model.lora_rank
    assert counted.models == 1 + frozen + (facts.critic == "separate") + facts.teacher
    seen = counted.steps
    assert (seen["samples"] > 0) == (facts.samples == "every step")
    assert facts.samples != "every step" or seen["samples"] >= 2
    warming = getattr(recipe.algo, "critic_warmup", 0)
    learners = 2 if facts.critic == "separate" else 1
    most = 2 * facts.minibatches * facts.epochs * learners
    if not getattr(recipe.algo, "restart", False) and name != "raft":  # a round has as many batches as were selected
        assert most - warming * facts.minibatches * facts.epochs * (learners - 1) >= seen["updates"] > 0
        ptx = getattr(recipe.algo, "ptx_rows", 0) * (getattr(recipe.algo, "ptx_coef", 0) > 0)
        assert seen["rows"] <= seen["updates"] * (facts.batch_rows + ptx)
    passes = facts.scoring_passes - facts.teacher  # the teacher's is part of the training pass
    groups = facts.prompts * (1 + getattr(recipe.algo, "max_resamples", 0))
    assert seen["scored"] <= 2 * passes * max(facts.step_rows, groups * facts.group_size)
    assert (seen["scored"] > 0) == (passes > 0)


def test_a_renamed_copy_of_an_algorithm_has_the_same_plan_command_and_documentation(place: Path) -> None:
    known = dict(config.RECIPES)
    try:
        run_server.register_copy("copycat", "online-dpo")
        original, copied = (recipe_of(name, place) for name in ("online-dpo", "copycat"))
        plans = [estimate.plan(recipe, memory=1, device="cpu", probe=False) for recipe in (original, copied)]
        assert [plan.algorithm for plan in plans] == ["online-dpo", "copycat"]
        first, second = ({**plan.as_dict(), "algorithm": ""} for plan in plans)
        for plan in (first, second):
            plan["held"].pop("process")
            plan.pop("peak")
        assert first["held"] == second["held"] and "reference model" in second["held"]
        assert algos.load("copycat") is algos.load("online-dpo")
        helps = [CliRunner().invoke(main, [name, "--help"]).output for name in ("online-dpo", "copycat")]
        assert helps[0].replace("online-dpo", "copycat") == helps[1] and "--reward" in helps[1]
        assert "copycat" in CliRunner().invoke(main, ["--help"]).output
        page = generator().config_page()
        assert "## `copycat`" in page and "### `[algo]` of copycat" in page
        assert "copycat" in generator().algorithms_page()
        assert run_server.settings_of("copycat")["algo.group_size"] == 4
    finally:
        main.commands.pop("copycat", None)
        config.RECIPES.clear()
        config.RECIPES.update(known)
        sys.modules.pop("posttrain.algos.copycat", None)


def test_no_module_compares_with_the_name_of_an_algorithm() -> None:
    named = re.compile(r"""\balgorithm\s*(==|!=|\bin\b|\bnot in\b)\s*[("'\[{]""")
    package = Path(config.__file__).parents[1]
    for path in sorted(package.rglob("*.py")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            assert not named.search(line), f"{path.relative_to(package)}:{number}: {line.strip()}"
