"""What every test file may use."""

from __future__ import annotations

import fcntl
import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from playwright.sync_api import Browser, Page, sync_playwright

from posttrain.models.kernels.build import library
from tests import tiny
from tests.lab_server import CHROMIUM, FLAGS, PATIENCE

settings.register_profile("posttrain", deadline=None)  # a busy machine must not fail a test
settings.load_profile("posttrain")

LONGEST = (
    "test_resume", "test_shipped_pipelines", "test_pipelines", "test_lab_course", "test_lab_hacking", "test_lab_pages",
    "test_learning", "test_cli", "test_lab_label", "test_lab_preferences", "test_lab_grpo",
)  # fmt: skip
"""The files that take longest begin first, so that a run in several processes does not end with one of them alone."""

SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def shared(*parts: str) -> Path:
    """A file of the shared folder beside the repository; the test is skipped, naming it, where it is absent."""
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs shared/{'/'.join(parts)}, which is not here")
    return path


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch computes with one thread in this file."""
    with tiny.threads(1):
        yield


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the files of LONGEST in front, the others in their order behind them."""
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(LONGEST)))


def pytest_collection_finish() -> None:
    """Keeps the garbage collector from visiting thousands of tests again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests keep reference log-probabilities in a folder of their own, not in the user's.

    Test processes side by side share the compiled kernels: the first compiles them, the others wait for it.
    """
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(cache))
        if "PYTEST_XDIST_WORKER" in os.environ:
            kernels = tmp_path_factory.getbasetemp().parent / "kernels"
            kernels.mkdir(exist_ok=True)
            (cache / "kernels").symlink_to(kernels)
            with (kernels / "lock").open("w") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                library()
        yield


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """The system's Chromium, else Playwright's. Its driver keeps an event loop running: it ends before other files."""
    with sync_playwright() as playwright:
        if CHROMIUM is None and not Path(playwright.chromium.executable_path).exists():
            pytest.skip("needs Chromium, which is not installed here: tests/install_browser.sh python3")
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS, timeout=PATIENCE)
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that must ask nobody but a lab here, run into no error and break no content policy."""
    context = browser.new_context(reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.on("websocket", lambda socket: asked.append(socket.url.replace("ws://", "http://")))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on(
        "console", lambda said: wrong.append(f"{said.text} {said.location['url']}") if said.type == "error" else None
    )
    yield page
    context.close()
    assert asked and not [url for url in asked if not url.startswith(("http://127.0.0.1:", "data:"))]
    assert not [
        text for text in wrong if "404" not in text and "ERR_CONNECTION" not in text and "WebSocket" not in text
    ]
