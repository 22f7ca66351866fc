"""The preference explorer: a few dozen comparisons are enough, and what goes along with them is learned as well."""

from __future__ import annotations

import math
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from playwright.sync_api import Page, expect

from posttrain.lab.explore import people, preferences
from posttrain.lab.explore.reward_model import PRIOR, data, fit, scores
from posttrain.objectives.reward import bradley_terry
from tests.lab_server import PATIENCE, Opened, accessibility, opened, too_wide

said = st.text("120", max_size=20)


@given(said, st.integers(0, 5))
@settings(max_examples=25)
def test_training_ends_where_the_loss_has_no_slope(labels: str, seed: int) -> None:
    weights, _, _ = fit(seed, labels)
    at = torch.tensor(weights, requires_grad=True)
    left, right, label = data(seed, labels)
    loss = bradley_terry(left @ at, right @ at, label, torch.zeros_like(label)).sum() + PRIOR * at.square().sum()
    (slope,) = torch.autograd.grad(loss, at)
    assert float(slope.abs().max()) < 1e-2 * max(1, len(labels))


@given(said)
@settings(max_examples=25)
def test_who_says_the_opposite_of_everything_gets_the_opposite_model(labels: str) -> None:
    opposite = labels.translate(str.maketrans("12", "21"))
    np.testing.assert_allclose(fit(0, labels)[0], -fit(0, opposite)[0], atol=1e-3)


def test_one_label_of_one_feature_worked_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    from posttrain.lab.explore import reward_model

    monkeypatch.setattr(reward_model, "features", lambda: np.array([[[1.0], [0.0]]]))
    monkeypatch.setattr(reward_model, "order", lambda seed: (0,))
    fit.cache_clear()
    weights, loss, _ = fit(0, "1")
    w = float(weights[0])
    assert 2 * PRIOR * w == pytest.approx(1 / (1 + math.exp(w)), abs=1e-3)  # slope of w² / 4 against σ(−w)
    assert w == pytest.approx(0.6748, abs=1e-3) and loss == pytest.approx(math.log(1 + math.exp(-w)), abs=1e-6)
    fit.cache_clear()


def test_the_shipped_pairs_are_two_different_answers_to_prompts_that_differ() -> None:
    found = people.pairs()
    assert len({pair.prompt for pair in found}) == len(found) and len(found) - people.UNSEEN >= 100
    assert all(pair.answers[0] != pair.answers[1] for pair in found)
    assert sorted(people.order(3)) == list(range(len(found) - people.UNSEEN)) and people.order(3) != people.order(4)
    np.testing.assert_allclose(people.features().mean((0, 1)), 0, atol=1e-9)


@pytest.mark.parametrize("who", people.PEOPLE)
def test_thirty_labels_of_somebody_are_enough_to_agree_with_them_on_unseen_pairs(who: str) -> None:
    for seed in range(5):  # of these fifteen models the worst agrees on 68 %, [55 %, 78 %]
        labels = preferences.say(seed, "", who)
        found = preferences.learned(seed, labels, who)
        assert len(labels) == preferences.AT_ONCE and found["held_out"]["low"] > 0.5
        assert found["held_out"]["n"] >= 30 and len(found["curve"]) == len(labels)
        bias = found["weights"][0]["weight"]
        assert found["weights"][0]["name"] == "length"
        if who == "long":
            assert bias > 1 and found["correlation"]["low"] > 0.5 and found["said"]["low"] > 0.5
        if who == "short":
            assert bias < 0 and found["correlation"]["high"] < 0 and found["said"]["high"] < 0.5


def test_a_label_is_foretold_by_a_model_that_has_not_seen_it() -> None:
    labels = preferences.say(0, "", "long")[:8]
    right = told = 0
    for n, choice in enumerate(labels):
        left, other = scores(fit(0, labels[:n])[0], [people.order(0)[n]])[0]
        if n and choice != "0":
            told, right = told + 1, right + ((left > other) == (choice == "1"))
    found = preferences.foretold(0, labels)
    assert (found.n, round(found.value * found.n)) == (told, right) and told >= 6


def test_ties_alone_teach_nothing_and_are_foretold_by_nobody() -> None:
    found = preferences.learned(0, "0000")
    assert [one["weight"] for one in found["weights"]] == [0.0] * len(people.FEATURES)
    assert found["before"] == {"value": None, "low": 0.0, "high": 1.0, "n": 0} and found["correlation"] is None


def test_pearsons_r_of_four_points_by_hand() -> None:
    found = preferences.correlation(np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 3.0, 2.0, 4.0]))
    assert found is not None and found["value"] == pytest.approx(0.8)
    assert found["high"] == pytest.approx(math.tanh(math.atanh(0.8) + 1.959964)) and found["low"] < 0


# --- in the browser --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Opened]:
    with opened(tmp_path_factory.mktemp("preferences")) as lab:
        yield lab


def fact(page: Page, name: str) -> str:
    return page.locator(f"[data-fact={name}]").inner_text()


def compare(page: Page, count: int) -> None:
    """Takes the longer answer `count` times, by keyboard."""
    start = len(page.url.partition("labels=")[2].partition("&")[0])
    for n in range(count):
        left, right = page.locator(".answers .said").all_inner_texts()
        page.keyboard.press("1" if len(left) > len(right) else "2" if len(left) < len(right) else "0")
        page.get_by_role("heading", name=f"Dataset: {start + n + 1} comparison").wait_for()


def test_a_few_dozen_comparisons_are_enough_and_length_is_learned_with_them(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/preferences")
    page.get_by_text("every prediction is a coin flip").wait_for()
    compare(page, 24)
    page.get_by_text("trained on 24 labels in").wait_for()
    page.get_by_text("✓ Better than a coin").wait_for()
    labels = page.url.partition("labels=")[2]
    found = preferences.learned(0, labels)
    assert fact(page, "before").startswith(f"{100 * found['before']['value']:.1f} %")
    assert found["before"]["low"] > 0.5 and found["weights"][0]["weight"] > 1
    page.get_by_text("It rewards length").wait_for()
    assert fact(page, "longer").startswith("100.0 %")
    page.reload()  # the address holds all of it
    page.get_by_text("trained on 24 labels in").wait_for()
    assert fact(page, "before").startswith(f"{100 * found['before']['value']:.1f} %")


def test_somebody_else_labels_thirty_and_the_model_agrees_with_them_on_unseen_pairs(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/preferences")
    page.get_by_label("polite answers").check()
    page.get_by_role("button", name="Label 30 for me").click()
    page.get_by_text("trained on 30 labels in").wait_for()
    found = preferences.learned(0, preferences.say(0, "", "polite"), "polite")
    assert (
        fact(page, "held-out").startswith(f"{100 * found['held_out']['value']:.1f} %")
        and found["held_out"]["low"] > 0.8
    )
    assert page.locator(".chart canvas").count() == 1 and "who=polite" in page.url
    page.get_by_role("button", name="Start over").click()
    page.get_by_text("every prediction is a coin flip").wait_for()
    page.get_by_label("short answers").check()
    page.get_by_role("button", name="Label 30 for me").click()
    page.get_by_text("It penalises length").wait_for()


def test_undo_takes_the_last_comparison_back_and_ratings_can_be_tried(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/preferences")
    page.get_by_role("region", name="The pair").wait_for()
    first = page.locator(".answers").inner_text()
    page.keyboard.press("0")
    page.get_by_role("heading", name="Dataset: 1 comparison").wait_for()
    assert page.locator(".answers").inner_text() != first
    page.keyboard.press("u")
    expect(page.locator(".answers")).to_have_text(first.replace("\n", ""), use_inner_text=False, timeout=PATIENCE)
    compare(page, 3)
    page.get_by_role("button", name="Rate the answers of your first 3 pairs").click()
    for n in range(6):
        page.get_by_text(f"Answer {n + 1} of 6").wait_for()
        page.get_by_role("button", name="7", exact=True).click()
    page.get_by_text("Your ratings agree with your choices on 0 of 3 pairs.").wait_for()
    assert page.get_by_text("equal ratings").count() == 3


def test_a_key_paints_within_a_twentieth_of_a_second(page: Page, lab: Opened) -> None:
    page.goto(f"{lab.address}/explore/preferences")
    page.get_by_role("region", name="The pair").wait_for()
    page.keyboard.press("1")
    page.get_by_text("trained on 1 label in").wait_for()
    times = page.evaluate(
        """async () => {
          const times = [];
          for (let n = 0; n < 20; n++) {
            const before = document.querySelector('.answers').innerText;
            const start = performance.now();
            dispatchEvent(new KeyboardEvent('keydown', { key: n % 2 ? '1' : '2' }));
            while (document.querySelector('.answers').innerText === before) await new Promise(requestAnimationFrame);
            times.push(performance.now() - start);
            await new Promise((done) => setTimeout(done, 60));
          }
          return times.sort((a, b) => a - b);
        }"""
    )
    print("key to paint in ms:", [round(one) for one in times])
    assert times[len(times) // 2] < 50 or times[0] < 50  # a busy machine may spoil some, not all


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_explorer_is_accessible_and_fits_a_phone(page: Page, lab: Opened, scheme: Any) -> None:
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for query in ("?labels=12012", "?who=long&labels=121212012121"):
        for width in (1280, 390):
            page.set_viewport_size({"width": width, "height": 900})
            page.goto(f"{lab.address}/explore/preferences{query}")
            page.get_by_text("trained on").wait_for()
            page.wait_for_selector(".katex")
            assert accessibility(page) == [] and not too_wide(page), (query, width)


@pytest.mark.parametrize("query", ["labels=1x", "seed=-1", "who=nobody", f"labels={'1' * 500}"])
def test_an_address_that_says_nonsense_is_refused_in_one_sentence(lab: Opened, query: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{lab.address}/api/explore/preferences?{query}", timeout=600)
    text = refused.value.read().decode()
    assert refused.value.code == 400 and ("expected" in text or "choose one" in text)
