"""inspect's providers that speak to a server by its address, each with a tool and its result."""

import asyncio
import os
import sys

from inspect_ai.model import (
    ChatMessageTool,
    ChatMessageUser,
    GenerateConfig,
    get_model,
)
from inspect_ai.tool import ToolInfo, ToolParam, ToolParams

url = sys.argv[1]
os.environ.update(OPENAI_API_KEY="none", ANTHROPIC_API_KEY="none", MANTA_API_KEY="none")
os.environ.update(VLLM_API_KEY="none", SGLANG_API_KEY="none")
parameters = ToolParams(properties={"city": ToolParam(type="string", description="The city")})
weather = ToolInfo(
    name="get_weather", description="Get the current weather in a city.", parameters=parameters
)


async def main() -> int:
    failed = 0
    for name, base, options in (
        ("openai/manta-demo", f"{url}/v1", {"responses_api": False}),
        ("openai/manta-demo", f"{url}/v1", {"responses_api": True}),
        ("openai-api/manta/manta-demo", f"{url}/v1", {}),
        ("openai-api/manta/manta-demo", f"{url}/v1", {"responses_api": True}),
        ("vllm/manta-demo", f"{url}/v1", {}),
        ("sglang/manta-demo", f"{url}/v1", {}),
        ("anthropic/manta-demo", url, {}),
    ):
        try:
            config = GenerateConfig(temperature=0, max_tokens=200)
            model = get_model(name, base_url=base, config=config, memoize=False, **options)
            asked = [ChatMessageUser(content="What is the weather in Paris?")]
            output = await model.generate(asked, tools=[weather])
            (call,) = output.message.tool_calls or []
            result = ChatMessageTool(content='{"temperature": 21}', tool_call_id=call.id)
            told = await model.generate([*asked, output.message, result], tools=[weather])
            print(name, options, call.arguments, repr(told.completion))
        except Exception as error:
            failed += 1
            print(name, options, "FAILED", type(error).__name__, str(error)[:300])
    return failed


sys.exit(asyncio.run(main()))
