"""Ray on one machine: how it is started, and what it could not serve."""

from deployments.local_ray.environment import HAPROXY, prepare

__all__ = ["HAPROXY", "prepare"]
