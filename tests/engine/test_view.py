"""Pictures of an engine at work: true, bounded, and free of charge while nobody looks."""

import json
from types import SimpleNamespace

import pytest

from engine.view import MAX_CELLS, Observer, Watch
from tests.conftest import CheckpointFactory
from tests.engine.helpers import BLOCK_SIZE, new_engine, new_requests, run

PREFIX = list(range(1, 2 * BLOCK_SIZE + 1))


def test_a_picture_shows_rows_queue_blocks_and_steps(checkpoints: CheckpointFactory) -> None:
    with new_engine(checkpoints("qwen3"), num_blocks=64, max_num_seqs=2) as engine:
        recorder = Observer(engine)
        for request in new_requests([[*PREFIX, 5], [*PREFIX, 6], [7] * 20], max_tokens=8):
            engine.add(request)
        engine.step()
        picture = recorder.draw()
        assert json.loads(json.dumps(picture))  # plain data
        first, second = picture["rows"]
        # Both prompts came in one step, and the second shares the first one's full blocks.
        assert first["cells"][:2] == second["cells"][:2]
        assert second["num_cached"] == second["num_prompt"] - 1 == 2 * BLOCK_SIZE
        assert picture["pool"].count("s") == 2 and picture["pool"].count("o") == 2
        assert [waiting["id"] for waiting in picture["waiting"]] == ["2"]
        assert not picture["waiting"][0]["preempted"]
        (step,) = picture["steps"]
        # Rows that compute one token come first.
        assert step["chunks"] == [("1", second["row"], 1, 0), ("0", first["row"], 33, 0)]

        engine.step()
        assert [s["step"] for s in recorder.draw()["steps"]] == [2]  # only what is new
        engine.abort("0"), engine.abort("1"), engine.abort("2")
        pool = recorder.draw()["pool"]
        assert set(pool) == {".", "c"} and pool.count("c") == 2


def test_a_picture_shows_drafts_and_what_became_of_them(checkpoints: CheckpointFactory) -> None:
    with new_engine(checkpoints("qwen3"), speculation="off") as engine:
        request, guessed = (new_requests([[5, 6]], max_tokens=9)[0] for _ in range(2))
        (output,) = run(engine, [request])
        _, second, third, *_ = output.token_ids
        guesses = [[second, third + 1]]
        engine.scheduler.speculation = SimpleNamespace(
            propose=lambda rows, budget: {rows[0]: guesses.pop(0)} if rows and guesses else {},
            judge=lambda *_: None,
            end=lambda _: None,
        )
        observer = Observer(engine)
        engine.add(guessed)
        engine.step(), engine.step()
        picture = observer.draw()
        (row,) = picture["rows"]
        assert [step["chunks"] for step in picture["steps"]] == [
            [("0", row["row"], 2, 0)],
            [("0", row["row"], 3, 1)],
        ]
        assert (row["num_drafted"], row["num_accepted"]) == (2, 1)
        assert row["num_tokens"] == 2 + 3


def test_a_preempted_request_waits_as_such(checkpoints: CheckpointFactory) -> None:
    with new_engine(checkpoints("qwen3"), num_blocks=5) as engine:
        recorder = Observer(engine)
        for request in new_requests([[1] * 30, [2] * 20], max_tokens=40, ignore_eos=True):
            engine.add(request)
        while not engine.scheduler.stats.preemptions:
            engine.step()
        assert [(w["id"], w["preempted"]) for w in recorder.draw()["waiting"]] == [("1", True)]


def test_a_large_pool_is_drawn_with_several_blocks_to_a_cell(
    checkpoints: CheckpointFactory,
) -> None:
    with new_engine(checkpoints("qwen3"), num_blocks=3 * MAX_CELLS - 1, block_size=1) as engine:
        engine.add(new_requests([[1, 2, 3, 4]])[0])
        engine.step()
        picture = Observer(engine).draw()
        assert picture["blocks_per_cell"] == 3 and len(picture["pool"]) == MAX_CELLS
        assert picture["pool"].startswith("oo..")
        assert picture["rows"][0]["cells"] == [0, 1]


def test_nothing_is_recorded_unless_somebody_watches(
    checkpoints: CheckpointFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("engine.view.time.monotonic", lambda: now[0])
    with new_engine(checkpoints("qwen3")) as engine:
        watch = Watch(engine)
        assert watch.picture() is None and engine.step_log is None
        watch.renew(2.0)
        assert watch.picture() is not None
        assert watch.picture() is None  # too soon
        now[0] = 0.11
        assert watch.picture() is not None
        now[0] = 2.1  # the watch was not renewed
        assert watch.picture() is None and engine.step_log is None
