"""The layering: imports go down only, lazy imports are few and named, modules and functions stay short."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "posttrain"
# A module belongs to the longest prefix that names it and may import from lower layers and its own prefix only;
# entries that share a layer do not import each other unless they are in ONE_LAYER.
LAYERS: dict[str, float] = {
    "types": 0, "config": 0, "measures": 0, "rng": 0, "shapes": 0, "cache": 0, "intervals": 0,
    "objectives": 1, "planner": 1, "kernels": 1,
    "data": 2, "models": 2,
    "rollout": 3, "store": 3, "machine": 3, "overlap": 3,
    "train": 3.25, "rewards": 3.5,
    "envs": 4, "sampled": 4, "play": 4.5,
    "collect": 5, "curriculum": 5, "search": 5, "evaluation": 5, "prepare": 5, "pairs": 5, "stepwise": 5,
    "calibration": 5, "probes": 5, "gather": 5.5,
    "algos": 6,
    "pipelines": 7.5, "speed": 6.5, "estimate": 6.75, "api": 7,
    "cli": 8, "arguments": 8, "inspection": 8, "pipeline": 8, "report": 8, "page": 8,
    "show": 8, "doctor": 8, "talk": 8, "demo": 8, "lab": 8,
    "evidence": 5, "exploits": 5, "diagnose": 8,
}  # fmt: skip
ONE_LAYER = {0, 5, 8}
FORBIDDEN = {
    "objectives": set(LAYERS) - {"objectives"},
    "planner": set(LAYERS) - {"types", "shapes"},
    "shapes": set(LAYERS) - {"types"},
    "store": set(LAYERS) - {"store", "types", "config", "rng"},
    "lab": {"train", "algos", "pipelines"},
}
OPTIONAL = {"datasets", "pyarrow", "vllm", "ray", "matplotlib", "rich", "reasoning_gym", "gymnasium", "verifiers", "z3"}
LAZY = {
    "cli", "inspection", "arguments", "api", "__init__", "doctor", "lab.checkpoints", "lab.explore.grpo", "lab.rescore",
    "lab.rejudge", "lab.label.scores", "lab.explore.preferences", "lab.explore.hacking", "lab.course.routes",
    "lab.course.exercises",
}  # fmt: skip
"""Modules that import within functions what they need later, so that start-up is quick."""
LONGEST_MODULE, LONGEST_FUNCTION, LONGEST_RUN = 400, 60, 150

SOURCES = {".".join(p.relative_to(PACKAGE).with_suffix("").parts): p for p in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in SOURCES.items()}
modules = pytest.mark.parametrize("module", TREES)


def part(module: str) -> str:
    """`posttrain.store.run` and `store.run` → `store`."""
    return module.removeprefix("posttrain.").split(".")[0]


def imported(node: ast.AST) -> list[str]:
    """Absolute names an import statement brings in: `from posttrain import rng` is `posttrain.rng`."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0 and node.module, "imports are absolute"
        return [f"{node.module}.{a.name}" if node.module == "posttrain" else node.module for a in node.names]
    return []


def own(module: str) -> set[str]:
    """Modules of the package that `module` imports anywhere, other than for type checking."""
    found = (name for node in walk(TREES[module]) for name in imported(node))
    return {name.removeprefix("posttrain.") for name in found if name.startswith("posttrain.")}


def walk(tree: ast.AST) -> Iterator[ast.AST]:
    """ast.walk that leaves out `if TYPE_CHECKING:` blocks."""
    yield tree
    for child in ast.iter_child_nodes(tree):
        if not (isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING"):
            yield from walk(child)


@modules
def test_a_module_imports_only_from_lower_layers(module: str) -> None:
    here = part(module)
    if module in ("__init__", "__main__"):
        return
    assert here in LAYERS, f"{module} is in no layer; add it to LAYERS"
    for name in own(module) - {"__version__"}:
        there = part(name)
        allowed = there == here or LAYERS[there] < LAYERS[here]
        allowed |= LAYERS[there] == LAYERS[here] in ONE_LAYER
        assert allowed and there not in FORBIDDEN.get(here, ()), f"{module} imports {name}"
        assert not (here == there == "algos"), f"{module} imports another algorithm, {name}"


def test_no_two_modules_import_each_other_through_any_chain() -> None:
    graph = {m: {n for n in own(m) if n in SOURCES} for m in SOURCES}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' → '.join((*path, module))}"
        if module not in done:
            for name in graph[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


@modules
def test_imports_inside_functions_are_of_optional_packages(module: str) -> None:
    for function in ast.walk(TREES[module]):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in (name for node in ast.walk(function) for name in imported(node)):
                allowed = name.split(".")[0] in OPTIONAL or module in LAZY
                allowed |= (module, function.name, name) == ("rng", "seed_global", "torch")
                assert allowed, f"{module}.{function.name} imports {name} inside the function"


@modules
def test_modules_and_functions_are_short_enough_to_read(module: str) -> None:
    lines = len(SOURCES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_MODULE, f"{module} has {lines} lines"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            most = LONGEST_RUN if part(module) == "algos" and node.name == "run" else LONGEST_FUNCTION
            assert length <= most, f"{module}.{node.name} has {length} lines (most: {most})"


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("posttrain.objectives.policy", ["transformers", "vllm", "ray"]),
        ("posttrain", ["torch", "transformers"]),
        ("posttrain.config", ["torch", "transformers"]),
        ("posttrain.cli.main", ["torch", "transformers"]),
        ("posttrain.lab.app", ["torch", "transformers"]),
    ],
)
def test_importing_one_module_does_not_load_what_it_does_not_need(module: str, absent: list[str]) -> None:
    code = f"import sys, {module}; print([m for m in {absent!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
