"""Two replicas behind HAProxy, asked by several tenants with their own keys. Run by
test_haproxy.py.

Prints one JSON object of what happened.
"""

import json
import os
import sys
import time
from typing import Any

from deployments import local_ray

os.environ.update(local_ray.prepare(haproxy=True))
os.environ["MANTA_API_KEYS"] = "acme:sk-0,globex:sk-1,initech:sk-2"

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
        with httpx.Client(timeout=60, headers={"Authorization": "Bearer sk-0"}) as http:

            def cached(prompt: str, tenant: int) -> int:
                body = {"prompt": prompt, "max_tokens": 2}
                headers = {"Authorization": f"Bearer sk-{tenant}"}
                response = http.post(url, json=body, headers=headers).raise_for_status()
                return int(response.json()["usage"]["prompt_tokens_details"]["cached_tokens"])

            prompts = [f"tenant {i} " + "x" * 300 for i in range(3)]
            first = [cached(prompts[i] + " hello", i) for i in range(3)]
            time.sleep(3)  # two report periods: from here on, routers rely on the reports
            later = [cached(f"{prompts[i]} {turn}", i) for turn in range(4) for i in range(3)]
            others = [cached(prompts[i], (i + 1) % 3) for i in range(3)]
            bad = http.post(url, json={"prompt": "x", "tempo": 1})
            unknown = http.post(url, json={"prompt": [10**30]})
            broken = http.post(url, content=b"{", headers={"content-type": "application/json"})
            with http.stream("POST", url, json={"prompt": "x", "stream": True}) as response:
                streamed = sum(line.startswith("data: {") for line in response.iter_lines())
        ids = [answer.headers.get_list("x-request-id") for answer in (bad, broken, response)]
        return {
            "ids": [len(told) for told in ids],
            "first": first,
            "later": later,
            "others": others,
            "refused": [
                bad.status_code,
                bad.json()["error"]["param"],
                unknown.status_code,
                broken.status_code,
            ],
            "streamed": streamed,
        }
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    print(json.dumps(main(sys.argv[1])))
