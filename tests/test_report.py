"""The report: one page that loads nothing, shows what a run or a pipeline holds, and runs nothing a model wrote."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from posttrain.cli.html import put, table, tag
from posttrain.cli.report import write_report
from posttrain.store.run import EpisodeRow, Event, Run
from posttrain.types import ConfigError, ResumeError
from tests import tiny

HOSTILE = "<script>alert(1)</script><img src=x onerror=alert(2)>\"'&\x1b[2J\u202e"


class Reader(HTMLParser):
    """Every tag with its attributes, and the text between them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.text += data

    def all(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag == name]


def checked(path: Path) -> Reader:
    """The page, after what every page must keep."""
    text = path.read_text(encoding="utf-8")
    read = Reader(text)
    assert not [tag for tag, _ in read.tags if tag in ("script", "iframe", "link", "object", "form", "base")]
    for name, attributes in read.tags:
        assert not [key for key in attributes if key.startswith("on")], name
        for key in ("src", "href"):
            assert (attributes.get(key) or "#").startswith(("#", "data:image/svg+xml;base64,")), attributes
    assert all(image["alt"] for image in read.all("img"))
    assert len(read.all("caption")) == len(read.all("table"))
    assert read.all("th") and all(cell["scope"] in ("row", "col") for cell in read.all("th"))
    assert "default-src 'none'" in text and "prefers-color-scheme: dark" in text and "width=device-width" in text
    assert "@import" not in text and "url(" not in text
    return read


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two steps on a tiny model."""
    root = tmp_path_factory.mktemp("report")
    return tiny.two_steps(root / "tiny", root / "run")


def test_the_page_of_a_run_shows_settings_curves_verdicts_and_samples(run: Path, tmp_path: Path) -> None:
    path = write_report(run, tmp_path / "page.html")
    read = checked(path)
    for words in ("Before and after", "Curves", "Verdicts", "Samples", "Settings", "algo.group_size", "Highest reward"):
        assert words in read.text
    assert "grpo · finished · step 2" in read.text and len(read.all("img")) >= 5
    assert not (run / "report.html").exists()


def episode(step: int, index: int, text: str, kind: Any = "train") -> EpisodeRow:
    nothing = (np.zeros(0, np.int32), np.zeros(0, bool), np.zeros(0, np.float32))
    scored = (float(index), True, "length", 3, {HOSTILE: 1.0}, HOSTILE)
    return EpisodeRow(kind, step, index, 0, HOSTILE, HOSTILE, text, *scored, *nothing, None)


def test_what_a_model_wrote_is_shown_and_never_run(tmp_path: Path) -> None:
    header = {"algorithm": HOSTILE, "recipe": {"data": {"tasks": HOSTILE}}, "created": HOSTILE}
    with Run.create(tmp_path / "run", header) as made:
        made.write(0, {"eval/accuracy": 0.1}, {}, [episode(0, 0, HOSTILE, "eval")], [Event("warning", "data", HOSTILE)])
        made.write(1, {"reward": 1.0, "eval/accuracy": 0.2}, {}, [episode(1, i, HOSTILE) for i in range(5)])
        made.write(2, {"eval/accuracy": 0.2}, {}, [episode(2, 0, HOSTILE, "eval")])
    read = checked(write_report(tmp_path / "run"))
    assert read.text.count("<script>alert(1)</script>") >= 10 and "\\x1b[2J\\u202e" in read.text
    assert "interrupted" in read.text, "an unfinished run has a page too"


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    with Run.create(tmp_path / "run", {"algorithm": "sft", "recipe": {}}):
        assert "running" in checked(write_report(tmp_path / "run")).text


RECIPE = """
pipeline = "small"
[[stage]]
name = "sft"
[[stage]]
name = "rl"
[[figure]]
kind = "cards"
name = "capabilities"
metrics = ["safety"]
[[figure]]
kind = "curves"
name = "learning"
metrics = ["reward"]
"""


def pipeline(folder: Path, stages: list[dict[str, Any]], **more: Any) -> Path:
    record = {"pipeline": "small", "about": HOSTILE, "recipe": RECIPE, "stages": stages, "results": None, "expect": {}}
    folder.mkdir(exist_ok=True)
    (folder / "pipeline.json").write_text(json.dumps({**record, **more}))
    return folder


def stage(folder: Path, name: str, safety: float) -> dict[str, Any]:
    place = folder / f"{name}-1" / "card"
    place.mkdir(parents=True)
    answer = {"capability": "safety", "prompt": "How?", "answer": HOSTILE, "passed": True, "detail": "", "tokens": 3}
    (place / "answers.jsonl").write_text(json.dumps(answer) + "\n")
    card = {"safety": {"value": safety, "low": safety - 0.1, "high": safety + 0.1, "n": 9}}
    known = {"name": name, "run": name, "folder": f"{name}-1", "card_folder": f"{name}-1/card", "card": card}
    return {**known, "seconds": 61.0, "peak_mib": 500.0, "made": {"rows": 5}, "summary": None}


def test_the_page_of_a_pipeline_compares_its_stages(tmp_path: Path) -> None:
    stages = [stage(tmp_path, "sft", 0.5), stage(tmp_path, "rl", 0.8)]
    expect = {"rl.safety": [0.7, 0.9], "sft.safety": [0.6, 0.7]}
    results = {"rl.safety": 0.8, "sft.safety": 0.5}
    path = write_report(pipeline(tmp_path, stages, expect=expect, results=results))
    read = checked(path)
    assert path == tmp_path / "report.html" and len(read.all("img")) == 2
    assert "80.0% [70.0%, 90.0%] ★" in read.text and "50.0% [40.0%, 60.0%] ★" not in read.text
    assert read.text.count("✓ met") == 1 and read.text.count("✗ missed") == 1
    assert read.text.count("How?") == 1 and read.text.count("<script>alert(1)</script>") == 3, "one box a stage"
    assert "2m02s in total" in read.text and "rows 5" in read.text


def test_a_pipeline_of_which_one_stage_has_ended_has_a_page(tmp_path: Path) -> None:
    stages = [stage(tmp_path, "sft", 0.5)]
    read = checked(write_report(pipeline(tmp_path, stages, expect={"rl.safety": [0, 1]})))
    assert "not finished · stages done: 1" in read.text and "not measured yet" in read.text


def test_what_is_no_run_and_where_nothing_can_be_written_is_said(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ResumeError, match="holds no run"):
        write_report(tmp_path)
    with pytest.raises(ConfigError, match="report cannot be written to"):
        write_report(run, tmp_path / "no" / "page.html")
    (tmp_path / "pipeline.json").write_text("[]")
    with pytest.raises(ResumeError, match="is damaged"):
        write_report(tmp_path)


def test_markup_is_escaped_once_wherever_it_is_put() -> None:
    assert tag("p", "a<b", put("c&d")) == "<p>a&lt;bc&amp;d</p>"
    assert Reader(tag("p", class_='x" onclick="y')).tags == [("p", {"class": 'x" onclick="y'})]
    assert "&lt;i&gt;" in table("<i>", ["<i>"], [["<i>", "<i>"]]) and "<i>" not in table("<i>", ["<i>"], [["<i>"]])
