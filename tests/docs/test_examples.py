"""The examples do what they show, with the demo model."""

import re
import runpy
import sys
from collections.abc import Callable
from typing import Any

import pytest

from tests.deployments.conftest import demo  # noqa: F401
from tests.deployments.cutting_proxy import cut_after
from tests.deployments.local_server import LocalServer
from tests.docs.blocks import ROOT

Run = Callable[..., str]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> Run:
    """run("name", *arguments): what the example prints."""

    def run(name: str, *arguments: str) -> str:
        path = ROOT / "docs" / "examples" / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
        return str(capsys.readouterr().out)

    return run


def test_rollouts_are_rewarded_and_their_lesson_is_served(run: Run) -> None:
    said = run("rl_rollout", "--rounds", "2", "--prompts", "4", "--group", "4")
    rewards = [float(value) for value in re.findall(r"reward ([\d.]+)", said)]
    assert len(rewards) == 2 and all(0.2 < value <= 1 for value in rewards)
    assert "tokens/s" in said


def test_an_evaluation_tells_what_was_right(run: Run) -> None:
    said = run("evaluate", "--questions", "80")
    shares = [float(value) for value in re.findall(r"([\d.]+)%", said)]
    assert len(shares) == 5 and min(shares[:4]) >= 80
    assert all(task in said for task in ("add", "repeat", "reverse", "sort"))


def test_extraction_gives_checked_objects(run: Run, demo: LocalServer) -> None:  # noqa: F811
    assert run("extract", "--url", demo.url).splitlines() == [
        "Person(name='Maria', age=31, city='Paris')",
        "Person(name='Tom', age=54, city='Oslo')",
        "Person(name='Anna', age=27, city='Tokyo')",
    ]


def test_retrieval_shares_prefixes(run: Run, demo: LocalServer) -> None:  # noqa: F811
    said = run("rag", "--url", demo.url)
    assert said.count("tokens cached") == 9
    for answer in ("Paris", "Oslo", "Tokyo", "cat", "horse", "rabbit", "mango", "pear", "lemon"):
        assert answer in said
    hit_rate = re.search(r"hit rate (\d+)%", said)
    assert hit_rate is not None and int(hit_rate[1]) >= 40


def test_an_agent_calls_tools_until_it_can_answer(run: Run, demo: LocalServer) -> None:  # noqa: F811
    said = run("agent", "--url", demo.url, "What is the weather in Oslo?")
    assert "get_weather({'city': 'Oslo'}) -> {'temperature': 4" in said
    assert "4 degrees" in said.splitlines()[-1]


def test_a_broken_stream_goes_on(run: Run, demo: LocalServer) -> None:  # noqa: F811
    question = "Repeat these words: apple river stone cloud"
    whole = run("resume", "--url", demo.url, question)
    with cut_after(demo.url, 900, 0, 1200) as url:
        assert run("resume", "--url", url, question) == whole
    assert "apple river stone" in whole
