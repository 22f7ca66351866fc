"""The shipped pipelines: a miniature of each runs to its report, and the last full run met what the recipe expects."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from bench import pipelines as full
from posttrain.cli.arguments import find_recipe, shipped_recipes
from posttrain.cli.report import write_report
from posttrain.pipelines.card import CAPABILITIES
from posttrain.pipelines.recipe import Pipeline, read_pipeline
from posttrain.pipelines.runner import run_pipeline
from tests.test_report import checked

SHIPPED = (
    "rlhf",
    "preference-methods",
    "overoptimisation",
    "diversity",
    "r1-zero",
    "r1",
    "constitution",
    "expert-search",
)


@pytest.fixture(scope="module")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All miniatures in one folder, so that the stages they have in common are made once."""
    return tmp_path_factory.mktemp("miniatures")


def test_every_shipped_pipeline_has_a_miniature_that_is_run_here() -> None:
    assert sorted(SHIPPED) == sorted(shipped_recipes("pipeline"))


@pytest.mark.parametrize("name", SHIPPED)
def test_the_miniature_of_a_shipped_pipeline_runs_to_its_report(name: str, shared_folder: Path) -> None:
    mini = read_pipeline(find_recipe(name), mini=True)
    shutil.rmtree(shared_folder / "figures", ignore_errors=True)
    ended = run_pipeline(mini, shared_folder)
    assert [record.name for record in ended.records] == [stage.name for stage in mini.stages]
    for stage, record in zip(mini.stages, ended.records, strict=True):
        assert stage.run == "model" or record.made or record.summary, stage.name
        assert (record.card is not None) == stage.card
        wanted = {*CAPABILITIES, "kl", "length", "distinct_1", "distinct_2", "distinct_3", "language", "format"}
        assert not stage.card or not wanted - (record.card or {}).keys(), stage.name
    drawn = {path.name for path in (shared_folder / "figures").iterdir()}
    assert drawn == {f"{figure.name}.{kind}" for figure in mini.figures for kind in ("png", "svg")}
    page = checked(write_report(shared_folder))
    assert len(page.all("img")) == len(mini.figures)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_pipeline_says_what_to_expect_and_its_last_full_run_met_it(name: str) -> None:
    recipe: Pipeline = read_pipeline(find_recipe(name))
    assert recipe.expect and recipe.time and recipe.about
    file = full.RESULTS / f"{name}.json"
    command = f"python -m bench.pipelines {name} --write"
    assert file.exists(), f"the results of a full run are not kept; run `{command}`"
    kept = json.loads(file.read_text(encoding="utf-8"))
    assert kept["recipe_sha256"] == full.recipe_sha256(recipe), f"the recipe has changed since; run `{command}`"
    assert kept["seconds"].keys() <= {stage.name for stage in recipe.stages}
    assert full.missed(recipe, kept["results"]) == []
