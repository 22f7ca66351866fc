"""docs/deploy: the RayJob has KubeRay's fields, and the commands of the Dockerfile work in a fresh environment."""

from __future__ import annotations

import copy
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from posttrain import config
from posttrain.cli.arguments import read_recipe
from posttrain.cli.main import main

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "docs" / "deploy"
SCHEMA = json.loads((DEPLOY / "rayjob.schema.json").read_text(encoding="utf-8"))
JOB = yaml.safe_load((DEPLOY / "rayjob.yaml").read_text(encoding="utf-8"))


def valid(job: Any) -> bool:
    return not list(jsonschema.Draft202012Validator(SCHEMA).iter_errors(job))


def test_the_rayjob_has_the_fields_of_kuberay() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(JOB, SCHEMA)


Break = Callable[[dict[str, Any]], Any]
WRONG: dict[str, Break] = {
    "a misspelt field": lambda spec: spec.update(backofLimit=3),
    "no entrypoint": lambda spec: spec.pop("entrypoint"),
    "a number for a text": lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["rayStartParams"].update(
        {"num-cpus": 1}
    ),
    "a worker group without a name": lambda spec: spec["rayClusterSpec"]["workerGroupSpecs"][0].pop("groupName"),
    "an unknown authentication": lambda spec: spec["rayClusterSpec"]["authOptions"].update(mode="tokens"),
    "no image": lambda spec: spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"][0].pop("image"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_schema_refuses(wrong: str) -> None:
    job = copy.deepcopy(JOB)
    WRONG[wrong](job["spec"])
    assert not valid(job)


def test_the_rayjob_needs_a_token_and_runs_commands_that_exist() -> None:
    cluster = JOB["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    script = shlex.split(JOB["spec"]["entrypoint"])[2]
    assert script.startswith("if [ -e /runs/grpo/run.json ]") and "posttrain resume /runs/grpo;" in script
    words = shlex.split(re.findall(r"exec posttrain (grpo [^;]+);", script)[0])
    _, recipe = read_recipe("grpo", words[1:])
    workers = recipe.cluster.learners + recipe.cluster.samplers
    groups = cluster["workerGroupSpecs"]
    there = sum(int(group["rayStartParams"]["num-cpus"]) * group["replicas"] for group in groups)
    assert recipe.cluster.backend == "ray" and workers <= there
    assert cluster["rayVersion"] in (ROOT / "docs" / "cluster.md").read_text(encoding="utf-8")


def run_lines() -> list[str]:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8").replace("\\\n", " ")
    return re.findall(r"^RUN (.+)$", text, re.MULTILINE)


def test_the_dockerfile_copies_what_exists_and_says_that_it_was_not_built() -> None:
    text = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    assert "NOT BUILT" in text
    for line in re.findall(r"^COPY (.+)$", text, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split()[:-1]), line
    assert len(run_lines()) == 4


@pytest.mark.skipif(
    "POSTTRAIN_TEST_DEPLOY" not in os.environ, reason="downloads torch and Ray; POSTTRAIN_TEST_DEPLOY=1 runs it"
)
def test_the_commands_of_the_dockerfile_work_in_a_fresh_environment(tmp_path: Path) -> None:
    """All but the first, which installs system packages."""
    place, environment = tmp_path / "image", tmp_path / "venv"
    place.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, place)
    shutil.copytree(ROOT / "posttrain", place / "posttrain", ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "venv", environment], check=True)
    settings = {"PATH": f"{environment / 'bin'}:{os.environ['PATH']}", "TORCH": "torch==2.13.0"}
    settings |= {name: value for name, value in os.environ.items() if name.startswith(("PIP_", "HTTP", "SSL", "HOME"))}
    settings |= {"TORCH": os.environ.get("TORCH", settings["TORCH"])}
    for line in run_lines()[1:]:
        subprocess.run(["bash", "-ec", line], cwd=place, env=settings, check=True)
    code = "import posttrain, sys; print(posttrain.__file__)"
    found = subprocess.run(
        [environment / "bin" / "python", "-c", code],
        cwd=tmp_path,
        env=settings,
        check=True,
        capture_output=True,
        text=True,
    )
    assert str(environment) in found.stdout


def test_the_help_of_the_commands_works_without_ray() -> None:
    for command in ("up", "down", "status"):
        assert CliRunner().invoke(main, ["cluster", command, "--help"]).exit_code == 0
    assert config.RECIPES["grpo"]().cluster.backend == "processes"
