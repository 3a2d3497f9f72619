"""The bundled demo model: its tokenizer, chat template, data split, size and accuracy."""

import random
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from engine.demo import DEMO_MODEL
from engine.demo.evaluate import evaluate
from engine.demo.samples import is_held_out
from engine.demo.tasks import KINDS, draw, training_sample

TOKENIZER = AutoTokenizer.from_pretrained(DEMO_MODEL)
RUST = Tokenizer.from_file(str(DEMO_MODEL / "tokenizer.json"))
NO_THOUGHT = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {
    "id": "call_0",
    "type": "function",
    "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
}


def render(messages: list[dict[str, Any]], **variables: Any) -> str:
    text: str = TOKENIZER.apply_chat_template(messages, tokenize=False, **variables)
    return text


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def test_importing_the_package_is_cheap() -> None:
    code = "import sys, engine.demo; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_everything_fits_in_the_repository() -> None:
    files = {path.name: path.stat().st_size for path in DEMO_MODEL.iterdir()}
    assert sum(files.values()) <= 12e6
    assert {"config.json", "generation_config.json", "model.safetensors"} <= set(files)
    assert {"tokenizer.json", "tokenizer_config.json"} <= set(files)


def test_config() -> None:
    config = AutoConfig.from_pretrained(DEMO_MODEL)
    assert config.architectures == ["Qwen3ForCausalLM"]
    assert config.dtype == torch.bfloat16 and config.tie_word_embeddings
    assert config.num_attention_heads % 2 == config.num_key_value_heads % 2 == 0
    assert config.vocab_size == len(TOKENIZER) == RUST.get_vocab_size()


@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    assert RUST.decode(RUST.encode(text).ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(
    "text", ["👍🏽 ❤️ 🎉", "你好,世界", "a\tb\n\n  c\r\n", " lead", "trail ", "naïve e\u0301", ""]
)
def test_awkward_text_round_trips_in_transformers(text: str) -> None:
    assert TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_digits_are_single_tokens() -> None:
    assert TOKENIZER.tokenize("123+45") == ["1", "2", "3", "+", "4", "5"]


def test_only_the_bracketed_tokens_are_special() -> None:
    text = "<|im_start|><think>a</think><tool_call>b</tool_call><|im_end|><|endoftext|>"
    ids = RUST.encode(text).ids
    assert len(ids) == 9
    for tokenizer in (RUST, TOKENIZER):
        shown = tokenizer.decode(ids, skip_special_tokens=True)
        assert shown == "<think>a</think><tool_call>b</tool_call>"
    assert (TOKENIZER.eos_token, TOKENIZER.pad_token) == ("<|im_end|>", "<|endoftext|>")


def test_template_of_a_plain_conversation() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Hi"),
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\nHello"},
        user([{"type": "text", "text": "Repeat: "}, {"type": "text", "text": "a b"}]),
    ]
    expected = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello<|im_end|>\n<|im_start|>user\nRepeat: a b<|im_end|>\n"
    )
    assert render(messages) == expected
    assert render(messages, add_generation_prompt=True) == expected + NO_THOUGHT


def test_template_with_thinking() -> None:
    opened = "<|im_start|>user\n1 + 1<|im_end|>\n<|im_start|>assistant\n"
    assert render([user("1 + 1")], add_generation_prompt=True, enable_thinking=True) == opened
    for answer in (
        {"role": "assistant", "content": "<think>\nones\n</think>\n\n2"},
        {"role": "assistant", "content": "2", "reasoning_content": "ones"},
    ):
        whole = render([user("1 + 1"), answer])
        assert whole == opened + "<think>\nones\n</think>\n\n2<|im_end|>\n"


def test_template_with_tools() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        user("Weather in Oslo?"),
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "tool_call_id": "call_0", "content": "cold"},
        {"role": "tool", "tool_call_id": "call_0", "content": "wet"},
    ]
    call = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
    assert render(messages, tools=[WEATHER], add_generation_prompt=True) == (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call these functions:\n<tools>\n"
        '{"type": "function", "function": {"name": "get_weather", "description": '
        '"Get the weather.", "parameters": {"type": "object", "properties": {"city": '
        '{"type": "string"}}}}}\n</tools>\n\nTo call one, answer with:\n<tool_call>\n'
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
        "<|im_start|>user\nWeather in Oslo?<|im_end|>\n"
        f"<|im_start|>assistant\n{call}\n{call}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\ncold\n</tool_response>\n"
        "<tool_response>\nwet\n</tool_response><|im_end|>\n" + NO_THOUGHT
    )


def test_the_template_renders_calls_as_the_samples_expect_them() -> None:
    sample = draw("tool call", random.Random(3), held_out=True, thinking=False)
    calls = [{"type": "function", "function": call} for call in sample.calls]
    messages = [*sample.messages, {"role": "assistant", "content": "", "tool_calls": calls}]
    tail = NO_THOUGHT + sample.expected + "<|im_end|>\n"
    assert render(messages, tools=sample.tools).endswith(tail)


def test_training_never_draws_a_held_out_instance() -> None:
    rng = random.Random(5)
    trained = {s.key for s in (training_sample(rng) for _ in range(3000)) if s.kind != "chat"}
    held = {draw(kind, rng, held_out=True).key for kind in KINDS for _ in range(50)}
    assert not trained & held
    assert not any(map(is_held_out, trained)) and all(map(is_held_out, held))


def test_samples_are_the_same_for_the_same_seed() -> None:
    first, second = (
        [training_sample(rng) for _ in range(200)] for rng in (random.Random(7), random.Random(7))
    )
    assert first == second
    assert len(Counter(sample.kind for sample in first)) == len(KINDS) + 1


def test_held_out_instances_are_answered() -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32).eval()
    scores = evaluate(model, TOKENIZER, per_kind=8, show=2)
    assert sum(scores.values()) / len(scores) >= 0.9, scores
