"""What replicas of one application tell each other through Serve: little, and not often."""

from typing import Any

from ray import serve
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

_TIMEOUT_S = 2.0


def own_name() -> str:
    """This replica's, as Serve's request routers know it."""
    return serve.get_replica_context().replica_tag


class Peers:
    """All replicas of a deployment.

    Args:
        deployment: its name; default: this replica's own.
    """

    def __init__(self, deployment: str = "") -> None:
        self._deployment = deployment
        self._handle: DeploymentHandle[Any] | None = None

    async def ask(self, method: str, *arguments: Any, timeout_s: float = _TIMEOUT_S) -> list[Any]:
        """What a method returns, or raises, on each replica that is known and answers in time."""
        if self._handle is None:
            context = serve.get_replica_context()
            deployment = self._deployment or context.deployment
            self._handle = serve.get_deployment_handle(deployment, context.app_name)
        try:
            return await self._handle.broadcast(method, *arguments).results_async(
                timeout_s=timeout_s, return_exceptions=True
            )
        except DeploymentUnavailableError:  # none is known
            return []
