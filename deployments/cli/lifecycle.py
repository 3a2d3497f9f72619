"""The life of `manta serve`: it starts Ray and the application, and they end with it.

Ray's processes are told by the kernel when the one that started them is killed. This module is
imported when the environment is complete, for Ray reads it at import.
"""

import itertools
import signal
import sys
import time
from contextlib import suppress

import ray
from ray import serve
from ray.exceptions import AuthenticationError, RayError
from ray.serve.exceptions import RayServeException

from deployments import ray_private
from deployments.args import APPLICATION, AppArgs
from deployments.builder import app
from deployments.cli.announce import announce, first_key, url_of

_PROXY_LOG = "its log is in /tmp/ray/session_latest/logs/serve"


def run_server(args: AppArgs, host: str, port: int, address: str) -> None:
    """Returns after SIGINT or SIGTERM, once the last answer has ended; a second signal cuts it.

    Of a cluster that was there before, only the application ends. Raises SystemExit, saying why,
    when it cannot be served.
    """
    try:
        ray.init(address=address)
    except (ConnectionError, AuthenticationError) as error:
        sys.exit(f"error: {error}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's own exits at once
    try:
        with suppress(KeyboardInterrupt):
            _serve(args, host, port)
        with suppress(KeyboardInterrupt):
            _drain(args.graceful_shutdown_timeout_s)
    except (RuntimeError, RayError) as error:
        sys.exit(f"error: {error}")
    finally:
        if address == "local":
            ray.shutdown()
        else:
            serve.delete(APPLICATION)


def _serve(args: AppArgs, host: str, port: int) -> None:
    """Until a signal comes. Raises RuntimeError when the application fails or Ray has died."""
    # Serve gives its proxies a minute, and a busy machine may need more: they are waited for below.
    with suppress(TimeoutError):
        serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
    with suppress(TimeoutError):
        serve.run(app(args), name=APPLICATION, route_prefix="/")
    url, key, is_announced = url_of(host, port), first_key(), False
    for seconds in itertools.count():
        if dead := ray_private.dead_processes():
            raise RuntimeError(f"Ray's {dead[0]} has died")
        is_announced = is_announced or announce(url, key)
        if not is_announced and seconds % 60 == 10:
            print(f"Waiting for Ray's HTTP proxy to answer at {url}; {_PROXY_LOG}", flush=True)
        time.sleep(1)


def _drain(timeout_s: float) -> None:
    print("Stopping once the last answer has ended; Ctrl-C again cuts it.", flush=True)
    with suppress(TimeoutError, RayServeException, RayError):  # the latter two: nothing runs
        replicas = serve.get_app_handle(APPLICATION)
        replicas.broadcast("drain").results(timeout_s=timeout_s, return_exceptions=True)
