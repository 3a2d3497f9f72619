"""A cluster of three raylets, of which one is killed under load. Run by test_nodes.py.

Prints one JSON object of what happened.
"""

import json
import sys
import threading
import time
from typing import Any

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

from benchmarks.chaos_faults import nodes_in_use
from deployments import app
from deployments.args import AppArgs
from deployments.cli.client import Client
from tests.deployments.conftest import free_port, wait_until


def num_running() -> int:
    replica = serve.status().applications["app"].deployments["Replica"]
    return int(replica.replica_states.get("RUNNING", 0))


class Load(threading.Thread):
    """Asks until told to stop; keeps (when it ended, whether it was answered)."""

    def __init__(self, url: str, i: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.results: list[tuple[float, bool]] = []
        self._body = {"prompt": f"request {i}", "max_tokens": 60, "seed": i, "ignore_eos": True}
        self._url, self._stop_asking = url, stop

    def run(self) -> None:
        with httpx.Client(timeout=60) as client:
            while not self._stop_asking.is_set():
                try:
                    response = client.post(f"{self._url}/v1/completions", json=self._body)
                    good = response.status_code == 200
                except httpx.TransportError:
                    good = False
                self.results.append((time.monotonic(), good))


class Stream(threading.Thread):
    """Streams one request again and again, by a client that goes on where a stream breaks."""

    def __init__(self, url: str, i: int, stop: threading.Event) -> None:
        super().__init__(daemon=True)
        self.texts: list[str] = []
        self.num_asked = 0
        self.error = ""
        self._stop_asking = stop
        self._client = Client(url)
        self._body = {"prompt": f"stream {i}", "max_tokens": 300, "seed": i, "ignore_eos": True}
        self._body |= {"stream": True, "return_token_ids": bool(i % 2)}
        self._events = self._client._events
        self._client._events = self._count  # type: ignore[method-assign]

    def _count(self, *arguments: Any) -> Any:
        self.num_asked += 1
        return self._events(*arguments)

    def ask(self) -> None:
        events = self._client.stream("/v1/completions", self._body)
        self.texts.append("".join(event["choices"][0]["text"] for event in events))

    def run(self) -> None:
        try:
            while not self._stop_asking.is_set():
                self.ask()
        except Exception as error:
            self.error = repr(error)


def main(model: str) -> dict[str, Any]:
    port = free_port()
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    # Each worker has room for one replica.
    workers = [cluster.add_node(num_cpus=2) for _ in range(2)]
    cluster.wait_for_nodes()
    ray.init(address=cluster.address, log_to_driver=False)
    stop = threading.Event()
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port, "location": "HeadOnly"})
        args = AppArgs(
            model=model, dtype="float32", num_blocks=100, num_replicas=2, num_cpus_per_shard=1.5
        )
        serve.run(app(args), name="app", route_prefix="/")
        spread = len(nodes_in_use())
        clients = [Load(f"http://127.0.0.1:{port}", i, stop) for i in range(6)]
        streams = [Stream(f"http://127.0.0.1:{port}", i, stop) for i in range(6)]
        for own in streams:
            own.ask()  # undisturbed
        for client in [*clients, *streams]:
            client.start()
        wait_until(lambda: all(len(c.results) >= 2 for c in clients), 60, "every client is served")
        killed_at = time.monotonic()
        cluster.remove_node(workers[0], allow_graceful=False)
        wait_until(lambda: num_running() == 1, 60, "the dead replica is noticed")
        noticed_at = time.monotonic()
        cluster.add_node(num_cpus=2)
        wait_until(lambda: num_running() == 2, 180, "the replica is replaced on the new node")
        stop.set()
        for client in [*clients, *streams]:
            client.join(60)
        results = sorted(result for client in clients for result in client.results)
        settled = noticed_at + 2
        return {
            "nodes_used": spread,
            "errors": [own.error for own in streams if own.error],
            "wrong": sum(text != own.texts[0] for own in streams for text in own.texts),
            "gone_on": sum(own.num_asked - len(own.texts) for own in streams),
            "before": [good for at, good in results if at < killed_at].count(False),
            "failed": [good for at, good in results if killed_at <= at < settled].count(False),
            "served_while_down": [g for at, g in results if killed_at <= at < settled].count(True),
            "failed_later": [good for at, good in results if at >= settled].count(False),
            "served_later": [good for at, good in results if at >= settled].count(True),
        }
    finally:
        stop.set()
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
