"""Manta's routing as Ray Serve's request router: ranks the replicas for one request.

Serve pickles this module by value, so its classes are not those that another process imports: what
a routing call carries is defined elsewhere.
"""

from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.routing.balancer import PrefixBalancer, ReplicaReport, RoutedPrompt

# How often Serve asks the replicas for their load; it gets no faster than this.
_REPORT_PERIOD_S = 1.0


class PrefixRequestRouter(RequestRouter):
    """Serve gives it the replicas, `PrefixBalancer` decides.

    An ingress router brings its own balancer, which knows the replicas' caches, and the prompt.
    Serve's own proxy routes before it has read the body: load and session decide then.
    """

    def initialize_state(self, **_: Any) -> None:
        self._balancer = PrefixBalancer()

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The best replica, and the others for when it has no slot left."""
        if not candidate_replicas:
            return []
        by_name = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        balancer, prompt, session = self._balancer, RoutedPrompt(), ""
        if pending_request is not None:
            session = pending_request.metadata.session_id
            match pending_request.args:
                case [PrefixBalancer() as balancer, RoutedPrompt() as prompt]:
                    pass
        balancer.keep(by_name)
        if balancer is self._balancer:
            for name, replica in by_name.items():
                if stats := (replica.routing_stats or {}).get("manta"):
                    balancer.take_report(name, ReplicaReport(**stats))
        chosen = balancer.choose(prompt, session)
        ranked = [[by_name[chosen]]]
        others = [replica for name, replica in by_name.items() if name != chosen]
        return [*ranked, others] if others else ranked


def router_config(
    router: type[RequestRouter] = PrefixRequestRouter,
) -> RequestRouterConfig:
    return RequestRouterConfig(
        request_router_class=router,  # type: ignore[arg-type]
        request_routing_stats_period_s=_REPORT_PERIOD_S,  # type: ignore[arg-type]
    )
