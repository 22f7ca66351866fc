"""The documentation says what the code does: pages are current, names exist, links resolve, examples run."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from functools import cache, reduce
from pathlib import Path
from typing import Any, get_type_hints

import click
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import posttrain as pt
from posttrain import api, config
from posttrain.cli import arguments
from posttrain.cli import main as cli
from posttrain.cli.tables import FIELDS
from posttrain.data.tasks.load import BUILT_IN
from posttrain.evaluation.accuracy import Estimate, Report
from posttrain.evaluation.labels import CHANGES
from posttrain.pipelines.card import CardConfig
from posttrain.pipelines.data_stages import DATA_STAGES
from posttrain.pipelines.figure import Figure
from posttrain.pipelines.figures import FIGURES
from posttrain.pipelines.recipe import GIVEN, STAGE, TABLES, GivenModel, read_pipeline
from posttrain.rewards.verifiers import VERIFIERS
from posttrain.store.run import Run
from posttrain.types import PosttrainError, Verdict

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
PROSE = [*PAGES, *(path for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md") if (path := ROOT / name).exists())]
BANNED = ("todo", "tbd", "fixme", "coming soon", "will be", "lorem", "/work/", "../shared")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m['role'] + ': ' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def text(name: str) -> str:
    """The page of that name, in whatever folder of docs/ it is."""
    (path,) = DOCS.rglob(name)
    return path.read_text(encoding="utf-8")


def fences(path: Path) -> Iterator[tuple[str, int, str]]:
    """(info string, line number, content) of each fenced block."""
    found: list[str] | None = None
    info, start = "", 0
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if found is None and line.lstrip().startswith("```"):
            found, info, start = [], line.strip().removeprefix("```").strip(), number
        elif found is not None and line.strip() == "```":
            yield info, start, "\n".join(found)
            found = None
        elif found is not None:
            found.append(line)
    assert found is None, f"{page_name(path)}:{start}: this code fence is never closed"


# --- generated pages ------------------------------------------------------------------------------------------------


@cache
def generator() -> Any:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_pages_are_current(capsys: pytest.CaptureFixture[str]) -> None:
    assert generator().main(["--check"]) == 0, capsys.readouterr().out


def test_a_stale_generated_page_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generator(), "HERE", tmp_path)
    assert generator().main([]) == 0
    (tmp_path / "cli.md").write_text("old", encoding="utf-8")
    capsys.readouterr()
    assert generator().main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/reference/cli.md does not match the code; run `make docs`.\n"


# --- nothing is undocumented ----------------------------------------------------------------------------------------


def test_every_command_and_option_is_documented() -> None:
    page = text("cli.md")
    for name, command in cli.main.commands.items():
        section = page.partition(f"## `posttrain {name}`\n")[2].partition("\n## ")[0]
        assert section, f"command {name} is not in docs/reference/cli.md"
        parts = command.commands if isinstance(command, click.Group) else {"": command}
        for inner, part in parts.items():
            heading = f"### `posttrain {name} {inner}`\n" if inner else "\n"
            listed = section.partition(heading)[2].partition("\n###")[0]
            for option in (p for p in part.params if isinstance(p, click.Option)):
                for spelling in (*option.opts, *option.secondary_opts):
                    assert f"`{spelling}`" in listed, f"{name} {inner} {spelling} is not in docs/reference/cli.md"


def test_every_setting_is_documented() -> None:
    page = text("config.md")
    for algorithm, recipe in config.RECIPES.items():
        for section in fields(recipe):
            heading = f"### `[{section.name}]`" + (f" of {algorithm}" if section.name == "algo" else "")
            part = page.partition(heading + "\n")[2].partition("\n#")[0]
            for field in fields(get_type_hints(recipe)[section.name]):
                assert f"| `{field.name}` |" in part, f"{section.name}.{field.name} of {algorithm}"


def test_every_setting_of_a_pipeline_is_documented() -> None:
    page = text("config.md").partition("## Pipelines\n")[2]
    stages = {GIVEN: GivenModel, **{name: settings for name, (settings, _) in DATA_STAGES.items()}}
    parts = {f'`run = "{name}"`': fields(settings) for name, settings in stages.items()}
    for heading, settings in (parts | {"`[card]`": fields(CardConfig), "`[[figure]]`": fields(Figure)}).items():
        part = page.partition(f"### {heading}\n")[2].partition("\n#")[0]
        for field in settings:
            assert f"| `{field.name}` |" in part, f"{field.name} of {heading}"
    for part, names in zip(page.split("\n### `[[stage]]`\n"), (TABLES, STAGE), strict=True):
        for name in names:
            assert f"| `{name}` |" in part, f"{name} of a pipeline's file"


def test_the_page_of_pipelines_names_every_data_stage_figure_and_shipped_pipeline() -> None:
    page = text("pipelines.md")
    for name in (*DATA_STAGES, *FIGURES, *arguments.shipped_recipes("pipeline")):
        assert f"`{name}`" in page, f"{name} is not in docs/guides/pipelines.md"


def test_every_exit_code_is_documented() -> None:
    def subclasses(cls: type[PosttrainError]) -> Iterator[type[PosttrainError]]:
        yield cls
        for sub in cls.__subclasses__():
            yield from subclasses(sub)

    listed = dict(re.findall(r"^\| (\d+) \| ([^|]+) \|", text("cli.md"), re.MULTILINE))
    for error in subclasses(PosttrainError):
        if error.__module__.startswith("posttrain"):
            assert str(error.exit_code) in listed, f"{error.exit_code} of {error.__name__}"
    assert {"0", "130", "143"} <= listed.keys()


def test_every_built_in_task_and_verifier_is_documented() -> None:
    for name in BUILT_IN:
        assert f"`{name}`" in text("data.md"), f"built-in task {name} is not in docs/guides/data.md"
    for name in VERIFIERS:
        assert f"`{name}`" in text("rewards.md"), f"verifier {name} is not in docs/guides/rewards.md"


def test_every_environment_variable_the_code_names_is_documented() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "posttrain").rglob("*.py")]
    named = {name for source in sources for name in re.findall(r"POSTTRAIN_[A-Z_]+", source)}
    assert named, "none was found: the pattern no longer fits"
    for name in named:
        assert f"`{name}`" in text("cli.md"), f"environment variable {name} is not in docs/reference/cli.md"


# --- metrics, from runs and not from reading the code ---------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer Llama with a byte-level tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    raw.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<pad>", "<bos>", "<eos>"]
    trainer = trainers.BpeTrainer(vocab_size=259, special_tokens=special, initial_alphabet=letters, show_progress=False)
    raw.train_from_iterator([], trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    shape = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(shape).save_pretrained(folder)
    return folder


def spread(completion: str) -> Verdict:
    """A reward that differs between the answers of a random model, and has a part."""
    score = float(sum(map(ord, completion)) % 7)
    return Verdict(score, score >= 1, parts={"odd": score % 2})


@pytest.fixture(scope="module")
def written(model: Path, tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every metric and timing name that runs and evaluations write.

    K is a number of answers, SOURCE one of data, NAME one part of a reward.
    """
    root = tmp_path_factory.mktemp("runs")
    tiny = {"rollout__max_tokens": 8, "slots": 32, "prompts": 2, "group_size": 4, "minibatches": 2, "kl_coef": 0.01}
    result = pt.grpo(str(model), "addition", spread, root / "grpo", steps=1, problems=2, samples=2, is_cap=2.0, **tiny)
    assert result.summary
    folders = [result.folder, pt.sft(str(model), "addition + sums", root / "sft", steps=1, batch_rows=4).folder]
    ppo = {"model.path": str(model), "data.tasks": "addition", "run.out": str(root / "ppo"), "train.steps": 1}
    ppo |= {"rollout.max_tokens": 8, "prompts": 4, "eval.problems": 2, "ptx_coef": 0.1, "ptx_data": "addition"}
    folders.append(api.start("ppo", config.resolve("ppo", {}, ppo), reward=spread).folder)
    own = {"model.path": str(model), "data.tasks": "addition", "rollout.max_tokens": 8, "eval.problems": 2}
    own |= {"train.steps": 1, "prompts": 2, "group_size": 2}
    for name, more in (("raft", {"data.tasks": "addition + sums"}), ("distill", {"teacher": str(model)})):
        recipe = config.resolve(name, {}, {**own, **more, "run.out": str(root / name)})
        folders.append(api.start(name, recipe, reward=spread).folder)
    rows = "".join(f'{{"prompt": "q{i}", "chosen": "a", "rejected": "b"}}\n' for i in range(9))
    (root / "pairs.jsonl").write_text(rows)
    pairs = {"model.path": str(model), "data.tasks": str(root / "pairs.jsonl"), "data.holdout": 0.5, "train.steps": 1}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(root / "cache"))
        for loss in ("sigmoid", "kto"):
            recipe = config.resolve("dpo", {}, {**pairs, "algo.loss": loss, "run.out": str(root / loss)})
            folders.append(api.start("dpo", recipe).folder)
    recipe = config.resolve("reward", {}, {**pairs, "algo.heads": 2, "run.out": str(root / "reward")})
    folders.append(api.start("reward", recipe).folder)
    marks = ([1, 1, 1], [1, 0, 0], [0, 0, 0])  # right and wrong first and middle steps
    steps = [{"prompt": f"q{i}", "steps": ["a", "b", "c"], "labels": marks[i % 3]} for i in range(30)]
    (root / "steps.jsonl").write_text("".join(json.dumps(row) + "\n" for row in steps))
    pairs |= {"data.tasks": str(root / "steps.jsonl"), "run.out": str(root / "prm"), "algo.lm_coef": 0.1}
    folders.append(api.start("prm", config.resolve("prm", {}, pairs)).folder)
    recipe = config.resolve("online-dpo", {}, {**own, "algo.group_size": 4, "run.out": str(root / "online-dpo")})
    folders.append(api.start("online-dpo", recipe, reward=spread).folder)
    world = {
        "env.name": str(Path(__file__).parent / "echo.py") + ":Echo",
        "data.count": 20,
        "run.out": str(root / "world"),
    }
    recipe = config.resolve("grpo", {}, {**own, **world, "algo.curriculum": "pass-rate"})
    folders.append(api.start("grpo", recipe).folder)
    shards = {"model.path": str(model), "data.tasks": "addition", "train.steps": 1, "algo.batch_rows": 4}
    shards |= {"cluster.learners": 2, "cluster.shard": "full", "train.threads": 1, "run.out": str(root / "shards")}
    folders.append(api.start("sft", config.resolve("sft", {}, shards)).folder)
    names: set[str] = set()
    for folder in folders:
        with Run.read(folder) as run:
            names |= {name for _, name, _ in run.metrics() + run.timings()}
    one = Estimate(0.5, 0.0, 1.0, 1)
    names |= Report(one, 0.0, 0.0, 1.0, 0.0, 0, 1, 64, {64: one}, {64: one}, generated=one, scored=one).metrics().keys()
    families = (r"_at_\d+$", "_at_K"), (r"/(addition|sums)$", "/SOURCE"), (r"\bpart/.+$", "part/NAME")
    return {reduce(lambda name, family: re.sub(*family, name), families, name) for name in names}


def test_every_metric_and_timing_is_documented_and_none_that_is_not_written(written: set[str]) -> None:
    listed = set(re.findall(r"^\| `([\w/]+)` \|", text("metrics.md"), re.MULTILINE))
    assert written - listed == set(), "written by a run, but not in docs/reference/metrics.md"
    assert listed - written == set(), "in docs/reference/metrics.md, but no run writes it"


def test_the_progress_line_and_the_before_after_table_show_only_names_that_are_written(written: set[str]) -> None:
    assert {name for name, _, _ in (*FIELDS, *CHANGES)} <= written


# --- examples -------------------------------------------------------------------------------------------------------

EXAMPLES = [
    pytest.param(code, id=f"{path.name}:{line}")
    for path in PAGES
    for info, line, code in fences(path)
    if info == "python runnable"
]


def shrunk(recipe: Any) -> Any:
    """The same recipe at a size that takes a second."""
    small = replace(recipe, train=replace(recipe.train, steps=1))
    if isinstance(recipe, config.SFTRecipe):
        return replace(small, algo=replace(recipe.algo, batch_rows=2))
    if not isinstance(recipe, config.EvalRecipe):
        small = replace(small, algo=replace(recipe.algo, prompts=2, group_size=2))
    return replace(
        small,
        rollout=replace(recipe.rollout, slots=32, max_tokens=4),
        eval=replace(recipe.eval, problems=2, samples=min(2, recipe.eval.samples)),
    )


@pytest.mark.parametrize("code", EXAMPLES)
def test_a_runnable_example_runs(code: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def small(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda first, recipe, *rest, **named: function(first, shrunk(recipe), *rest, **named)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("posttrain.models.weights.ABACUS", model)
    monkeypatch.setattr(api, "start", small(api.start))
    monkeypatch.setattr(api, "evaluate_recipe", small(api.evaluate_recipe))
    exec(compile(code, "example", "exec"), {"__name__": "example"})


def test_the_pages_that_promise_runnable_examples_have_some() -> None:
    for name in ("quickstart.md", "rewards.md", "environments.md"):
        (path,) = DOCS.rglob(name)
        assert any(info == "python runnable" for info, _, _ in fences(path)), page_name(path)


def test_an_example_of_a_pipeline_is_one(tmp_path: Path) -> None:
    examples = [code for path in PROSE for info, _, code in fences(path) if info == "toml" and "[[stage]]" in code]
    assert examples, "docs/guides/pipelines.md has no whole pipeline"
    for code in examples:
        (tmp_path / "example.toml").write_text(code, encoding="utf-8")
        assert len(read_pipeline(tmp_path / "example.toml").stages) > 1


def test_every_python_example_is_valid_python() -> None:
    for path in PROSE:
        for info, line, code in fences(path):
            if info.split(" ")[0] == "python":
                compile(code, f"{page_name(path)}:{line}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


def commands() -> Iterator[Any]:
    for path in PROSE:
        for info, start, code in fences(path):
            if info in ("sh", "bash", "console", "shell"):
                joined = code.replace("\\\n", " " * 2)
                for offset, line in enumerate(joined.splitlines()):
                    words = shlex.split(line.strip().removeprefix("$ "), comments=True)
                    if words[:1] == ["posttrain"]:
                        yield pytest.param(words[1:], id=f"{path.name}:{start + 1 + offset}:{' '.join(words[1:3])}")


@pytest.mark.parametrize("words", list(commands()))
def test_a_command_in_a_code_fence_parses_and_its_settings_resolve(words: list[str]) -> None:
    if not words or words[0] in ("--help", "--version"):
        return
    assert words[0] in cli.main.commands, f"there is no command {words[0]!r}"
    command = cli.main.commands[words[0]]
    try:
        context = command.make_context(words[0], words[1:])
    except click.exceptions.Exit:  # --help
        return
    if "args" not in context.params:
        return
    plain, settings = arguments.split_settings(context.params["args"])
    if words[0] in ("resume", "doctor"):
        plain = []  # a run
    if words[0] == "pipeline":
        assert plain, "a pipeline is named"
        if plain[0] in arguments.shipped_recipes("pipeline"):
            read_pipeline(arguments.find_recipe(plain[0]), settings)
        return
    algorithm = words[0] if words[0] in config.RECIPES else "grpo"
    if plain and plain[0] in config.RECIPES:
        algorithm = plain[0]
    elif plain and not plain[0].endswith(".toml"):
        algorithm = config.read_toml(arguments.find_recipe(plain[0]))[0]
    evaluates = words[0] in ("eval", "best-of-n", "search")
    recipe = config.EvalRecipe if evaluates else config.RECIPES[algorithm]
    for name, value in settings.items():
        section, key = config.locate(recipe, name)
        config.coerce(value, get_type_hints(get_type_hints(recipe)[section])[key], name)


# --- names and links in the prose -----------------------------------------------------------------------------------


@pytest.mark.parametrize("path", PROSE, ids=page_name)
def test_links_names_and_words_of_a_page_are_right(path: Path) -> None:
    whole = path.read_text(encoding="utf-8")
    check_links(path, whole)
    for file, name in re.findall(r"`((?:posttrain|tests|docs)/[\w/]+\.py):([A-Za-z_][\w.]*)`", whole):
        assert name in definitions(ROOT / file), f"{page_name(path)}: {file} defines no {name}"
    for file in re.findall(r"`((?:posttrain|tests|docs)/[\w./-]+)`", whole):
        assert (ROOT / file).exists(), f"{page_name(path)}: {file} does not exist"
    for name in re.findall(r"`((?:model|data|reward|rollout|algo|train|eval|run)\.[a-z][a-z0-9_]*)\b", whole):
        if name.rpartition(".")[2] not in ("json", "jsonl", "db", "md", "py", "toml"):
            assert any(knows(recipe, name) for recipe in config.RECIPES.values()), f"{page_name(path)}: {name}?"
    for command in re.findall(r"`posttrain ([a-z][a-z-]*)", whole):
        assert command in cli.main.commands, f"{page_name(path)}: no command {command}"
    low = whole.lower()
    for word in BANNED:
        assert word not in low, f"{page_name(path)} says {word!r}"


def check_links(path: Path, whole: str) -> None:
    without_code = re.sub(r"```.*?```", "", whole, flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        aim = (path.parent / file).resolve() if file else path
        assert aim.exists(), f"{page_name(path)}: link to {target}, which does not exist"
        if anchor:
            assert anchor in anchors(aim), f"{page_name(path)}: {target} has no such heading"


@cache
def anchors(path: Path) -> set[str]:
    """The headings of a page as GitHub spells them in links."""
    without_code = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    heads = re.findall(r"^#+ (.+)$", without_code, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@cache
def definitions(path: Path) -> set[str]:
    """Functions, classes, methods and names assigned at the top of a module."""
    found: set[str] = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            inner = (n for n in node.body if isinstance(n, ast.FunctionDef))
            found |= {f"{node.name}.{n.name}" for n in inner}
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def knows(recipe: type, name: str) -> bool:
    try:
        config.locate(recipe, name)
    except config.SettingRenamed:  # an old name, which pages mention to say what to write
        return True
    except PosttrainError:
        return False
    return True


def test_the_index_links_every_page() -> None:
    listed = set(re.findall(r"\]\(([^)#\s]+)", text("README.md")))
    for path in PAGES:
        if path.name != "README.md":
            assert str(path.relative_to(DOCS)) in listed, f"docs/README.md does not link {path.relative_to(DOCS)}"
