"""Takes the pictures of the six explorers in the README and docs: `python -m docs.lab_pictures [OUT]`.

It opens the real lab on an empty folder, drives a Chromium as a reader would, and writes docs/images/lab-NAME.png.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from playwright.sync_api import Page, sync_playwright

from tests.lab_server import CHROMIUM, FLAGS, opened

IMAGES = Path(__file__).parent / "images"
WIDTH, HEIGHT = 1200, 1120
STAGES = "/explore/stages?stage=ppo"
GRPO = "/explore/grpo?problem=98*8&size=8"
HACKING = "/explore/hacking?at=60"
SEARCH = "/explore/search"


def take(page: Page, address: str) -> dict[str, bytes]:
    """Name → picture, each once its page has come to rest."""
    found: dict[str, bytes] = {}
    page.goto(address + STAGES)
    page.get_by_text("What changed from").wait_for()
    found["stages"] = page.screenshot()
    page.goto(address + "/explore/preferences")
    page.get_by_role("button", name="Label 30 for me").click()
    page.get_by_role("heading", name="Length bias").wait_for()
    found["preferences"] = page.screenshot()
    page.goto(address + "/explore/algorithms")
    page.get_by_text("Memory on one device").wait_for()
    found["algorithms"] = page.screenshot()
    page.goto(address + GRPO)
    page.locator(".katex").first.wait_for()
    page.wait_for_load_state("networkidle")
    found["grpo"] = page.screenshot()
    page.goto(address + HACKING)
    page.get_by_text("at 120").first.wait_for()
    found["hacking"] = page.screenshot()
    page.goto(address + SEARCH)
    page.get_by_text("✓ Right:").wait_for()
    found["search"] = page.screenshot()
    return found


def main(out: Path) -> None:
    """Writes all six."""
    with tempfile.TemporaryDirectory() as folder, opened(Path(folder)) as lab, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, reduced_motion="reduce")
        page.set_default_timeout(120_000)
        for name, picture in take(page, lab.address).items():
            (out / f"lab-{name}.png").write_bytes(picture)
        browser.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else IMAGES)
