"""Outputs of a given form: whatever a random model says has it, and nothing else changes."""

import json
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from engine import LLM, SamplingParams, StructuredOutputs
from engine.engine import Engine
from engine.sampling.grammar import compiler as grammar_compiler
from engine.sampling.grammar import matcher as grammar_matcher
from engine.sampling.grammar.compiler import GrammarCompiler, _Worker
from engine.schedule.request import Request
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, run, tokens_of
from tests.engine.random_schemas import random_schema
from tests.engine.small_tokenizer import one_character_each

PROMPT = [5, 6, 7, 8]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 5},
        "size": {"type": "integer", "minimum": -5, "maximum": 20},
        "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 2},
    },
    "required": ["size"],
}
SUM = """
root ::= term ("+" term)?
term ::= [0-9] | "(" root ")"
"""
# Takes minutes to compile.
BOMB = {"type": "string", "pattern": "^a{1,50}$"}
for _ in range(4):
    BOMB = {"type": "object", "properties": {f"k{i}": BOMB for i in range(6)}}


@pytest.fixture(scope="module", autouse=True)
def shared_workers() -> Iterator[None]:
    """Engines of one vocabulary share the process that compiles, which takes seconds to start."""
    workers: dict[str, _Worker] = {}

    def share(vocabulary: dict[str, Any]) -> _Worker:
        worker = _Worker(vocabulary)
        return workers.setdefault(repr(worker._arguments), worker)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grammar_compiler, "_Worker", share)
        patch.setattr(_Worker, "kill", lambda worker: None)
        yield
    for worker in workers.values():
        worker.kill()


@pytest.fixture(scope="module")
def llm(byte_model: Path) -> Iterator[LLM]:
    llm = LLM(
        str(byte_model),
        dtype="float32",
        device="cpu",
        num_threads=1,
        max_num_seqs=16,
        num_blocks=512,
    )
    yield llm
    assert llm.engine.scheduler.pool.num_free == 512
    llm.close()


def structured(seed: int = 0, **form: Any) -> SamplingParams:
    return SamplingParams(temperature=1.0, max_tokens=800, seed=seed, structured_outputs=form)


def is_instance_of(schema: Any) -> Callable[[str], bool]:
    return lambda text: jsonschema.validate(json.loads(text), schema) is None


def matches(regex: str) -> Callable[[str], bool]:
    return lambda text: re.fullmatch(regex, text) is not None


FORMS: list[tuple[dict[str, Any], Callable[[str], bool]]] = [
    ({"json": SCHEMA}, is_instance_of(SCHEMA)),
    ({"json": json.dumps(SCHEMA)}, is_instance_of(SCHEMA)),
    ({"json": SCHEMA, "disable_any_whitespace": True}, matches(r"\{[^\n\t]*\}")),
    ({"regex": r"(ab|日本)[^a-z]{2,9}\.?"}, matches(r"(ab|日本)[^a-z]{2,9}\.?")),
    ({"choice": ["yes", 'a "b"\\\n', "ye"]}, lambda text: text in ("yes", 'a "b"\\\n', "ye")),
    ({"grammar": SUM}, matches(r"[0-9+()]+")),
    ({"structural_tag": {"format": {"type": "const_string", "value": "hi"}}}, matches("hi")),
]
for form, _ in FORMS[-1:]:
    form["structural_tag"]["type"] = "structural_tag"


@pytest.mark.parametrize(("form", "is_right"), FORMS, ids=[next(iter(f)) for f, _ in FORMS])
def test_outputs_have_the_form(
    llm: LLM, form: dict[str, Any], is_right: Callable[[str], bool]
) -> None:
    params = [structured(seed, **form) for seed in range(6)]
    outputs = [output.outputs[0] for output in llm.generate([PROMPT] * 6, params, use_tqdm=False)]
    for output in outputs:
        assert output.finish_reason == "stop"
        assert is_right(output.text), output.text
    assert len({output.text for output in outputs}) > 1 or "structural_tag" in form


def test_any_object(llm: LLM) -> None:
    """It has no bounds, so a model that does not know what it says rarely ends one."""
    params = [structured(seed, json_object=True) for seed in range(4)]
    for output in llm.generate([PROMPT] * 4, params, use_tqdm=False):
        (choice,) = output.outputs
        assert choice.text.startswith("{") and not re.search(r"\s{33}", choice.text)
        if choice.finish_reason == "stop":
            assert isinstance(json.loads(choice.text), dict)


def test_every_choice_of_a_prompt_has_the_form(llm: LLM) -> None:
    params = structured(json=SCHEMA).model_copy(update={"n": 4})
    (output,) = llm.generate([PROMPT], params, use_tqdm=False)
    texts = [choice.text for choice in output.outputs]
    assert len(set(texts)) == 4
    assert all(map(is_instance_of(SCHEMA), texts))


def test_penalties_and_biases_only_choose_among_what_fits(llm: LLM) -> None:
    quiet = structured(regex="[ab]{20}").model_copy(update={"logit_bias": {3 + ord("a"): -100.0}})
    (output,) = llm.generate([PROMPT], quiet, use_tqdm=False)
    assert output.outputs[0].text == "b" * 20
    varied = structured(regex="[abc]{60}").model_copy(update={"frequency_penalty": 2.0})
    (output,) = llm.generate([PROMPT], varied, use_tqdm=False)
    text = output.outputs[0].text
    assert re.fullmatch("[abc]{60}", text) and max(map(text.count, "abc")) <= 30


def requests_of_both_kinds() -> list[Request]:
    forms = [{"json": random_schema(seed)} for seed in range(6)] + [{"regex": "(ab)+[^a]{9}"}]
    plain = SamplingParams(temperature=1.0, max_tokens=80, ignore_eos=True)
    requests = []
    for i, form in enumerate(forms):
        requests.append(Request(f"s{i}", [*PROMPT, i], structured(**form), i))
        requests.append(Request(f"p{i}", [*PROMPT, i], plain, i))
    return requests


@pytest.fixture(scope="module")
def alone(byte_model: Path) -> dict[str, list[int]]:
    """The output of each of `requests_of_both_kinds`, with no other beside it."""
    with new_engine(byte_model) as engine:
        return {r.id: tokens_of(run(engine, [r]))[0] for r in requests_of_both_kinds()}


@pytest.mark.parametrize(
    ("config", "preempts"),
    [
        (dict(), False),
        (dict(async_scheduling=True), False),
        (dict(async_scheduling=True, num_blocks=30, block_size=8), True),
        (dict(max_num_batched_tokens=16, max_num_seqs=12, enable_prefix_caching=False), False),
    ],
    ids=["one batch", "async", "preempted", "chunks"],
)
def test_neither_kind_changes_the_other(
    byte_model: Path, alone: dict[str, list[int]], config: dict[str, Any], preempts: bool
) -> None:
    with new_engine(byte_model, **config) as engine:
        requests = requests_of_both_kinds()
        outputs = tokens_of(run(engine, requests))
        assert (engine.scheduler.stats.preemptions > 0) == preempts
    assert {r.id: output for r, output in zip(requests, outputs, strict=True)} == alone


def test_a_resumed_request_goes_on_within_its_form(
    byte_model: Path, alone: dict[str, list[int]]
) -> None:
    known = 5
    with new_engine(byte_model) as engine:
        resumed = [
            Request(r.id, r.prompt_token_ids, r.params, r.seed, "", alone[r.id][:known])
            for r in requests_of_both_kinds()
            if len(alone[r.id]) > known
        ]
        rest = tokens_of(run(engine, resumed))
    assert rest == [alone[r.id][known:] for r in resumed]


def test_all_ranks_follow_the_leaders_grammar(
    byte_model: Path, alone: dict[str, list[int]]
) -> None:
    llm = LLM(
        str(byte_model),
        dtype="float32",
        device="cpu",
        num_threads=1,
        num_blocks=256,
        tensor_parallel_size=2,
    )
    try:
        requests = requests_of_both_kinds()
        outputs = tokens_of(run(llm.engine, requests))
    finally:
        llm.close()
    assert {r.id: output for r, output in zip(requests, outputs, strict=True)} == alone


def test_an_engine_without_grammars_has_none_of_it(byte_model: Path) -> None:
    with new_engine(byte_model) as engine:
        run(engine, [r for r in requests_of_both_kinds() if r.id.startswith("p")])
        (grammars,) = engine._antechamber._prerequisites
        assert grammars._compiler is None
        assert engine.runner.sampler.matchers._thread is None


# --- What cannot be ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({}, "exactly one of json, regex, .* \\(got none\\)"),
        ({"regex": "a", "json_object": True}, "got regex, json_object"),
        ({"json": "{"}, "json: not valid JSON"),
        ({"json": {"not": {}}}, "json: the keyword 'not' is not supported"),
        (
            {"json": {"properties": {"a": {"uniqueItems": True}}}},
            "json.properties.a: the keyword 'uniqueItems'",
        ),
        ({"json": {"type": "object", "required": ["a"]}}, "json.required: 'a' is not among"),
        ({"json": {"minLength": 3}}, "json.minLength: needs a type"),
        ({"json": {"type": "string", "format": "iri"}}, "json.format: 'iri' is not supported"),
        ({"json": {"type": "string", "pattern": "a(?=b)"}}, "json.pattern: lookahead"),
        ({"json": {"anyOf": [{"$ref": "other.json"}]}}, "json.anyOf.0.\\$ref: only references"),
        ({"json": {"enum": [1], "minimum": 2}}, "enum cannot be combined with minimum"),
        ({"json": {"type": "object", "required": 5}}, "json.required: must be a list"),
        ({"json": {"type": "object", "required": [[]]}}, "json.required: must be a list of str"),
        ({"json": {"type": "string", "format": []}}, "json.format: must be a string"),
        ({"json": {"allOf": {}}}, "json.allOf: must be a list"),
        ({"json": {"anyOf": []}}, "json.anyOf: must not be empty"),
        ({"json": {"properties": []}}, "json.properties: must be an object"),
        ({"json": {"properties": {"a": 1}}}, "json.properties.a: a schema is an object"),
        ({"json": {"type": "integer", "minimum": 2**63}}, "json: there is no integer of 64 bits"),
        ({"json": {"type": "integer", "exclusiveMaximum": "1"}}, "json.exclusiveMaximum: must be"),
        ({"json": {"type": "integer", "maximum": "1"}}, "json.maximum: must be a number"),
        ({"json": {"type": "string", "maxLength": "3"}}, "json: a length is a whole number"),
        ({"regex": "a" * 100_001}, "regex: .* characters are too many"),
        ({"choice": ["a", ""]}, "choice: a choice must not be empty"),
        ({"regexp": "a"}, "regexp"),
    ],
)
def test_forms_refused_before_they_are_compiled(form: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        StructuredOutputs(**form)


def test_a_schema_nested_too_deeply() -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(70):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested too deeply"):
        StructuredOutputs(json=schema)
    for _ in range(5000):
        schema = {"type": "array", "items": schema}
    with pytest.raises(ValueError, match="nested too deeply"):
        StructuredOutputs(json=schema)


@pytest.mark.parametrize("name", ["min_tokens", "ignore_eos", "allowed_token_ids", "bad_words"])
def test_what_would_contradict_a_form(name: str) -> None:
    values: dict[str, Any] = dict(
        min_tokens=1, ignore_eos=True, allowed_token_ids=[1], bad_words=["a"]
    )
    with pytest.raises(ValueError, match=f"{name}: it cannot be combined with structured_out"):
        SamplingParams(structured_outputs={"regex": "a"}, **{name: values[name]})


@pytest.mark.parametrize(
    ("form", "says"),
    [
        ({"regex": "(a"}, "parenthesis is not closed"),
        ({"regex": "(a)\\1"}, "Backreference is not supported"),
        ({"grammar": "start ::= foo"}, 'root rule with name "root" is not found'),
        ({"grammar": "root ::= " + "(" * 9999 + '"a"' + ")" * 9999}, "Nest layer exceeded"),
        ({"json": {"type": "string", "pattern": "(a"}}, "parenthesis is not closed"),
        ({"structural_tag": "{"}, "Invalid JSON"),
    ],
)
def test_forms_that_the_compiler_refuses(llm: LLM, form: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"structured_outputs: .*{says}"):
        llm.generate([PROMPT, PROMPT], [structured(**form), SamplingParams()], use_tqdm=False)
    assert not llm.engine.has_work


def test_a_vocabulary_that_cannot_write_it(checkpoints: CheckpointFactory) -> None:
    directory = checkpoints("qwen3", eos_token_id=[2])
    one_character_each().save(str(directory / "tokenizer.json"))
    with new_engine(directory) as engine:
        engine.add(Request("é", PROMPT, structured(regex="aé"), 0))
        engine.add(Request("a", PROMPT, structured(regex="ab"), 0))
        endings = endings_of(engine)
    assert endings["é"] == "structured_outputs: the model's vocabulary has no token that could " + (
        "come next"
    )
    assert endings["a"] == "stop"


def endings_of(engine: Engine) -> dict[str, str]:
    """The errors or finish reasons of all live requests, in the order in which they ended."""
    endings = {}
    while engine.has_work:
        for delta in engine.step():
            if delta.finish_reason is not None:
                endings[delta.request_id] = delta.error or delta.finish_reason
    assert engine.scheduler.pool.num_free == engine.scheduler.pool.num_blocks
    return endings


def test_a_pathological_schema_holds_up_nobody(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.sampling.grammar.compiler.TIMEOUT_S", 1.5)
    with new_engine(byte_model) as engine:
        run(engine, [Request("first", PROMPT, structured(regex="ab"), 0)])  # all is loaded
        engine.add(Request("bomb", PROMPT, structured(json=BOMB), 0))
        engine.add(Request("other form", PROMPT, structured(json=SCHEMA), 0))
        engine.add(Request("plain", PROMPT, SamplingParams(ignore_eos=True, max_tokens=9), 0))
        longest, last = 0.0, time.monotonic()
        endings: dict[str, str] = {}
        while engine.has_work:
            for delta in engine.step():
                if delta.finish_reason is not None:
                    endings[delta.request_id] = delta.error or delta.finish_reason
            now = time.monotonic()
            longest, last = max(longest, now - last), now
    assert next(iter(endings)) == "plain"
    assert (endings["plain"], endings["other form"]) == ("length", "stop")
    assert endings["bomb"] == (
        "structured_outputs: compiling it takes more than 1.5 s or 4 GiB; make it simpler"
    )
    assert longest < 0.75, "a step waited for the compiler"


def test_a_grammar_too_ambiguous_to_follow_ends_alone(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.sampling.grammar.matcher._FREE_S", 1e-9)
    monkeypatch.setattr("engine.sampling.grammar.matcher._PER_TOKEN_S", 1e-9)
    with new_engine(byte_model) as engine:
        engine.add(Request("ambiguous", PROMPT, structured(grammar='root ::= root root | "a"'), 0))
        engine.add(Request("plain", PROMPT, SamplingParams(ignore_eos=True, max_tokens=9), 0))
        endings = endings_of(engine)
    assert endings["plain"] == "length"
    assert "too ambiguous to follow" in endings["ambiguous"]


def test_what_is_raised_while_a_grammar_is_followed_ends_its_request_alone(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(grammar: Any) -> Any:
        raise RuntimeError("a fault of xgrammar's")

    with new_engine(byte_model) as engine:
        monkeypatch.setattr(grammar_matcher, "_new_matcher", fail)
        engine.add(Request("form", PROMPT, structured(regex="ab"), 0))
        engine.add(Request("plain", PROMPT, SamplingParams(ignore_eos=True, max_tokens=9), 0))
        endings = endings_of(engine)
    assert endings["plain"] == "length"
    assert endings["form"].endswith("its grammar cannot be followed: a fault of xgrammar's")


def test_an_aborted_request_is_forgotten_while_its_grammar_compiles(byte_model: Path) -> None:
    with new_engine(byte_model) as engine:
        engine.add(Request("gone", PROMPT, structured(json=SCHEMA), 0))
        with pytest.raises(ValueError, match="already live"):
            engine.add(Request("gone", PROMPT, structured(json=SCHEMA), 0))
        engine.abort("gone")
        assert not engine.has_work
        (output,) = run(engine, [Request("gone", PROMPT, structured(json=SCHEMA), 0)])
        assert output.finish_reason == "stop"


def test_grammars_are_compiled_once_and_forgotten_in_time(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("engine.sampling.grammar.compiler._MAX_CACHED", 2)
    compiler = GrammarCompiler(byte_model, 320, [2])
    try:
        forms = [StructuredOutputs(regex=regex) for regex in ("a", "b", "(")]
        futures = [compiler.compile(form) for form in forms]
        assert compiler.compile(StructuredOutputs(regex="b")) is futures[1]
        assert compiler.compile(forms[2]) is futures[2]
        assert futures[2].exception() is not None
        assert compiler.compile(forms[0]) is not futures[0], "only two are remembered"
        # What has died is started again.
        process = compiler._worker._process
        assert process is not None
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert compiler.compile(StructuredOutputs(regex="c")).result() is not None
    finally:
        compiler.close()
