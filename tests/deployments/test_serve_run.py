"""`serve run` and `manta serve` as a user starts and stops them, in processes of their own."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import psutil
import pytest
import ray
import yaml

from deployments import ray_private
from tests.deployments.conftest import free_port, wait_until
from tests.deployments.manta_serve import (
    MANTA_SERVE,
    ROOT,
    SERVE_RUN,
    MantaServe,
    begun,
    family,
    is_up,
    running,
    wait_gone,
)

pytestmark = pytest.mark.ray

SMALL = ["manta-demo", "max_model_len=1024", "num_blocks=64", "num_threads=1"]


def open_to_others(processes: dict[psutil.Process, str]) -> set[str]:
    """Who of them listens elsewhere than on the loopback."""
    found = set()
    for process, title in processes.items():
        with suppress(psutil.Error):  # HAProxy hides its own, another may have ended
            found |= {title for ip, _ in _listening(process) if not ip.startswith("127.")}
    return found


def _listening(process: Any = psutil) -> set[tuple[str, int]]:
    """Addresses and ports, of a process or the whole machine."""
    return {
        (connection.laddr.ip.removeprefix("::ffff:"), connection.laddr.port)
        for connection in process.net_connections("tcp")
        if connection.status == psutil.CONN_LISTEN
    }


def test_a_serve_config_file_starts_it_and_ctrl_c_leaves_no_process(tmp_path: Path) -> None:
    port = free_port()
    config = {
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "llm",
                "route_prefix": "/",
                "import_path": "deployments:app",
                "args": {"served_model_name": "tiny", "max_model_len": 512, "num_blocks": 64},
            }
        ],
    }
    path = tmp_path / "serve.yaml"
    path.write_text(yaml.safe_dump(config))
    log = tmp_path / "serve.log"
    url = f"http://127.0.0.1:{port}"
    # A cluster of its own: not the one that other tests have in this process.
    with running([*SERVE_RUN, "--address", "local", str(path)], log) as process:
        wait_until(lambda: is_up(url), 120, "the server answers")
        model = httpx.get(f"{url}/v1/models").json()["data"][0]
        assert (model["id"], model["max_model_len"]) == ("tiny", 512)
        body = {
            "messages": [{"role": "user", "content": "Repeat these words: apple river"}],
            "temperature": 0,
        }
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json()
        assert answer["choices"][0]["message"]["content"] == "apple river"

        children = family(process)
        assert any("EngineShard" in title for title in children.values())
        os.killpg(process.pid, signal.SIGINT)
        process.wait(timeout=60)
        wait_gone(children)


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("max_modl_len=5", "max_modl_len: unknown field, did you mean 'max_model_len'?"),
    ],
)
def test_a_bad_argument_prints_one_readable_line(tmp_path: Path, argument: str, says: str) -> None:
    log = tmp_path / "serve.log"
    with running([*SERVE_RUN, "deployments:app", *argument.split()], log) as process:
        assert process.wait(timeout=60) != 0
    output = log.read_text()
    assert says in output
    assert "Traceback" not in output


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("model=./nowhere", "no directory or GGUF file './nowhere'"),
        ("tensor_parallel_size=3 num_cpus_per_shard=0.1", "cannot be split over 3 ranks"),
        ("num_replicas=1000", "num_replicas (1000) of 1 ranks"),
    ],
)
def test_serve_run_refuses_before_ray_starts(tmp_path: Path, argument: str, says: str) -> None:
    log = tmp_path / "serve.log"
    command = [*SERVE_RUN, "--address", "local", "deployments:app", *argument.split()]
    with running(command, log) as process:
        assert process.wait(timeout=60) == 1
    *_, line = log.read_text().splitlines()
    assert line.startswith("error: ") and says in line
    assert "Started a local Ray instance" not in log.read_text()


TENANTS = [{"Authorization": f"Bearer sk-{i}"} for i in range(3)]
KEYS = "acme:sk-0,globex:sk-1,initech:sk-2"


@pytest.fixture(scope="module")
def two(
    manta_serve: MantaServe, tmp_path_factory: pytest.TempPathFactory, byte_model: Path
) -> Iterator[list[MantaServe]]:
    """Both with HAProxy, the first of two replicas and in the background of a script.

    A byte is a token of the first.
    """
    settings = ["dtype=float32", "num_blocks=200", "num_threads=1", "num_cpus_per_shard=0.1"]
    arguments = [str(byte_model), *settings, "num_replicas=2"]
    directory = tmp_path_factory.mktemp("two")
    with begun(directory, *arguments, in_background=True, MANTA_API_KEYS=KEYS) as server:
        servers = [server, manta_serve]
        wait_until(lambda: all(each.is_answering() for each in servers), 240, "both answer")
        yield servers


def test_two_with_haproxy_fit_a_machine_and_are_closed_to_others(two: list[MantaServe]) -> None:
    for server in two:
        # Serve's own ports between replicas; they ask for Ray's token.
        titles = open_to_others(family(server.process))
        assert titles and all(title.startswith("ray::ServeReplica:manta:") for title in titles)
        for name in ("STATS", "METRICS"):
            port = int(server.environment[f"RAY_SERVE_HAPROXY_{name}_PORT"])
            assert {ip for ip, listening in _listening() if listening == port} == {"127.0.0.1"}
        # Ray opens the socket itself to everybody.
        assert server.private_directory.stat().st_mode & 0o077 == 0
        assert any(path.is_socket() for path in server.private_directory.glob("*/admin.sock"))


def test_prompts_go_to_the_replica_that_has_their_prefix(two: list[MantaServe]) -> None:
    """HAProxy asks a router that sees the prompt, and connects clients straight to replicas."""
    url = f"{two[0].url}/v1/completions"
    with httpx.Client(timeout=60) as http:

        def cached(prompt: str, tenant: int) -> int:
            body = {"prompt": prompt, "max_tokens": 2}
            answer = http.post(url, json=body, headers=TENANTS[tenant]).raise_for_status()
            return int(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

        prompts = [f"tenant {i} " + "x" * 300 for i in range(3)]
        assert [cached(prompts[i] + " hello", i) for i in range(3)] == [0, 0, 0]
        time.sleep(3)  # two report periods: from here on, routers rely on the reports
        # 300 shared bytes are 9 blocks of 32 tokens; nobody computes them a second time.
        later = [cached(f"{prompts[i]} {turn}", i) for turn in range(4) for i in range(3)]
        assert later == [288] * 12
        # Though the router sees no keys, and tells the prompts of tenants apart by nothing else.
        assert [cached(prompts[i], (i + 1) % 3) for i in range(3)] == [0, 0, 0]

        # What the router cannot read, the replica refuses as it would have without one.
        http.headers = httpx.Headers(TENANTS[0])
        unknown = http.post(url, json={"prompt": "x", "tempo": 1})
        assert (unknown.status_code, unknown.json()["error"]["param"]) == (400, "tempo")
        assert http.post(url, json={"prompt": [10**30]}).status_code == 400
        broken = http.post(url, content=b"{", headers={"content-type": "application/json"})
        assert broken.status_code == 400
        with http.stream("POST", url, json={"prompt": "x", "stream": True}) as streamed:
            assert sum(line.startswith("data: {") for line in streamed.iter_lines()) > 1
        for answer in (unknown, broken, streamed):
            assert len(answer.headers.get_list("x-request-id")) == 1


def test_who_hangs_up_before_an_answer_has_begun_ends_the_request(two: list[MantaServe]) -> None:
    """Also where head and body of the request came apart, as httpx and its clients send them."""
    url = two[1].url

    def num_aborted() -> float:
        lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
        ended = [line for line in lines if line.startswith("vllm:request_success_total{")]
        return sum(float(line.rpartition(" ")[2]) for line in ended if '="abort"' in line)

    before, body = num_aborted(), {"prompt": "x", "max_tokens": 2000, "n": 16, "ignore_eos": True}
    with pytest.raises(httpx.ReadTimeout):
        httpx.post(f"{url}/v1/completions", json=body, timeout=httpx.Timeout(30, read=1))
    wait_until(lambda: num_aborted() == before + 16, 60, "the engine is told")


def test_a_port_in_use_is_refused_before_anything_starts(two: list[MantaServe]) -> None:
    """Ray would have both servers listen, and give each some of the clients."""
    command = two[0].command
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "choose another by --port" in done.stderr


def test_a_killed_proxy_is_replaced(two: list[MantaServe]) -> None:
    server, _ = two
    assert server.environment["RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S"] == "1"
    for process, title in family(server.process).items():
        if "/haproxy -db" in title:
            process.kill()
    wait_until(lambda: is_up(server.url), 60, "its port is back")


def test_on_sigterm_it_lets_nobody_in_and_finishes_its_answers(two: list[MantaServe]) -> None:
    server, other = two
    started = family(server.process)
    body: dict[str, Any] = {"prompt": "a", "max_tokens": 900, "n": 4, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    url = f"{server.url}/v1/completions"
    with httpx.stream("POST", url, json=body, headers=TENANTS[0], timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)  # is for what runs in the foreground
        server.process.send_signal(signal.SIGTERM)
        wait_until(lambda: _status(server.url) == 503, 30, "nobody is let in any more")
        events = [line.removeprefix("data: ") for line in lines if line]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["usage"]["completion_tokens"] == 4 * 900
    assert server.process.wait(25) == 0, server.log.read_text()  # with HAProxy, too
    wait_gone(started)
    assert not server.private_directory.exists()
    assert is_up(other.url)


def _status(url: str) -> int:
    try:
        url = f"{url}/v1/completions"
        return httpx.post(url, json={"prompt": "b"}, headers=TENANTS[0]).status_code
    except httpx.TransportError:
        return 0


def test_from_a_cluster_that_it_joined_it_takes_only_its_own(
    cluster: str, server: str, tmp_path: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    where = ["--address", address, "--port", cluster.rpartition(":")[2]]
    with running([*MANTA_SERVE, *SMALL, *where], log := tmp_path / "log") as joined:
        wait_until(lambda: is_up(cluster), 120, "its application answers")
        joined.send_signal(signal.SIGINT)  # in the foreground, as by Ctrl-C
        assert joined.wait(60) == 0, log.read_text()
    assert not is_up(cluster) and is_up(server)


def test_a_dead_ray_is_noticed(cluster: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its raylet or GCS nothing serves for long, and nobody starts them anew."""
    node = ray._private.worker._global_node
    assert node.all_processes.keys() >= {"raylet", "gcs_server"}
    assert ray_private.dead_processes() == []
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
        for kind in ("raylet", "dashboard"):
            monkeypatch.setitem(node.all_processes, kind, [SimpleNamespace(process=dead)])
        assert ray_private.dead_processes() == ["raylet"]
