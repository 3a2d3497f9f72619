"""Manta on Ray: `serve run deployments:app model=…`, and the offline batch job."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deployments.builder import app

__all__ = ["app"]


def __getattr__(name: str) -> Any:
    """Imports the Serve application on first use: parts of the package load without Serve."""
    if name == "app":
        from deployments.builder import app

        return app
    raise AttributeError(f"module 'deployments' has no attribute {name!r}")
