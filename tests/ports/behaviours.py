"""What documented APIs do, as other servers' tests have it: each asked of a live server.

python -m tests.ports.behaviours [AREA…]

Derived from the server tests of vLLM (tests/entrypoints, tests/tool_use), SGLang
(test/registered/openai_server, test/anthropic) and llama.cpp (tools/server/tests/unit): what they
hold of documented APIs, each thing once, whatever a server calls it. Left out is what is of inputs
other than text, of adapters, of many models in one server, and of command lines. docs/api.md has
the table that `table` makes of it.
"""

import base64
import json
import struct
import sys
import tempfile
import threading
from typing import Any

import httpx

from tests.ports.asked import (
    CLAUDE,
    FLAT,
    FORM,
    KEY,
    NAMED,
    TOOLS,
    USER,
    WEATHER,
    WORDS,
    Asked,
    Check,
    call_of,
    history,
    is_error,
    joined,
    live,
    results,
)

COMPLETIONS, CHAT, RESPONSES = "/v1/completions", "/v1/chat/completions", "/v1/responses"
THINKING = [*USER, {"role": "assistant", "content": "<think>\nHm."}]
GO_ON = {"continue_final_message": True, "add_generation_prompt": False, "ignore_eos": True}
SYSTEM = {"role": "system", "content": "Be short."}


def embedding(a: Asked, **body: Any) -> Any:
    return a.post("/v1/embeddings", **body)["data"]


def floats(encoded: str) -> list[float]:
    raw = base64.b64decode(encoded)
    return list(struct.unpack(f"{len(raw) // 4}f", raw))


def close(first: list[float], second: list[float]) -> bool:
    return all(abs(x - y) < 1e-3 for x, y in zip(first, second, strict=True))


def types(events: list[Any]) -> list[str]:
    return [event["type"] for event in events]


def in_order(a: Asked) -> bool:
    numbers = [event["sequence_number"] for event in a.events(RESPONSES, input=WORDS)]
    return numbers == list(range(len(numbers)))


def hang_up(a: Asked) -> bool:
    body = {"prompt": "a", "max_tokens": 900, "ignore_eos": True, "stream": True}
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.stream("POST", a.url + COMPLETIONS, json=body, headers=headers) as stream:
        next(stream.iter_lines())
    return idle(a)


def idle(a: Asked) -> bool:
    done = threading.Event()
    for _ in range(200):
        if a.server.is_idle():
            return True
        done.wait(0.05)
    return False


def at_once(a: Asked) -> bool:
    alone = [a.said([{"role": "user", "content": f"What is {i} + 1?"}]) for i in range(4)]
    found: dict[int, Any] = {}

    def ask(i: int) -> None:
        found[i] = a.said([{"role": "user", "content": f"What is {i} + 1?"}])

    threads = [threading.Thread(target=ask, args=[i]) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[i] for i in range(4)] == alone


def file_of(a: Asked) -> Any:
    line = {"custom_id": "a", "method": "POST", "url": CHAT}
    line["body"] = {"model": "manta-demo", "messages": USER, "max_tokens": 5}  # type: ignore[assignment]
    return httpx.post(
        f"{a.url}/v1/files",
        headers={"authorization": f"Bearer {KEY}"},
        files={"file": ("in.jsonl", json.dumps(line).encode())},
        data={"purpose": "batch"},
    ).json()


def batch(a: Asked) -> bool:
    made = a.post(
        "/v1/batches", input_file_id=file_of(a)["id"], endpoint=CHAT, completion_window="24h"
    )
    done = threading.Event()
    for _ in range(400):
        told = a.get(f"/v1/batches/{made['id']}")
        if told["status"] == "completed":
            content = a.send(f"/v1/files/{told['output_file_id']}/content", "GET").text
            return json.loads(content)["response"]["status_code"] == 200
        done.wait(0.1)
    return False


def cached(a: Asked, **more: Any) -> int:
    used = [a.text("x y z " * 40, max_tokens=1, **more)["usage"] for _ in range(2)]
    return int(used[1]["prompt_tokens_details"]["cached_tokens"])


def forms(a: Asked, **form: Any) -> Any:
    return a.text("city:", max_tokens=80, **form)["choices"][0]["text"]


def samples(a: Asked) -> str:
    return a.send("/metrics", "GET").text


def preflight(a: Asked, origin: str) -> str | None:
    ask = {"origin": origin, "access-control-request-method": "POST"}
    answer = httpx.options(a.url + CHAT, headers=ask)
    return answer.headers.get("access-control-allow-origin")


# By area: what is asked, and how it is seen that it is met.
MET: dict[str, dict[str, Check]] = {
    "Models": {
        "list": lambda a: a.get("/v1/models")["data"][0]["id"] == "manta-demo",
        "one": lambda a: a.get("/v1/models/manta-demo")["object"] == "model",
        "window and checkpoint of it": lambda a: a.get("/v1/models/manta-demo")["max_model_len"],
        "404 for others": lambda a: is_error(a.send("/v1/models/a/b", "GET"), 404),
        "a request for another is a 404": lambda a: a.refused(
            CHAT, "model", status=404, model="other", messages=USER
        ),
        "may be left out of a request": lambda a: a.chat()["model"] == "manta-demo",
    },
    "Chat": {
        "answer with usage and finish reason": lambda a: (
            a.chat()["choices"][0]["finish_reason"] == "stop" and a.chat()["usage"]["total_tokens"]
        ),
        "system and developer": lambda a: (
            a.said([SYSTEM, *USER]) and a.said([SYSTEM | {"role": "developer"}, *USER])
        ),
        "content as parts": lambda a: (
            a.said([{"role": "user", "content": [{"type": "text", "text": WORDS}]}]) == a.said()
        ),
        "content null in history": lambda a: a.said(history("21")),
        "many turns": lambda a: a.said([*USER, {"role": "assistant", "content": "Yes."}, *USER]),
        "n choices": lambda a: len(a.chat(n=3)["choices"]) == 3,
        "stop as a text": lambda a: "river" not in a.said(stop="river")["content"],
        "stop as a list": lambda a: "river" not in a.said(stop=["q", "river"])["content"],
        "one seed, one text": lambda a: (
            a.said(seed=7, temperature=1.5) == a.said(seed=7, temperature=1.5)
        ),
        "other seeds, other texts": lambda a: (
            len({str(a.said(seed=i, temperature=5, top_k=50)) for i in range(6)}) > 1
        ),
        "max_tokens": lambda a: a.chat(max_tokens=2)["choices"][0]["finish_reason"] == "length",
        "max_completion_tokens": lambda a: (
            a.chat(max_completion_tokens=2)["usage"]["completion_tokens"] == 2
        ),
        "min_tokens, ignore_eos": lambda a: (
            a.chat(ignore_eos=True, max_tokens=30)["usage"]["completion_tokens"] == 30
            and a.chat(min_tokens=25)["usage"]["completion_tokens"] >= 25
        ),
        "logit_bias": lambda a: a.said(logit_bias={"5": 100}, max_tokens=3) != a.said(max_tokens=3),
        "logit_bias of no token is refused": lambda a: a.refused(
            CHAT, "logit_bias", messages=USER, logit_bias={"9999999": 1}
        ),
        "penalties and samplers": lambda a: a.said(
            top_p=0.9, top_k=5, min_p=0.1, presence_penalty=1, repetition_penalty=1.1
        ),
        "a begun answer is continued": lambda a: (
            "river"
            in a.said([*USER, {"role": "assistant", "content": "apple"}], **GO_ON)["content"]
        ),
        "and not together with a new turn": lambda a: a.refused(
            CHAT, messages=THINKING, continue_final_message=True, add_generation_prompt=True
        ),
        "chat_template_kwargs": lambda a: a.said(chat_template_kwargs={"enable_thinking": False}),
        "truncate_prompt_tokens": lambda a: (
            a.chat(truncate_prompt_tokens=5)["usage"]["prompt_tokens"] == 5
        ),
        "requests at once are as alone": at_once,
        "system_fingerprint": lambda a: a.chat()["system_fingerprint"],
        "roles that are none are refused": lambda a: a.refused(
            CHAT, "role", messages=[{"role": "x", "content": "a"}]
        ),
        "no messages are refused": lambda a: a.refused(CHAT, "messages", messages=[]),
    },
    "Streams": {
        "role first": lambda a: a.chunks()[0]["choices"][0]["delta"]["role"] == "assistant",
        "the same text as whole": lambda a: joined(a.chunks()) == a.said()["content"],
        "one finish_reason, [DONE] last": lambda a: (
            sum(bool(c["choices"][0]["finish_reason"]) for c in a.chunks()[:-1]) == 1
            and a.chunks()[-1] == "[DONE]"
        ),
        "include_usage: a chunk without choices": lambda a: (
            a.chunks(stream_options={"include_usage": True})[-2]["choices"] == []
        ),
        "continuous_usage_stats": lambda a: all(
            c["usage"] for c in a.chunks(stream_options={"continuous_usage_stats": True})[:-1]
        ),
        "stream_options need a stream": lambda a: a.refused(
            CHAT, "stream_options", messages=USER, stream_options={"include_usage": True}
        ),
        "n choices at once": lambda a: (
            {c["choices"][0]["index"] for c in a.chunks(n=2)[:-1]} == {0, 1}
        ),
        "what is refused is no stream": lambda a: a.refused(
            CHAT, messages=USER, stream=True, temperature=-1
        ),
        "hanging up frees everything": hang_up,
    },
    "Log-probabilities": {
        "of a chat, with bytes": lambda a: a.chat(logprobs=True)["choices"][0]["logprobs"][
            "content"
        ][0]["bytes"],
        "top_logprobs, 0 to 20": lambda a: (
            len(
                a.chat(logprobs=True, top_logprobs=20)["choices"][0]["logprobs"]["content"][0][
                    "top_logprobs"
                ]
            )
            == 20
        ),
        "more are refused": lambda a: a.refused(
            CHAT, "top_logprobs", messages=USER, logprobs=True, top_logprobs=21
        ),
        "top_logprobs need logprobs": lambda a: a.refused(
            CHAT, "top_logprobs", messages=USER, top_logprobs=2
        ),
        "streamed": lambda a: any(
            c["choices"][0]["logprobs"] for c in a.chunks(logprobs=True)[:-1]
        ),
        "of a completion, with text_offset": lambda a: (
            a.text(logprobs=2)["choices"][0]["logprobs"]["text_offset"][0] == 0
        ),
        "prompt_logprobs": lambda a: a.text(prompt_logprobs=1)["choices"][0]["prompt_logprobs"][1],
        "tokens as token ids": lambda a: (
            "token_id:" in str(a.chat(logprobs=True, return_tokens_as_token_ids=True)["choices"])
        ),
    },
    "Token ids": {
        "return_token_ids, whole": lambda a: (
            a.chat(return_token_ids=True)["choices"][0]["token_ids"]
            and a.chat(return_token_ids=True)["prompt_token_ids"]
        ),
        "return_token_ids, streamed": lambda a: a.chunks(return_token_ids=True)[0][
            "prompt_token_ids"
        ],
        "tokenize, with strings": lambda a: a.post(
            "/tokenize", prompt="one two", return_token_strs=True
        )["token_strs"],
        "with and without special tokens": lambda a: a.post(
            "/tokenize", prompt="one", add_special_tokens=False
        )["count"],
        "of chats with tools": lambda a: (
            a.post("/tokenize", messages=USER, tools=TOOLS)["count"]
            > a.post("/tokenize", messages=USER)["count"]
        ),
        "detokenize": lambda a: (
            a.post("/detokenize", tokens=a.post("/tokenize", prompt="one two")["tokens"])["prompt"]
            == "one two"
        ),
        "tokenizer_info": lambda a: a.get("/tokenizer_info")["chat_template"],
    },
    "Completions": {
        "one text": lambda a: a.text()["choices"][0]["text"],
        "many texts": lambda a: (
            [c["index"] for c in a.text(["one two", "three"], n=2)["choices"]] == [0, 1, 2, 3]
        ),
        "token ids, one or many": lambda a: a.text([5, 6]) and a.text([[5, 6], [7]]),
        "batch and alone alike": lambda a: (
            [c["text"] for c in a.text(["one two", "three"])["choices"]]
            == [a.text(p)["choices"][0]["text"] for p in ("one two", "three")]
        ),
        "streamed, as whole": lambda a: (
            "".join(
                c["choices"][0]["text"]
                for c in a.events(COMPLETIONS, prompt="one two", temperature=0, max_tokens=8)[:-1]
            )
            == a.text()["choices"][0]["text"]
        ),
        "echo": lambda a: a.text(echo=True)["choices"][0]["text"].startswith("one two"),
        "echo with max_tokens 0": lambda a: (
            a.text(echo=True, max_tokens=0, logprobs=1)["choices"][0]["text"] == "one two"
        ),
        "best_of": lambda a: len(a.text(best_of=3, n=1, temperature=1)["choices"]) == 1,
        "stop and include_stop_str_in_output": lambda a: a.text(
            stop=["e"], include_stop_str_in_output=True
        ),
        "bad_words": lambda a: a.text(bad_words=["river"]),
        "allowed_token_ids": lambda a: (
            set(
                a.text(allowed_token_ids=[300, 301], return_token_ids=True)["choices"][0][
                    "token_ids"
                ]
            )
            <= {300, 301}
        ),
        "an empty prompt is refused": lambda a: a.refused(COMPLETIONS, "prompt", prompt=""),
        "an empty list of prompts is refused": lambda a: a.refused(COMPLETIONS, prompt=[]),
        "prompts in many languages": lambda a: a.text("漢字 é 👋")["choices"],
        "answers without end at the window": lambda a: (
            a.text("a", max_tokens=5000, ignore_eos=True)["choices"][0]["finish_reason"] == "length"
        ),
    },
    "Structured output": {
        "json_schema in a chat": lambda a: (
            json.loads(a.said(WEATHER, response_format=FORM)["content"]).keys() == {"city"}
        ),
        "json_object": lambda a: a.said(WEATHER, response_format={"type": "json_object"})[
            "content"
        ].startswith("{"),
        "streamed": lambda a: json.loads(joined(a.chunks(WEATHER, response_format=FORM))),
        "regex": lambda a: forms(a, structured_outputs={"regex": "ab{3}"}) == "abbb",
        "choice": lambda a: (
            forms(a, structured_outputs={"choice": ["sea", "sky"]}) in ("sea", "sky")
        ),
        "grammar (EBNF)": lambda a: (
            forms(a, structured_outputs={"grammar": 'root ::= "sea" | "sky"'}) in ("sea", "sky")
        ),
        "json of a completion": lambda a: json.loads(
            forms(a, structured_outputs={"json": {"enum": ["sea", 7]}})
        ),
        "structural tags": lambda a: (
            forms(
                a,
                response_format={
                    "type": "structural_tag",
                    "format": {"type": "const_string", "value": "sea"},
                },
            )
            == "sea"
        ),
        "older names (guided_*)": lambda a: forms(a, guided_choice=["sea"]) == "sea",
        "invalid ones are refused": lambda a: (
            a.refused(COMPLETIONS, prompt="a", structured_outputs={"grammar": "root ::="})
            and a.refused(COMPLETIONS, prompt="a", structured_outputs={"regex": "("})
            and a.refused(COMPLETIONS, prompt="a", structured_outputs={"choice": []})
        ),
        "two at once are refused": lambda a: a.refused(
            COMPLETIONS, prompt="a", structured_outputs={"regex": "a", "choice": ["a"]}
        ),
    },
    "Tools": {
        "auto": lambda a: call_of(a.said(WEATHER, tools=TOOLS)) == {"city": "Paris"},
        "finish_reason tool_calls": lambda a: (
            a.chat(WEATHER, tools=TOOLS)["choices"][0]["finish_reason"] == "tool_calls"
        ),
        "none": lambda a: "tool_calls" not in a.said(WEATHER, tools=TOOLS, tool_choice="none"),
        "required": lambda a: call_of(a.said(tools=TOOLS, tool_choice="required")),
        "named": lambda a: call_of(a.said(tools=TOOLS, tool_choice=NAMED)),
        "a name that is none is refused": lambda a: a.refused(
            CHAT,
            *("tool_choice", "other"),
            messages=USER,
            tools=TOOLS,
            tool_choice={"type": "function", "function": {"name": "other"}},
        ),
        "required without tools is refused": lambda a: a.refused(
            CHAT, "tool_choice", messages=USER, tool_choice="required"
        ),
        "null is auto": lambda a: a.said(WEATHER, tools=TOOLS, tool_choice=None)["tool_calls"],
        "streamed: name, then arguments": lambda a: (
            json.loads(
                "".join(
                    call["function"].get("arguments", "")
                    for c in a.chunks(WEATHER, tools=TOOLS)[:-1]
                    for call in c["choices"][0]["delta"].get("tool_calls", ())
                )
            )
            == {"city": "Paris"}
        ),
        "parallel_tool_calls: false": lambda a: (
            len(a.said(WEATHER, tools=TOOLS, parallel_tool_calls=False)["tool_calls"]) == 1
        ),
        "strict": lambda a: call_of(
            a.said(
                WEATHER,
                tools=[{"type": "function", "function": {**TOOLS[0]["function"], "strict": True}}],  # type: ignore[dict-item]
            )
        ),
        "results as text": lambda a: "21" in a.said(history('{"temperature": 21}'))["content"],
        "results as parts": lambda a: a.said(history([{"type": "text", "text": "21"}])),
        "arguments in history as an object": lambda a: a.said(history("21", {"city": "Paris"})),
        "no parameters": lambda a: (
            call_of(
                a.said(
                    tools=[{"type": "function", "function": {"name": "get_weather"}}],
                    tool_choice="required",
                )
            )
            == {}
        ),
        "a call beside a form": lambda a: (
            call_of(a.said(WEATHER, tools=TOOLS, response_format=FORM)) == {"city": "Paris"}
        ),
    },
    "Reasoning": {
        "apart from content": lambda a: (
            a.said(THINKING, max_tokens=40, **GO_ON).get("reasoning_content") is not None
        ),
        "by both names": lambda a: (
            (said := a.said(THINKING, max_tokens=40, **GO_ON))["reasoning"]
            == said["reasoning_content"]
        ),
        "streamed": lambda a: joined(a.chunks(THINKING, **GO_ON), "reasoning_content"),
        "include_reasoning: false": lambda a: (
            "reasoning" not in a.said(THINKING, include_reasoning=False, **GO_ON)
        ),
        "reasoning_effort, none to max": lambda a: all(
            a.said(reasoning_effort=effort) for effort in ("none", "minimal", "high", "max")
        ),
        "other efforts are refused": lambda a: a.refused(
            CHAT, "reasoning_effort", messages=USER, reasoning_effort="vast"
        ),
        "enable_thinking": lambda a: a.said(chat_template_kwargs={"enable_thinking": True}),
        "thinking_token_budget": lambda a: (
            a.chat(THINKING, thinking_token_budget=3, **GO_ON)["usage"][
                "completion_tokens_details"
            ]["reasoning_tokens"]
            <= 6
        ),
        "a negative budget is refused": lambda a: a.refused(
            CHAT, "thinking_token_budget", messages=USER, thinking_token_budget=-1
        ),
        "never in a form": lambda a: (
            "reasoning" not in a.said(WEATHER, response_format=FORM, reasoning_effort="high")
        ),
        "counted in usage": lambda a: (
            "reasoning_tokens" in a.chat()["usage"]["completion_tokens_details"]
        ),
        "back in history": lambda a: a.said(history("21", reasoning_content="Hm.")),
    },
    "Responses": {
        "a text": lambda a: "river" in a.respond()["output"][0]["content"][0]["text"],
        "items": lambda a: a.respond([{"role": "user", "content": WORDS}])["output"],
        "instructions": lambda a: a.respond(instructions="Be short.")["instructions"],
        "events in OpenAI's order": lambda a: (
            (kinds := types(a.events(RESPONSES, input=WORDS)))[:2]
            == ["response.created", "response.in_progress"]
            and kinds[-1] == "response.completed"
        ),
        "sequence numbers": in_order,
        "functions": lambda a: (
            a.respond("What is the weather in Paris?", tools=FLAT)["output"][-1]["type"]
            == "function_call"
        ),
        "calls and results in history": lambda a: a.respond(
            [
                *WEATHER,
                {
                    "type": "function_call",
                    "call_id": "c",
                    "name": "get_weather",
                    "arguments": "{}",
                },
                {"type": "function_call_output", "call_id": "c", "output": "21"},
            ]
        )["output"],
        "previous_response_id": lambda a: a.respond(
            "And again?", previous_response_id=a.respond()["id"]
        )["previous_response_id"],
        "retrieve and delete": lambda a: (
            a.get(f"/v1/responses/{(made := a.respond()['id'])}")["id"] == made
            and a.send(f"/v1/responses/{made}", "DELETE").status_code == 200
            and a.send(f"/v1/responses/{made}", "GET").status_code == 404
        ),
        "store: false": lambda a: (
            a.send(f"/v1/responses/{a.respond(store=False)['id']}", "GET").status_code == 404
        ),
        "text.format": lambda a: json.loads(
            a.respond(
                "What is the weather in Paris?",
                text={"format": {"type": "json_schema", **FORM["json_schema"]}},  # type: ignore[dict-item]
            )["output"][0]["content"][0]["text"]
        ),
        "max_output_tokens: incomplete": lambda a: (
            a.respond(max_output_tokens=2)["incomplete_details"]["reason"] == "max_output_tokens"
        ),
        "usage with cached and reasoning tokens": lambda a: (
            a.respond()["usage"]["input_tokens_details"]
            and a.respond()["usage"]["output_tokens_details"]
        ),
        "metadata": lambda a: a.respond(metadata={"a": "b"})["metadata"] == {"a": "b"},
    },
    "Messages": {
        "a text": lambda a: "river" in a.message()["content"][0]["text"],
        "system as text or blocks": lambda a: (
            a.message(system="Be short.")
            and a.message(system=[{"type": "text", "text": "Be short."}])
        ),
        "many blocks and turns": lambda a: a.message(
            [
                {"role": "user", "content": [{"type": "text", "text": "a"}] * 2},
                {"role": "assistant", "content": "b"},
                *USER,
            ]
        ),
        "events in order": lambda a: (
            (kinds := types(a.message_events()))[:2] == ["message_start", "content_block_start"]
            and kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
        ),
        "indices of blocks": lambda a: (
            [e["index"] for e in a.message_events() if e["type"] == "content_block_start"] == [0]
        ),
        "count_tokens, without max_tokens": lambda a: a.post(
            "/v1/messages/count_tokens", model="manta-demo", messages=USER
        )["input_tokens"],
        "count_tokens with system and tools": lambda a: a.post(
            *("/v1/messages/count_tokens",),
            model="manta-demo",
            messages=USER,
            system="Be short.",
            tools=CLAUDE,
        )["input_tokens"],
        "tools": lambda a: (
            a.message(WEATHER, tools=CLAUDE)["content"][-1]["input"] == {"city": "Paris"}
        ),
        "stop_reason tool_use": lambda a: (
            a.message(WEATHER, tools=CLAUDE)["stop_reason"] == "tool_use"
        ),
        "tool_choice any, tool, none": lambda a: (
            a.message(tools=CLAUDE, tool_choice={"type": "any"})["stop_reason"] == "tool_use"
            and a.message(tools=CLAUDE, tool_choice={"type": "tool", "name": "get_weather"})
            and a.message(WEATHER, tools=CLAUDE, tool_choice={"type": "none"})["stop_reason"]
            != "tool_use"
        ),
        "tools streamed": lambda a: json.loads(
            "".join(
                e["delta"].get("partial_json", "")
                for e in a.message_events(WEATHER, tools=CLAUDE)
                if e["type"] == "content_block_delta"
            )
        ),
        "tool results": lambda a: a.message(results("21")),
        "tool results of blocks, and errors": lambda a: (
            a.message(results([{"type": "text", "text": "21"}]))
            and a.message(results("no", is_error=True))
        ),
        "tool results beside text": lambda a: a.message(
            results("21", {"type": "text", "text": "So?"})
        ),
        "thinking on and off": lambda a: (
            a.message(thinking={"type": "disabled"})
            and a.message(max_tokens=1100 - 200, thinking={"type": "enabled", "budget_tokens": 800})
        ),
        "thinking in history": lambda a: a.message(
            [
                *USER,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
                        {"type": "text", "text": "Yes."},
                    ],
                },
                *USER,
            ]
        ),
        "stop_sequences": lambda a: (
            a.message(stop_sequences=["river"])["stop_reason"] == "stop_sequence"
        ),
        "temperature, top_p, top_k": lambda a: a.message(temperature=0.5, top_p=0.9, top_k=5),
        "metadata": lambda a: a.message(metadata={"user_id": "me"}),
        "no messages are refused, in its shape": lambda a: a.refused(
            "/v1/messages", '"type":"error"', model="manta-demo", max_tokens=5, messages=[]
        ),
        "x-api-key": lambda a: (
            a.send(
                *("/v1/messages",),
                headers={"x-api-key": KEY},
                model="manta-demo",
                max_tokens=5,
                messages=USER,
            ).status_code
            == 200
        ),
    },
    "Embeddings": {
        "one and many": lambda a: len(embedding(a, input=["a", "b"])) == 2,
        "token ids": lambda a: embedding(a, input=[5, 6]) and embedding(a, input=[[5], [6]]),
        "base64": lambda a: close(
            floats(embedding(a, input="a", encoding_format="base64")[0]["embedding"]),
            embedding(a, input="a")[0]["embedding"],
        ),
        "dimensions": lambda a: len(embedding(a, input="a", dimensions=8)[0]["embedding"]) == 8,
        "truncation": lambda a: embedding(a, input="a b c " * 900, truncate_prompt_tokens=9),
        "too long is refused": lambda a: a.refused(
            "/v1/embeddings", "context_length_exceeded", input="a b c " * 900
        ),
        "empty ones are refused": lambda a: a.refused("/v1/embeddings", input=[]),
        "the same in any batch": lambda a: close(
            embedding(a, input=["a", "b c d"])[0]["embedding"],
            embedding(a, input="a")[0]["embedding"],
        ),
        "usage": lambda a: a.post("/v1/embeddings", input="a b")["usage"]["prompt_tokens"],
        "scores of one or many": lambda a: (
            len(a.post("/v1/score", text_1="a", text_2=["a", "b"])["data"]) == 2
        ),
        "rerank, with top_n and documents": lambda a: (
            a.post("/rerank", query="a", documents=["b", "a"], top_n=1, return_documents=True)[
                "results"
            ][0]["document"]["text"]
            == "a"
        ),
        "no documents are refused": lambda a: a.refused("/rerank", query="a", documents=[]),
    },
    "Cache": {
        "cached_tokens": lambda a: cached(a) > 0,
        "cache_salt divides": lambda a: (
            cached(a, cache_salt="one") > 0
            and a.text("x y z " * 40, max_tokens=1, cache_salt="two")["usage"][
                "prompt_tokens_details"
            ]["cached_tokens"]
            == 0
        ),
        "the same text from it": lambda a: (
            a.text("sea " * 40)["choices"] == a.text("sea " * 40)["choices"]
        ),
    },
    "Errors": {
        "OpenAI's shape": lambda a: is_error(a.send(CHAT, messages=3), 400),
        "no JSON": lambda a: (
            httpx.post(
                a.url + CHAT,
                content=b"{",
                headers={"authorization": f"Bearer {KEY}", "content-type": "application/json"},
            ).status_code
            == 400
        ),
        "no object": lambda a: (
            httpx.post(
                a.url + CHAT, json=[1], headers={"authorization": f"Bearer {KEY}"}
            ).status_code
            == 400
        ),
        "no such path": lambda a: is_error(a.send("/v1/none", "GET"), 404),
        "too long, in the words clients look for": lambda a: a.refused(
            CHAT, "maximum context length", messages=[{"role": "user", "content": "a b " * 900}]
        ),
        "too long, before a stream": lambda a: a.refused(
            CHAT, messages=[{"role": "user", "content": "a b " * 900}], stream=True
        ),
        "values out of bounds": lambda a: (
            a.refused(CHAT, "temperature", messages=USER, temperature=-1)
            and a.refused(CHAT, "top_p", messages=USER, top_p=2)
            and a.refused(CHAT, "n", messages=USER, n=0)
        ),
        "a wrong key, and none": lambda a: (
            is_error(a.send(CHAT, headers={"authorization": "Bearer x"}, messages=USER), 401)
            and is_error(a.send(CHAT, headers={}, messages=USER), 401)
        ),
    },
    "Server": {
        "health, open without a key": lambda a: httpx.get(f"{a.url}/health").status_code == 200,
        "ping, ready, load": lambda a: (
            a.get("/ping") and a.get("/ready") and a.get("/load")["server_load"] == 0
        ),
        "version": lambda a: a.get("/version")["version"],
        "metrics of tokens and requests": lambda a: (
            "vllm:generation_tokens_total" in samples(a) and "vllm:request_success" in samples(a)
        ),
        "metrics of queue, prefill and decode": lambda a: all(
            f"vllm:request_{name}_time_seconds_bucket" in samples(a)
            for name in ("queue", "prefill", "decode", "inference")
        ),
        "metrics of cache and steps": lambda a: (
            "vllm:cache_config_info" in samples(a) and "vllm:iteration_tokens" in samples(a)
        ),
        "metrics of one request": lambda a: (
            a.chat(return_metrics=True)["metrics"]["tokens_per_second"] is not None
        ),
        "CORS for pages that are listed": lambda a: (
            preflight(a, "https://app.example") == "https://app.example"
        ),
        "and for no others": lambda a: preflight(a, "https://evil.example") is None,
        "request ids": lambda a: (
            a.send(
                *(CHAT,),
                headers={"authorization": f"Bearer {KEY}", "x-request-id": "mine"},
                messages=USER,
            ).headers["x-request-id"]
            == "mine"
        ),
        "the document of it all": lambda a: a.get("/openapi.json")["paths"][CHAT],
        "priorities need a server for them": lambda a: a.refused(
            CHAT, "priority", messages=USER, priority=3
        ),
        "sleep and wake-up": lambda a: (
            a.send("/sleep").json()["status"] == "asleep"
            and a.get("/is_sleeping")["is_sleeping"]
            and a.send("/wake_up").json()["status"] == "awake"
        ),
        "files": lambda a: a.get(f"/v1/files/{file_of(a)['id']}")["purpose"] == "batch",
        "batches": batch,
    },
}
# What is refused, why, and a request that shows it.
REFUSED: dict[str, dict[str, tuple[str, str, dict[str, Any]]]] = {
    "Chat": {
        "a template in the request": (
            "templates are programs, and the deployment's",
            CHAT,
            {"messages": USER, "chat_template": "{{ messages }}"},
        ),
        "many chats in one request": (
            "a batch does that",
            "/v1/chat/completions/batch",
            {"messages": [USER]},
        ),
        "documents": (
            "they go into messages, or chat_template_kwargs",
            CHAT,
            {"messages": USER, "documents": [{"text": "a"}]},
        ),
        "use_beam_search": (
            "the engine samples, and searches for nothing",
            CHAT,
            {"messages": USER, "use_beam_search": True},
        ),
    },
    "Streams": {
        "return_progress": (
            "a stream begins with its first token",
            CHAT,
            {"messages": USER, "stream": True, "return_progress": True},
        ),
    },
    "Log-probabilities": {
        "logprob_token_ids": (
            "top_logprobs tell of 20 tokens, allowed_token_ids leaves only these",
            CHAT,
            {"messages": USER, "logprobs": True, "logprob_token_ids": [5]},
        ),
    },
    "Completions": {
        "suffix, infill": (
            "models have marks for it, which a prompt may hold",
            COMPLETIONS,
            {"prompt": "a", "suffix": "b"},
        ),
        "a server's own way (/generate, /completion)": (
            "there is one API",
            "/generate",
            {"text": "a"},
        ),
        "embeddings as prompts": (
            "prompts are texts or tokens",
            COMPLETIONS,
            {"prompt": "a", "prompt_embeds": "AAAA"},
        ),
        "use_beam_search": (
            "as of chats",
            COMPLETIONS,
            {"prompt": "a", "use_beam_search": True},
        ),
    },
    "Token ids": {
        "in and out without text (/inference/v1/generate)": (
            "completions take ids, return_token_ids tells them",
            "/inference/v1/generate",
            {"token_ids": [5]},
        ),
        "a chat's prompt, unanswered (render, /apply-template)": (
            "/tokenize and /detokenize tell it",
            "/v1/chat/completions/render",
            {"messages": USER},
        ),
    },
    "Tools": {
        "tools that the server runs (MCP, shell)": (
            "clients run them",
            "/tools",
            {"name": "shell"},
        ),
    },
    "Reasoning": {
        "separate_reasoning: false": (
            "thoughts have a field of their own; leave them out or put both together",
            CHAT,
            {"messages": USER, "separate_reasoning": False},
        ),
    },
    "Responses": {
        "background": ("a batch does that", RESPONSES, {"input": "a", "background": True}),
        "log-probabilities": (
            "of chats and completions only",
            RESPONSES,
            {"input": "a", "include": ["message.output_text.logprobs"]},
        ),
    },
    "Embeddings": {
        "texts instead of documents, as TEI has it": (
            "Jina's and Cohere's form is taken",
            "/rerank",
            {"query": "a", "texts": ["a"]},
        ),
        "a vector of every token (/pooling)": (
            "a text is one vector",
            "/pooling",
            {"input": "a"},
        ),
    },
    "Messages": {
        "batches": ("/v1/batches are OpenAI's", "/v1/messages/batches", {"requests": []}),
    },
    "Cache": {
        "saving and restoring slots": (
            "prefixes are found and kept by themselves",
            "/slots/0",
            {"filename": "a"},
        ),
        "clearing it by request": (
            "blocks go when others need their room",
            "/reset_prefix_cache",
            {},
        ),
    },
    "Server": {
        "/props, /slots": (
            "/metrics and the page tell it",
            "/props",
            {},
        ),
        "changing weights over HTTP": (
            "it needs enable_weight_updates, for clients may name any path",
            "/update_weights_from_disk",
            {"model_path": "a"},
        ),
    },
}


def table() -> str:
    """In Markdown, with how many there are."""
    lines = ["| | met | refused, and why |", "|---|---|---|"]
    for area, met in MET.items():
        refused = REFUSED.get(area, {})
        because = "; ".join(f"{name} ({why})" for name, (why, _, _) in refused.items())
        count = f"{len(met)} of {len(met) + len(refused)}"
        lines.append(f"| **{area}** | {count}: {'; '.join(met)} | {because} |")
    num_met, num_refused = (sum(map(len, each.values())) for each in (MET, REFUSED))
    lines.append(f"| **All** | {num_met} of {num_met + num_refused} | |")
    return "\n".join(lines)


def main() -> int:
    areas = sys.argv[1:] or list(MET)
    failed = []
    with tempfile.TemporaryDirectory() as directory, live(directory) as asked:
        for area in areas:
            for name, check in MET[area].items():
                try:
                    reason = "" if check(asked) else "it is not so"
                except Exception as error:
                    reason = f"{type(error).__name__}: {str(error)[:300]}"
                if reason:
                    failed.append(f"{area}, {name}: {reason}")
        for area in areas:
            for name, (_, path, body) in REFUSED.get(area, {}).items():
                answer = asked.send(path, **body)
                if answer.status_code not in (400, 404):
                    failed.append(f"{area}, {name}: answered with {answer.status_code}")
        if not idle(asked):
            failed.append("something is left behind")
    if areas == list(MET):
        print(table())
    print("\n".join(failed))
    num_met = sum(len(MET[area]) for area in areas)
    print(f"{num_met - len(failed)} of {num_met} are met as said; {len(failed)} faults")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
