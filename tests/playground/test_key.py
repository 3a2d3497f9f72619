"""The page before a server that requires an API key."""

import os
from collections.abc import Iterator
from unittest import mock

import httpx
import pytest
from playwright.sync_api import expect

from tests.deployments.local_server import LocalServer, serve_locally
from tests.playground.conftest import OpenPage
from tests.playground.test_chat_page import Screenshot, last_answer, say

KEY = "sk-for-this-test"


@pytest.fixture(scope="module")
def locked() -> Iterator[LocalServer]:
    with (
        mock.patch.dict(os.environ, {"MANTA_API_KEYS": KEY}),
        serve_locally(num_blocks=64, max_num_seqs=4) as running,
    ):
        yield running


def test_the_engine_is_shown_to_nobody_without_a_key(locked: LocalServer) -> None:
    assert httpx.get(locked.url).status_code == 200
    assert httpx.get(f"{locked.url}/playground/main.js").status_code == 200
    for headers in ({}, {"authorization": "Bearer another"}):
        refused = httpx.get(f"{locked.url}/engine/events", headers=headers)
        assert refused.status_code == 401
        assert refused.json()["error"]["code"] == "invalid_api_key"
    assert locked.engine.step_log is None


def test_the_page_asks_for_the_key_and_then_shows_everything(
    locked: LocalServer, open_page: OpenPage, screenshot: Screenshot
) -> None:
    page = open_page("both", url=locked.url, viewport={"width": 1440, "height": 900})
    expect(page.locator("#key")).to_be_focused()
    expect(page.locator("#model")).to_have_text("an API key is needed")
    expect(page.locator("#engine-note")).to_contain_text("needs the API key")
    expect(page.locator("#engine-body")).to_be_hidden()
    screenshot(page, "key-required")
    page.click("#close-settings")
    say(page, "What is 17 + 25?")
    expect(page.locator(".error")).to_contain_text("API key")

    page.click("#toggle-settings")
    page.fill("#key", KEY)
    page.click("#close-settings")
    expect(page.locator("#model")).to_contain_text("manta-demo")
    expect(page.locator("#engine-body")).to_be_visible()
    page.locator(".meta button", has_text="Retry").click()
    expect(last_answer(page).locator(".text")).to_have_text("42")
    assert KEY not in page.evaluate("JSON.stringify(localStorage)")
