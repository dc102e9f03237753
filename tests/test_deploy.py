from __future__ import annotations

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import kubernetes_validate
import pytest
import yaml

from vlmport.runtime.serving.options import ServingOptions
from vlmport.runtime.triton_model.serving_metrics import ServingMetrics

DEPLOY = Path(__file__).resolve().parents[1] / "docs" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
COMPOSE = DEPLOY / "docker-compose.yaml"
OLDEST, NEWEST = "1.30", "1.37"  # README.md names the oldest; the newest whose schemas are known
NAME = {"app.kubernetes.io/name": "vlm"}
# These kinds belong to kustomize and to the Prometheus operator; Kubernetes' own schemas lack them,
# and tests below check by hand what is used of them.
WITHOUT_SCHEMA = ("Kustomization", "PodMonitor")


@cache
def documents() -> dict[tuple[str, str], dict[str, Any]]:
    """Kind and name -> the document."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for file in sorted(KUBERNETES.glob("*.yaml")):
        for document in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            name = document.get("metadata", {}).get("name", "")
            assert (document["kind"], name) not in found
            found[document["kind"], name] = document
    return found


def server() -> dict[str, Any]:
    """The container of the deployment."""
    [container] = documents()["Deployment", "vlm"]["spec"]["template"]["spec"]["containers"]
    found: dict[str, Any] = container
    return found


def images(value: object) -> list[str]:
    """Every image that a document names, however deep."""
    if isinstance(value, dict):
        own = [value["image"]] if isinstance(value.get("image"), str) else []
        return own + [image for entry in value.values() for image in images(entry)]
    if isinstance(value, list):
        return [image for entry in value for image in images(entry)]
    return []


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_manifests_fit_the_schemas_of_kubernetes(version: str) -> None:
    checked = []
    for (kind, _), document in documents().items():
        if kind not in WITHOUT_SCHEMA:
            assert kubernetes_validate.validate(document, version, strict=True) == version
            checked.append(kind)
    assert {"Deployment", "Service", "HorizontalPodAutoscaler", "PodDisruptionBudget"} <= {*checked}


def test_a_wrong_manifest_does_not_fit() -> None:
    wrong = {**documents()["Deployment", "vlm"], "replica": 3}
    with pytest.raises(kubernetes_validate.ValidationError, match="replica"):
        kubernetes_validate.validate(wrong, NEWEST, strict=True)


def checked_compose(file: Path) -> subprocess.CompletedProcess[str]:
    schema = ("--builtin-schema", "vendor.compose-spec")
    command = [sys.executable, "-m", "check_jsonschema", *schema, str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_compose_file_fits_the_compose_specification(tmp_path: Path) -> None:
    found = checked_compose(COMPOSE)
    assert found.returncode == 0, found.stdout + found.stderr
    wrong = tmp_path / "docker-compose.yaml"
    wrong.write_text(COMPOSE.read_text(encoding="utf-8").replace("shm_size:", "shm_sise:"))
    assert checked_compose(wrong).returncode == 1


def test_images_have_a_tag_that_does_not_move() -> None:
    compose = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))
    named = images(compose) + images([*documents().values()])
    assert len(named) >= 4
    for image in named:
        assert re.search(r":[^/]+$", image), image
        assert "latest" not in image
    [set_image] = documents()["Kustomization", ""]["images"]
    assert set_image["newTag"] != "latest"
    assert {image.partition(":")[0] for image in images([*documents().values()])} == {
        set_image["name"]
    }


def test_the_kustomization_lists_every_file() -> None:
    listed = documents()["Kustomization", ""]["resources"]
    # The job is for one kind of repository; a comment says so.
    files = {file.name for file in KUBERNETES.glob("*.yaml")} - {"kustomization.yaml"}
    assert set(listed) == files - {"engines-job.yaml"}


def test_everything_finds_the_pods() -> None:
    found = documents()
    template = found["Deployment", "vlm"]["spec"]["template"]["metadata"]["labels"]
    assert template == NAME
    assert found["Deployment", "vlm"]["spec"]["selector"]["matchLabels"] == NAME
    for service in ("vlm", "vlm-pods"):
        assert found["Service", service]["spec"]["selector"] == NAME
    for kind in ("PodMonitor", "PodDisruptionBudget"):
        assert found[kind, "vlm"]["spec"]["selector"]["matchLabels"] == NAME
    target = found["HorizontalPodAutoscaler", "vlm"]["spec"]["scaleTargetRef"]
    assert target == {"apiVersion": "apps/v1", "kind": "Deployment", "name": "vlm"}
    # The job that builds engines has a GPU, too, and must not be served from.
    job = found["Job", "vlm-engines"]["spec"]["template"]["metadata"]["labels"]
    assert job != NAME


def test_a_replica_has_one_gpu_and_ports_that_others_name() -> None:
    container = server()
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"http": 8000, "grpc": 8001, "metrics": 8002}
    for name in ("vlm", "vlm-pods"):
        for port in documents()["Service", name]["spec"]["ports"]:
            assert ports[port["targetPort"]] == port["port"]
    monitored = documents()["PodMonitor", "vlm"]
    assert monitored["apiVersion"] == "monitoring.coreos.com/v1"
    assert [(one["port"], one["path"]) for one in monitored["spec"]["podMetricsEndpoints"]] == [
        ("metrics", "/metrics")
    ]
    volumes = documents()["Deployment", "vlm"]["spec"]["template"]["spec"]["volumes"]
    mounts = {mount["name"] for mount in container["volumeMounts"]}
    assert mounts == {volume["name"] for volume in volumes}
    claim = volumes[0]["persistentVolumeClaim"]["claimName"]
    assert ("PersistentVolumeClaim", claim) in documents()


def test_probes_ask_what_triton_answers() -> None:
    container = server()
    paths = {
        probe: container[probe]["httpGet"]["path"] for probe in ("startupProbe", "readinessProbe")
    }
    assert paths == {
        "startupProbe": "/v2/models/vlm/ready",
        "readinessProbe": "/v2/health/ready",
    }
    # What it asks is run in tests/tritonserver/test_server_faults.py.
    alive = container["livenessProbe"]
    assert alive["timeoutSeconds"] > 4  # curl's own limit
    assert "/v2/models/vlm/generate" in alive["exec"]["command"][-1]
    startup = container["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] == 600  # README.md: ten minutes


def test_a_pod_has_time_to_end_its_streams() -> None:
    grace = documents()["Deployment", "vlm"]["spec"]["template"]["spec"]
    container = server()
    [exit_timeout] = [
        int(word.partition("=")[2]) for word in container["args"] if "exit-timeout" in word
    ]
    sleep = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert grace["terminationGracePeriodSeconds"] > sleep + exit_timeout
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert f"serves on for {sleep} s" in readme
    assert f"at most {exit_timeout} s (`--exit-timeout-secs`" in readme
    compose = yaml.safe_load(COMPOSE.read_text(encoding="utf-8"))["services"]["triton"]
    assert f"--exit-timeout-secs={exit_timeout}" in compose["command"]
    assert int(compose["stop_grace_period"].removesuffix("s")) > exit_timeout


def test_the_autoscaler_reads_metrics_that_the_model_exports_and_the_adapter_hands_on() -> None:
    metrics = [
        metric["pods"]["metric"]["name"]
        for metric in documents()["HorizontalPodAutoscaler", "vlm"]["spec"]["metrics"]
    ]
    assert metrics == ["vlmport_active_requests", "vlmport_waiting_requests"]
    assert set(metrics) <= exported_metrics()
    config = documents()["ConfigMap", "vlm-metrics-adapter"]["data"]["config.yaml"]
    [rule] = yaml.safe_load(config)["rules"]
    pattern = re.search(r'__name__=~"([^"]+)"', rule["seriesQuery"])
    assert pattern is not None
    assert all(re.fullmatch(pattern[1], metric) for metric in metrics)
    assert set(rule["resources"]["overrides"]) == {"namespace", "pod"}
    for part in ("<<.Series>>", "<<.LabelMatchers>>", "<<.GroupBy>>"):
        assert part in rule["metricsQuery"]
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert all(f"| `{metric}` |" in readme for metric in metrics)


class MetricFamily:
    """Stands for that of Triton's Python backend: notes which metrics a model makes."""

    GAUGE, COUNTER = range(2)
    names: ClassVar[set[str]] = set()

    def __init__(self, name: str, description: str, kind: int) -> None:
        assert description
        assert kind in (self.GAUGE, self.COUNTER)
        self.names.add(name)

    def Metric(self, labels: dict[str, str]) -> None:  # noqa: N802 (Triton names it so)
        assert "model" in labels


def exported_metrics() -> set[str]:
    """Names of the metrics that the main model makes when it starts."""
    ServingMetrics(SimpleNamespace(MetricFamily=MetricFamily), {"model": "vlm", "version": "1"})
    return MetricFamily.names


def test_the_target_of_active_requests_is_a_share_of_the_slots() -> None:
    [active, _] = documents()["HorizontalPodAutoscaler", "vlm"]["spec"]["metrics"]
    target = int(active["pods"]["target"]["averageValue"])
    slots = ServingOptions().num_slots
    # docs/deploy/scaling.md: seven tenths of the slots, rounded.
    assert target == round(0.7 * slots)
    readme = (DEPLOY / "README.md").read_text(encoding="utf-8")
    assert f"| {target} of {slots} slots |" in readme
