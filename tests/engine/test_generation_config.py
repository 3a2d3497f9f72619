"""What a checkpoint says of its generation is obeyed, or named where it cannot be."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import GenerationConfig

from engine import LLM, SamplingParams
from engine.checkpoint.files import CheckpointError
from engine.generation_config import _NOT_OBEYED, _OBEYED, eos_token_ids, sampling_defaults
from engine.schedule.request import Request
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, run
from tests.engine.small_tokenizer import byte_level

# Of GenerationConfig, what changes no text: speed, memory, what is returned beside it, who starts.
WITHOUT_EFFECT = {
    *("do_sample", "max_length", "eos_token_id"),  # obeyed, or named, in their own ways
    *("bos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("early_stopping", "length_penalty"),  # of beams, which are not neutral themselves
    *("use_cache", "cache_implementation", "cache_config", "max_cache_len", "prefill_chunk_size"),
    *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
    *("return_dict_in_generate", "renormalize_logits", "remove_invalid_values", "low_memory"),
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "use_mtp"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
    *("assistant_ensemble_weight", "target_lookbehind", "prompt_lookup_num_tokens"),
    *("max_matching_ngram_size", "speculation_type", "compile_config", "disable_compile"),
    *("continuous_batching_config", "_from_model_config", "transformers_version"),
}


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(config={…}, tokenizer_config={…}, …): a directory with these .json files."""

    def write(**files: dict[str, Any]) -> Path:
        for name, content in files.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(content))
        return tmp_path

    return write


# --- What ends an output ----------------------------------------------------------------------

ADDED = [
    {"id": 7, "content": "<|endoftext|>", "special": True},
    {"id": 8, "content": "<|im_end|>", "special": True},
    {"id": 9, "content": "<think>", "special": False},
]
TOKENIZER = {"added_tokens": ADDED, "model": {"vocab": {"a": 0, "</s>": 1}}}


@pytest.mark.parametrize(
    "files, ids",
    [
        (dict(), set()),
        (dict(config={"eos_token_id": 2}), {2}),
        (dict(config={"eos_token_id": 2}, generation_config={"eos_token_id": [5, 6]}), {2, 5, 6}),
        (dict(config={"eos_token_id": 7}, tokenizer_config={"eos_token": "<|im_end|>"}), {7, 8}),
        (dict(tokenizer_config={"eos_token": {"content": "<|im_end|>"}}), {8}),
        (dict(special_tokens_map={"eos_token": "<|im_end|>"}), {8}),
        (dict(tokenizer_config={"eos_token": "</s>"}), {1}),
        (dict(config={"eos_token_id": 2}, tokenizer_config={"eos_token": "<nowhere>"}), {2}),
        (dict(config={"eos_token_id": 2}, tokenizer_config={"eos_token": None}), {2}),
    ],
)
def test_all_that_name_an_end_are_believed(
    write: Callable[..., Path], files: dict[str, Any], ids: set[int]
) -> None:
    if "tokenizer_config" in files or "special_tokens_map" in files:
        files = files | {"tokenizer": TOKENIZER}
    assert eos_token_ids(write(**files)) == ids


@pytest.mark.parametrize("given", ["2", [2, "3"], {"id": 2}, 2.0, True])
@pytest.mark.parametrize("name", ["config", "generation_config"])
def test_an_end_that_is_no_token_id_is_refused(
    write: Callable[..., Path], name: str, given: Any
) -> None:
    directory = write(**{name: {"eos_token_id": given}})
    with pytest.raises(CheckpointError) as refused:
        eos_token_ids(directory)
    assert f"{directory}/{name}.json: eos_token_id: should be a token id" in str(refused.value)
    assert f"(got {given!r})" in str(refused.value)


def test_the_tokenizers_own_list_of_tokens_is_read(write: Callable[..., Path]) -> None:
    listed = {str(token["id"]): token for token in ADDED}
    config = {"eos_token": "<|im_end|>", "added_tokens_decoder": listed}
    assert eos_token_ids(write(tokenizer_config=config)) == {8}


def test_where_nobody_names_an_end_any_special_token_is_one(write: Callable[..., Path]) -> None:
    assert eos_token_ids(write(config={}, tokenizer=TOKENIZER)) == {7, 8}


def test_the_tokenizers_end_ends_an_output(byte_model: Path, tmp_path: Path) -> None:
    """The model's own configs say token 2; it says another first, which its tokenizer names."""
    prompt, options = [20, 30, 40], dict(dtype="float32", device="cpu", num_threads=1)
    longest = SamplingParams(seed=1, max_tokens=20, allowed_token_ids=range(10, 260))
    tokens = LLM(str(byte_model), **options).generate(prompt, longest)[0].outputs[0].token_ids
    end = tokens[7]
    assert end not in tokens[:7]
    model = tmp_path / "model"
    shutil.copytree(byte_model, model)
    named = {"eos_token": byte_level().id_to_token(end)}
    (model / "tokenizer_config.json").write_text(json.dumps(named))
    output = LLM(str(model), **options).generate(prompt, longest)[0].outputs[0]
    assert (output.token_ids, output.finish_reason) == (tokens[:8], "stop")


def test_an_end_outside_the_vocabulary_is_none(edited: Callable[..., Path]) -> None:
    """Tokenizers are given tokens that the model never learned; a negative one means none."""
    directory = edited("qwen3", lambda config: config.update(eos_token_id=[-1, 2, 320, 5000]))
    params = SamplingParams(temperature=0, max_tokens=4, min_tokens=4)
    with new_engine(directory) as engine:
        assert engine.limits.eos_token_ids == [2]
        (output,) = run(engine, [Request("0", [5, 6, 7], params, 0)])
    assert len(output.token_ids) == 4


def test_a_checkpoint_that_names_no_end_ends_structured_outputs(
    checkpoints: CheckpointFactory, tmp_path: Path
) -> None:
    model = tmp_path / "model"
    shutil.copytree(checkpoints("qwen3", eos_token_id=None), model)
    byte_level().save(str(model / "tokenizer.json"))
    params = SamplingParams(structured_outputs={"choice": ["yes", "no"]}, max_tokens=20)
    with new_engine(model) as engine:
        (output,) = run(engine, [Request("0", [20, 30], params, seed=0)])
    text = byte_level().decode(output.token_ids)
    assert (text in ("yes", "no"), output.finish_reason) == (True, "stop")


# --- Recommended sampling ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "recommended, defaults",
    [
        ({}, {}),
        (
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
            {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "repetition_penalty": 1.05},
        ),
        ({"temperature": None, "min_p": 0.1}, {"min_p": 0.1}),
        ({"max_new_tokens": 512}, {"max_tokens": 512}),
        (
            {"do_sample": False, "top_k": 20, "repetition_penalty": 1.1},
            {"temperature": 0.0, "repetition_penalty": 1.1},
        ),
    ],
)
def test_recommended_sampling_is_the_default(
    write: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    recommended: dict[str, Any],
    defaults: dict[str, Any],
) -> None:
    assert sampling_defaults(write(generation_config=recommended)) == defaults
    assert not caplog.records


def test_what_is_recommended_in_vain_is_named(
    write: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    write(config={"max_position_embeddings": None})
    write(generation_config={"max_length": 2048})
    assert sampling_defaults(write()) == {} and not caplog.records  # of no window
    write(config={"max_position_embeddings": 4096})
    write(generation_config={"num_beams": 4, "typical_p": 1.0, "max_length": 2048, "chat": "x"})
    assert sampling_defaults(write()) == {}
    (record,) = caplog.records
    assert record.getMessage().endswith("not obeyed here: max_length=2048, num_beams=4")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("generation_config", {"top_p": 1.5}, "top_p: .*less than"),
        ("generation_config", {"max_new_tokens": [9]}, r"max_new_tokens: .*integer \(got \[9\]"),
        ("generation_config", {"max_length": "2048"}, r"max_length: .*integer \(got '2048'\)"),
        ("generation_config", {"do_sample": "no"}, r"do_sample: .*true or false \(got 'no'\)"),
        ("config", {"max_position_embeddings": "4"}, r"max_position_embeddings: .*\(got '4'\)"),
    ],
)
def test_a_recommendation_that_cannot_be_is_refused(
    write: Callable[..., Path], name: str, content: dict[str, Any], told: str
) -> None:
    directory = write(**{name: content})
    with pytest.raises(CheckpointError, match=rf"/{name}\.json: {told}"):
        sampling_defaults(directory)


def test_all_that_transformers_obeys_is_known() -> None:
    """Each of its fields is obeyed, named, or without effect; a new one makes this fail."""
    fields = set(GenerationConfig().to_dict())
    assert fields - WITHOUT_EFFECT - _NOT_OBEYED - set(_OBEYED) == set()
