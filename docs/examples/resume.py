"""A stream that outlives its replica: when the connection breaks, the same text goes on.

manta serve num_replicas=2                   # in another shell
python docs/examples/resume.py "Repeat these words: apple river stone"
"""

import argparse
import json
import time
from collections.abc import Iterator
from typing import Any

import httpx

GIVE_UP_S = 60.0


def stream(url: str, body: dict[str, Any]) -> Iterator[str]:
    """The content of a chat's answer, as it comes."""
    last_id, give_up_at = "", time.monotonic() + GIVE_UP_S
    while True:
        headers = {"last-event-id": last_id} if last_id else {}
        try:
            for event_id, content in events(url, body | {"stream": True}, headers):
                last_id, give_up_at = event_id, time.monotonic() + GIVE_UP_S
                yield content
            return
        except httpx.TransportError:
            if time.monotonic() > give_up_at:
                raise
            time.sleep(0.5)  # until another replica answers


def events(url: str, body: dict[str, Any], headers: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(id, content): what has come since the last id would come again, so it waits for the next."""
    content = event_id = ""
    with httpx.stream("POST", url, json=body, headers=headers, timeout=60) as answer:
        is_a_proxys = answer.headers.get("content-type") != "application/json"
        if answer.status_code == 503 or (answer.is_error and is_a_proxys):
            raise httpx.ConnectError("no replica is there yet")
        answer.raise_for_status()
        for line in answer.iter_lines():
            name, _, value = line.partition(": ")
            if name == "id":
                event_id = value
            elif value == "[DONE]":
                return
            elif name == "data":
                event = json.loads(value)
                if "error" in event:
                    may_pass = event["error"]["code"] == "engine_unavailable"
                    kind = httpx.ConnectError if may_pass else RuntimeError
                    raise kind(event["error"]["message"])
                choice = event["choices"][0]
                content += choice["delta"].get("content") or ""
            elif event_id:  # an empty line ends an event
                yield event_id, content
                content = event_id = ""
    raise httpx.RemoteProtocolError("the answer has no end")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("question")
    parser.add_argument("--url", default="http://localhost:8000")
    arguments = parser.parse_args()
    chat = {"messages": [{"role": "user", "content": arguments.question}]}
    for part in stream(f"{arguments.url}/v1/chat/completions", chat):
        print(part, end="", flush=True)
    print()
