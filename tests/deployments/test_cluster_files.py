"""cluster.yaml and the example manifests, checked against Ray's own schemas."""

import re
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from deployments.args import AppArgs
from deployments.local_ray import HAPROXY

ROOT = Path(__file__).resolve().parents[2]
SERVE_CONFIG = ROOT / "docs" / "examples" / "serve-config.yaml"
RAY_SERVICE = ROOT / "docs" / "examples" / "rayservice.yaml"
ENVIRONMENT = HAPROXY | {
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}


def load(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text())
    assert isinstance(content, dict)
    return content


def check_applications(config: dict[str, Any]) -> None:
    """As `serve deploy` does, and then as the application does with its arguments."""
    deployed = ServeDeploySchema.model_validate(config)
    assert deployed.http_options.port == 8000
    assert deployed.applications
    for application in deployed.applications:
        assert application.import_path == "deployments:app"
        args = AppArgs.model_validate(application.args)
        assert args.device == "cuda"


@pytest.fixture
def cluster_config(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.chdir(ROOT)  # file_mounts are relative
    return prepare_config(load(ROOT / "cluster.yaml"))


def test_ray_up_accepts_the_cluster(cluster_config: dict[str, Any]) -> None:
    validate_config(cluster_config)
    head, workers = (cluster_config["available_node_types"][name] for name in ("head", "gpu"))
    assert cluster_config["head_node_type"] == "head" and head["resources"] == {"CPU": 0}
    assert workers["min_workers"] < workers["max_workers"] <= cluster_config["max_workers"]
    assert cluster_config["file_mounts"] == {
        "/home/ray/manta": ".",
        "/home/ray/.ray/auth_token": "~/.ray/auth_token",  # where Ray looks for it by itself
    }


@pytest.mark.parametrize("commands", ["head_start_ray_commands", "worker_start_ray_commands"])
def test_every_node_starts_ray_with_the_environment(
    cluster_config: dict[str, Any], commands: str
) -> None:
    (start,) = [command for command in cluster_config[commands] if "ray start" in command]
    before = start.split("ray start")[0].split()
    given = dict(word.split("=") for word in before if "=" in word)
    assert given == ENVIRONMENT | {"RAY_AUTH_MODE": "token"}


def test_serve_deploy_accepts_the_config() -> None:
    check_applications(load(SERVE_CONFIG))


def test_the_second_application_is_right_too() -> None:
    """The commented example, as it is once the comment signs are gone."""
    text = re.sub(r"^  # ((?:- |  )\S| {3,}\S)", r"  \1", SERVE_CONFIG.read_text(), flags=re.M)
    config = yaml.safe_load(text)
    assert [application["name"] for application in config["applications"]] == [
        "qwen3-8b",
        "llama-70b",
    ]
    check_applications(config)


def test_kuberay_gets_a_sound_service() -> None:
    manifest = load(RAY_SERVICE)
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayService")
    check_applications(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    cluster = manifest["spec"]["rayClusterConfig"]
    assert cluster["rayVersion"] == ray.__version__ and cluster["enableInTreeAutoscaling"]
    assert cluster["authOptions"] == {"mode": "token"}
    head, (workers,) = cluster["headGroupSpec"], cluster["workerGroupSpecs"]
    assert workers["minReplicas"] <= workers["replicas"] <= workers["maxReplicas"]
    for group in (head, workers):
        (container,) = group["template"]["spec"]["containers"]
        environment = {variable["name"]: variable["value"] for variable in container["env"]}
        assert ENVIRONMENT.items() <= environment.items()
        assert 8000 in [port["containerPort"] for port in container["ports"]]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/gpu"] == "1"
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]


def test_images_have_the_installed_ray() -> None:
    docker = load(ROOT / "cluster.yaml")["docker"]
    images = [docker[name] for name in ("head_image", "worker_image", "image")]
    stages = re.findall(r"^FROM (\S+) AS (\w+)$", (ROOT / "Dockerfile").read_text(), re.M)
    assert [stage for _, stage in stages] == ["cpu", "cuda"]
    images.append(stages[1][0])
    assert all(f":{ray.__version__}-" in image for image in images)
