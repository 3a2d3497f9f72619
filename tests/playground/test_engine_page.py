"""The live view of the engine, in a real browser while a real engine works."""

import re
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, expect

from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer
from tests.playground.conftest import OpenPage

Screenshot = Callable[[Page, str], None]


def tile(page: Page, label: str) -> Any:
    return page.locator(".tile", has=page.locator("dt", has_text=re.compile(f"^{label}"))).locator(
        "dd"
    )


def start_load(page: Page, kind: str, count: int, tokens: int) -> None:
    page.select_option("#load-kind", kind)
    page.fill("#load-count", str(count))
    page.fill("#load-tokens", str(tokens))
    page.click("#load-start")


def pixels(page: Page) -> str:
    return str(page.evaluate("document.getElementById('pool').toDataURL()"))


def test_a_load_is_seen_in_the_batch_the_pool_and_the_queue(
    open_page: OpenPage, screenshot: Screenshot
) -> None:
    page = open_page("both", viewport={"width": 1440, "height": 900})
    pool = page.locator("#pool")
    expect(pool).to_have_attribute("aria-label", re.compile(r"0 owned, 0 shared"))
    expect(page.locator("#shards li")).to_have_text(re.compile("rank 0 · cpu"))
    idle = pixels(page)
    start_load(page, "shared", 40, 400)
    expect(pool).to_have_attribute("aria-label", re.compile(r"[1-9]\d* owned, [1-9]\d* shared"))
    expect(page.locator("#queue li").first).not_to_have_text("empty")
    expect(page.locator(".lane:not(.gone)").nth(3)).to_be_visible()
    expect(tile(page, "Running")).not_to_have_text("0")
    assert pixels(page) != idle
    screenshot(page, "both-under-load")
    expect(page.locator("#events")).to_contain_text("prompt tokens were cached")
    expect(page.locator("#load-status")).to_have_text(re.compile("^40 answered"), timeout=60_000)
    expect(tile(page, "Running")).to_have_text("0")
    expect(tile(page, "Prefix hits")).not_to_have_text(re.compile("^0"))
    expect(pool).to_have_attribute("aria-label", re.compile(r"[1-9]\d* free and cached, 0 owned"))


def test_preemption_is_told(open_page: OpenPage) -> None:
    page = open_page("engine")
    expect(page.locator("#engine-body")).to_be_visible()
    start_load(page, "short", 64, 1500)
    expect(page.locator("#events .preempted").first).to_contain_text("preempted", timeout=30_000)
    expect(tile(page, "Preemptions")).not_to_have_text("0")
    page.click("#load-start")
    expect(page.locator("#load-status")).to_have_text("Stopped")


def test_a_row_and_its_blocks_light_each_other_up(open_page: OpenPage) -> None:
    page = open_page("engine")
    expect(page.locator("#engine-body")).to_be_visible()
    start_load(page, "short", 64, 1400)
    lane = page.locator(".lane:not(.gone)").first
    expect(lane).to_be_visible()
    lane.locator("button").focus()
    expect(lane.locator("button")).to_have_attribute("title", re.compile(r"Request \d+: \d+ of"))
    page.click("#load-start")
    page.locator("#pool").hover(position={"x": 6, "y": 6})
    expect(page.locator("#popover")).to_contain_text("Block 0")


def test_engines_draw_only_for_who_can_see_them(open_page: OpenPage, server: LocalServer) -> None:
    page = open_page("engine")
    expect(page.locator("#engine-body")).to_be_visible()
    assert server.engine.step_log is not None
    page.locator('[data-show="chat"]').click()
    wait_until(lambda: server.engine.step_log is None, 10, "the engine stops drawing")


@pytest.mark.parametrize("count", [2, 1])
def test_replicas_can_be_chosen(open_page: OpenPage, server: LocalServer, count: int) -> None:
    """The front tells of several replicas; here one engine stands for all."""
    own = server.front.watch_own_engine

    async def several() -> list[dict[str, Any]]:
        (picture,) = await own()
        return [picture | {"replica": f"r{i}"} for i in range(count)]

    server.front.watch = several
    try:
        page = open_page("engine")
        expect(page.locator("#engine-body")).to_be_visible()
        buttons = page.locator("#replicas button")
        if count == 1:
            expect(page.locator("#replicas")).to_be_hidden()
            return
        expect(buttons).to_have_text(["Replica 1", "Replica 2"])
        buttons.nth(1).click()
        expect(buttons.nth(1)).to_have_attribute("aria-pressed", "true")
        expect(tile(page, "Running")).to_have_text("0")
    finally:
        server.front.watch = own
