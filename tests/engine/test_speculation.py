"""Drafts: they never change a text, whoever makes them, and are taken where they pay."""

import json
import random
import shutil
import time
from collections.abc import Iterator
from collections.abc import Sequence as Listed
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engine import LLM, SamplingParams
from engine.config import EngineConfig
from engine.engine import Engine
from engine.runner import preflight
from engine.runner.preflight import read_model
from engine.schedule.request import Request
from engine.schedule.sequence import Sequence
from engine.schedule.step import DraftedTokens, DraftRow, TokenLogprobs, count_accepted
from engine.speculation import speculator
from engine.speculation.costs import DecodeCosts, StepCosts
from engine.speculation.drafter import Draft, Drafter
from engine.speculation.grammar import GrammarDrafter
from engine.speculation.model import ModelDrafter
from engine.speculation.ngram import NgramDrafter
from engine.speculation.prediction import PredictionDrafter
from engine.speculation.speculator import DrafterRecord, Speculator
from engine.speculation.suffix import SuffixDrafter
from engine.speculation.texts import RUN, Match, TextIndex
from tests.conftest import CheckpointFactory
from tests.engine.helpers import new_engine, new_requests, run, tokens_of
from tests.engine.test_commands import engine_of

# --- The same text ----------------------------------------------------------------------------


class Liar(Drafter):
    """Knows how every text goes on, and lies now and then."""

    name = "liar"

    def __init__(self, texts: dict[str, list[int]], honesty: float, rng: random.Random) -> None:
        self._texts, self._honesty, self._rng = texts, honesty, rng

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        position = len(sequence.token_ids)
        truth = self._texts[sequence.id][position : position + limit]
        truth += [self._rng.randrange(3, 259) for _ in range(limit - len(truth))]
        tokens = [
            t if self._rng.random() < self._honesty else self._rng.randrange(259) for t in truth
        ]
        count = self._rng.randint(0, limit)
        return Draft(tokens[:count], [0.9] * count)


def speculate(engine: Engine, *drafters: Drafter, max_drafts: int = 6) -> Speculator:
    """Have an engine take all drafts that it can: nothing tells it what steps cost."""
    speculator = Speculator(drafters, max_drafts, num_ahead=0)
    engine.scheduler.speculation = speculator
    return speculator


@dataclass
class Arrival:
    request: Request
    step: int  # before which it comes
    abort_after: int | None  # tokens received


@dataclass
class Received:
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    ending: tuple[str | None, int | None] = (None, None)


FORMS: list[dict[str, Any]] = [
    {"regex": "(yes|no), my lord( and master)*[.]"},
    {"json": {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": ["x", "y"]}},
              "required": ["a", "b"]}},
]  # fmt: skip


def random_params(rng: random.Random) -> SamplingParams:
    rules: dict[str, Any] = {"temperature": rng.choice([0.0, 0.7, 1.2])}
    for name, values in {
        "top_k": [20],
        "top_p": [0.9],
        "repetition_penalty": [1.3],
        "frequency_penalty": [0.6],
        "presence_penalty": [-0.4],
        "logit_bias": [{70: 3.0, 80: -5.0}],
        "bad_words_token_ids": [[[60, 61], [90]]],
        "logprobs": [0, 3],
    }.items():
        if rng.random() < 0.25:
            rules[name] = rng.choice(values)
    if rng.random() < 0.25:
        rules.pop("bad_words_token_ids", None)
        rules["structured_outputs"] = rng.choice(FORMS)
    else:
        rules["stop_token_ids"] = rng.sample(range(3, 259), rng.choice([0, 5]))
        rules["ignore_eos"] = rng.random() < 0.5
        rules["min_tokens"] = rng.choice([0, 0, 6])
    return SamplingParams(max_tokens=rng.randint(6, 40), **rules)


def random_arrivals(rng: random.Random, count: int) -> list[Arrival]:
    common = [rng.randrange(3, 259) for _ in range(40)]
    arrivals = []
    for i in range(count):
        prompt = common[: rng.randrange(41)] + [rng.randrange(3, 259) for _ in range(3)]
        output: list[int] = []
        request = Request(str(i), prompt, random_params(rng), rng.randrange(99), "", output)
        abort_after = rng.randint(1, 9) if rng.random() < 0.15 else None
        arrivals.append(Arrival(request, rng.randint(0, 12), abort_after))
    return arrivals


def play(engine: Engine, arrivals: Listed[Arrival]) -> list[Received]:
    """Run it all; every step checks the pool, and at the end nothing is left."""
    received = {arrival.request.id: Received() for arrival in arrivals}
    step = 0
    while step <= 12 or engine.has_work:
        for arrival in arrivals:
            if arrival.step == step:
                engine.add(arrival.request)
        for delta in engine.step():
            own = received[delta.request_id]
            assert delta.error is None and own.ending[0] is None
            own.token_ids += delta.token_ids
            own.logprobs += delta.logprobs or []
            own.ending = delta.finish_reason, delta.stop_token
        for arrival in arrivals:
            own = received[arrival.request.id]
            if own.ending[0] is None and len(own.token_ids) >= (arrival.abort_after or 1000):
                engine.abort(arrival.request.id)
                own.ending = "abort", None
                del own.token_ids[arrival.abort_after :], own.logprobs[arrival.abort_after :]
        engine.scheduler.assert_invariants()
        step += 1
    assert all(pool.num_free == pool.num_blocks for pool in engine.scheduler.blocks.pools)
    return list(received.values())


def assert_same(received: list[Received], expected: list[Received]) -> None:
    for own, other in zip(received, expected, strict=True):
        if "abort" not in (own.ending[0], other.ending[0]):
            assert (own.token_ids, own.ending) == (other.token_ids, other.ending)
        count = min(len(own.token_ids), len(other.token_ids))  # one may have ended just in time
        assert own.token_ids[:count] == other.token_ids[:count]
        assert bool(own.logprobs) == bool(other.logprobs)
        for logprobs, others in zip(own.logprobs, other.logprobs, strict=False):
            assert logprobs.rank == others.rank
            np.testing.assert_allclose(logprobs.logprobs, others.logprobs, atol=1e-4)


POOLS: list[dict[str, Any]] = [
    dict(async_scheduling=False),
    dict(async_scheduling=True, block_size=4, num_blocks=40, max_num_batched_tokens=128),
    dict(async_scheduling=False, max_num_seqs=3, max_num_batched_tokens=16, block_size=4),
    dict(async_scheduling=True, enable_prefix_caching=False, max_num_seqs=6, num_blocks=60),
]


@pytest.fixture(
    scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)]
)
def engines(byte_model: Path, request: pytest.FixtureRequest) -> Iterator[list[Engine]]:
    """One for each of the pools, without speculation of its own."""
    with ExitStack() as stack:
        config = dict(speculation="off", dtype=request.param)
        made = [stack.enter_context(new_engine(byte_model, **config | pool)) for pool in POOLS]
        if not made[0].runner.is_exact:
            pytest.skip("a token does not have the same bits in every step on this machine")
        yield made


SEEDS = [*range(6), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(6, 500))]


@pytest.mark.parametrize("seed", SEEDS)
def test_drafts_change_nothing(engines: list[Engine], seed: int) -> None:
    """Tokens, endings and log-probabilities of random histories, by an engine without drafts."""
    rng = random.Random(seed)
    arrivals = random_arrivals(rng, 10)
    engines[0].scheduler.speculation = None
    expected = play(engines[0], arrivals)
    texts = {
        arrival.request.id: arrival.request.prompt_token_ids + own.token_ids
        for arrival, own in zip(arrivals, expected, strict=True)
    }
    drafters: list[list[Drafter]] = [
        [Liar(texts, honesty, rng)] for honesty in (0.0, 0.5, 0.9, 1.0)
    ] + [[SuffixDrafter()], [NgramDrafter()]]
    engine = engines[seed % len(engines)]
    for chosen in rng.sample(drafters, 2):
        speculator = speculate(engine, *chosen)
        assert_same(play(engine, arrivals), expected)
        assert not speculator._rows, "of requests that have ended nothing is kept"


def test_drafts_change_nothing_in_16_bits_where_tokens_have_the_same_bits(byte_model: Path) -> None:
    prompts = [[5, 6, 7], [9] * 40, list(range(20, 50)), list(range(100))]
    params = dict(max_tokens=40, temperature=1.0, ignore_eos=True)
    with new_engine(byte_model, dtype="bfloat16") as engine:
        if not engine.runner.is_exact:
            pytest.skip("not on this machine")
        expected = tokens_of(run(engine, new_requests(prompts, **params)))
        texts = {str(i): prompts[i] + text for i, text in enumerate(expected)}
        for honesty in (0.5, 0.9, 1.0):
            speculate(engine, Liar(texts, honesty, random.Random(0)))
            assert tokens_of(run(engine, new_requests(prompts, **params))) == expected


@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_ranks_accept_alike(byte_model: Path, async_scheduling: bool) -> None:
    params = dict(max_tokens=24, temperature=1.0, frequency_penalty=0.3, ignore_eos=True)
    prompts = [[5, 6, 7], [9] * 40, list(range(20, 50))]
    with new_engine(byte_model, speculation="off") as engine:
        expected = tokens_of(run(engine, new_requests(prompts, **params)))
    texts = {str(i): prompts[i] + text for i, text in enumerate(expected)}
    with engine_of(byte_model, 2, async_scheduling) as engine:
        speculator = speculate(engine, Liar(texts, 0.8, random.Random(0)))
        assert tokens_of(run(engine, new_requests(prompts, **params))) == expected
        assert 0 < speculator.num_accepted["liar"] < speculator.num_draft_tokens["liar"]


def test_stop_strings_and_choices_are_the_same() -> None:
    params = SamplingParams(temperature=0.8, seed=3, max_tokens=40, stop=["stone", "\n"], n=3)
    prompts = ["Repeat these words: apple river stone apple river stone apple", "1, 2, 3, 1, 2, 3"]
    results = []
    for speculation in ("off", "suffix"):
        llm = LLM(
            "manta-demo", dtype="float32", num_threads=1, num_blocks=64, max_model_len=256,
            speculation=speculation,
        )  # fmt: skip
        outputs = llm.generate(prompts, params, use_tqdm=False)
        results.append([[(o.text, o.token_ids, o.stop_reason) for o in r.outputs] for r in outputs])
        llm.close()
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("speculation", "dtype", "has_one"),
    [
        ("auto", "float32", True),
        ("auto", "bfloat16", None),  # where a token has the same bits in every step
        ("suffix", "bfloat16", True),
        ("off", "float32", False),
    ],
)
def test_auto_is_on_where_it_changes_no_text(
    byte_model: Path, speculation: str, dtype: str, has_one: bool | None
) -> None:
    with new_engine(byte_model, speculation=speculation, dtype=dtype) as engine:
        expected = engine.runner.ops.is_invariant if has_one is None else has_one
        assert (engine.speculator is not None) == expected


@pytest.mark.parametrize(
    ("drafts", "sampled", "count"),
    [([], [5], 0), ([5], [5, 6], 1), ([4, 6], [5, 6, 7], 0), ([5, 6, 8], [5, 6, 7, 8], 2)],
)
def test_drafts_are_accepted_up_to_the_first_that_differs(
    drafts: list[int], sampled: list[int], count: int
) -> None:
    assert count_accepted(drafts, sampled) == count


# --- A draft model ----------------------------------------------------------------------------


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft model goes on drafting: nobody knows what steps cost, nor how often it was right."""
    monkeypatch.setattr(StepCosts, "count", lambda *_: None)
    monkeypatch.setattr(ModelDrafter, "judge", lambda *_: None)
    monkeypatch.setattr(DrafterRecord, "judge", lambda *_: None)
    monkeypatch.setattr(speculator, "_SELDOM", 1)


@pytest.fixture(scope="module")
def stranger(checkpoints: CheckpointFactory) -> Path:
    """A model of the same vocabulary that knows nothing of the other's texts."""
    return checkpoints("llama3", num_hidden_layers=1, max_position_embeddings=2048)


# In which blocks come from the prefix cache, from host memory, and are taken away.
SCARCE: list[dict[str, Any]] = [
    *POOLS,
    dict(block_size=4, num_blocks=40, host_cache_memory_bytes=1 << 20),
]
MODEL_SEEDS = [1, 4, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(5, 100))]


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("seed", MODEL_SEEDS)
def test_what_a_draft_model_says_changes_nothing(
    engines: list[Engine], byte_model: Path, stranger: Path, seed: int
) -> None:
    arrivals = random_arrivals(random.Random(seed), 10)
    engines[0].scheduler.speculation = None
    expected = play(engines[0], arrivals)
    draft_model = stranger if seed % 2 else byte_model
    config = dict(speculation="model", draft_model=str(draft_model), dtype=engines[0].config.dtype)
    with new_engine(byte_model, **config | SCARCE[seed % len(SCARCE)]) as engine:
        assert_same(play(engine, arrivals), expected)
        assert engine.speculator is not None and engine.speculator.num_draft_tokens["model"] > 20


def accepted(engine: Engine) -> float:
    """The share of a draft model's tokens that came."""
    assert engine.speculator is not None
    drafted = engine.speculator.num_draft_tokens["model"]
    assert drafted > 50
    return engine.speculator.num_accepted["model"] / drafted


CROWD = [[7] * 40 + [i] for i in range(8)] * 2  # with a prefix in common, and each twice


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "temperature", [pytest.param(0.0, marks=pytest.mark.slow), 1.0], ids=["greedy", "drawn"]
)
@pytest.mark.parametrize("config", SCARCE, ids=lambda config: "-".join(config))
def test_a_model_knows_what_it_will_say_itself(
    byte_model: Path, config: dict[str, Any], temperature: float
) -> None:
    """That all its drafts come shows that its own cache is right wherever the model's is."""
    config = dict(speculation="model", draft_model=str(byte_model)) | config
    with new_engine(byte_model, **config) as engine:
        requests = new_requests(CROWD, max_tokens=40, temperature=temperature, ignore_eos=True)
        run(engine, requests)
        assert accepted(engine) > 0.99
        if config.get("num_blocks", 999) == 40:
            assert engine.scheduler.stats.preemptions > 0
        if "host_cache_memory_bytes" in config:
            assert engine.scheduler.stats.restored_tokens > 0


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize("async_scheduling", [False, True], ids=["sync", "async"])
def test_ranks_share_a_draft_model(byte_model: Path, async_scheduling: bool) -> None:
    config = dict(speculation="model", draft_model=str(byte_model), dtype="float32")
    requests = new_requests([[5, 6, 7], [9] * 40], max_tokens=40, temperature=1.0, ignore_eos=True)
    with new_engine(byte_model) as engine:
        expected = tokens_of(run(engine, requests))
    with engine_of(byte_model, 2, async_scheduling, **config) as engine:
        assert tokens_of(run(engine, requests)) == expected
        assert accepted(engine) > 0.95


@pytest.mark.parametrize(
    ("family", "overrides", "model", "reason"),
    [
        ("qwen3", dict(vocab_size=300, max_position_embeddings=2048), "qwen3", "300 tokens"),
        ("llama3", {}, "qwen3", "window is 512 tokens; lower max_model_len"),
        ("qwen3", dict(max_position_embeddings=2048), "mistral", "do not keep"),
        ("qwen2", dict(max_position_embeddings=2048), "other tokens", "other tokens"),
    ],
)
def test_a_draft_model_that_does_not_go_with_the_model_is_refused(
    checkpoints: CheckpointFactory,
    byte_model: Path,
    tmp_path: Path,
    family: str,
    overrides: dict[str, Any],
    model: str,
    reason: str,
) -> None:
    directory, draft = byte_model, checkpoints(family, **overrides)
    if model == "mistral":
        directory = checkpoints("mistral", max_position_embeddings=2048)
    if model == "other tokens":
        draft = shutil.copytree(draft, tmp_path / "draft")
        tokenizer = json.loads((byte_model / "tokenizer.json").read_text())
        tokenizer["model"]["vocab"]["a"], tokenizer["model"]["vocab"]["b"] = 98, 97
        (draft / "tokenizer.json").write_text(json.dumps(tokenizer))
    config = EngineConfig(model=str(directory), speculation="model", draft_model=str(draft))
    with pytest.raises(ValueError, match=f"draft_model: .*{reason}"):
        read_model(config)


def test_a_draft_model_is_asked_for_with_speculation_only() -> None:
    for settings in (dict(speculation="model"), dict(draft_model="small")):
        with pytest.raises(ValueError, match=r"draft_model: .* give both or neither"):
            EngineConfig(model="m", **settings)
    config = EngineConfig(model="manta-demo", speculation="model", draft_model="./nowhere")
    with pytest.raises(ValueError, match=r"^draft_model: there is no directory"):
        read_model(config)


def test_a_draft_model_is_read_once(
    byte_model: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[Path] = []
    read_config = preflight.read_config

    def noted(directory: Path, *args: Any) -> Any:
        read.append(directory)
        return read_config(directory, *args)

    monkeypatch.setattr(preflight, "read_config", noted)
    with new_engine(byte_model, speculation="model", draft_model=str(stranger)):
        assert read == [byte_model, stranger]


def test_memory_is_shared_by_both_caches(byte_model: Path, stranger: Path) -> None:
    counts, sizes = [], []
    for settings in ({}, dict(speculation="model", draft_model=str(stranger))):
        config = dict(num_blocks=None, kv_cache_memory_bytes=1 << 21) | settings
        with new_engine(byte_model, **config) as engine:
            runner = engine.runner
            counts.append(runner.num_blocks[0])
            sizes.append(
                sum(
                    tensor.nbytes
                    for own in runner._passes
                    for cache in own.kv_caches
                    for tensor in cache.tensors
                )
            )
    assert counts[1] < counts[0]
    assert all(0.95 * (1 << 21) < size <= 1 << 21 for size in sizes)


def model_drafts(own: float, accepted: int, costs: DecodeCosts, num_rows: int = 1) -> int:
    """Tokens that a draft model is asked for, whose steps take so long, after 50 judgements."""

    def draft(rows: list[DraftRow]) -> DraftedTokens:
        return DraftedTokens([[5] * row.num_drafts for row in rows], own)

    drafter = ModelDrafter(draft, block_size=32)
    rows = [sequence([1, 2, 3]) for _ in range(num_rows)]
    for row in rows:
        row.block_tables = [[0]]
    drafter.prepare(rows, 8, costs)
    for _ in range(50):
        drafter.judge(rows[0], 4, accepted)
    drafter.prepare(rows, 8, costs)
    return len(drafter.draft(rows[0], 8).token_ids)


def test_a_draft_model_is_asked_where_its_steps_and_the_check_pay() -> None:
    costs = DecodeCosts()
    for num_tokens in (1, 64):
        costs.count(num_tokens, num_tokens, 1.0 + num_tokens / 100)
    assert model_drafts(own=0.05, accepted=4, costs=costs) == 8
    assert 0 < model_drafts(own=0.3, accepted=2, costs=costs) < 4
    assert model_drafts(own=0.05, accepted=0, costs=costs) == 0
    assert model_drafts(own=1.0, accepted=4, costs=costs) == 0


def test_a_draft_model_goes_on_in_the_blocks_that_a_row_holds() -> None:
    costs = DecodeCosts()
    for num_tokens in (1, 64):
        costs.count(1, num_tokens, 1.0)
    asked: list[DraftRow] = []

    def draft(rows: list[DraftRow]) -> DraftedTokens:
        asked.extend(rows)
        return DraftedTokens([[5] * row.num_drafts for row in rows], 0.1)

    for length, num_blocks, count in ((30, 1, 3), (32, 1, 1), (33, 1, 0), (33, 2, 8)):
        row, asked[:] = sequence([1] * length), []
        row.block_tables = [[0] * num_blocks]
        ModelDrafter(draft, block_size=32).prepare([row], 8, costs)
        assert [(own.position, own.num_drafts) for own in asked] == [(length - 1, count)] * (
            count > 0
        )


# --- Drafters ---------------------------------------------------------------------------------


def sequence(tokens: list[int], num_prompt: int = 0, **fields: Any) -> Sequence:
    params = SamplingParams()
    request = Request("a", tokens[:num_prompt], params, 0, output_token_ids=tokens[num_prompt:])
    for name, value in fields.items():
        setattr(request, name, value)
    return Sequence(request, 10_000, frozenset(), 0, (0, 0, 0))


def lookup(text: list[int], limit: int, end: list[int] | None = None) -> Draft:
    """How a text goes on, or what ends like this, if it goes on as there."""
    return Match(text if end is None else end, TextIndex(text)).draft(limit)


def test_a_text_goes_on_as_after_the_longest_agreement() -> None:
    text = [*range(10), 50, 7, 8, 9, 60, *range(10)]
    assert lookup(text, 3).token_ids == [50, 7, 8]
    assert lookup(text, 2, [7, 8, 9]).token_ids == [60, 0], "of equals the latest"
    assert lookup(text, 2, [8, 9]).token_ids == lookup(text, 2, [1, 3, 5]).token_ids == []


def test_what_repeats_itself_to_its_end_goes_on_repeating() -> None:
    text = [9, *[1, 2, 3, 4] * 3]
    assert lookup(text, 10).token_ids == [1, 2, 3, 4, 1, 2, 3, 4, 1, 2]


def test_the_longer_the_agreement_the_surer() -> None:
    text = [*range(60), 99, *range(40, 60)]
    few, many = (lookup(text, 2, [*range(start, 60)]).confidences for start in (57, 10))
    assert few[0] < few[1] < many[0] < many[1] < 1


def test_a_text_is_followed_from_where_it_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """While it agrees it is looked for no more; and agrees as long as it says."""
    rng, finds = random.Random(0), [0]
    find = TextIndex.find

    def counted(self: TextIndex, text: list[int]) -> tuple[int, int]:
        finds[0] += 1
        return find(self, text)

    monkeypatch.setattr(TextIndex, "find", counted)
    others = TextIndex([rng.randrange(40) for _ in range(300)])
    text = [rng.randrange(40) for _ in range(300)]
    match = Match(text, TextIndex(text))
    copied = [*text[50:250], *others.token_ids[:200]]
    num_right = 0
    while copied:
        draft = match.draft(4, [others])
        if draft.token_ids:
            num_agree = round(RUN * draft.confidences[0] / (1 - draft.confidences[0]))
            line = [*text[-num_agree:], *draft.token_ids]
            known = text + draft.token_ids, others.token_ids
            assert any(line == own[i : i + len(line)] for own in known for i in range(len(own)))
        count = rng.randint(1, 5)
        num_right += count_accepted(draft.token_ids, copied[:count])
        text += [rng.randrange(40)] if rng.random() < 0.05 else copied[:count]
        del copied[:count]
    assert num_right > 250 and finds[0] < 80


def test_outputs_are_shared_where_cached_blocks_are() -> None:
    drafter = SuffixDrafter()
    ended = sequence([1, 2, 3, 4, 5, 6, 7], num_prompt=3, cache_owner="me")
    drafter.end(ended)
    for owner, salt, drafts in (("me", "", [6, 7]), ("you", "", []), ("me", "salt", [])):
        asking = sequence([30, 3, 4, 5], num_prompt=2, cache_owner=owner, cache_salt=salt)
        assert drafter.draft(asking, 4).token_ids == drafts


def test_what_is_kept_of_outputs_is_bounded() -> None:
    drafter = SuffixDrafter()
    for i in range(60):
        text = [random.Random(i).randrange(1 << 20) for _ in range(3000)]
        drafter.end(sequence(text, num_prompt=5, cache_owner=f"{i % 30}" if i < 40 else "one"))
    shares = drafter._shared.values()
    assert len(shares) == 16
    assert sum(len(g.token_ids) for outputs in shares for g in outputs.generations) < 100_000


def test_a_prediction_is_followed_from_its_beginning_and_found_again() -> None:
    predicted = list(range(100, 120))
    drafter = PredictionDrafter()
    for output, drafts in (
        ([], [100, 101]),
        ([100], [101, 102]),
        ([100, 7, 105, 106, 107], [108, 109]),
        ([100, 7], []),
    ):
        asking = sequence([1, 2, *output], num_prompt=2, prediction_token_ids=predicted)
        assert drafter.draft(asking, 2).token_ids == drafts
        drafter.end(asking)


def test_what_a_grammar_demands_is_a_draft_until_the_text_differs() -> None:
    drafter = GrammarDrafter(lambda row, is_settled: (4, "abcd"), lambda text: list(text.encode()))
    for since, drafts in (([], b"ab"), ([97], b"bc"), ([97, 98, 99], b"d"), ([98], b"")):
        assert bytes(drafter.draft(sequence([1, 2, 3, 4, *since]), 2).token_ids) == drafts


def test_grammars_need_fewer_steps_than_tokens(byte_model: Path) -> None:
    form = {"regex": "(yes|no), my lord and master, as you have always said[.]"}
    texts = []
    for speculation in ("off", "grammar"):
        with new_engine(byte_model, speculation=speculation) as engine:
            (request,) = new_requests([[5, 6]], max_tokens=80, structured_outputs=form)
            texts.append(tokens_of(run(engine, [request])))
            steps = engine.num_steps
    assert texts[0] == texts[1]
    assert steps < len(texts[0][0]) / 3


# --- How many ---------------------------------------------------------------------------------


class Sure(Drafter):
    """Says the same of every text."""

    name = "sure"

    def __init__(self, count: int, confidence: float) -> None:
        self._draft = Draft([7] * count, [confidence] * count)
        self.num_asked = 0

    def draft(self, sequence: Sequence, limit: int) -> Draft:
        self.num_asked += 1
        return Draft(self._draft.token_ids[:limit], self._draft.confidences[:limit])


def proposed(num_rows: int, drafter: Drafter, costs: dict[int, float], budget: int = 999) -> int:
    """Drafts for rows of an engine whose steps cost so much, by their tokens."""
    speculator = Speculator([drafter], max_drafts=8, num_ahead=0)
    for num_tokens, seconds in costs.items():
        speculator.costs.count(num_tokens, num_tokens, seconds)
        if num_tokens > num_rows:
            speculator.costs.count(num_rows, num_tokens, seconds)
    rows = [sequence([1, 2, 3]) for _ in range(num_rows)]
    return sum(map(len, speculator.propose(rows, budget).values()))


def test_where_tokens_cost_nothing_all_drafts_are_taken() -> None:
    assert proposed(2, Sure(8, 0.5), {1: 1.0, 64: 1.0}) == 16


def test_where_steps_cost_what_their_tokens_do_nobody_is_asked() -> None:
    drafter = Sure(8, 0.99)
    assert proposed(32, drafter, {1: 1.0, 32: 32.0, 512: 512.0}) == 0
    assert drafter.num_asked == 0


def test_unsure_drafts_are_taken_where_a_step_is_cheap_only() -> None:
    steps = {1: 1.0, 2: 1.1, 4: 1.3, 8: 1.7, 16: 2.5, 32: 4.1, 300: 31.0}
    assert proposed(1, Sure(8, 0.9), steps) == 8
    assert 0 < proposed(1, Sure(8, 0.5), steps) < 4
    assert proposed(16, Sure(8, 0.3), steps) == 0


def test_no_more_are_taken_than_the_budget_has() -> None:
    assert proposed(4, Sure(8, 0.9), {}, budget=5) == 5
    assert proposed(4, Sure(8, 0.9), {}, budget=0) == 0


@pytest.mark.parametrize("confidence", [0.4, 0.6, 0.8, 0.95])
def test_steps_with_drafts_are_of_few_sizes(confidence: float) -> None:
    """So it is soon known what they cost, and they are replayed."""
    for slope in (0.01, 0.03, 0.1, 0.2):
        steps = {n: 1.0 + slope * n for n in range(1, 40)}
        assert 4 + proposed(4, Sure(8, confidence), steps) in (4, 6, 8, 12, 16, 24, 32, 4 + 32)


def test_a_row_whose_drafts_fail_gets_fewer() -> None:
    speculator = Speculator([Sure(8, 0.9)], max_drafts=8, num_ahead=0)
    for num_tokens in range(1, 20):
        speculator.costs.count(num_tokens, num_tokens, 1 + 0.1 * num_tokens)
    row = sequence([1, 2, 3])
    first = len(speculator.propose([row], 999)[row])
    for _ in range(20):
        drafts = speculator.propose([row], 999).get(row, [])
        if drafts:
            speculator.judge(row, len(drafts), 0)
    assert first > 5 and len(speculator.propose([row], 999).get(row, [])) <= 1
    speculator.end(row)
    assert not speculator._rows


def test_a_drafter_that_errs_is_believed_less_in_rows_to_come_and_again_in_time() -> None:
    speculator = Speculator([Sure(8, 0.9)], max_drafts=8, num_ahead=0)
    for num_tokens in range(1, 20):
        speculator.costs.count(num_tokens, num_tokens, 1 + 0.1 * num_tokens)

    def drafted(num_accepted: int | None = None) -> int:
        row = sequence([1, 2, 3])
        count = len(speculator.propose([row], 999).get(row, []))
        if count and num_accepted is not None:
            speculator.judge(row, count, min(count, num_accepted))
        speculator.end(row)
        return count

    first = drafted()
    for _ in range(40):
        drafted(num_accepted=0)
    assert first > 5 and drafted() <= 1
    assert max([drafted() for _ in range(2000)][-8:]) == first


def test_a_row_that_would_sit_out_a_step_must_gain_more_than_that() -> None:
    for confidence, count in ((0.3, 0), (0.9, 8)):
        speculator = Speculator([Sure(9, confidence)], max_drafts=8, num_ahead=1)
        assert sum(map(len, speculator.propose([sequence([1, 2, 3])], 99).values())) == count


def asked(drafter: Sure, num_steps: int, num_accepted: int) -> tuple[int, int]:
    """In how many steps a drafter is asked, and in the last 80 of them, so many drafts right."""
    speculator, row = Speculator([drafter], max_drafts=8, num_ahead=0), sequence([1, 2, 3])
    for num_tokens in range(1, 9):
        speculator.costs.count(1, num_tokens, 1e-9)
    before = 0
    for step in range(num_steps):
        before = drafter.num_asked if step == num_steps - 80 else before
        if drafts := speculator.propose([row], 8):
            speculator.judge(row, len(drafts[row]), min(num_accepted, len(drafts[row])))
    return drafter.num_asked, drafter.num_asked - before


def test_drafters_whose_drafts_save_less_than_making_them_are_asked_seldom() -> None:
    """Here a step takes a nanosecond, and no drafter is as fast."""
    assert asked(Sure(8, 0.9), 800, num_accepted=8)[1] == 10
    num_asked, of_last = asked(Sure(0, 0.9), 800, num_accepted=0)
    assert num_asked < 200 and of_last == 10


def test_drafts_that_save_steps_are_worth_their_making() -> None:
    drafter, row = Sure(8, 0.9), sequence([1, 2, 3])
    speculator = Speculator([drafter], max_drafts=8, num_ahead=0)
    for _ in range(200):
        speculator.judge(row, len(speculator.propose([row], 8)[row]), 8)
    assert drafter.num_asked == 200


def test_making_drafts_is_no_part_of_what_a_step_costs_unless_one_runs_meanwhile() -> None:
    class Slow(Sure):
        def draft(self, sequence: Sequence, limit: int) -> Draft:
            time.sleep(0.02)
            return super().draft(sequence, limit)

    for num_ahead in (0, 1):
        speculator = Speculator([Slow(8, 0.9)], max_drafts=8, num_ahead=num_ahead)
        begin = time.perf_counter()
        speculator.propose([sequence([1, 2, 3])], 8)
        drafting = time.perf_counter() - begin
        speculator.count(1, 1, drafting + 0.01)
        assert speculator.costs.of(1, np.zeros(1))[0] == pytest.approx(
            0.01 + num_ahead * drafting, abs=0.005
        )


def test_planning_a_step_is_part_of_what_it_costs(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with new_engine(byte_model, speculation="suffix", async_scheduling=False) as engine:
        schedule = engine.scheduler.schedule
        run(engine, new_requests([[5, 6]], max_tokens=3, ignore_eos=True))
        assert engine.speculator is not None
        engine.speculator.costs.forget()
        monkeypatch.setattr(engine.scheduler, "schedule", lambda: (time.sleep(0.05), schedule())[1])
        run(engine, new_requests([[5, 6]], max_tokens=3, ignore_eos=True))
        assert engine.speculator.costs.of(1, np.zeros(1))[0] > 0.05


def test_a_step_that_is_being_recorded_says_nothing_of_what_it_costs(
    byte_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dict(speculation="suffix", async_scheduling=False, enable_prefix_caching=False)
    with new_engine(byte_model, **config) as engine:
        assert engine.speculator is not None
        counts: list[int] = []
        monkeypatch.setattr(engine.speculator, "count", lambda *_: counts.append(1))
        monkeypatch.setattr(engine.speculator, "propose", lambda *_: {})
        for _ in range(2):
            run(engine, new_requests([[5] * 40], max_tokens=6, ignore_eos=True))
            counts.append(0)
        records = engine.runner.forward_pass.num_recordings
    assert counts == [1] * (5 - records) + [0] + [1] * 5 + [0]


def test_a_step_with_drafts_costs_what_steps_with_drafts_have_cost() -> None:
    """One without, of as many tokens, may be replayed."""
    costs = DecodeCosts()
    costs.count(8, 8, 4.0)
    assert costs.of(8, np.array([0, 4, 8])).tolist() == pytest.approx([4, 4.1, 4.2])  # a guess
    costs.count(4, 8, 10.0)
    costs.count(8, 16, 11.0)
    assert costs.of(8, np.array([0, 4, 8])).tolist() == [4, 7.5, 11]
    assert costs.of(4, np.array([0, 2, 4])).tolist() == [2, 6, 10]
    costs.count(32, 32, 12.0)
    costs.count(8, 64, 11.0)
    assert costs.of(32, np.array([0, 32])).tolist() == [12, 12]  # no less than without


def test_sizes_that_were_not_measured_are_guessed_low() -> None:
    costs = StepCosts()
    assert costs.of(np.array([1, 9])).tolist() == [1, 1]
    costs.count(4, 2.0)
    costs.count(8, 3.0)
    assert costs.of(np.array([2, 4, 6, 8, 99])).tolist() == [1.0, 2.0, 2.5, 3.0, 3.0]


def test_costs_follow_the_machine_and_forget_what_does_not_come_again() -> None:
    costs = StepCosts()
    costs.count(8, 9.0)
    for _ in range(2000):
        costs.count(1, 1.0)
    for _ in range(40):
        costs.count(1, 2.0)
    cost, larger = costs.of(np.array([1, 8]))
    assert cost == pytest.approx(2.0, rel=0.01) and larger == cost


def test_what_seemed_dear_once_is_tried_again_soon() -> None:
    """One step may have been an accident, many are not."""
    costs, larger = StepCosts(), []
    for times in (1, 10):
        for _ in range(times):
            costs.count(8, 9.0)
        for num_steps in (20, 20, 200):
            for _ in range(num_steps):
                costs.count(1, 1.0)
            larger.append(float(costs.of(8)))
    assert larger == [9, 1, 1, 9, 9, 9]
