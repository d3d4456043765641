"""Provenance of a run's files: what they depend on beside the experiment."""

from __future__ import annotations

import json
import platform
from functools import cache
from hashlib import file_digest, sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import msgspec

from aioengine.lab.runs.experiment import Experiment

PACKAGES = ("aioengine", "msgspec", "numpy", "polars", "scipy", "sortedcontainers")


def provenance(experiment: Experiment) -> dict[str, Any]:
    """Return what an experiment's results depend on beside its own fields, as far as it can be known."""
    policy = experiment.policy
    name = policy if isinstance(policy, str) else str(policy.get("name", ""))
    workload = json.dumps(msgspec.to_builtins(experiment.workload), sort_keys=True).encode()
    return {
        "seed": experiment.seed,
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}},
        "workload_sha256": _hash(workload, experiment.workload.trace),
        "preset_sha256": _hash(None, experiment.preset, ".json"),
        "policy_sha256": _hash(None, name.partition(":")[0], ".py"),
    }


def _hash(data: bytes | None, file: str | None, suffix: str = "") -> str | None:
    """Return the hash of the data and of the file's content; None if there is neither, or the file, whose
    name must end in ``suffix``, cannot be read."""
    path = None if file is None or not file.endswith(suffix) else Path(file).expanduser()
    if data is None and path is None:
        return None
    digest = sha256(data or b"")
    try:
        if path is not None:
            with path.open("rb") as opened:
                file_digest(opened, lambda: digest)
    except OSError:
        return None
    return digest.hexdigest()


@cache  # it takes a millisecond, and a comparison has hundreds of runs
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine() -> str:
    """Return the GPU's name; without a GPU, the processor's name and the number of threads that compute."""
    import torch

    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    return f"{cpu_name()}, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Return the processor's name in the system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def versions() -> str:
    packages = ", ".join(f"{package} {_version(package)}" for package in ("aioengine", "torch"))
    return f"{packages}, Python {platform.python_version()}"
