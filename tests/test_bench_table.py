"""The side-by-side in time and memory: its arithmetic, and that it says so when a bar is missed. Nothing is timed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoTokenizer, LlamaForCausalLM

from bench import __main__ as command
from bench import duel, scaling, side_ours, table
from bench.duel import Series, Side, SideFailed, Sides, check
from bench.models import SHAPES, model_folder, texts
from bench.roofline import arithmetic
from bench.rows import ROWS, Bar, Row, chats, long_tailed, pairs, quarter
from bench.scaling import Curve
from bench.side_peer import force_generate
from bench.table import Result
from bench.turns import Turns, reward
from posttrain.models.shapes import ModelShape
from posttrain.types import SamplingParams

SMALL = ModelShape(layers=1, width=32, heads=2, kv_heads=2, head_dim=16, ffn=48, vocab=64, tied=True)
ROW = Row("a step", (Bar("time", 2.0), Bar("memory", 0.5)), "5M", {"kind": "grpo"})
OURS = Series({"dtype": "float32"}, [1.0, 9.0, 2.0], [2.0, 2.0, 2.0], [640] * 4, [0.5] * 4, loaded=100, peak=300)
PEER = Series({"dtype": "float32"}, [5.0, 4.0, 30.0], [8.0, 8.0, 8.0], [640] * 4, [0.5] * 4, loaded=150, peak=600)
MET = Result(ROW, OURS, PEER)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_folder(SMALL, tmp_path_factory.mktemp("models"))


def test_ratios_are_of_medians_and_of_whole_peaks() -> None:
    assert MET.faster == 5.0 / 2.0 and MET.share == 0.5
    assert OURS.above == 200 and PEER.above == 450


def test_a_bar_is_reached_when_it_is_equalled_and_missed_below() -> None:
    assert MET.met and MET.verdicts() == [(ROW.bars[0], True), (ROW.bars[1], True)]
    slower = replace(MET, ours=replace(OURS, seconds=[2.51]))
    assert not slower.met and "**missed**: time" in slower.line()
    larger = replace(MET, ours=replace(OURS, peak=301))
    assert not larger.met and "**missed**: memory" in larger.line()


def test_a_row_that_was_not_measured_meets_no_bar_and_says_why() -> None:
    failed = Result(ROW, problem="the sides did not do the same work")
    assert not failed.met and not any(met for _, met in failed.verdicts())
    assert "**not measured**: the sides did not do the same work" in failed.line()
    assert not replace(MET, problem="other tokens").met


def test_every_line_of_the_table_has_as_many_cells_as_its_head() -> None:
    lines = table.markdown([MET, Result(ROW, problem="nothing")]).splitlines()
    assert len({line.count("|") for line in lines}) == 1


def test_a_record_is_plain_data() -> None:
    record = json.loads(json.dumps(MET.record()))
    assert (record["faster"], record["memory_share"], record["cpu_share"]) == (2.5, 0.5, 0.25)


def test_sides_that_wrote_other_numbers_of_tokens_are_not_compared() -> None:
    assert check({"kind": "grpo"}, OURS, PEER) == ""
    assert "did not do the same work" in check({"kind": "grpo"}, replace(OURS, tokens=[639] * 4), PEER)


def test_losses_must_agree_where_nothing_is_sampled() -> None:
    other = replace(OURS, losses=[0.5, 0.6, 0.5, 0.5])
    assert check({"kind": "grpo"}, other, PEER) == ""
    assert "losses of step 2 differ" in check({"kind": "sft"}, other, PEER)
    assert "losses of step 1 differ" in check({"kind": "dpo"}, replace(OURS, losses=[float("nan")] * 4), PEER)


def test_the_fastest_settings_are_taken_and_a_hopeless_one_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: dict[str, int] = {}

    class Known:
        """A side whose settings say how long its steps take; "none" does not run."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __enter__(self) -> Known:
            if self.name == "none":
                raise SideFailed("ended")
            return self

        def __exit__(self, *_: object) -> None: ...

        def step(self, keep: bool = True) -> float:
            steps[self.name] = steps.get(self.name, 0) + 1
            return float(self.name)

    monkeypatch.setattr(Sides, "start", lambda self, which, job, settings: Known(settings["name"]))
    sides = Sides(Path("python"), 1)
    assert sides.fastest("peer", {}, [{"name": n} for n in ("3", "none", "2", "9")]) == {"name": "2"}
    assert steps == {"3": 2, "2": 2, "9": 1}
    with pytest.raises(SideFailed, match="all 2 candidate settings of ours failed"):
        sides.fastest("ours", {}, [{"name": "none"}, {"name": "none"}])


def test_a_side_that_ends_early_is_an_error_and_not_a_time(tmp_path: Path) -> None:
    with pytest.raises(SideFailed, match="exited early with code 1"):
        Side(Path(duel.sys.executable), "bench.no_such_side", {"threads": 1}, {})


class Told:
    """The harness's end: lets a side do `count` steps and keeps what it said."""

    def __init__(self, count: int) -> None:
        self.left, self.said = count, list[Mapping[str, Any]]()

    def loaded(self) -> None: ...

    def wait(self) -> None:
        if not self.left:
            raise StopIteration
        self.left -= 1

    def done(self, **facts: Any) -> None:
        self.said.append(facts)


@pytest.mark.parametrize("kind", ["grpo", "generate", "sft", "dpo"])
def test_our_side_does_a_step_a_turn_and_tells_what_it_did(kind: str, folder: Path, tmp_path: Path) -> None:
    job: dict[str, Any] = {"kind": kind, "folder": str(folder), "lr": 1e-3, "threads": 1, "settings": {}}
    job |= {"prompts": texts(folder, [3, 5]), "group": 2, "lengths": [4, 1, 7, 2]}
    job |= chats(SMALL.vocab, 3) | pairs(SMALL.vocab, 2)
    told = Told(2)
    with pytest.raises(StopIteration):
        side_ours.KINDS[kind](job, cast(Turns, told), str(tmp_path))
    rows = [len(p["prompt"]) + len(p[side]) for p in job["pairs"] for side in ("chosen", "rejected")]
    counts = {"grpo": 14, "generate": 14, "sft": sum(len(row["ids"]) for row in job["rows"]), "dpo": sum(rows)}
    assert [facts["tokens"] for facts in told.said] == [counts[kind]] * 2
    if kind in ("sft", "dpo"):
        assert told.said[1]["loss"] < told.said[0]["loss"]  # the same rows again


def test_a_generator_that_ignores_its_limits_is_refused() -> None:
    class Deaf:
        def generate(self, requests: Any, *_: Any) -> list[list[Any]]:
            return [[type("C", (), {"tokens": [1, 2, 3]}) for _ in r.seeds] for r in requests]

    request = side_ours.Request(cast(Any, [5]), (1, 2))
    with pytest.raises(SystemExit, match=r"wrote \[3, 3\] tokens, expected \[3, 2\]"):
        side_ours.Forced(Deaf(), (3, 2)).generate([request], SamplingParams(max_tokens=3))


def test_the_peers_rows_end_exactly_where_they_are_told(folder: Path) -> None:
    model, tokenizer = LlamaForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    lengths = [1, 4, 6, 2]
    force_generate(model, lengths, tokenizer.eos_token_id)
    inputs = {"input_ids": torch.full((4, 3), 9), "attention_mask": torch.ones(4, 3, dtype=torch.int64)}
    out = model.generate(**inputs, do_sample=True, max_new_tokens=6)[:, 3:]  # type: ignore[operator]
    for row, length in zip(out.tolist(), lengths, strict=True):
        assert row.index(tokenizer.eos_token_id) == length - 1


def test_texts_are_read_as_as_many_tokens_as_were_asked_for(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert [len(tokenizer.encode(text)) for text in texts(folder, [1, 7, 30])] == [1, 7, 30]


def test_lengths_have_the_tail_they_should() -> None:
    lengths = long_tailed(4000, 8, 512, 90)
    assert min(lengths) >= 8 and max(lengths) == 512
    assert 85 < sum(lengths) / len(lengths) < 95
    assert 60 < sorted(lengths)[2000] < 70  # the median of 8 + an exponential of mean 82 is 8 + 82 ln 2 ≈ 65


def test_arithmetic_is_six_flop_a_weight_and_token_and_attentions_share() -> None:
    flops, moved = arithmetic(SMALL, rows=2, length=10)
    layer = 4 * 32 * 32 + 3 * 32 * 48
    assert flops == 6 * (layer * 20 + 64 * 32 * 18) + 3 * 2 * 2 * 10**2 * 32
    assert moved > 3 * 4 * (layer + 64 * 32)  # each weight at least once a product


def test_a_slope_is_the_exponent_of_a_power_law() -> None:
    curve = Curve("tokens", (1.0, 10.0, 100.0), (2.0, 20.0, 200.0))
    assert curve.slope == pytest.approx(1.0) and curve.met
    square = replace(curve, y=(1.0, 100.0, 10_000.0))
    assert square.slope == pytest.approx(2.0) and not square.met and "**missed**" in square.line()
    with pytest.raises(ValueError, match="needs two sizes"):
        scaling.fit([3.0, 3.0], [1.0, 2.0])


def test_curves_are_drawn(tmp_path: Path) -> None:
    scaling.draw([Curve("tokens", (1.0, 10.0), (2.0, 20.0))] * 3, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_every_row_has_a_name_of_its_own_a_bar_and_known_work() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert row.bars and row.ours and row.peer and row.model in SHAPES
        assert row.work["kind"] in side_ours.KINDS
        if "lengths" in row.work:
            assert len(row.work["lengths"]) == len(row.work["prompts"]) * row.work["group"]


def test_a_quarter_of_the_work_keeps_its_shape_and_its_longest_row() -> None:
    for row, less in ((row, quarter(row)) for row in ROWS):
        if "lengths" in row.work:
            assert len(less.work["lengths"]) == len(less.work["prompts"]) * less.work["group"]
            assert max(less.work["lengths"]) == max(row.work["lengths"])
            assert 4 * len(less.work["lengths"]) == len(row.work["lengths"])
        else:
            assert 4 * less.work["count"] == row.work["count"]


def test_only_what_stands_between_the_marks_of_the_page_is_replaced() -> None:
    page = f"before\n{command.BEGIN}old{command.END}after\n"
    assert command.written(page, "new") == f"before\n{command.BEGIN}\nnew\n{command.END}after\n"
    with pytest.raises(ValueError, match="put the two marks back"):
        command.written("no marks", "new")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--only", "nothing"], "no row's name contains 'nothing'"),
        (["--rounds", "0"], "--rounds is 0"),
        (["--write", "--quick"], "leave out --only and --quick"),
        (["--smollm", "nowhere"], "has no config.json"),
    ],
)
def test_options_that_cannot_be_meant_are_refused(
    flags: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(flags)
    assert error.value.code == 2 and words in capsys.readouterr().err


def test_the_reward_is_a_share_of_the_characters() -> None:
    assert (reward(""), reward("w24"), reward("bcd")) == (0.0, 2 / 3, 0.0)
