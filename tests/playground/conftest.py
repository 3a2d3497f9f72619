"""A headless Chromium for the page; without one these tests are skipped.

Chromium is playwright's own (`playwright install chromium`), or the system's
(`apt-get install chromium`). MANTA_REQUIRE_BROWSER=1 makes its absence a failure. Screenshots are
kept in MANTA_SCREENSHOTS, by default test-artifacts/ in the working directory.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deployments.local_server import LocalServer, serve_locally

pytest.importorskip("playwright", reason="needs playwright: pip install -e '.[dev]'")

from playwright.sync_api import Browser, Page, expect, sync_playwright
from playwright.sync_api import Error as PlaywrightError

OpenPage = Callable[..., Page]


@pytest.fixture(scope="package")  # while it is open, other tests could not run an event loop
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        try:
            system = shutil.which("chromium") or shutil.which("google-chrome")
            browser = playwright.chromium.launch(executable_path=system, args=["--no-sandbox"])
        except PlaywrightError as error:
            reason = (
                f"no Chromium: playwright install chromium, or apt-get install chromium ({error})"
            )
            if os.environ.get("MANTA_REQUIRE_BROWSER") == "1":
                pytest.fail(reason)
            pytest.skip(reason)
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server() -> Iterator[LocalServer]:
    """The demo model with a pool small enough to fill, a token at a time."""
    with serve_locally(
        num_blocks=192,
        block_size=16,
        max_num_seqs=16,
        max_num_batched_tokens=128,
        speculation="off",
    ) as running:
        yield running


@pytest.fixture
def open_page(browser: Browser, server: LocalServer) -> Iterator[OpenPage]:
    """open_page(view, url=…, **context options): a page on which nothing may go wrong.

    A script error, a message on the console or a request to another host fails the test.
    """
    contexts = []
    faults: list[str] = []

    def open_page(view: str = "chat", url: str = server.url, **options: Any) -> Page:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 860}} | options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(15_000)
        expect.set_options(timeout=15_000)  # of a busy machine
        page.on("pageerror", lambda error: faults.append(f"script error: {error}"))
        page.on("console", lambda message: _note(faults, message))
        page.on("request", lambda r: None if r.url.startswith(url) else faults.append(r.url))
        page.goto(f"{url}/#{view}")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert faults == []


def _note(faults: list[str], message: Any) -> None:
    # Chromium reports every answer other than 200 by itself; that is not the page's doing.
    if message.type in ("error", "warning") and "Failed to load resource" not in message.text:
        faults.append(f"{message.type}: {message.text}")


@pytest.fixture(scope="session")
def screenshot() -> Callable[[Page, str], None]:
    directory = Path(os.environ.get("MANTA_SCREENSHOTS", "test-artifacts"))
    directory.mkdir(parents=True, exist_ok=True)
    return lambda page, name: page.screenshot(path=directory / f"{name}.png") and None
