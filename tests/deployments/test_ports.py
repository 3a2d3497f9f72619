"""Other people's clients, unchanged: each test runs where its library is installed."""

import json
from typing import Literal

import pytest
from pydantic import BaseModel, Field

from tests.deployments.local_server import LocalServer

WORDS = "Repeat these words: apple river stone"


def test_langchain_chats_streams_and_calls_tools(demo: LocalServer) -> None:
    langchain = pytest.importorskip("langchain_openai")
    tools = pytest.importorskip("langchain_core.tools")

    @tools.tool
    def get_weather(city: str) -> str:
        """Get the current weather of a city."""
        return f"sunny in {city}"

    model = langchain.ChatOpenAI(
        model="manta-demo", base_url=f"{demo.url}/v1", api_key="none", temperature=0
    )
    answer = model.invoke(WORDS)
    assert answer.content == "apple river stone"
    assert answer.usage_metadata["output_tokens"] > 0
    chunks = [chunk.content for chunk in model.stream(WORDS)]
    assert "".join(chunks) == "apple river stone"
    called = model.bind_tools([get_weather]).invoke("What is the weather in Paris?")
    (call,) = called.tool_calls
    assert (call["name"], call["args"]) == ("get_weather", {"city": "Paris"})
    assert get_weather.invoke(call["args"]) == "sunny in Paris"
    responses = model.model_copy(update={"use_responses_api": True})
    assert "apple river stone" in json.dumps(responses.invoke(WORDS).content)


def test_instructor_extracts_into_a_model(demo: LocalServer) -> None:
    """By a forced function call and by a JSON schema: both are kept by a grammar."""
    instructor = pytest.importorskip("instructor")

    class Place(BaseModel):
        city: str = Field(max_length=12)
        country: Literal["France", "Norway"]

    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA):
        with demo.client() as client:
            place = instructor.from_openai(client, mode=mode).chat.completions.create(
                model="manta-demo",
                messages=messages,
                response_model=Place,
                temperature=0,
                max_tokens=200,
                max_retries=0,
            )
        assert isinstance(place, Place)
