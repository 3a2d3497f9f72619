"""litellm: OpenAI's and Anthropic's ways, streams, tools, and its bridge from one to the other."""

import sys
from typing import Any

import litellm

url = sys.argv[1]
openai: dict[str, Any] = {
    "model": "openai/manta-demo",
    "api_base": f"{url}/v1",
    "api_key": "none",
}
anthropic: dict[str, Any] = {"model": "anthropic/manta-demo", "api_base": url, "api_key": "none"}
question: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
parameters = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
function = {"name": "get_weather", "parameters": parameters, "description": "Get the weather."}
tools = [{"type": "function", "function": function}]
for way in (openai, anthropic):
    answer = litellm.completion(messages=question, tools=tools, temperature=0, **way)
    (call,) = answer.choices[0].message.tool_calls
    assert "Paris" in call.function.arguments
    result = {"role": "tool", "tool_call_id": call.id, "content": '{"temperature": 21}'}
    history = [*question, answer.choices[0].message, result]
    told = litellm.completion(messages=history, tools=tools, max_tokens=30, **way)
    chunks = list(litellm.completion(messages=question, stream=True, max_tokens=20, **way))
    print(way["model"], repr(told.choices[0].message.content), len(chunks), "chunks")
bridged = litellm.anthropic.messages.create(messages=question, max_tokens=30, **openai)
bridged = __import__("asyncio").run(bridged) if hasattr(bridged, "__await__") else bridged
print("bridge", bridged["content"] if isinstance(bridged, dict) else bridged)
responded = litellm.responses(input="Repeat these words: sea", **openai)
print("responses", responded.output[-1].content[0].text)
