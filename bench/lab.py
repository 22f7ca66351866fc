"""Lab response times: a long run, many dashboards on one live run, and key presses in the explorers.

    python -m bench.lab [--only long|live|keys] [--steps 10000] [--episodes 100] [--rounds 5] [--folder FOLDER] [--keep]

`long` creates a run of `--steps` steps with `--episodes` episodes each and times what a user waits for. `live` opens 50
dashboards on a run that another process writes. `keys` presses keys in every explorer. Each prints its target, and the
command exits with code 1 if one is missed. The long run is kept, in build/bench/lab or `--folder`, only with `--keep`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlencode
from urllib.request import urlopen

import numpy as np
from playwright.sync_api import Browser, Page, expect, sync_playwright
from websockets.asyncio.client import connect
from websockets.typing import Origin

from bench.environment import ROOT
from posttrain.lab.app import PAGES
from posttrain.store.run import EpisodeRow, Run
from tests.lab_server import CHROMIUM, FLAGS, PATIENCE, Opened, header, hostile_run, opened

GROUP, METRICS, TOKENS = 10, 40, 24
WORDS = "sea small bread sun field farm train blue tall near moves shines says nobody corn bird".split()
PAINT, FILTER, KEY = 1000.0, 300.0, 50.0  # targets in ms: first paint, a filter's result, a key's effect (p95)
SEARCHES: dict[str, dict[str, str]] = {
    "newest first": {},
    "lowest reward": {"order": "worst"},
    "highest reward": {"order": "best"},
    "longest": {"order": "longest"},
    "flat groups": {"order": "flat"},
    "unscored": {"result": "unscored"},
    "a reward part is 0": {"part": "correct", "bound": "most", "limit": "0"},
    "a common word": {"text": "bread"},
    "a word that does not occur": {"text": "zebra"},
    "lowest reward of steps 100 to 200": {"order": "worst", "first": "100", "last": "200"},
    "page 2,500 of the lowest reward": {"order": "worst", "start": "100000"},
    "page 20,000 of the lowest reward": {"order": "worst", "start": "800000"},
}
DASHBOARDS, LIVE_STEPS, EVERY = 50, 60, 0.2
PRESSES = 60
ARROWS = ("ArrowRight", "ArrowLeft")
KEYS: dict[str, tuple[str, tuple[str, str]]] = {
    "/explore/stages": ("input[name=view]:checked", ARROWS),
    "/explore/algorithms": ("input[name=size]:checked", ARROWS),
    "/explore/hacking": ("input[name=beta]", ARROWS),
    "/explore/grpo": ("input[name=reward-1]", ARROWS),
    "/explore/preferences": ("main", ("1", "u")),
    "/explore/search": ("input[name=grown]", ("ArrowLeft", "ArrowRight")),
}
"""Explorer → focused element, and the two keys that are pressed alternately."""
WATCH = """() => {
  window.pressed = 0; window.painted = 0;
  const changed = () => requestAnimationFrame(() => setTimeout(() => { window.painted = performance.now(); }));
  new MutationObserver(changed).observe(document.querySelector('main'),
    {subtree: true, childList: true, characterData: true, attributes: true});
  addEventListener('keydown', (event) => { window.pressed = event.timeStamp; }, true);
}"""
"""Script that records when a key was pressed and the frame after each change of the page."""


@dataclass
class Sheet:
    """Measurements, one line each, and whether every target was met."""

    met: bool = True
    lines: list[dict[str, float | str | bool]] = field(default_factory=list[dict[str, float | str | bool]])

    def add(self, what: str, took: Sequence[float], bar: float | None = None, share: float = 1.0) -> None:
        """Prints the median and the `share` quantile of milliseconds, and compares the latter with the target."""
        high = float(np.quantile(took, share))
        met = bar is None or high <= bar
        self.met &= met
        verdict = "" if bar is None else f"  {'met' if met else 'MISSED'} (at most {bar:.0f})"
        print(f"{what:52} {statistics.median(took):8.1f} {high:8.1f} ms{verdict}", flush=True)
        self.lines.append({"what": what, "median": statistics.median(took), "high": high, "met": met})

    def say(self, what: str, value: str, met: bool = True) -> None:
        """Prints a value that is not a time."""
        self.met &= met
        print(f"{what:52} {value}{'' if met else '  MISSED'}", flush=True)
        self.lines.append({"what": what, "value": value, "met": met})


def timed(rounds: int, work: Callable[[], object]) -> list[float]:
    """Milliseconds that each round of `work` takes."""
    took: list[float] = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        took.append(1000 * (time.perf_counter() - began))
    return took


@contextmanager
def chromium() -> Iterator[Browser]:
    """The browser that the tests use."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


# --- a long run ------------------------------------------------------------------------------------------------------


def make(folder: Path, steps: int, episodes: int) -> None:
    """Writes the long run, with short completions."""
    draw = np.random.default_rng(0)
    mask, tokens = np.arange(TOKENS) >= 8, draw.integers(3, 500, TOKENS).astype(np.int32)
    logprobs = -draw.exponential(0.5, TOKENS).astype(np.float32)
    names = ["reward", "accuracy", "length", "entropy", "loss", *(f"part/{i}" for i in range(METRICS - 5))]
    with Run.create(folder, {**header(), "size": [steps, episodes]}) as run:
        run._db.execute("PRAGMA synchronous = OFF")  # speed over durability: the run can be made again
        for step in range(1, steps + 1):
            numbers = draw.random(METRICS) + step / steps
            rewards = draw.integers(0, 5, episodes) / 4
            rewards[30:40] = rewards[30] if step % 2 else rewards[30:40]  # some groups are flat
            words = draw.integers(0, len(WORDS), (episodes, 12))
            right = rewards > 0.5
            rows = [
                EpisodeRow("train", step, i // GROUP, i % GROUP, f"task:{i // GROUP}", "What is said?",
                           " ".join(WORDS[word] for word in words[i]), None if i % 50 == 49 else float(rewards[i]),
                           bool(right[i]), "stop", int(words[i].sum()) % 80, {"correct": float(right[i])},
                           None, tokens, mask, logprobs, 0.5)
                for i in range(episodes)
            ]  # fmt: skip
            run.write(step, dict(zip(names, map(float, numbers), strict=True)), {}, rows)
        run.finish({"steps": steps})


def painted(browser: Browser, address: str, ready: str) -> tuple[float, float]:
    """Milliseconds from requesting a page to its first contentful paint and to the first `ready` element."""
    page = browser.new_page()
    page.goto(address)
    page.wait_for_selector(ready, timeout=PATIENCE)
    there = page.evaluate("performance.now()")
    first = page.evaluate("performance.getEntriesByName('first-contentful-paint')[0].startTime")
    page.close()
    return float(first), float(there)


def filtered(page: Page, name: str, values: Sequence[str]) -> list[float]:
    """Milliseconds from selecting each of a filter's values to the frame that shows the result."""
    took: list[float] = []
    for value in values:
        page.evaluate(WATCH)
        began = float(page.evaluate("performance.now()"))
        page.locator(f"select[name={name}]").select_option(value)
        expect(page.locator("#looked")).to_contain_text("looked through", timeout=PATIENCE)
        page.locator(".episodes li").first.wait_for(timeout=PATIENCE)
        settle(page)
        took.append(float(page.evaluate("window.painted")) - began)
    return took


def settle(page: Page, quiet: int = 150) -> None:
    """Waits until the page has not changed for a while."""
    while page.evaluate("performance.now() - Math.max(window.painted, window.pressed)") < quiet:
        page.wait_for_timeout(20)


def long_run(sheet: Sheet, folder: Path, rounds: int) -> None:
    """Times what a user waits for on a run with many steps and episodes."""
    with opened(folder) as lab, chromium() as browser:
        run = f"{lab.address}/runs/long"
        first, there = painted(browser, run, ".chart canvas")
        sheet.add("first paint of the run, lab just started", [first], PAINT)
        sheet.add("first curve of the run, lab just started", [there])
        both = [painted(browser, run, ".chart canvas") for _ in range(rounds)]
        sheet.add("first paint of the run", [paint for paint, _ in both], PAINT)
        sheet.add("first curve of the run", [curve for _, curve in both], PAINT)
        for name, path, ready in (
            ("list of runs", "/runs", "table"),
            ("episodes", "/runs/long/episodes", ".episodes li"),
            ("one episode", "/runs/long/episodes/train/50/0/0", ".span.model .t"),
        ):
            both = [painted(browser, lab.address + path, ready) for _ in range(rounds)]
            sheet.add(f"first paint of {name}", [paint for paint, _ in both], PAINT)
            sheet.add(f"content of {name}", [shown for _, shown in both], PAINT)
        page = browser.new_page()
        page.goto(f"{run}/episodes")
        page.locator(".episodes li").first.wait_for(timeout=PATIENCE)
        orders = ["worst", "best", "longest", "shortest", "flat", "oldest", "newest"]
        sheet.add("selecting an order, until it is shown", filtered(page, "order", orders), FILTER)
        results = ["passed", "failed", "unscored", "any"]
        sheet.add("selecting a result, until it is shown", filtered(page, "result", results), FILTER)
        for name, asked in SEARCHES.items():
            path = f"{lab.address}/api/runs/long/episodes?{urlencode(asked)}"
            sheet.add(f"search: {name}", timed(rounds, lambda path=path: urlopen(path).read()), FILTER)
        sheet.say("lab memory afterwards", f"{memory(lab.process.pid):.0f} MiB")


def memory(pid: int) -> float:
    """Resident memory of a process in MiB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)


def seconds_of_cpu(pid: int) -> float:
    """CPU seconds that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


# --- many dashboards -------------------------------------------------------------------------------------------------


WRITER = """
import sys, time
from pathlib import Path
from posttrain.store.run import Run
folder, steps, every = Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])
with Run.open(folder) as run:
    print("open", flush=True)
    sys.stdin.readline()
    for step in range(1, steps + 1):
        run.write(step, {f"m{i}": step + i / 100 for i in range(40)} | {"written": time.time() % 1000}, {}, [])
        time.sleep(every)
"""


async def watch(lab: Opened, steps: int) -> tuple[list[int], list[float]]:
    """Steps that one dashboard received, in order, and the delay of each after it was written, in milliseconds."""
    address = f"ws://127.0.0.1:{lab.port}/live/live?token={lab.token}&metrics=written"
    seen: list[int] = []
    late: list[float] = []
    async with connect(address, origin=Origin(lab.address), max_size=1 << 25) as socket:
        while steps not in seen:
            news = json.loads(await asyncio.wait_for(socket.recv(), 120))
            if "written" in news.get("curves", {}):
                now, (fresh, when) = time.time() % 1000, news["curves"]["written"]
                late += [1000 * ((now - moment) % 1000) for moment in when]
                seen = [*fresh] if news["whole"] else [*seen, *fresh]
    return seen, late


async def watch_all(lab: Opened, writer: subprocess.Popen[str]) -> list[tuple[list[int], list[float]]]:
    """Runs all dashboards, opened before the first step is written."""
    tasks = [asyncio.create_task(watch(lab, LIVE_STEPS)) for _ in range(DASHBOARDS)]
    await asyncio.sleep(3)
    assert writer.stdin is not None
    writer.stdin.write("\n")
    writer.stdin.flush()
    return await asyncio.gather(*tasks)


def live(sheet: Sheet) -> None:
    """50 dashboards on one run that another process writes; none may miss a step."""
    with tempfile.TemporaryDirectory() as place:
        Run.create(Path(place) / "live", header()).close()
        command = [sys.executable, "-c", WRITER, str(Path(place) / "live"), str(LIVE_STEPS), str(EVERY)]
        writer = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        assert writer.stdout is not None
        writer.stdout.readline()
        with opened(Path(place)) as lab:
            before, began = seconds_of_cpu(lab.process.pid), time.perf_counter()
            alone = memory(lab.process.pid)
            found = asyncio.run(watch_all(lab, writer))
            took = time.perf_counter() - began
            whole = sum(seen == list(range(1, LIVE_STEPS + 1)) for seen, _ in found)
            sheet.say(
                f"{DASHBOARDS} dashboards, {LIVE_STEPS} steps: got every step once", f"{whole}", whole == DASHBOARDS
            )
            sheet.add(
                "delay from writing a step to a dashboard update", [ms for _, late in found for ms in late], share=0.95
            )
            share = (seconds_of_cpu(lab.process.pid) - before) / took
            sheet.say("lab memory with all dashboards", f"{memory(lab.process.pid):.0f} MiB ({alone:.0f} before)")
            sheet.say("lab CPU use, of one core", f"{share:.0%}")
        writer.wait(timeout=60)


# --- a key of an explorer --------------------------------------------------------------------------------------------


def key_to_paint(page: Page, control: str, pressed: tuple[str, str], presses: int = PRESSES) -> list[float]:
    """Milliseconds from each key press on a control to the frame after the last change it causes.

    The last change counts, not the first: a slider's own number moves at once, and the server's result follows.
    """
    page.locator(control).first.wait_for(timeout=PATIENCE)
    page.wait_for_load_state("networkidle")
    if control != "main":
        page.locator(control).first.focus()
    page.evaluate(WATCH)
    took: list[float] = []
    for press in range(presses + 2):
        page.keyboard.press(pressed[press % 2])
        settle(page)
        after = float(page.evaluate("window.painted - window.pressed"))
        if press >= 2 and after > 0:  # the first two are warm-up
            took.append(after)
    return took


def keys(sheet: Sheet) -> None:
    """Measures key presses in every explorer."""
    with tempfile.TemporaryDirectory() as place:
        hostile_run(Path(place) / "one")
        with opened(Path(place)) as lab, chromium() as browser:
            for path in (path for path in PAGES if path.startswith("/explore/")):
                control, pressed = KEYS[path]
                page = browser.new_page()
                page.goto(lab.address + path)
                took = key_to_paint(page, control, pressed)
                if len(took) < PRESSES // 2:
                    sheet.say(path, f"only {len(took)} of {PRESSES} key presses changed the page", False)
                else:
                    sheet.add(f"{path}, key to paint (p95 of {len(took)})", took, KEY, 0.95)
                page.close()


def main() -> None:
    """Runs the selected measurements."""
    parser = argparse.ArgumentParser(prog="python -m bench.lab", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--only", choices=("long", "live", "keys"), default=None)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--episodes", type=int, default=100, help="episodes per step")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench" / "lab")
    parser.add_argument("--keep", action="store_true", help="keep the long run and reuse it next time")
    asked = parser.parse_args()
    sheet, about = Sheet(), asked.folder / "long" / "run.json"
    if asked.only in (None, "long"):
        if not about.exists() or json.loads(about.read_text())["size"] != [asked.steps, asked.episodes]:
            shutil.rmtree(asked.folder / "long", ignore_errors=True)
            began = time.perf_counter()
            make(asked.folder / "long", asked.steps, asked.episodes)
            print(f"wrote {asked.steps * asked.episodes:,} episodes in {time.perf_counter() - began:.0f} s")
        print(f"{'':52} {'median':>8} {'worst':>8}")
        long_run(sheet, asked.folder, asked.rounds)
        if not asked.keep:
            shutil.rmtree(asked.folder / "long")
    if asked.only in (None, "live"):
        live(sheet)
    if asked.only in (None, "keys"):
        keys(sheet)
    sys.exit(0 if sheet.met else 1)


if __name__ == "__main__":
    main()
