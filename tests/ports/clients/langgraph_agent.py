"""A ReAct agent of LangGraph, over OpenAI's and Anthropic's API."""

import sys

from langchain_anthropic import ChatAnthropic
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from langgraph.prebuilt import create_react_agent

url = sys.argv[1]


@tool
def get_weather(city: str) -> str:
    """Get the current weather in a city."""
    return '{"temperature": 21, "condition": "sunny"}'


base = {"model": "manta-demo", "api_key": "none", "temperature": 0}
for model in (
    ChatOpenAI(**base, base_url=f"{url}/v1"),
    ChatOpenAI(**base, base_url=f"{url}/v1", use_responses_api=True),
    ChatAnthropic(**base, base_url=url, max_tokens=100),
):
    agent = create_react_agent(model, [get_weather])
    said = agent.invoke({"messages": [("user", "What is the weather in Paris?")]})["messages"]
    assert "21" in str(said[-1].content), said
    print(type(model).__name__, repr(said[-1].content))
