"""The server that most tests of the HTTP interface use."""

import openai

from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer


def test_the_demo_model_answers_without_ray(demo: LocalServer) -> None:
    with openai.OpenAI(base_url=f"{demo.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.chat.completions.create(
            model="manta-demo",
            messages=[{"role": "user", "content": "Repeat these words: apple river stone"}],
            temperature=0,
        )
    assert answer.choices[0].message.content == "apple river stone"
    wait_until(demo.is_idle, what="every block free")


def test_the_tiny_model_completes_text(tiny: LocalServer) -> None:
    with openai.OpenAI(base_url=f"{tiny.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.completions.create(model="tiny", prompt="ab", max_tokens=4)
    assert answer.usage is not None and answer.usage.completion_tokens <= 4
    wait_until(tiny.is_idle, what="every block free")
