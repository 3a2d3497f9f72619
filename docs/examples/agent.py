"""An agent: the model calls tools until it can answer, and they run here.

manta serve                                  # in another shell
python docs/examples/agent.py "What is the weather in Paris?"
"""

import argparse
import inspect
import json
from collections.abc import Callable
from typing import Any

from openai import OpenAI

MAX_TURNS = 8
_JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean"}


def get_weather(city: str) -> dict[str, Any]:
    """Get the current weather in a city."""
    degrees = {"Paris": 18, "Oslo": 4, "Tokyo": 23}.get(city, 15)
    return {"temperature": degrees, "condition": "sunny"}


def get_time(city: str) -> dict[str, Any]:
    """Get the time in a city."""
    return {"time": {"Paris": "14:05", "Oslo": "14:05", "Tokyo": "21:05"}.get(city, "12:00")}


TOOLS: dict[str, Callable[..., Any]] = {tool.__name__: tool for tool in (get_weather, get_time)}


def described(tool: Callable[..., Any]) -> dict[str, Any]:
    """A function as the API describes it, from its signature and docstring."""
    parameters = inspect.signature(tool).parameters
    properties = {
        name: {"type": _JSON_TYPES[parameter.annotation], "description": f"The {name} name"}
        for name, parameter in parameters.items()
    }
    schema = {"type": "object", "properties": properties, "required": list(parameters)}
    function = {"name": tool.__name__, "description": tool.__doc__, "parameters": schema}
    return {"type": "function", "function": function}


def run(client: OpenAI, question: str) -> str:
    """The answer, once no more tools are called."""
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": question}]
    for _ in range(MAX_TURNS):
        answer = client.chat.completions.create(
            model=model,
            messages=messages,
            tools=[described(tool) for tool in TOOLS.values()],
            temperature=0,
        )
        message = answer.choices[0].message
        messages.append(message.model_dump(exclude_none=True))
        if not message.tool_calls:
            return message.content or ""
        for call in message.tool_calls:
            arguments = json.loads(call.function.arguments)
            result = TOOLS[call.function.name](**arguments)
            print(f"  {call.function.name}({arguments}) -> {result}")
            content = json.dumps(result)
            messages.append({"role": "tool", "tool_call_id": call.id, "content": content})
    raise RuntimeError(f"no answer after {MAX_TURNS} turns")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("questions", nargs="*", default=["What is the weather in Paris?"])
    parser.add_argument("--url", default="http://localhost:8000")
    parser.add_argument("--key", default="none")
    args = parser.parse_args()
    client = OpenAI(base_url=f"{args.url}/v1", api_key=args.key)
    for question in args.questions:
        print(question)
        print(run(client, question))


if __name__ == "__main__":
    main()
