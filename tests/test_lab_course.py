"""The course: what its Markdown may say, that every name in it resolves, and how a person reads it."""

from __future__ import annotations

import importlib
import inspect
import math
import re
import shlex
from collections.abc import Iterator
from functools import reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from markdown_it.ruler import Ruler
from playwright.sync_api import Page, expect

from posttrain.cli.arguments import read_recipe
from posttrain.cli.main import main
from posttrain.config import RECIPES
from posttrain.lab.app import PAGES
from posttrain.lab.course import pages, source
from posttrain.lab.course.examples import EXAMPLES
from posttrain.lab.course.working import Worked, one
from posttrain.types import DataError, ResumeError
from tests.lab_server import PATIENCE, Opened, accessibility, opened, too_wide

CHAPTERS = ("why", "rewards", "algorithms")
REQUIRED = {
    "rewards": [
        r"P(y_w \succ y_l \mid x)",
        r"\sigma\big(r_\phi(x, y_w) - r_\phi(x, y_l)\big)",
        r"\sum_{D} \log \sigma\big(r_\phi(x, y_w) - r_\phi(x, y_l)\big)",
    ],
    "algorithms": [
        r"\max_\theta\; \mathbb{E}_{x \sim D,\; y \sim \pi_\theta} \Big[ r_\phi(x, y) - \beta \cdot D_{\mathrm{KL}}",
        r"\pi^*(y \mid x) = \frac{1}{Z(x)}\, \pi_{\text{ref}}(y \mid x)\, e^{r(x, y)/\beta}",
        r"\log \sigma \left( \beta \log \frac{\pi_\theta(y_w \mid x)}{\pi_{\text{ref}}(y_w \mid x)}",
        r"\hat A_i = \frac{r_i - \mu_G}{\sigma_G + \epsilon}",
        r"L_{\text{GRPO}} = -\frac{1}{G} \sum_{i=1}^{G} \min\left( \rho_i \hat{A}_i",
        r"\mathbb{E}[g] = \mathbb{E}[r_i \nabla \log \pi(y_i)] - \tfrac1G",
        r"\hat A_t = \sum_{k \ge 0} (\gamma \lambda)^k\, \delta_{t+k}",
        r"\mathrm{clip}(\rho_t, 1 - \epsilon, 1 + \epsilon)",
        r"A_i = r_i - \frac{1}{G - 1} \sum_{j \ne i} r_j",
        r"\big(h - \tfrac{1}{2\tau}\big)^2",
    ],
    "why": [r"\mathbb{E}_{y \sim \pi_\theta} \big[ R(x, y)\, \nabla_\theta \log \pi_\theta(y \mid x) \big]"],
}
OPTIONS = {
    "tasks": "data.tasks",
    "data": "data.tasks",
    "reward": "reward.name",
    "model": "model.path",
    "preset": "algo.preset",
    "loss": "algo.loss",
    "beta": "algo.beta",
    "critic": "algo.critic",
}


def walk(node: Any) -> Iterator[dict[str, Any]]:
    """A node and all below it that are no text."""
    if isinstance(node, dict):
        yield node
        for child in node.get("children", []):
            yield from walk(child)


def nodes_of(chapter: str) -> list[dict[str, Any]]:
    parts = [part for section in pages.read_chapter(chapter)["sections"] for part in section["parts"]]
    return [node for part in parts for child in part["children"] for node in walk(child)]


def named(tag: str) -> set[str]:
    return {node["name"] for chapter in pages.CHAPTERS for node in nodes_of(chapter) if node["tag"] == tag}


def chapter_of(body: str) -> pages.Parsed:
    return pages.parse(f"# Title\n\nA lead.\n\n## One section\n\n{body}\n")


def only(body: str) -> list[Any]:
    """The children of the only part of a section."""
    (part,) = chapter_of(body)["sections"][0]["parts"]
    return part["children"]


# --- Markdown -------------------------------------------------------------------------------------------------------


TEX = st.text(st.characters(min_codepoint=32, max_codepoint=126, exclude_characters="$"), min_size=1).map(str.strip)


@given(TEX.filter(lambda tex: tex != "" and not tex.endswith("\\")))
def test_a_formula_reaches_the_page_as_it_was_written(tex: str) -> None:
    (paragraph,) = only(f"where ${tex}$ holds")
    assert [node["tex"] for node in walk(paragraph) if node["tag"] == "formula"] == [tex]


def test_reading_threads_share_rules_that_are_already_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        Ruler, "__compile__", lambda ruler: pytest.fail("the rules are compiled while chapters are read")
    )
    for chapter in pages.CHAPTERS:
        assert pages.read_chapter.__wrapped__(chapter) == pages.read_chapter(chapter)


def test_a_displayed_formula_may_hold_what_elsewhere_is_markdown() -> None:
    tex = "a_1 * b_2 * c\n| x | [^y] <b>"
    assert only(f"$$\n{tex}\n$$") == [{"tag": "formula", "tex": tex, "display": True}]


def test_prices_are_no_formulas_and_markup_is_text() -> None:
    (paragraph,) = only("From $5 to $7: <script>alert(1)</script> & <b>no</b>.")
    text = "".join(paragraph["children"])
    assert text == "From $5 to $7: <script>alert(1)</script> & <b>no</b>."


def test_a_section_has_parts_in_their_order_and_sources_are_numbered_as_they_come() -> None:
    body = (
        "Both. [^b]\n\n::: intuition\nWords.[^a]\n:::\n\nAgain.[^b]\n\n::: mathematics\n$x$\n:::\n\n[^a]: A.\n[^b]: B."
    )
    found = chapter_of(body)
    parts = found["sections"][0]["parts"]
    assert [part["layer"] for part in parts] == [None, "intuition", None, "mathematics"]
    assert [(one["name"], one["number"]) for one in found["sources"]] == [("b", 1), ("a", 2)]
    assert found["words"] == {"intuition": 3, "mathematics": 2, "implementation": 2}


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("::: intuition\nx", "never closed"),
        ("::: intuition\n::: mathematics\n:::\n:::", "do not nest"),
        (":::\n", "do not nest"),
        ("::: poetry\nx\n:::", "do not nest"),
        ("See.[^none]", "undefined sources: none"),
        ("x\n\n[^a]: Unused.", "unused sources: a"),
        ("[^a]\n\n[^a]: Once.\n[^a]: Twice.", "defines a source twice: a"),
        ("[x](javascript:alert)", r"contains|links to"),
        ("[x](other.md)", "links to 'other.md'"),
        ("$$\nx", "never closed: 'x'"),
        ("```source objectives.policy:nothing\n```", "defines no nothing"),
        ("```source objectives.nowhere:clip\n```", "no nowhere.py"),
        ("```explore nothing\n```", "no explorer 'nothing'"),
        ("![x](https://example.org/x.png)", "contains image"),
    ],
)
def test_what_a_chapter_may_not_say_is_an_error_that_names_it(body: str, said: str) -> None:
    if "javascript" in body:  # such a link is not even read as one
        assert all(node["tag"] != "a" for child in only(body) for node in walk(child))
        return
    with pytest.raises(DataError, match=said):
        chapter_of(body)


def test_a_mark_of_a_layer_inside_of_code_is_code() -> None:
    (block,) = only("```\n::: intuition\n## no section\n```")
    assert block["children"][0]["children"] == ["::: intuition\n## no section"]


def test_a_chapter_that_is_not_there_is_named() -> None:
    with pytest.raises(ResumeError, match="no chapter 'x'; choose one of why, rewards"):
        pages.read_chapter("x")


# --- the six chapters -----------------------------------------------------------------------------------------------


def test_there_are_six_chapters_and_their_lengths_are_counted() -> None:
    found = pages.chapters()
    assert tuple(one["name"] for one in found) == pages.CHAPTERS
    assert all(min(one["words"].values()) > 200 for one in found)


@pytest.mark.parametrize("chapter", pages.CHAPTERS)
def test_every_section_says_it_in_all_three_layers(chapter: str) -> None:
    for section in pages.read_chapter(chapter)["sections"]:
        assert set(pages.LAYERS) <= {part["layer"] for part in section["parts"]}, section["title"]


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_the_required_equations_are_there(chapter: str) -> None:
    formulas = " ".join(node["tex"] for node in nodes_of(chapter) if node["tag"] == "formula")
    for tex in REQUIRED[chapter]:
        assert tex in formulas, tex


def test_the_source_that_is_shown_is_the_source_that_runs() -> None:
    names = {name for name in named("source") if not name.startswith("recipe:")}
    assert len(names) > 25
    for name in names:
        module, _, path = name.partition(":")
        running = reduce(getattr, path.split("."), importlib.import_module(f"posttrain.{module}"))
        shown = source.read_source(name)
        assert shown["code"] == inspect.getsource(running), name
        assert shown["line"] == inspect.getsourcelines(running)[1]
        assert Path(inspect.getfile(running)).as_posix().endswith(shown["file"])


def test_every_worked_example_that_a_chapter_names_is_computed_and_none_is_left_over() -> None:
    assert named("worked") == set(EXAMPLES)
    for name, example in EXAMPLES.items():
        found = example()
        assert found.steps or found.rows, name
        assert all(len(row) == len(found.head) for row in found.rows), name
        for call in found.calls:
            if call.startswith("recipe "):
                assert source.read_source(f"recipe:{call.removeprefix('recipe ')}")
            elif "/" in call:
                assert (source.PACKAGE / call).is_file(), call
            elif call.startswith("torch."):
                assert hasattr(torch, call.removeprefix("torch."))
            else:
                module, _, function = call.rpartition(".")
                assert hasattr(importlib.import_module(f"posttrain.{module}"), function), call


def test_every_explorer_that_a_chapter_names_has_a_page_and_each_is_named() -> None:
    assert named("explore") == set(pages.EXPLORERS)
    assert {f"/explore/{name}" for name in pages.EXPLORERS} <= set(PAGES)


def test_every_link_within_the_lab_leads_to_a_page_and_a_section_that_exist() -> None:
    sections = {name: {one["id"] for one in pages.read_chapter(name)["sections"]} for name in pages.CHAPTERS}
    for chapter in pages.CHAPTERS:
        for node in nodes_of(chapter):
            if node["tag"] != "a" or node["href"].startswith("http"):
                continue
            path, _, place = node["href"].partition("#")
            if path.startswith("/learn/"):
                assert path.removeprefix("/learn/") in sections, node
            elif path:
                assert path in PAGES, node
            if place:
                assert place in sections[path.removeprefix("/learn/") or chapter], node


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_every_source_has_an_address(chapter: str) -> None:
    for one_source in pages.read_chapter(chapter)["sources"]:
        links = [node["href"] for child in one_source["children"] for node in walk(child) if node["tag"] == "a"]
        assert links and all(link.startswith("http") for link in links), one_source["name"]


def test_every_command_exists_and_so_do_its_settings() -> None:
    fences = [n["children"][0] for chapter in CHAPTERS for n in nodes_of(chapter) if n["tag"] == "command"]
    lines = {line.partition("  #")[0].strip() for fence in fences for line in fence.splitlines()}
    assert len(lines) > 30
    for line in lines:
        program, command, *rest = shlex.split(line)
        assert program == "posttrain" and CliRunner().invoke(main, [command, "--help"]).exit_code == 0, line
        if command == "pipeline":
            assert source.read_source(f"recipe:{rest[0]}")
        elif command in RECIPES:
            words = [f"--{OPTIONS.get(word[2:], word[2:])}" if word.startswith("--") else word for word in rest]
            assert read_recipe(command, words)[1] is not None, line


# --- worked by hand -------------------------------------------------------------------------------------------------


def results(name: str) -> list[str]:
    return [step.result for step in EXAMPLES[name]().steps]


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def test_worked_numbers_are_those_worked_by_hand() -> None:
    log = math.log
    assert results("bradley-terry") == [one(sigmoid(0.8)), one(-log(sigmoid(0.8))), one(-log(sigmoid(-0.8)))]
    assert results("likelihood") == [one(log(7 / 3)), "0.700"]
    assert results("dpo") == ["0.100", "-0.050", one(-log(sigmoid(0.15))), one(0.1 * sigmoid(-0.15), 4)]
    z = 0.6 + 0.3 * math.e + 0.1 * math.e**2
    assert results("optimum") == [one(z), one(0.1 * math.e**2 / z), one(log(z))]
    assert results("gae") == ["0.100", "0.190", one(0.19 + 0.95 * 0.1), "0.200", one(0.2 + 0.95 * 0.285)]
    assert results("rloo") == ["0.667", "0.667", one(0.5 / math.sqrt(1 / 3))]
    assert results("kto") == ["0.600", one(1 - sigmoid(0.7)), one(1 - sigmoid(-0.7))]
    odds = [log(math.exp(-p) / (1 - math.exp(-p))) for p in (0.5, 0.9)]
    term = -0.25 * log(sigmoid(odds[0] - odds[1]))
    assert results("orpo") == [one(odds[0]), one(odds[1]), one(term), one(0.5 + term)]
    assert results("simpo") == ["-0.200", one(-log(sigmoid(-0.2))), one(-log(sigmoid(0.8)))]


def test_what_the_chapters_prove_is_seen_in_their_numbers() -> None:
    rows: dict[str, list[tuple[str, ...]]] = {name: list(EXAMPLES[name]().rows) for name in EXAMPLES}
    assert all(row[3] == row[4] for row in rows["policy-gradient"])  # the theorem
    assert len({row[2] for row in rows["baseline"]}) == 1  # a baseline leaves the mean
    assert all(row[1] == row[2] for row in rows["cross-entropy"])
    assert len({row[2] for row in rows["shift"]}) == 1  # only differences count
    assert max(rows["optimum"], key=lambda row: float(row[-1]))[0] == "the optimum"
    assert all(row[1] == row[4] for row in rows["cancels"])  # the implied reward and β log Z are the reward
    assert all(row[2] == row[3] and row[1] == row[4] for row in rows["unbiased"])  # (1 − 1/G) ∇J, and ∇J
    assert all(row[1] == row[2] for row in rows["group-as-critic"])
    assert [row[4] for row in rows["clip"]] == ["no"] * 3 + ["yes", "yes"] + ["no"] * 3
    assert min(rows["ipo"], key=lambda row: float(row[2]))[0] == "5"


def test_a_number_never_shows_minus_zero() -> None:
    assert (one(-0.0001), one(-0.0006), one(torch.tensor(-2.5), 1)) == ("0.000", "-0.001", "-2.5")
    assert Worked("t", "g", ("c",), head=("a",), rows=(("1",),)).as_dict()["rows"] == [["1"]]


# --- in the browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    with opened(tmp_path_factory.mktemp("empty")) as lab:
        yield lab


expect.set_options(timeout=PATIENCE)


def shown(page: Page, address: str) -> None:
    """Opens a chapter and waits for its formulas, numbers and exercises."""
    page.goto(address)
    expect(page.locator(".chapter h1")).to_be_visible()
    expect(page.locator(".chapter .waiting")).to_have_count(0)
    expect(page.locator(".formula:not(:has(.katex, .katex-error))")).to_have_count(0)


@pytest.mark.parametrize("chapter", pages.CHAPTERS)
def test_a_chapter_is_drawn_whole_and_fits_and_breaks_no_rule(page: Page, lab: Opened, chapter: str) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page.emulate_media(color_scheme="dark")
    shown(page, f"{lab.address}/learn/{chapter}?layer=all")
    assert page.locator(".katex-error").count() == 0 and page.locator(".failed").count() == 0
    drawn = page.locator(".worked[data-name]").evaluate_all("(all) => all.map((one) => one.dataset.name)")
    assert set(drawn) == {node["name"] for node in nodes_of(chapter) if node["tag"] == "worked"}
    assert not accessibility(page) and not too_wide(page)
    page.set_viewport_size({"width": 1280, "height": 900})
    page.emulate_media(color_scheme="light")
    assert not accessibility(page) and not too_wide(page)


def test_layers_are_switched_by_arrow_keys_kept_in_the_address_and_remembered(page: Page, lab: Opened) -> None:
    shown(page, f"{lab.address}/learn/rewards")
    layers = [page.locator(f".layer.{name}").first for name in pages.LAYERS]
    expect(layers[0]).to_be_visible()
    expect(layers[1]).to_be_hidden()
    page.keyboard.press("ArrowRight")
    expect(layers[1]).to_be_visible()
    expect(layers[0]).to_be_hidden()
    assert page.url.endswith("/learn/rewards?layer=mathematics")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    for layer in layers:
        expect(layer).to_be_visible()
    page.get_by_role("radio", name="All", exact=True).focus()
    page.keyboard.press("ArrowRight")  # the radio buttons' own keys, once round
    expect(layers[1]).to_be_hidden()
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    expect(layers[2]).to_be_visible()
    shown(page, f"{lab.address}/learn/why")  # another chapter, without a layer in its address
    expect(page.locator(".layer.implementation").first).to_be_visible()
    expect(page.locator(".layer.intuition").first).to_be_hidden()
    shown(page, f"{lab.address}/learn/why?layer=intuition")  # a link shows what its sender saw
    expect(page.locator(".layer.intuition").first).to_be_visible()


def test_switching_the_layer_leaves_the_reader_where_they_were(page: Page, lab: Opened) -> None:
    shown(page, f"{lab.address}/learn/algorithms?layer=mathematics")
    heading = page.get_by_role("heading", name="GRPO", exact=True)
    heading.evaluate("(node) => scrollTo(0, node.getBoundingClientRect().top + scrollY - 200)")
    page.keyboard.press("ArrowLeft")
    page.wait_for_function(
        "(node) => Math.abs(node.getBoundingClientRect().top - 200) < 4", arg=heading.element_handle()
    )


def test_the_page_shows_the_function_as_python_reads_it(page: Page, lab: Opened) -> None:
    from posttrain.objectives import policy

    shown(page, f"{lab.address}/learn/algorithms?layer=implementation")
    figure = page.locator("figure.source[data-name='objectives.policy:clip']")
    assert figure.locator("pre").text_content() == inspect.getsource(policy.clip)
    line = inspect.getsourcelines(policy.clip)[1]
    expect(figure.locator("figcaption")).to_have_text(f"posttrain/objectives/policy.py from line {line}")


def test_numbers_on_the_page_are_the_library_s(page: Page, lab: Opened) -> None:
    shown(page, f"{lab.address}/learn/algorithms?layer=mathematics")
    for name in ("clip", "gae", "four-models"):
        cells = page.locator(f".worked[data-name='{name}'] td").all_inner_texts()
        rows = EXAMPLES[name]().rows
        assert [text.replace("−", "-") for text in cells] == [cell for row in rows for cell in row[1:]]


def test_a_source_is_one_step_away_and_back(page: Page, lab: Opened) -> None:
    shown(page, f"{lab.address}/learn/why")
    page.get_by_role("link", name="source 1", exact=True).first.click()
    expect(page.locator("#source-instructgpt")).to_be_in_viewport()
    expect(page.locator("#source-instructgpt")).to_contain_text("2203.02155")


def test_the_first_page_of_the_course_leads_to_every_chapter(page: Page, lab: Opened) -> None:
    page.goto(lab.address)
    page.get_by_role("navigation", name="Lab").get_by_role("link", name="Learn").click()
    links = page.locator(".chapters h2 a")
    expect(links).to_have_count(6)
    assert links.evaluate_all("(all) => all.map((a) => a.pathname)") == [f"/learn/{name}" for name in pages.CHAPTERS]
    for scheme, width in (("light", 1280), ("dark", 390)):
        page.emulate_media(color_scheme="dark" if scheme == "dark" else "light")
        page.set_viewport_size({"width": width, "height": 844})
        assert not accessibility(page) and not too_wide(page)
    links.nth(1).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Reward models")
    page.get_by_role("navigation", name="Chapters").get_by_role("link", name=re.compile("Algorithms")).click()
    expect(page.get_by_role("heading", level=1)).to_have_text("Algorithms")


def test_a_chapter_that_does_not_exist_is_said_so(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/learn/nothing")
    expect(page.get_by_role("alert")).to_contain_text("the course has no chapter 'nothing'")
