"""The private names of Ray that Manta uses, and what happens where they are missing.

Everything else here is Ray's public API. Where one of the names is missing, as in a later version
perhaps, or without HAProxy, applications are built without the ingress router, and Serve balances
requests by load and session alone; the log names what is missing.
"""

import importlib
import logging
from typing import Any

import ray
from ray.serve import Application

logger = logging.getLogger("ray.serve")

# What routing by prompts needs, by where it is imported from. Made for Ray 2.60.
_NEEDED = (
    "ray.serve:Application._with_ingress_request_router",
    "ray.serve.handle:DeploymentHandle._init",
    "ray.serve.handle:DeploymentHandle.broadcast",
    "ray.serve.handle:DeploymentHandle.choose_replica",
    "ray.serve._private.common:ReplicaID.to_full_id_str",
    "ray.serve.request_router:RunningReplica.backend_http_endpoint",
    "ray.serve._private.constants:RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY",
    "ray.serve._private.constants:RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE",
    "ray.serve._private.constants:SERVE_SESSION_ID",
)
_VARIABLES = ("RAY_SERVE_ENABLE_HA_PROXY", "RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY")


def haproxy_enabled() -> bool:
    """Whether this process's Serve runs HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1 at import time)."""
    try:
        from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
    except ImportError:
        return False
    return bool(RAY_SERVE_ENABLE_HA_PROXY)


def _routers_see_bodies() -> bool:
    if not haproxy_enabled():
        return False
    from ray.serve._private.constants import RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY

    return bool(RAY_SERVE_INGRESS_REQUEST_ROUTER_FORWARD_BODY)


def is_cluster_here() -> bool:
    """Whether `ray.init` would join a cluster: a Ray that somebody else runs here need not be one.

    Where that cannot be told, yes.
    """
    try:
        from ray._private.services import canonicalize_bootstrap_address
    except ImportError:
        return True
    return canonicalize_bootstrap_address(None) is not None  # type: ignore[arg-type]


def can_route_by_body() -> bool:
    """Whether an ingress router can be attached and would see prompts; the log says why not."""
    if not _routers_see_bodies():
        logger.warning(
            "Requests go to replicas by load and session alone. For routing by cached prefixes, "
            "%s must be set on every node before `ray start`, and here.",
            " and ".join(f"{name}=1" for name in _VARIABLES),
        )
        return False
    if missing := missing_names():
        logger.warning(
            "Requests go to replicas by load and session alone: Ray %s lacks %s, which routing by "
            "cached prefixes needs.",
            ray.__version__,
            ", ".join(missing),
        )
    return not missing


def missing_names() -> list[str]:
    """What this Ray lacks of what routing by prompts needs."""
    return [name for name in _NEEDED if not _exists(name)]


def _exists(name: str) -> bool:
    module, _, path = name.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in path.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError):
        return False
    return True


def routers_see_keys() -> bool:
    """Whether HAProxy hands ingress routers the clients' Authorization header.

    It hands them one header, which RAY_SERVE_SESSION_ID_HEADER_KEY names.
    """
    from ray.serve._private.constants import SERVE_SESSION_ID

    return bool(SERVE_SESSION_ID.lower() == "authorization")


def haproxy_room() -> int:
    """Bytes of a request, head and body, to which HAProxy can add headers without doubt."""
    from ray.serve._private.constants import RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE

    return RAY_SERVE_HAPROXY_INGRESS_REQUEST_ROUTER_BUFSIZE // 2


def with_ingress_router(application: Application, router: Application) -> Application:
    """HAProxy asks `router` where each POST to `application` goes."""
    return application._with_ingress_request_router(router)


def start_routing(handle: Any) -> None:
    """Let a handle learn of its replicas before the first request."""
    handle._init()


async def choose_endpoint(handle: Any, *arguments: Any) -> tuple[str, int, str]:
    """(host, port, replica id) of the replica that the handle's request router ranks first.

    Reserves no slot there: the request reaches the replica through HAProxy, not this handle. Raises
    RuntimeError when the replica has no HTTP endpoint.
    """
    async with handle.choose_replica(*arguments, _reserve=False) as selection:
        replica = selection._replica
        if replica.backend_http_endpoint is None:
            raise RuntimeError(f"replica {selection.replica_id} has no HTTP endpoint")
        host, port = replica.backend_http_endpoint
        return host, port, replica.replica_id.to_full_id_str()


def dead_processes() -> list[str]:
    """Those of Ray's own that this process has started, and that a node does not live without."""
    node = ray._private.worker._global_node
    vital = {"raylet", "gcs_server"}
    return [kind for kind, _ in node.dead_processes() if kind in vital] if node else []
