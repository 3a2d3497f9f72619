"""`deployments:door`, the Serve application before several others."""

from typing import Annotated

import httpx
from fastapi import FastAPI
from pydantic import Field
from ray import serve
from ray.serve import Application

from deployments.relay.door import TIMEOUT, build_door
from engine.strict import StrictModel

_CPUS = 0.1


class DoorArgs(StrictModel):
    models: dict[str, Annotated[str, Field(pattern=r"^/.*[^/]$")]] = Field(
        min_length=1,
        description="By the name of each model, the route prefix of its application. What names no "
        "model goes to the first.",
    )
    proxy: str = Field(
        "http://127.0.0.1:8000", description="Where Serve answers, on the door's own nodes."
    )
    num_replicas: int = Field(1, ge=1)
    max_ongoing_requests: int = Field(4096, ge=1, description="Of each replica.")


@serve.deployment
@serve.ingress()
class DoorReplica:
    def __init__(self, args: DoorArgs) -> None:
        limits = httpx.Limits(max_connections=args.max_ongoing_requests)
        self._http = httpx.AsyncClient(base_url=args.proxy, timeout=TIMEOUT, limits=limits)
        self._models = args.models

    def __serve_build_asgi_app__(self) -> FastAPI:
        return build_door(self._http, self._models)


def door(args: DoorArgs) -> Application:
    """One address for the models of several applications."""
    replicas: Application = DoorReplica.options(  # type: ignore[attr-defined]
        num_replicas=args.num_replicas,
        max_ongoing_requests=args.max_ongoing_requests,
        ray_actor_options={"num_cpus": _CPUS},
    ).bind(args)
    return replicas
