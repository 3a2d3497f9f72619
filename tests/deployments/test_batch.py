"""The batch job: its command line, its formats, and real submitted jobs."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from pyarrow import parquet

from benchmarks.job_cluster import JobCluster, kill_driver
from deployments.batch import job_file
from deployments.batch.job_args import BatchArgs, parse_args
from deployments.batch.job_file import claim_output
from deployments.batch.jsonl import JsonlFormat
from deployments.batch.parquet import ParquetFormat
from deployments.batch.parts import find_format, split
from deployments.batch.rows import CHAT, COMPLETIONS, Row, answer
from deployments.batch.storage import Location
from engine import LLM, SamplingParams
from tests.deployments.conftest import wait_until
from tests.deployments.in_process import serve_in_process

ENGINE = ("--dtype", "float32", "--max-num-seqs", "8", "--num-blocks", "200")
MAX_TOKENS = 60
GREEDY = ("--max-tokens", str(MAX_TOKENS), "--temperature", "0")


@pytest.fixture(scope="module")
def model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, able to chat."""
    directory = tmp_path_factory.mktemp("model") / "chat"
    shutil.copytree(tiny_model, directory)
    (directory / "chat_template.jinja").write_text(
        "{% for message in messages %}{{ message.role }}: {{ message.content }} {% endfor %}"
    )
    return directory


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    llm = LLM(str(model), dtype="float32", max_num_seqs=8, num_blocks=200)
    yield llm
    llm.close()


@pytest.fixture(scope="module")
def jobs() -> Iterator[JobCluster]:
    with JobCluster() as cluster:
        yield cluster


def make_line(index: int) -> dict[str, Any]:
    prompt = f"row {index}"
    chat = {"messages": [{"role": "user", "content": prompt}], "max_tokens": 10 + index % 50}
    return {
        "custom_id": f"row-{index}",
        "method": "POST",
        "url": "/v1/chat/completions" if index % 2 else "/v1/completions",
        "body": chat if index % 2 else {"prompt": prompt},
    }


def arguments_of(model: Path, rows: Path, output: Path) -> tuple[str, ...]:
    where = ("--model", str(model), "--input", str(rows), "--output", str(output))
    return (*where, "--rows-per-part", "8", *ENGINE, *GREEDY)


def read_output(directory: Path) -> list[dict[str, Any]]:
    lines = [line for part in finished_parts(directory) for line in part.read_text().splitlines()]
    return [json.loads(line) for line in lines]


def finished_parts(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-*"))


def expected_texts(llm: LLM, count: int) -> dict[str, str]:
    prompts, params = [], []
    for index in range(count):
        body = make_line(index)["body"]
        prompts.append(
            llm.get_tokenizer().encode_chat(body["messages"])
            if "messages" in body
            else llm.get_tokenizer().encode(body["prompt"])
        )
        params.append(SamplingParams(temperature=0, max_tokens=body.get("max_tokens", MAX_TOKENS)))
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return {f"row-{i}": output.outputs[0].text for i, output in enumerate(outputs)}


def text_of(line: dict[str, Any]) -> str:
    choice = line["response"]["body"]["choices"][0]
    return choice["text"] if "text" in choice else choice["message"]["content"]


BAD_LINES = {
    b'{"custom_id": "x", ': ("not valid JSON", None),
    b"[1, 2]": ("not a JSON object", None),
    b"\xff\xfe": ("not valid JSON", None),
    json.dumps(make_line(0) | {"custom_id": "url", "url": "/v1/embeddings"}).encode(): (
        "url",
        "url",
    ),
    json.dumps(make_line(0) | {"custom_id": "extra", "priority": 3}).encode(): (
        "unknown field",
        "extra",
    ),
    json.dumps(make_line(0) | {"custom_id": "body", "body": {"promt": "a"}}).encode(): (
        "did you mean 'prompt'?",
        "body",
    ),
    json.dumps(make_line(0) | {"custom_id": "long", "body": {"prompt": "a" * 600}}).encode(): (
        "context window is 512 tokens",
        "long",
    ),
    json.dumps(
        make_line(0) | {"custom_id": "stream", "body": {"prompt": "a", "stream": True}}
    ).encode(): ("stream", "stream"),
    json.dumps(
        make_line(0) | {"custom_id": "model", "body": {"prompt": "a", "model": "gpt-4o"}}
    ).encode(): ("does not exist", "model"),
}


def test_a_killed_front_is_replaced_and_each_row_answered_once(
    jobs: JobCluster, model: Path, llm: LLM, tmp_path: Path
) -> None:
    count, output = 240, tmp_path / "out"
    lines = [json.dumps(make_line(index)).encode() for index in range(count)]
    for place, line in enumerate(BAD_LINES):  # anywhere among the good ones
        lines.insert(20 * place, line)
    (tmp_path / "in.jsonl").write_bytes(b"\n".join(lines) + b"\n\n")
    arguments = arguments_of(model, tmp_path / "in.jsonl", output)

    job = jobs.submit(*arguments)
    wait_for_parts(job, output, 3)
    kill_front(jobs)
    printed, _ = job.communicate(timeout=120)
    assert job.returncode == 0, printed
    assert "batch: done: " in printed and "ETA " in printed and " output tok/s" in printed
    assert not list(output.glob("_unfinished-*"))

    answers = read_output(output)
    assert len(answers) == count + len(BAD_LINES)
    good = [line for line in answers if (line["response"] or {}).get("status_code") == 200]
    assert all(line["error"] is None for line in good)
    assert [line["custom_id"] for line in good] == [f"row-{i}" for i in range(count)]
    assert {line["custom_id"]: text_of(line) for line in good} == expected_texts(llm, count)
    bad = [line for line in answers if line not in good]
    for line, (message, custom_id) in zip(bad, BAD_LINES.values(), strict=True):
        assert line["custom_id"] == custom_id
        error = line["error"]
        if custom_id in ("body", "long", "stream", "model"):  # requests, which have a response
            assert error is None and line["response"]["status_code"] in (400, 404)
            error = line["response"]["body"]["error"]
        else:
            assert line["response"] is None
        assert message in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.slow
def test_a_killed_job_goes_on_with_what_is_left(
    jobs: JobCluster, model: Path, llm: LLM, tmp_path: Path
) -> None:
    count, output = 240, tmp_path / "out"
    lines = (json.dumps(make_line(index)) for index in range(count))
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    arguments = arguments_of(model, tmp_path / "in.jsonl", output)

    job = jobs.submit(*arguments)
    wait_for_parts(job, output, 3)
    kill_driver(output)
    printed, _ = job.communicate(timeout=60)
    assert job.returncode != 0, printed
    before = {part: part.read_bytes() for part in finished_parts(output)}
    assert 3 <= len(before) < 30

    printed = jobs.run(*arguments, "--num-replicas", "2")
    assert f"of which {len(before)} are done" in printed
    assert all(part.read_bytes() == content for part, content in before.items())
    answers = read_output(output)
    assert [line["custom_id"] for line in answers] == [f"row-{i}" for i in range(count)]
    assert {line["custom_id"]: text_of(line) for line in answers} == expected_texts(llm, count)


def test_jobs_are_taken_from_who_has_the_token(jobs: JobCluster) -> None:
    answer = httpx.post(f"{jobs.address}/api/jobs/", json={"entrypoint": "true"})
    assert answer.status_code == 401


def wait_for_parts(job: "subprocess.Popen[str]", output: Path, count: int) -> None:
    """Fails at once when the job has ended, with what it said."""

    def are_there() -> bool:
        assert job.poll() is None, job.communicate()[0]
        return len(finished_parts(output)) >= count

    wait_until(are_there, 120, f"{count} parts of a batch")


def kill_front(jobs: JobCluster) -> None:
    """kill -9 to a process that holds requests; Ray starts it anew, and it its engine."""
    front, *_ = [p for p in jobs.processes() if "ray::BatchReplica" in " ".join(p.cmdline())]
    front.kill()


@pytest.mark.slow
def test_parquet_on_two_ranks(jobs: JobCluster, model: Path, llm: LLM, tmp_path: Path) -> None:
    prompts: list[Any] = [f"item {i}" for i in range(40)]
    prompts[3], prompts[30] = None, "x" * 600
    table = pa.table({"prompt": prompts, "tag": range(40)})
    (tmp_path / "in").mkdir()
    parquet.write_table(table[:25], tmp_path / "in" / "a.parquet", row_group_size=10)
    parquet.write_table(table[25:], tmp_path / "in" / "b.parquet")
    output = tmp_path / "out"

    printed = jobs.run(
        *("--model", str(model), "--input", f"file://{tmp_path}/in"),
        *("--output", f"file://{output}", "--rows-per-part", "8", "--tensor-parallel-size", "2"),
        *(*ENGINE, "--max-tokens", "12", "--temperature", "0"),
    )
    assert "40 rows in 6 parts" in printed and "2 of them errors" in printed

    assert len(finished_parts(output)) == 4 + 2  # parts do not span files
    result = pa.concat_tables(parquet.read_table(part) for part in finished_parts(output))
    assert result["tag"].to_pylist() == list(range(40))
    assert result["prompt"].to_pylist() == prompts
    rows = result.to_pylist()
    good = [row for row in rows if row["error"] is None]
    assert [row["tag"] for row in rows if row["error"] is not None] == [3, 30]
    params = SamplingParams(temperature=0, max_tokens=12)
    outputs = llm.generate([row["prompt"] for row in good], params, use_tqdm=False)
    assert [row["text"] for row in good] == [o.outputs[0].text for o in outputs]
    assert [row["prompt_tokens"] for row in good] == [len(o.prompt_token_ids) for o in outputs]
    assert {row["finish_reason"] for row in good} <= {"stop", "length"}
    assert "context window" in rows[30]["error"]["message"]


def parse(*more: str) -> Any:
    return parse_args(["--model", "m", "--input", "/in", "--output", "/out", *more])


def test_the_command_line_takes_all_fields() -> None:
    args = parse(
        *("--tensor-parallel-size", "2", "--enable-prefix-caching", "false", "--num-blocks", "9"),
        *("--num-replicas", "3", "--stop", '["a", "b"]', "--temperature", "0.5"),
        *("--structured-outputs", '{"regex": "a+"}', "--logit-bias", '{"5": 1.5}'),
        *("--chat-template", "{{ messages[0].content }}"),
    )
    assert args.tensor_parallel_size == 2 and args.num_blocks == 9 and args.num_replicas == 3
    assert args.enable_prefix_caching is False
    assert args.chat_template == "{{ messages[0].content }}"
    assert args.sampling == SamplingParams(
        stop=["a", "b"],
        temperature=0.5,
        structured_outputs={"regex": "a+"},
        logit_bias={5: 1.5},
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tensor-paralel-size", "2"), "unrecognized arguments"),
        (("--max-num-seqs", "many"), "--max-num-seqs: Input should be a valid integer"),
        (("--temperature", "-1"), "--temperature: Input should be greater than or equal to 0"),
        (("--output", "out"), "absolute path"),
        (("--output", "/in/out"), "should not lie in the input's directory"),
    ],
)
def test_a_wrong_command_line_says_what_is_wrong(
    options: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse(*options)
    assert message in capsys.readouterr().err


def test_parts_cover_each_row_once(tmp_path: Path) -> None:
    text = "".join(f"{'' if i % 3 else chr(10)}{{{i}}}\n" for i in range(25)).rstrip("\n")
    (tmp_path / "b.jsonl").write_text(text)
    (tmp_path / "a.jsonl").write_text("{0}\n" * 4)
    (tmp_path / "_hidden.jsonl").write_text("{0}\n")
    source = Location.of(str(tmp_path))
    paths = [path for path, _ in source.files()]
    args = parse("--rows-per-part", "4")
    parts = list(split(args, source, paths))
    assert [part.name for part in parts] == [f"part-{i:06d}.jsonl" for i in range(8)]
    assert [part.first_row for part in parts] == [0, 4, 8, 12, 16, 20, 24, 28]
    lines = [
        line.strip()
        for part in parts
        for line in JsonlFormat().read(
            Location(source.filesystem, part.path), part.start, part.num_rows
        )
    ]
    assert lines == [b"{0}"] * 4 + [b"{%d}" % i for i in range(25)]


def test_every_argument_is_known_to_change_answers_or_not() -> None:
    """One that is new has to be put on a side; these must be the same whenever a job goes on."""
    assert BatchArgs.model_fields.keys() - job_file._FREE == {
        *("input", "rows_per_part", "sampling", "model", "revision", "served_model_name"),
        *("model_impl", "tokenizer", "chat_template", "generation_config", "hf_overrides"),
        *("dtype", "quantization", "kv_cache_dtype", "attention_backend", "load_format"),
        *("max_model_len", "seed", "tool_parser", "reasoning_parser", "deterministic"),
        *("pooling", "reranker", "weights"),
    }


def test_inputs_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such file"):
        find_format([path for path, _ in Location.of(str(tmp_path / "none")).files()])
    with pytest.raises(ValueError, match="decompress or rename"):
        find_format(["a.jsonl", "a.jsonl.gz"])
    with pytest.raises(ValueError, match="one job for each kind"):
        find_format(["a.jsonl", "a.parquet"])
    for columns, message in (
        ({"text": ["a"]}, "no column 'prompt'"),
        ({"prompt": ["a"], "text": ["b"]}, r"\['text'\], which the output adds"),
    ):
        parquet.write_table(pa.table(columns), tmp_path / "a.parquet")
        source = Location.of(str(tmp_path / "a.parquet"))
        with pytest.raises(ValueError, match=message):
            list(ParquetFormat().split(source, 8))


def test_a_table_is_asked_for_what_it_has_columns_for(tmp_path: Path) -> None:
    """A text per row: what else a job or a row wants is refused, not left out."""
    for option in ("n", "logprobs", "prompt_logprobs"):
        args = parse(f"--{option.replace('_', '-')}", "2")
        with pytest.raises(ValueError, match=f"{option}: .* no column for"):
            list(split(args, Location.of(str(tmp_path)), ["a.parquet"]))
    format = ParquetFormat()
    prompts = format.parse(pa.table({"prompt": [["a", "b"], ["a"], []]}))
    prompts += format.parse(pa.table({"prompt": [[[3, 4], [5]]]}))
    for row in prompts:
        assert row.error is None or "a row has one prompt" in row.error.message
    assert [row.error is not None for row in prompts] == [True, True, False, True]
    tokens, text = (format.parse(pa.table({"prompt": [one]}))[0] for one in ([3, 4], "a"))
    assert (tokens.body["prompt"], text.body["prompt"]) == ([3, 4], "a")


def test_rows_take_of_the_job_what_they_leave_open() -> None:
    """In the words of their API, and nothing that they have said in others."""
    chat = {"messages": [{"role": "user", "content": "Repeat: apple"}], "max_completion_tokens": 3}
    no_words = chat | {"response_format": {"type": "text"}, "top_logprobs": 1, "logprobs": True}
    defaults = SamplingParams(logprobs=2, max_tokens=2, structured_outputs={"regex": "abcde"})
    with serve_in_process("manta-demo") as api:
        bodies = []
        for url, body in ((CHAT, chat), (CHAT, no_words), (COMPLETIONS, {"prompt": "apple"})):
            own = defaults.model_dump(exclude_unset=True)
            found = api.run(answer(api.front, Row(url, body), own, seed=5))
            assert found.error is None, found.error
            bodies.append(found.body)
    first, second, third = (body["choices"][0] for body in bodies)
    assert "abcde".startswith(first["message"]["content"])
    assert not second["message"]["content"].startswith("a b")
    assert [len(one["top_logprobs"]) for one in first["logprobs"]["content"]] == [2, 2, 2]
    assert {len(one["top_logprobs"]) for one in second["logprobs"]["content"]} == {1}
    assert "abcde".startswith(third["text"]) and third["logprobs"] is not None


def test_an_output_belongs_to_one_job(tmp_path: Path) -> None:
    output = Location.of(f"{tmp_path}/out")
    files = [("/in", 9)]
    claim_output(parse("--max-tokens", "3"), files, output)
    claim_output(parse("--max-tokens", "4"), files, output)  # nothing was finished yet
    output.write("part-000000.jsonl", b"")
    claim_output(parse("--max-tokens", "4", "--num-replicas", "2"), files, output)
    with pytest.raises(ValueError, match="sampling: the output was begun with"):
        claim_output(parse("--max-tokens", "5"), files, output)
    with pytest.raises(ValueError, match="quantization: the output was begun with None"):
        claim_output(parse("--max-tokens", "4", "--quantization", "w8a8"), files, output)
    with pytest.raises(ValueError, match="files: the output was begun with"):
        claim_output(parse("--max-tokens", "4"), [("/in", 10)], output)
    (tmp_path / "out" / "_job.json").unlink()
    with pytest.raises(ValueError, match="holds other files"):
        claim_output(parse("--max-tokens", "4"), files, output)


def test_any_fsspec_path_will_do() -> None:
    output = Location.of("memory://batch/out")
    output.write("part-000000.jsonl", b"x")
    assert output.read("part-000000.jsonl") == b"x"
    assert output.names() == {"part-000000.jsonl"}
    assert [(Path(path).name, size) for path, size in output.files()] == [("part-000000.jsonl", 1)]
