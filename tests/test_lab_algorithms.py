"""The algorithm explorer: its bars are the planner's numbers; PPO, DPO and GRPO hold what they are known to hold."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st
from playwright.sync_api import Page

from posttrain.lab.explore import algorithms
from posttrain.lab.explore.algorithms import CARDS, DEVICES, KINDS, LENGTHS, SIZES, Asked
from posttrain.planner import memory as planner
from posttrain.types import ConfigError
from tests.lab_server import Opened, accessibility, opened, too_wide

asked = st.builds(
    Asked,
    size=st.sampled_from(list(SIZES)),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    lora=st.booleans(),
    devices=st.sampled_from(DEVICES),
    length=st.sampled_from(LENGTHS),
    recompute=st.booleans(),
    cached=st.booleans(),
)


def rows(of: Asked) -> dict[str, dict[str, object]]:
    return {row["name"]: row for row in algorithms.compute(of)["kinds"]}


# --- the numbers ----------------------------------------------------------------------------------------------------


def test_ppo_holds_four_models_dpo_two_and_grpo_two_but_is_online() -> None:
    found = rows(Asked())
    assert {name: (row["held"], row["online"]) for name, row in found.items()} == {
        "ppo": (4, True), "dpo": (2, False), "grpo": (2, True), "rloo": (2, True),
        "kto": (2, False), "sft": (1, False), "reward": (1, False),
    }  # fmt: skip
    assert found["ppo"]["models"] == dict.fromkeys(["policy", "reference", "critic", "reward model"], "held")


@given(asked, st.sampled_from(list(KINDS)))
def test_the_parts_add_up_to_the_planners_peak_and_a_reference_that_dpo_holds(of: Asked, name: str) -> None:
    parts = algorithms.parts_of(name, of, of.devices)
    _, memory = algorithms.planned(name, of, of.devices)
    added = 0
    if KINDS[name].algorithm == "dpo" and not (of.cached or of.lora):
        weights = algorithms.shape_of_size(of.size).parameters * (4 if of.dtype == "float32" else 2)
        added = -(-weights // of.devices)
        assert parts["reference"] == added
    assert sum(parts.values()) == memory.peak + added
    assert min(parts.values()) >= 0


@given(asked, st.sampled_from(list(KINDS)))
def test_devices_share_models_evenly_and_adapters_need_far_less_than_all_weights(of: Asked, name: str) -> None:
    split = [algorithms.parts_of(name, of, n) for n in DEVICES]
    for part in ("weights", "optimizer", "reference", "critic", "reward model"):
        assert [split[0][part] / n for n in DEVICES] == pytest.approx([one[part] for one in split], abs=3)
    whole, small = (Asked(**{**vars(of), "lora": lora}) for lora in (False, True))
    held = [algorithms.parts_of(name, one, 1) for one in (whole, small)]
    models = ("weights", "gradients", "optimizer", "reference", "critic")
    assert sum(held[1][part] for part in models) < 0.6 * sum(held[0][part] for part in models)


def test_one_model_worked_by_hand() -> None:
    shape = algorithms.shape_of_size("7b")
    parts = algorithms.parts_of("ppo", Asked(size="7b"), 1)
    n = shape.parameters
    assert n == 7_615_487_488
    assert parts["weights"] == 6 * n and parts["optimizer"] == 8 * n  # bf16 and its float32 copy; two of Adam's numbers
    assert parts["reference"] == 2 * n and parts["critic"] == 14 * n and parts["reward model"] == 4 * n
    answers, tokens, a_token = 32, 1024, 2 * 28 * 4 * 128 * 2  # keys and values of 28 layers, 4 heads of 128, bf16
    assert parts["KV cache"] == answers * tokens * a_token


def test_with_adapters_the_reference_is_the_policy_and_read_once_it_is_gone() -> None:
    small, once = rows(Asked(lora=True)), rows(Asked(cached=True))
    assert small["dpo"]["models"] == {"policy": "held", "reference": "shared"}
    assert small["ppo"]["held"] == 3
    assert once["dpo"]["models"] == {"policy": "held", "reference": "read once"} and once["grpo"]["held"] == 2


@given(asked)
def test_what_is_said_to_fit_fits(of: Asked) -> None:
    for row in algorithms.compute(of)["kinds"]:
        assert row["fits"] == [card for card in CARDS if row["total"] <= card * 2**30]
        for card, count in row["fewest"]:
            if count is not None:
                assert sum(algorithms.parts_of(row["name"], of, count).values()) <= card * 2**30


@pytest.mark.parametrize(
    ("name", "value"), [("size", "3b"), ("devices", "3"), ("lora", "maybe"), ("length", "1e3"), ("dtype", "")]
)
def test_what_is_not_among_the_choices_is_refused_by_name(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}='{value}' is not one of"):
        Asked.of({name: value})


def test_an_address_says_what_it_asks_for() -> None:
    assert Asked.of({}) == Asked()
    query = {"size": "70b", "dtype": "float32", "lora": "true", "devices": "8", "length": "512", "recompute": "false"}
    assert Asked.of(query) == Asked("70b", "float32", True, 8, 512, False)


# --- in the browser -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    with opened(tmp_path_factory.mktemp("empty")) as lab:
        yield lab


def total(page: Page, title: str) -> str:
    return page.locator(".lane", has_text=title).locator(".number").first.inner_text()


def said(name: str, of: Asked) -> str:
    return f"{sum(algorithms.parts_of(name, of, of.devices).values()) / 2**30:.1f} GB"


def width(page: Page, lane: int, part: str) -> float:
    return page.locator(".lane").nth(lane).locator(f".part-{part}").evaluate("e => e.getBoundingClientRect().width")


def test_a_reader_finds_four_models_two_and_two_of_which_one_is_online(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/algorithms")
    page.locator(".lane").first.wait_for()
    cards = {card.locator("h2").inner_text(): card.inner_text() for card in page.locator(".algorithms > li").all()}
    assert "4 models in memory · online" in cards["PPO"]
    assert "2 models in memory · offline" in cards["DPO"]
    assert "2 models in memory · online" in cards["GRPO"]
    assert page.get_by_role("img", name="How PPO works").count() == 1
    lines = page.locator("table", has_text="Explores").locator("tbody tr").all()
    table = [line.locator("th, td").all_inner_texts() for line in lines]
    assert [row[0] for row in table] == [kind.title for kind in KINDS.values()]
    assert table[0][1].startswith("4: policy, reference, critic and reward model") and table[1][3] == "offline"


def test_another_size_moves_the_bars_by_the_planners_numbers(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/algorithms")
    page.locator(".lane").first.wait_for()
    assert total(page, "PPO") == said("ppo", Asked()) and "does not fit" in page.locator(".lane").first.inner_text()
    ratio = width(page, 0, "weights") / width(page, 0, "optimizer")
    parts = algorithms.parts_of("ppo", Asked(), 1)
    assert ratio == pytest.approx(parts["weights"] / parts["optimizer"], rel=0.02)
    page.get_by_label("1B", exact=True).check()
    page.get_by_text("Llama 3.2 1B: 1.24 billion weights").wait_for()
    for title, name in (("PPO", "ppo"), ("DPO", "dpo"), ("GRPO", "grpo")):
        assert total(page, title) == said(name, Asked(size="1b"))
    assert "fits on one card of 80 GB" in page.locator(".lane").first.inner_text()
    page.get_by_label("LoRA").check()
    page.get_by_label("8", exact=True).check()
    page.get_by_text("on each of 8 devices").wait_for()
    assert total(page, "DPO") == said("dpo", Asked(size="1b", lora=True, devices=8))
    assert page.url.endswith("?size=1b&lora=true&devices=8")


def test_a_link_shows_the_same_and_the_page_is_accessible(page: Page, lab: Opened) -> None:
    of = Asked("70b", "float32", False, 4, 4096, True)
    page.goto(f"{lab.address}/explore/algorithms?size=70b&dtype=float32&devices=4&length=4096")
    page.locator(".lane").first.wait_for()
    assert total(page, "GRPO") == said("grpo", of)
    page.get_by_text("All numbers and assumptions").click()
    for across, scheme in product((1280, 390), ("light", "dark")):
        page.set_viewport_size({"width": across, "height": 900})
        page.emulate_media(color_scheme=scheme)
        assert accessibility(page) == [] and not too_wide(page), (across, scheme)


def test_the_planner_is_asked_for_each_kind_as_it_samples() -> None:
    for name, kind in KINDS.items():
        recipe, _ = algorithms.planned(name, Asked(), 1)
        assert planner.samples(recipe) == (kind.explores.startswith("yes"))
