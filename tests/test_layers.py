"""The layering: imports go down only, lazy imports are few and named, modules and functions stay short."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Set
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "posttrain"
LAYERS = (
    ("types", "rng", "objectives"),
    ("config", "store"),
    ("data",),
    ("models",),
    ("train",),
    ("rewards",),
    ("envs",),
    ("rollout",),
    ("evaluation",),
    ("cluster",),
    ("search",),
    ("algos",),
    ("planner",),
    ("api",),
    ("pipelines",),
    ("lab",),
    ("cli",),
)
"""Folders and modules at the package root, bottom up. Imports go downwards, or stay inside a folder."""
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
SAME_LEVEL = {("config", "types"), ("store", "types"), ("store", "config"), ("rng", "types")}
"""(importer, imported) within one layer."""
ONLY = {"objectives": set[str](), "planner.memory": {"types", "config", "models.shapes"}, "models.shapes": {"types"}}
"""Modules or folders that may import less than what is below them: from the package these alone, and themselves."""
FORBIDDEN = {("lab", "pipelines")}
ROOT_MODULES = {"api", "types", "rng"}
OPTIONAL = {"datasets", "pyarrow", "vllm", "matplotlib", "rich", "reasoning_gym", "gymnasium", "verifiers", "z3",
            "torch.utils.tensorboard"}  # fmt: skip
LAZY = {
    "__init__": "importing the package does not load torch",
    "cli.main": "commands load torch when they run, so that --help is quick",
    "cli.inspect": "the same",
    "cli.arguments": "the same",
    "cli.data": "the same",
    "cli.cluster": "the same",
    "cli.search": "the same",
    "cli.doctor": "each measurement loads what it measures",
    "lab.checkpoints": "the lab starts without torch",
    "lab.rescore": "the same",
    "lab.rejudge": "the same",
    "lab.label.scores": "the same",
    "lab.explore.grpo": "the same",
    "lab.explore.preferences": "the same",
    "lab.explore.hacking": "the same",
    "lab.explore.search": "the same",
    "lab.course.routes": "the same",
    "lab.course.exercises": "the same",
}
"""Modules with imports inside functions, and the reason."""
LONGEST_MODULE, LONGEST_FUNCTION = 400, 60
LONGEST_RUN = {"grpo": 100}
"""Longest `run` of an algorithm; 80 lines for the others."""

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


def test_the_package_root_holds_few_modules_and_only_known_folders() -> None:
    names = {p.stem for p in PACKAGE.iterdir() if not p.name.startswith("__")}
    assert names == set(LEVEL), "a new folder or module needs a place in LAYERS"
    assert {p.stem for p in PACKAGE.glob("*.py") if not p.name.startswith("__")} == ROOT_MODULES


@modules
def test_a_module_imports_only_from_lower_layers(module: str) -> None:
    if module in ("__init__", "__main__"):
        return
    here = part(module)
    only = next((names for name, names in ONLY.items() if module == name or module.startswith(f"{name}.")), None)
    for name in own(module) - {"__version__"}:
        there = part(name)
        allowed = there == here or LEVEL[there] < LEVEL[here] or (here, there) in SAME_LEVEL
        assert allowed and (here, there) not in FORBIDDEN, f"{module} imports {name}"
        assert not (here == there == "algos"), f"{module} imports another algorithm, {name}"
        if only is not None:
            inside = name.startswith(f"{here}.")
            assert inside or any(name == n or name.startswith(f"{n}.") for n in only), f"{module} imports {name}"


def assert_no_cycle(graph: Mapping[str, Set[str]]) -> None:
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, f"cycle: {' → '.join((*path, module))}"
        if module not in done:
            for name in graph[module]:
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_no_two_modules_import_each_other_through_any_chain() -> None:
    assert_no_cycle({m: {n for n in own(m) if n in SOURCES} for m in SOURCES})


def test_no_two_scripts_of_the_lab_import_each_other_through_any_chain() -> None:
    scripts = {path.name: path.read_text(encoding="utf-8") for path in (PACKAGE / "lab" / "static").glob("*.js")}
    imported = re.compile(r"""(?:from|import)\s*\(?\s*"\./([\w-]+\.js)\"""")
    graph = {name: {*imported.findall(text)} for name, text in scripts.items()}
    assert "ui.js" in graph["course.js"] and "course-exercise.js" in graph["course.js"]  # static and dynamic imports
    assert_no_cycle(graph)


@modules
def test_imports_inside_functions_are_of_optional_packages(module: str) -> None:
    for function in ast.walk(TREES[module]):
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            for name in (name for node in ast.walk(function) for name in imported(node)):
                allowed = name.split(".")[0] in OPTIONAL or name in OPTIONAL or module in LAZY
                allowed |= (module, function.name, name) == ("rng", "seed_global", "torch")
                assert allowed, f"{module}.{function.name} imports {name} inside the function"


@modules
def test_modules_and_functions_are_short_enough_to_read(module: str) -> None:
    lines = len(SOURCES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= LONGEST_MODULE, f"{module} has {lines} lines"
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            is_run = part(module) == "algos" and node.name == "run"
            most = LONGEST_RUN.get(module.removeprefix("algos."), 80) if is_run else LONGEST_FUNCTION
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
