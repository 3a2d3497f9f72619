"""The chat on the playground page, in a real browser against the real server."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, Route, expect

from tests.deployments.local_server import LocalServer
from tests.playground.conftest import OpenPage

Screenshot = Callable[[Page, str], None]
CHAT = "**/v1/chat/completions"


def say(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def last_answer(page: Page) -> Any:
    answer = page.locator(".turn.assistant").last
    expect(answer.locator("footer.meta")).to_be_visible(timeout=30_000)
    return answer


def settings(page: Page, **values: Any) -> None:
    """Fills the form in the settings; True checks a box."""
    page.click("#toggle-settings")
    for name, value in values.items():
        field = page.locator(f'#settings-form [name="{name}"]')
        field.check() if value is True else field.fill(str(value))
    page.click("#close-settings")


def chunks(*deltas: dict[str, Any], **choice: Any) -> str:
    """A stream of chat chunks in OpenAI's format."""
    events = [{"choices": [{"index": 0, "delta": delta} | choice]} for delta in deltas]
    events.append({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
    events.append({"choices": [], "usage": {"prompt_tokens": 9, "completion_tokens": len(deltas)}})
    return "".join(f"data: {json.dumps(event)}\n\n" for event in events) + "data: [DONE]\n\n"


def answer_with(page: Page, body: str, sent: list[dict[str, Any]] | None = None) -> None:
    """Answers chat requests in the server's place: for shapes the demo model cannot be made to."""

    def reply(route: Route) -> None:
        if sent is not None:
            sent.append(route.request.post_data_json)
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route(CHAT, reply)


def pretend_fields(page: Page, *names: str) -> None:
    """Lets the page believe that the server takes these fields."""
    properties: dict[str, Any] = {name: {} for name in names}
    schema = {"components": {"schemas": {"ChatCompletionRequest": {"properties": properties}}}}
    page.route("**/openapi.json", lambda route: route.fulfill(json=schema))


def test_a_conversation(open_page: OpenPage, screenshot: Screenshot) -> None:
    page = open_page()
    expect(page.locator("#model")).to_contain_text("manta-demo")
    expect(page.locator('#health[data-state="ok"]')).to_be_attached()
    screenshot(page, "welcome")
    settings(page, temperature="0", system="Answer briefly.")
    say(page, "Repeat these words: apple river stone")
    answer = last_answer(page)
    expect(answer.locator(".text")).to_have_text("apple river stone")
    expect(answer.locator(".meta")).to_contain_text("tok/s")
    expect(answer.locator(".meta")).to_contain_text("TTFT")
    expect(page.locator("#announce")).to_contain_text("apple river stone")

    with page.expect_request(CHAT) as request:
        say(page, "My name is Maria.")
    sent = request.value.post_data_json
    assert [m["role"] for m in sent["messages"]] == ["system", "user", "assistant", "user"]
    assert sent["temperature"] == 0 and sent["messages"][2]["content"] == "apple river stone"
    expect(last_answer(page).locator(".text")).to_contain_text("Maria")

    page.reload()  # the conversation and the settings are still there
    expect(page.locator(".turn")).to_have_count(4)
    screenshot(page, "chat")
    page.click("#new-chat")
    expect(page.locator("#welcome")).to_be_visible()


STOPPED = 'data: {"error": {"message": "stopped", "code": "engine_unavailable"}}'


@pytest.mark.parametrize(
    "ending", ["", f"{STOPPED}\n\ndata: [DONE]\n\n"], ids=["breaks off", "says so"]
)
def test_an_answer_that_breaks_goes_on(
    ending: str, open_page: OpenPage, server: LocalServer
) -> None:
    page = open_page()
    heads: list[str] = []
    ids: list[str] = []  # of what came before the end

    def reply(route: Route) -> None:
        heads.append(route.request.headers.get("last-event-id", ""))
        body = route.request.post_data_json | {"temperature": 0}
        if len(heads) in (1, 3):  # a proxy that reached no replica
            route.fulfill(status=500, body="Internal Server Error")
            return
        if len(heads) > 3:
            route.continue_(post_data=json.dumps(body))
            return
        whole = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=60).text
        part = "\n\n".join([*whole.split("\n\n")[:4], ending])
        ids.extend(re.findall(r"id: (\S+)", part))
        route.fulfill(status=200, content_type="text/event-stream", body=part)

    page.route(CHAT, reply)
    say(page, "Repeat these words: apple river stone")
    answer = last_answer(page)
    expect(answer.locator(".text")).to_have_text("apple river stone")
    assert heads == ["", "", ids[-1], ids[-1]]


def test_stop_keeps_what_has_come(open_page: OpenPage, server: LocalServer) -> None:
    page = open_page()
    page.route(CHAT, lambda route: route.continue_(post_data=json.dumps(
        route.request.post_data_json | {"ignore_eos": True})))  # fmt: skip
    say(page, "Repeat these words: apple river stone")
    expect(page.locator(".turn.assistant .text")).to_contain_text("apple")
    page.click("#stop")
    expect(last_answer(page).locator(".meta")).to_contain_text("stopped")
    expect(page.locator("#stop")).to_be_hidden()
    for _ in range(100):
        if server.is_idle():
            break
        page.wait_for_timeout(50)
    assert server.is_idle()  # the server was told
    page.unroute(CHAT)
    page.locator(".meta button", has_text="Retry").click()
    expect(last_answer(page).locator(".meta")).not_to_contain_text("stopped")


def test_an_answer_can_be_taken_along(open_page: OpenPage) -> None:
    page = open_page(permissions=["clipboard-read", "clipboard-write"])
    settings(page, temperature="0", top_k="5")
    say(page, "What is 'a' + 1?")
    answer = last_answer(page)
    answer.locator("button", has_text="curl").click()
    expect(answer.locator("button", has_text="Copied")).to_be_visible()
    curl = page.evaluate("navigator.clipboard.readText()")
    assert "/v1/chat/completions" in curl and "'\\''a'\\''" in curl and '"stream"' not in curl
    answer.locator("button", has_text="Python").click()
    page.wait_for_function("navigator.clipboard.readText().then(t => t.startsWith('from openai'))")
    python = page.evaluate("navigator.clipboard.readText()")
    compile(python, "snippet", "exec")
    assert "temperature=0," in python and '"top_k": 5' in python.split("extra_body=")[1]


def test_reasoning_is_folded_wherever_the_server_puts_it(open_page: OpenPage) -> None:
    page = open_page()
    settings(page, thinking=True, temperature="0")
    say(page, "What is 17 + 25?")
    answer = last_answer(page)
    expect(answer.locator(".text")).to_have_text("42")
    reasoning = answer.locator("details.reasoning")
    expect(reasoning.locator("div")).to_be_hidden()
    reasoning.locator("summary").click()
    expect(reasoning.locator("div")).to_contain_text("ones")

    answer_with(page, chunks({"reasoning_content": "I add. "}, {"content": "It is 42."}))
    say(page, "Again")
    answer = last_answer(page)
    expect(answer.locator(".text")).to_have_text("It is 42.")
    expect(answer.locator("summary")).to_have_text("Reasoning")


def test_tokens_show_their_probabilities(
    open_page: OpenPage, server: LocalServer, screenshot: Screenshot
) -> None:
    page = open_page()
    settings(page, logprobs=True, temperature="0")
    with page.expect_request(CHAT) as request:
        say(page, "What is 37 + 48?")
    tokens = last_answer(page).locator(".tok")
    expect(page.locator(".tokens")).to_contain_text("85")
    body = request.value.post_data_json | {"stream": False, "stream_options": None}
    answer = httpx.post(f"{server.url}/v1/chat/completions", json=body).json()
    items = answer["choices"][0]["logprobs"]["content"]
    expect(tokens).to_have_count(len(items))
    for i, item in enumerate(items):
        tokens.nth(i).hover() if item["token"].strip() else tokens.nth(i).focus()
        chosen = page.locator("#popover b")
        expect(chosen).to_have_count(1)
        assert len(item["top_logprobs"]) == 5
        expect(page.locator("#popover i")).to_have_count(5)
        shown = page.locator("#popover").inner_text()
        assert re.search(percent(item["logprob"]), shown), (shown, item)
    tokens.nth(0).focus()
    first = page.locator("#popover").inner_text()
    page.keyboard.press("ArrowRight")
    expect(page.locator("#popover")).not_to_have_text(first)
    screenshot(page, "tokens")


def percent(logprob: float) -> str:
    """How the page writes a probability."""
    share = 100 * math.exp(logprob)
    return "100 %" if share >= 99.95 else f"{share:.1f} %" if share >= 0.1 else "< 0.1 %"


def test_what_the_server_refuses_is_switched_off_and_the_answer_comes(open_page: OpenPage) -> None:
    page = open_page()
    pretend_fields(page, "logprobs", "top_logprobs")
    page.reload()
    error = {"error": {"message": "logprobs: not here", "param": "logprobs", "code": None}}
    sent: list[dict[str, Any]] = []

    def reply(route: Route) -> None:
        sent.append(route.request.post_data_json)
        if "logprobs" in sent[-1]:
            route.fulfill(status=400, json=error)
        else:
            route.fulfill(content_type="text/event-stream", body=chunks({"content": "fine"}))

    page.route(CHAT, reply)
    settings(page, logprobs=True)
    say(page, "Hello")
    expect(last_answer(page).locator(".text")).to_have_text("fine")
    assert len(sent) == 2 and "logprobs" not in sent[1]
    page.click("#toggle-settings")
    expect(page.locator('[data-needs="logprobs"] .why')).to_contain_text("not here")


def test_an_answer_is_held_to_a_pasted_schema(open_page: OpenPage, screenshot: Screenshot) -> None:
    page = open_page()
    settings(page, temperature="0")
    page.click("#toggle-settings")
    page.fill("#schema", "{nonsense")
    expect(page.locator("#schema-error")).to_contain_text("Not JSON")
    page.locator('[data-example="schema"]').click()
    expect(page.locator("#schema-error")).to_be_hidden()
    page.click("#close-settings")
    with page.expect_request(CHAT) as request:
        say(
            page,
            "Extract the name, age and city as JSON: Maria is 31 years old and lives in Paris.",
        )
    schema = request.value.post_data_json["response_format"]["json_schema"]
    assert schema["strict"] is True and schema["schema"]["required"] == ["name", "age", "city"]
    answer = last_answer(page)
    expect(answer.locator(".badge")).to_have_text("valid JSON")
    assert json.loads(answer.locator("pre").inner_text()) == {
        "name": "Maria", "age": 31, "city": "Paris",
    }  # fmt: skip
    screenshot(page, "structured")

    # What the model would never say by itself.
    mood = {"type": "object", "properties": {"mood": {"enum": ["calm", "bright"]}},
            "required": ["mood"], "additionalProperties": False}  # fmt: skip
    settings(page, schema=json.dumps(mood))
    say(page, "What is 17 + 25?")
    answer = last_answer(page)
    expect(answer.locator(".badge")).to_have_text("valid JSON")
    assert json.loads(answer.locator("pre").inner_text())["mood"] in ("calm", "bright")

    settings(page, schema='{"type": "no such type"}')
    say(page, "What is 17 + 25?")
    expect(page.locator(".error")).to_contain_text("no such type")


def test_tool_calls_are_shown_and_answered(open_page: OpenPage, screenshot: Screenshot) -> None:
    page = open_page()
    page.click("#toggle-settings")
    page.fill('#settings-form [name="temperature"]', "0")
    page.locator('[data-example="tools"]').click()
    page.click("#close-settings")
    say(page, "What is the weather in Paris?")
    answer = last_answer(page)
    expect(answer.locator(".call header")).to_contain_text("get_weather")
    expect(answer.locator(".call pre")).to_contain_text('"city": "Paris"')
    expect(answer.locator(".meta")).to_contain_text("tool_calls")
    screenshot(page, "tool-call")

    answer.locator(".answer-call textarea").fill('{"temperature": 18, "condition": "sunny"}')
    with page.expect_request(CHAT) as request:
        answer.locator(".answer-call button").click()
    assistant, tool = request.value.post_data_json["messages"][-2:]
    assert assistant["tool_calls"][0]["function"]["name"] == "get_weather"
    assert (tool["role"], tool["tool_call_id"]) == ("tool", assistant["tool_calls"][0]["id"])
    expect(last_answer(page).locator(".text")).to_contain_text("18 degrees and sunny in Paris")
    screenshot(page, "tool-answered")


def test_a_call_that_comes_in_pieces_is_put_together(open_page: OpenPage) -> None:
    page = open_page()
    call = {"index": 0, "id": "call_1", "type": "function"}
    second = {"index": 1, "id": "call_2", "type": "function"}
    body = chunks(
        {"tool_calls": [call | {"function": {"name": "get_weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
        {"tool_calls": [second | {"function": {"name": "get_time", "arguments": "{}"}}]},
    )
    answer_with(page, body)
    say(page, "What is the weather in Paris, and the time?")
    answer = last_answer(page)
    expect(answer.locator(".call header")).to_have_text([re.compile("weather"), re.compile("time")])
    expect(answer.locator(".call pre").first).to_contain_text('"city": "Paris"')
    expect(answer.locator(".answer-call button")).to_have_text("Send results")


def test_an_error_is_shown_in_the_servers_words(open_page: OpenPage) -> None:
    page = open_page()
    settings(page, temperature="-1")
    say(page, "Hello")
    expect(page.locator(".error")).to_contain_text("temperature")
    settings(page, temperature="0")
    page.locator(".meta button", has_text="Retry").click()
    expect(last_answer(page).locator(".text")).to_contain_text("Hello!")
