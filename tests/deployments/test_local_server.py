"""The server that most tests of the HTTP interface use."""

from tests.deployments.conftest import wait_until
from tests.deployments.local_server import LocalServer


def test_the_demo_model_answers_without_ray(demo: LocalServer) -> None:
    with demo.client() as client:
        answer = client.chat.completions.create(
            model="manta-demo",
            messages=[{"role": "user", "content": "Repeat these words: apple river stone"}],
            temperature=0,
        )
    assert answer.choices[0].message.content == "apple river stone"
    wait_until(demo.is_idle, what="every block free")


def test_the_tiny_model_completes_text(tiny: LocalServer) -> None:
    with tiny.client() as client:
        answer = client.completions.create(model="tiny", prompt="ab", max_tokens=4)
    assert answer.usage is not None and answer.usage.completion_tokens <= 4
    wait_until(tiny.is_idle, what="every block free")
