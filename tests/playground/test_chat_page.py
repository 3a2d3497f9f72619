"""The chat on the playground page, in a real browser against the real server."""

import json
from collections.abc import Callable
from typing import Any

import pytest
from playwright.sync_api import Page, Route, expect

from tests.playground.conftest import OpenPage

Screenshot = Callable[[Page, str], None]
CHAT = "**/v1/chat/completions"


def say(page: Page, text: str) -> None:
    page.fill("#input", text)
    page.keyboard.press("Enter")


def last_answer(page: Page) -> Any:
    answer = page.locator(".turn.assistant").last
    expect(answer.locator("footer.meta")).to_be_visible()
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


def test_stop_keeps_what_has_come(open_page: OpenPage, server: Any) -> None:
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


def test_tokens_show_their_probabilities(open_page: OpenPage, screenshot: Screenshot) -> None:
    page = open_page()
    pretend_fields(page, "logprobs", "top_logprobs")
    page.reload()
    content = [
        {"token": token, "logprob": logprob, "bytes": list(token.encode()), "top_logprobs": [
            {"token": token, "logprob": logprob, "bytes": None},
            {"token": " pear", "logprob": -1.9, "bytes": None}]}
        for token, logprob in (("apple", -0.2), (" river", -0.01), (" stone", -1.2))
    ]  # fmt: skip
    sent: list[dict[str, Any]] = []
    answer_with(page, chunks({"content": "apple river stone"}, logprobs={"content": content}), sent)
    settings(page, logprobs=True)
    say(page, "Three words")
    tokens = last_answer(page).locator(".tok")
    assert sent[0]["logprobs"] is True and sent[0]["top_logprobs"] == 5
    expect(tokens).to_have_count(3)
    expect(page.locator(".tokens")).to_have_text("apple river stone")
    tokens.nth(0).hover()
    expect(page.locator("#popover")).to_contain_text("81.9 %")
    expect(page.locator("#popover")).to_contain_text("␣pear")
    tokens.nth(0).focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expect(page.locator("#popover")).to_contain_text("30.1 %")
    screenshot(page, "tokens")


@pytest.mark.parametrize("field", ["logprobs", "response_format"])
def test_what_the_server_refuses_is_switched_off_and_the_answer_comes(
    open_page: OpenPage, field: str
) -> None:
    page = open_page()
    pretend_fields(page, "logprobs", "top_logprobs", "response_format")
    page.reload()
    error = {"error": {"message": f"{field}: not here", "param": field, "code": None}}
    sent: list[dict[str, Any]] = []

    def reply(route: Route) -> None:
        sent.append(route.request.post_data_json)
        if field in sent[-1]:
            route.fulfill(status=400, json=error)
        else:
            route.fulfill(content_type="text/event-stream", body=chunks({"content": "fine"}))

    page.route(CHAT, reply)
    settings(page, **({"logprobs": True} if field == "logprobs" else {"schema": "{}"}))
    say(page, "Hello")
    expect(last_answer(page).locator(".text")).to_have_text("fine")
    assert len(sent) == 2 and field not in sent[1]
    page.click("#toggle-settings")
    expect(page.locator(f'[data-needs="{field}"] .why')).to_contain_text("not here")


def test_a_structured_answer_is_asked_for_and_checked(open_page: OpenPage) -> None:
    page = open_page()
    pretend_fields(page, "response_format")
    page.reload()
    page.click("#toggle-settings")
    page.fill("#schema", "{nonsense")
    expect(page.locator("#schema-error")).to_contain_text("Not JSON")
    page.locator('[data-example="schema"]').click()
    expect(page.locator("#schema-error")).to_be_hidden()
    page.click("#close-settings")
    sent: list[dict[str, Any]] = []
    answer_with(page, chunks({"content": '{"name": "Maria",'}, {"content": ' "age": 31}'}), sent)
    say(page, "Extract the name and age as JSON: Maria is 31 years old.")
    answer = last_answer(page)
    schema = sent[0]["response_format"]["json_schema"]
    assert schema["strict"] is True and schema["schema"]["required"] == ["name", "age", "city"]
    expect(answer.locator(".badge")).to_have_text("valid JSON")
    expect(answer.locator("pre")).to_contain_text('"age": 31')


def test_tool_calls_are_shown_and_answered(open_page: OpenPage, screenshot: Screenshot) -> None:
    page = open_page()
    pretend_fields(page, "tools")
    page.reload()
    page.click("#toggle-settings")
    page.locator('[data-example="tools"]').click()
    page.click("#close-settings")
    call = {"index": 0, "id": "call_1", "type": "function"}
    body = chunks(
        {"tool_calls": [call | {"function": {"name": "get_weather", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"city": '}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Paris"}'}}]},
    )
    sent: list[dict[str, Any]] = []
    answer_with(page, body, sent)
    say(page, "What is the weather in Paris?")
    answer = last_answer(page)
    expect(answer.locator(".call header")).to_contain_text("get_weather")
    expect(answer.locator(".call pre")).to_contain_text('"city": "Paris"')
    assert sent[0]["tools"][0]["function"]["name"] == "get_weather"
    screenshot(page, "tool-call")

    page.unroute(CHAT)
    answer_with(page, chunks({"content": "It is sunny in Paris."}), sent)
    answer.locator(".answer-call textarea").fill('{"temperature": 18, "condition": "sunny"}')
    answer.locator(".answer-call button").click()
    expect(last_answer(page).locator(".text")).to_have_text("It is sunny in Paris.")
    assistant, tool = sent[1]["messages"][-2:]
    assert assistant["tool_calls"][0]["function"]["arguments"] == '{"city": "Paris"}'
    assert (tool["role"], tool["tool_call_id"]) == ("tool", "call_1")


def test_an_error_is_shown_in_the_servers_words(open_page: OpenPage) -> None:
    page = open_page()
    settings(page, temperature="-1")
    say(page, "Hello")
    expect(page.locator(".error")).to_contain_text("temperature")
    settings(page, temperature="0")
    page.locator(".meta button", has_text="Retry").click()
    expect(last_answer(page).locator(".text")).to_contain_text("Hello!")
