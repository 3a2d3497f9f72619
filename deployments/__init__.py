"""Manta on Ray: `serve run deployments:app model=…`, and the offline batch job."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deployments.builder import app
    from deployments.relay.application import door

__all__ = ["app", "door"]


def __getattr__(name: str) -> Any:
    """Imports the Serve application on first use: parts of the package load without Serve."""
    if name == "app":
        from deployments.builder import app

        return app
    if name == "door":
        from deployments.relay.application import door

        return door
    raise AttributeError(f"module 'deployments' has no attribute {name!r}")
