"""The `manta` command as a user types it."""

import json
import os
import pty
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
import yaml

from deployments import local_ray, ray_private
from deployments.args import AppArgs
from deployments.cli import lifecycle
from deployments.cli.announce import announce, first_key, url_of
from deployments.cli.doctor import run as run_doctor
from deployments.local_ray import preflight
from engine import diagnosis as doctor
from engine.device.cpu_speed import CpuSpeed
from kernels import Ops
from tests.deployments.conftest import demo, free_port, wait_until  # noqa: F401
from tests.deployments.local_server import LocalServer, serve_locally

ROOT = Path(__file__).resolve().parents[2]


def manta(
    *arguments: str, typed: str = "", **environment: str
) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", "from deployments.cli import main; main()", *arguments],
        cwd=ROOT,
        input=typed,
        env=os.environ | {"COLUMNS": "200", "NO_COLOR": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_help_is_there_at_once_and_names_every_command() -> None:
    code = "import sys; from deployments.cli import app; print(sorted(set(sys.modules) & heavy))"
    heavy = "heavy = {'torch', 'ray', 'transformers', 'tokenizers', 'fastapi', 'numpy'}; "
    loaded = subprocess.run(
        [sys.executable, "-c", heavy + code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"
    start = time.monotonic()
    text = manta("--help").stdout
    assert time.monotonic() - start < 5  # 0.3 s on an idle machine
    assert all(name in text for name in ("serve", "chat", "bench", "doctor"))
    assert "--install-completion" in text


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("manta d", {"doctor"}),
        ("manta serve Qwen/Qwen3-8B max_num", {"max_num_seqs=", "max_num_batched_tokens="}),
        (
            "manta serve ./model quantization=",
            {f"quantization={x}" for x in ("w8a8", "int4", "fp8")},
        ),
        ("manta serve ./model enable_prefix_caching=f", {"enable_prefix_caching=false"}),
        ("manta bench thr", {"throughput"}),
    ],
)
def test_the_shell_completes(typed: str, offered: set[str]) -> None:
    words = len(typed.split()) - 1
    environment = {
        "_MANTA_COMPLETE": "complete_bash",
        "COMP_WORDS": typed,
        "COMP_CWORD": str(words),
    }
    code = (
        "import sys; from deployments.cli import app; sys.argv = ['manta']; app(prog_name='manta')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT, env=os.environ | environment, capture_output=True, text=True,
    )  # fmt: skip
    assert set(done.stdout.split()) == offered, done.stderr


def test_serve_writes_the_config_that_serve_deploy_takes() -> None:
    done = manta("serve", "Qwen/Qwen3-8B", "max_model_len=4096", "--port", "9000", "--dry-run")
    config = yaml.safe_load(done.stdout)
    assert config["http_options"] == {"host": "127.0.0.1", "port": 9000}
    (application,) = config["applications"]
    assert application["import_path"] == "deployments:app"
    assert application["args"] == {"model": "Qwen/Qwen3-8B", "max_model_len": 4096}
    demo_config = yaml.safe_load(manta("serve", "max_num_seqs=8", "--dry-run").stdout)
    assert demo_config["applications"][0]["args"] == {"model": "manta-demo", "max_num_seqs": 8}


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("max_modl_len=5", "did you mean 'max_model_len'?"),
        ("block_size=0", "block_size"),
        ("oops", "should be NAME=VALUE"),
    ],
)
def test_serve_refuses_bad_arguments_before_anything_starts(option: str, says: str) -> None:
    done = manta("serve", "manta-demo", option)
    assert done.returncode != 0 and says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["./nowhere"], "no directory or GGUF file './nowhere'"),
        (["manta-demo", "max_model_len=1000000"], "is longer than the model's window"),
        (["manta-demo", "tensor_parallel_size=3", "num_cpus_per_shard=0.1"], "cannot be split"),
        (["manta-demo", "num_replicas=1000"], "num_replicas (1000) of 1 ranks"),
    ],
)
def test_serve_refuses_what_an_engine_would_before_ray_starts(
    options: list[str], says: str
) -> None:
    done = manta("serve", *options, "--port", str(free_port()))
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and says in line
    assert done.stdout == ""


def test_serve_says_whether_the_host_or_the_port_is_wrong() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for host, option in (("127.0.0.1", "--port"), ("192.0.2.77", "--host"), ("-", "--host")):
            with pytest.raises(SystemExit, match=f"choose another by {option}"):
                preflight.start(AppArgs(), host, port)


def test_serve_refuses_a_model_that_is_not_served(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "rwkv"}')
    done = manta("serve", str(tmp_path), "--port", str(free_port()))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line == "error: RwkvForCausalLM keeps states in a way of its own"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ({"model_type": "doge"}, "changes its mask"),
        ({"model_type": "llama", "num_attention_heads": 4}, "the model's 4 attention heads"),
        ({"text_config": {"model_type": "rwkv"}}, "keeps states"),
    ],
)
def test_what_config_json_tells_is_refused_without_a_process_to_ask(
    content: dict[str, Any], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(content))
    monkeypatch.setattr(preflight.subprocess, "Popen", None)
    args = AppArgs(model=str(tmp_path), tensor_parallel_size=3, num_cpus_per_shard=0.1)
    with pytest.raises(SystemExit, match=says):
        preflight.start(args, "127.0.0.1", free_port())


@pytest.mark.parametrize(
    ("others", "started", "address", "joins"),
    [
        (set(), None, "", False),
        ({"10.0.0.1:6379"}, None, "", False),  # which somebody else's ray.init has started
        ({"10.0.0.1:6379"}, "10.0.0.1:6379", "", True),
        (set(), None, "10.0.0.1:6379", True),
    ],
    ids=["nobody", "somebody else's", "ray start", "RAY_ADDRESS"],
)
def test_a_cluster_is_here_if_serve_run_would_join_it(
    others: set[str],
    started: str | None,
    address: str,
    joins: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("ray._private.services.find_gcs_addresses", lambda: others)
    monkeypatch.setattr("ray._private.services.find_bootstrap_address", lambda _: started)
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert ray_private.is_cluster_here() == joins


def test_chat_goes_over_several_turns(demo: LocalServer, tmp_path: Path) -> None:  # noqa: F811
    typed = "My name is Maria.\n/think\n/help\nWhat is my name?\n/new\nWhat is \\\n17 + 25?\n"
    done = manta(
        "chat", "--url", demo.url, "--temperature", "0", typed=typed, XDG_STATE_HOME=str(tmp_path)
    )
    assert done.returncode == 0, done.stderr
    assert "manta-demo" in done.stdout and "TTFT" in done.stdout and "tok/s" in done.stdout
    assert done.stdout.count("Maria") == 2 and "42" in done.stdout
    assert "thinking is on" in done.stdout and "/undo" in done.stdout


def test_chat_is_with_one_of_several_models(demo: LocalServer) -> None:  # noqa: F811
    typed = "What is 17 + 25?"
    done = manta("chat", "--url", demo.url, "--model", "manta-demo", typed=typed)
    assert "42" in done.stdout
    done = manta("chat", "--url", demo.url, "--model", "large", typed=typed)
    assert "no model 'large'; --model takes one of: manta-demo" in done.stderr

    class Door(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"data": [{"id": "small"}, {"id": "large"}]}).encode())

    with HTTPServer(("127.0.0.1", 0), Door) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = manta("chat", "--url", f"http://127.0.0.1:{server.server_port}", typed=typed)
        server.shutdown()
    assert "2 models; --model takes one of: small, large" in done.stderr and done.returncode == 1


def test_chat_on_a_terminal_remembers_what_was_typed(demo: LocalServer, tmp_path: Path) -> None:  # noqa: F811
    ours, theirs = pty.openpty()
    code = "from deployments.cli import main; main()"
    environment = os.environ | {"TERM": "xterm", "XDG_STATE_HOME": str(tmp_path)}
    chat = subprocess.Popen(
        [sys.executable, "-c", code, "chat", "--url", demo.url, "--temperature", "0"],
        cwd=ROOT, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
    )  # fmt: skip
    os.close(theirs)
    seen = ""

    def until(text: str) -> str:
        """What comes up to the text; the rest is for the next call."""
        nonlocal seen
        deadline = time.monotonic() + 60
        while text not in seen:
            assert time.monotonic() < deadline, seen
            if select.select([ours], [], [], 1)[0]:
                seen += os.read(ours, 65536).decode(errors="replace")
        before, _, seen = seen.partition(text)
        return before

    try:
        until("> ")
        os.write(ours, b"What is 17 + 25?\n")
        assert "42" in until("tok/s")
        until("> ")
        os.write(ours, b"\x04")
        assert chat.wait(30) == 0
    finally:
        chat.kill()
        os.close(ours)
    assert (tmp_path / "manta" / "chat-history").read_text().splitlines()[-1] == "What is 17 + 25?"


def test_serve_waits_for_a_proxy_longer_than_ray_does(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On a busy machine a proxy takes more than the minute after which Ray raises."""

    def too_late(*_: object, **__: object) -> None:
        raise TimeoutError("HTTP proxies not available after 60s.")

    answers = iter([False] * 12 + [True])
    monkeypatch.setattr(lifecycle.serve, "start", too_late)
    monkeypatch.setattr(lifecycle.serve, "run", too_late)
    monkeypatch.setattr(lifecycle, "app", lambda args: None)
    monkeypatch.setattr(lifecycle, "announce", lambda url, key: next(answers))
    monkeypatch.setattr(lifecycle.time, "sleep", lambda seconds: None)
    dead = iter([[]] * 20 + [["raylet"]])
    monkeypatch.setattr(ray_private, "dead_processes", lambda: next(dead))
    with pytest.raises(RuntimeError, match="Ray's raylet has died"):
        lifecycle._serve(AppArgs(), "127.0.0.1", 8000)
    assert next(answers, None) is None, "it was announced, and once"
    (said,) = capsys.readouterr().out.splitlines()
    assert said.startswith(
        "Waiting for Ray's HTTP proxy to answer at http://localhost:8000; its log"
    )


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://localhost:80"),
        ("gpu1", "http://gpu1:80"),
        ("fd00::1", "http://[fd00::1]:80"),
    ],
)
def test_an_address_is_told_as_one_would_type_it(host: str, url: str) -> None:
    assert url_of(host, 80) == url


def test_serve_tells_what_serves_and_not_the_key(
    monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    assert not announce("http://127.0.0.1:1", "")
    monkeypatch.setenv("MANTA_API_KEYS", "alice:sk-hush,bob:sk-other")
    with serve_locally(num_blocks=48, block_size=16, max_num_seqs=4) as locked:
        assert announce(locked.url, first_key())
        said = capsys.readouterr().out
        for expected in (
            locked.url,
            "manta-demo",
            "48 blocks of 16 tokens: 768",
            "cpu",
            "required",
        ):
            assert expected in said
        assert "hush" not in said
        assert announce(locked.url, "")
        said = capsys.readouterr().out
        assert locked.url in said and "required" in said and "blocks" not in said


def test_chat_says_what_to_do_without_a_server() -> None:
    done = manta("chat", "--url", "http://127.0.0.1:1")
    assert done.returncode == 1 and "manta serve" in done.stderr


def test_bench_lists_and_runs_the_benchmarks(demo: LocalServer, tmp_path: Path) -> None:  # noqa: F811
    listed = manta("bench").stdout
    assert "throughput" in listed and "serving" in listed and "floor" not in listed
    assert manta("bench", "nonsense").returncode == 1
    assert "--clients" in manta("bench", "serving", "--help").stdout
    pytest.importorskip("matplotlib")
    path = tmp_path / "load.svg"
    done = manta("bench", "serving", "--url", demo.url, "--clients", "1,4", "--requests", "4",
                 "--tokens", "8", "--plot", str(path))  # fmt: skip
    assert done.returncode == 0, done.stderr
    clients = [line.split()[0] for line in done.stdout.splitlines()]
    assert clients == ["clients", "1", "4"] and "▇" in done.stdout
    assert path.read_text().startswith("<?xml")


def test_a_benchmark_ends_when_the_command_is_told_to(demo: LocalServer) -> None:  # noqa: F811
    code = "from deployments.cli import main; main()"
    arguments = ["bench", "serving", "--url", demo.url, "--requests", "100000"]
    bench = subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=ROOT)
    try:
        wait_until(lambda: "benchmarks.serving" in psutil.Process(bench.pid).cmdline())
        bench.terminate()
        assert bench.wait(30) == -signal.SIGTERM
    finally:
        bench.kill()


def test_ray_of_one_machine_is_closed_to_its_other_users(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / ".ray").mkdir(mode=0o755)  # as Ray makes it, with a token that all can read
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_SERVE_HAPROXY_METRICS_PORT", "9101")
    values = [local_ray.prepare(haproxy=True) for _ in range(2)]
    assert (tmp_path / ".ray").stat().st_mode & 0o777 == 0o700
    files = {value for value in values[0].values() if value.startswith("/")}
    (directory,) = {Path("/tmp", Path(file).parts[2]) for file in files}
    assert len(files) == 6 and directory.stat().st_mode & 0o777 == 0o700
    assert {value["RAY_SERVE_HAPROXY_METRICS_PORT"] for value in values} == {"9101"}
    for name in ("RAY_SERVE_HAPROXY_STATS_PORT", "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"):
        assert values[0][name] != values[1][name]


def test_doctor_names_devices_ops_and_reasons() -> None:
    done = manta("doctor")
    assert done.returncode == 0, done.stdout
    what = ["PyTorch", "CPU", "C++ compiler", "Ops on CPU", "Speed of the CPU", "Best on the CPU"]
    for each in (*what, "Ray", "HAProxy", "Model cache"):
        assert each in done.stdout, each


def test_doctor_says_what_serving_a_model_takes_without_loading_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(run_doctor.__globals__, "examine", None)  # nor measuring the machine
    run_doctor("manta-demo", ["max_model_len=1024"])
    text = capsys.readouterr().out
    assert "qwen3, computed by our own blocks" in text
    assert "million in bfloat16" in text
    assert "KiB per token" in text and "a sequence of 1024" in text
    with pytest.raises(SystemExit, match="1"):
        run_doctor("manta-demo", ["max_model_len=1000000"])
    assert "is longer than the model's window" in capsys.readouterr().out


@pytest.mark.parametrize("installed", [False, True])
def test_doctor_names_the_attention_of_a_gpu_and_why(
    monkeypatch: pytest.MonkeyPatch, installed: bool
) -> None:
    from kernels.cuda import flash_attention

    pytest.importorskip("triton")

    def imported(name: str) -> Any:
        if not installed:
            raise ImportError(f"No module named {name!r}")
        return SimpleNamespace(flash_attn_varlen_func=None)

    monkeypatch.setattr(flash_attention, "import_module", imported)
    hopper = SimpleNamespace(major=9, minor=0, multi_processor_count=132)
    finding = doctor._attention(hopper)
    if installed:
        assert finding.state == "ok" and "flash-attn-4 for prompts" in finding.text
    else:
        assert finding.state == "note" and "flash-attn 4 cannot be imported" in finding.text
        assert finding.fix == "pip install -e '.[cuda]'"


def test_doctor_says_what_a_gpu_lacks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("triton")
    turing = SimpleNamespace(name="Tesla T4", major=7, minor=5, multi_processor_count=40)
    (finding,) = doctor._cuda_ops(turing)
    assert finding.state == "bad" and "8.0 (Ampere) or more; Tesla T4 has 7.5" in finding.text
    hopper = SimpleNamespace(name="H100", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"include": str(tmp_path)})
    (finding,) = doctor._cuda_ops(hopper)
    assert "Triton needs Python's headers" in finding.text and "python3-dev" in finding.fix
    (tmp_path / "Python.h").touch()
    assert [finding.state for finding in doctor._cuda_ops(hopper)] == ["ok", "note"]
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: None)
    (finding,) = doctor._cuda_ops(hopper)
    assert "Triton needs a C compiler" in finding.text


def test_doctor_says_how_to_get_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    from kernels.cpu import build

    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setattr("shutil.which", lambda name: None)
    finding = doctor._compiler()
    assert (finding.state, finding.fix) == ("note", "apt-get install g++")
    monkeypatch.setattr(build, "packaged_library", lambda: Path("avx2.so"))
    finding = doctor._compiler()
    assert finding.state == "ok" and "this wheel holds the kernels" in finding.text
    monkeypatch.undo()
    monkeypatch.setattr(doctor, "find_spec", lambda name: None)
    assert [found.state for found in doctor.examine() if found.what == "kernels"] == ["bad"]


def test_doctor_chooses_by_what_a_step_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading a weight or multiplying by it, whichever is longer; steps of 1, 8 and 32 tokens."""
    rates = {"float32": 170e9, "bfloat16": 165e9, "w8a8": 330e9, "int4": 250e9}
    how = {torch.bfloat16: "widened", "w8a8": "by vpdpbusd"}
    ops = Ops("cpu-avx_vnni", products=how)
    monkeypatch.setattr(doctor, "measure", lambda ops: CpuSpeed(33e9, rates))
    speed, best = doctor._cpu_speed(ops)
    assert (
        "33 GB/s" in speed.text and "bfloat16 165 (widened), w8a8 330 (by vpdpbusd)" in speed.text
    )
    assert best.text == (
        "dtype=auto, the checkpoint's; for speed quantization=w8a8, or int4 where requests mostly "
        "come one at a time"
    )
    rates |= {"bfloat16": 18e9, "int4": 500e9}  # without instructions for it
    assert doctor._cpu_speed(ops)[1].text == "dtype=float32; for speed quantization=int4"
