"""What holds for the page as a whole: it is small, self-contained and usable by everybody."""

import re
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect

from deployments.api.routes.playground import ASSETS
from tests.deployments.local_server import LocalServer
from tests.playground.conftest import OpenPage
from tests.playground.test_chat_page import Screenshot, last_answer, say

MAX_BYTES = 200_000
PHONE: dict[str, Any] = {"viewport": {"width": 390, "height": 844}, "device_scale_factor": 2}


def test_the_page_is_small_and_names_no_other_host() -> None:
    files = list(ASSETS.iterdir())
    assert {"index.html", "main.js", "base.css"} <= {file.name for file in files}
    assert sum(file.stat().st_size for file in files) <= MAX_BYTES
    for file in files:
        hosts = set(re.findall(r"https?://[\w.]+", file.read_text()))
        assert hosts <= {"http://www.w3.org"}, file.name


def test_the_browser_is_told_to_load_nothing_else(server: LocalServer) -> None:
    page = httpx.get(server.url)
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'self'" in page.headers["content-security-policy"]
    for path in ("playground/main.js", "playground/base.css", "playground/manta.svg"):
        asset = httpx.get(f"{server.url}/{path}")
        assert asset.status_code == 200 and asset.headers["x-content-type-options"] == "nosniff"
    for path in ("playground/nothing.js", "playground/..%2Fwire.py", "playground/index.html"):
        assert httpx.get(f"{server.url}/{path}").status_code == 404


def violations(page: Page) -> list[str]:
    response = Axe().run(
        page, options={"runOnly": ["wcag2a", "wcag2aa", "wcag21aa", "best-practice"]}
    )
    assert len(response.response["passes"]) > 15, "the check itself has not run"
    found = response.response["violations"]
    return [
        f"{v['id']}: {n['html'][:120]} {n['failureSummary']}" for v in found for n in v["nodes"]
    ]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_hinders_anybody(open_page: OpenPage, screenshot: Screenshot, scheme: str) -> None:
    page = open_page("both", color_scheme=scheme, viewport={"width": 1440, "height": 900})
    expect(page.locator("#engine-body")).to_be_visible()
    say(page, "What is 17 + 25?")
    last_answer(page)
    page.click("#toggle-settings")
    screenshot(page, f"settings-{scheme}")
    assert violations(page) == []


@pytest.mark.parametrize("view", ["chat", "engine"])
def test_it_fits_a_phone(open_page: OpenPage, screenshot: Screenshot, view: str) -> None:
    page = open_page(view, **PHONE)
    expect(page.locator('#health[data-state="ok"]')).to_be_attached()
    if view == "chat":
        page.fill("#input", "What is 17 + 25?")
        page.click("#send")
        last_answer(page)
    else:
        expect(page.locator("#engine-body")).to_be_visible()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    screenshot(page, f"phone-{view}")
    assert violations(page) == []


def test_the_keyboard_reaches_everything(open_page: OpenPage) -> None:
    page = open_page("chat")
    expect(page.locator('#health[data-state="ok"]')).to_be_attached()
    page.locator("body").press("Tab")  # from the message box, which has the focus
    page.evaluate("document.activeElement.blur()")
    reached = []
    for _ in range(24):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    assert {"input", "send", "toggle-settings", "theme", "new-chat", "log"} <= set(reached)


def test_motion_is_left_out_for_who_does_not_want_it(open_page: OpenPage) -> None:
    page = open_page("chat", reduced_motion="reduce")
    page.evaluate(
        "document.body.insertAdjacentHTML('beforeend', '<p class=streaming><b class=text>')"
    )
    assert page.evaluate(
        "getComputedStyle(document.querySelector('.streaming .text'), '::after').animationName"
    ) == "none"  # fmt: skip
