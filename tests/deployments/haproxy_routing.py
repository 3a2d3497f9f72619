"""Two replicas behind HAProxy, asked by several tenants. Run by test_haproxy.py.

Prints one JSON object of what happened.
"""

import json
import os
import sys
import time
from typing import Any

os.environ["RAY_SERVE_ENABLE_HA_PROXY"] = "1"  # read when Serve is imported
os.environ["RAY_SERVE_SESSION_ID_HEADER_KEY"] = "authorization"
os.environ["RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY"] = "1"
os.environ["RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S"] = "1"  # no load balancer to inform

import httpx
import ray
from ray import serve

from deployments import app
from deployments.args import AppArgs
from tests.deployments.conftest import free_port


def main(model: str) -> dict[str, Any]:
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1/completions"
    ray.init(num_cpus=8, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        args = AppArgs(model=model, dtype="float32", num_blocks=200, num_replicas=2, num_threads=1)
        serve.run(app(args), name="app", route_prefix="/")
        with httpx.Client(timeout=60) as http:

            def cached(prompt: str, **headers: str) -> int:
                body = {"prompt": prompt, "max_tokens": 2}
                response = http.post(url, json=body, headers=headers).raise_for_status()
                return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

            tenants = [f"tenant {i} " + "x" * 300 for i in range(3)]
            first = [cached(tenant + " hello") for tenant in tenants]
            time.sleep(3)  # two report periods: from here on, routers rely on the reports
            later = [cached(f"{tenant} {i}") for i in range(4) for tenant in tenants]
            bad = http.post(url, json={"prompt": "x", "tempo": 1})
            broken = http.post(url, content=b"{", headers={"content-type": "application/json"})
            with http.stream("POST", url, json={"prompt": "x", "stream": True}) as response:
                streamed = sum(line.startswith("data: {") for line in response.iter_lines())
        return {
            "first": first,
            "later": later,
            "refused": [bad.status_code, bad.json()["error"]["param"], broken.status_code],
            "streamed": streamed,
        }
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
