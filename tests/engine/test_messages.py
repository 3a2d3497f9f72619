"""`LLM.chat` takes the messages that the server takes, and makes the same prompts of them."""

from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from engine import LLM, SamplingParams
from engine.demo import DEMO_MODEL

ORACLE = AutoTokenizer.from_pretrained(DEMO_MODEL)
USER = {"role": "user", "content": "Repeat: river"}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    llm = LLM("manta-demo", device="cpu", num_threads=1, num_blocks=16, max_num_seqs=4)
    yield llm
    llm.close()


def prompt_of(llm: LLM, messages: Any, **options: Any) -> str:
    (output,) = llm.chat(messages, SamplingParams(max_tokens=1), use_tqdm=False, **options)
    return llm.get_tokenizer().decode(output.prompt_token_ids, skip_special_tokens=False)


def called(arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": "call_0", "type": "function", "function": function}


@pytest.mark.parametrize(
    "message, as_templates_take_it",
    [
        (
            {"role": "user", "content": [{"type": "text", "text": t} for t in ("Repeat:", "sea")]},
            {"role": "user", "content": "Repeat:\nsea"},
        ),
        ({"role": "developer", "content": "Be brief."}, {"role": "system", "content": "Be brief."}),
        (
            {"role": "assistant", "content": None, "tool_calls": [called('{"city": "Oslo"}')]},
            {"role": "assistant", "content": "", "tool_calls": [called({"city": "Oslo"})]},
        ),
        (
            {"role": "assistant", "content": "Hi", "refusal": None, "annotations": []},
            {"role": "assistant", "content": "Hi"},
        ),
    ],
)
def test_messages_of_the_openai_api(
    llm: LLM, message: dict[str, Any], as_templates_take_it: dict[str, Any]
) -> None:
    expected = ORACLE.apply_chat_template(
        [as_templates_take_it, USER], tokenize=False, add_generation_prompt=True
    )
    assert prompt_of(llm, [message, USER]) == expected


def test_tools_say_what_was_said_of_them(llm: LLM) -> None:
    function = {"name": "f", "parameters": {"type": "object"}}
    expected = ORACLE.apply_chat_template(
        [USER],
        tools=[{"type": "function", "function": function}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert prompt_of(llm, [USER], tools=[{"function": function | {"strict": True}}]) == expected


@pytest.mark.parametrize(
    "messages, options, says",
    [
        ([{"role": "robot", "content": "x"}], {}, r"messages\.0\.role: .* \(got 'robot'\)"),
        ([{"role": "user"}], {}, r"messages\.0\.content: Field required"),
        ([USER | {"mood": "good"}], {}, r"messages\.0\.mood: unknown field"),
        ([USER | {"content": [{"type": "image_url"}]}], {}, r"messages\.0\.content"),
        ([USER], {"tools": [{"name": "f"}]}, r"tools\.0\.name: unknown field"),
        ([USER], {"continue_final_message": True}, "continue_final_message: set"),
        ([USER], {"chat_template_kwargs": {"tools": []}}, "'tools' is not a variable"),
        ([], {}, "messages: "),
    ],
)
def test_other_messages_are_refused_by_name(
    llm: LLM, messages: Any, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(ValueError, match=says):
        llm.chat([messages], use_tqdm=False, **options)
    assert not llm.engine.has_work
