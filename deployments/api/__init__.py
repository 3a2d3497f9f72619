"""The OpenAI-compatible HTTP interface of one front."""

from deployments.api.app import build_api

__all__ = ["build_api"]
