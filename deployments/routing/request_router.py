"""Manta's routing as Ray Serve's request router: ranks the replicas for one request.

Serve pickles this module by value, so its classes are not those that another process imports: what
a routing call carries is defined elsewhere.
"""

from typing import Any

from ray.serve.config import RequestRouterConfig
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from deployments.routing.balancer import PrefixBalancer, RoutedPrompt, report_from_stats

# How often Serve asks the replicas for their reports; it gets no faster than this.
_REPORT_PERIOD_S = 1.0


class PrefixRequestRouter(RequestRouter):
    """Serve gives it the replicas and their reports, `PrefixBalancer` decides.

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
        self._balancer.update(
            {name: report_from_stats(r.routing_stats) for name, r in by_name.items()}
        )
        prompt, session = RoutedPrompt(), ""
        if pending_request is not None:
            session = pending_request.metadata.session_id
            if pending_request.args and isinstance(pending_request.args[0], RoutedPrompt):
                prompt = pending_request.args[0]
        chosen = self._balancer.choose(prompt, session)
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
