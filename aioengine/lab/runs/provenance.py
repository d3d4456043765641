"""Provenance of a run's files, and the check that a second run gives the same ones."""

from __future__ import annotations

import json
import platform
import tempfile
from collections.abc import Callable
from functools import cache
from hashlib import file_digest, sha256
from importlib.metadata import PackageNotFoundError, version
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from aioengine.checks import read_json
from aioengine.errors import ConfigError
from aioengine.lab.runs.experiment import Experiment

RESULTS = ("requests.csv", "slots.csv", "moves.csv", "samples.csv", "summary.json")
"""Files of a run that depend on its experiment alone."""
PACKAGES = ("aioengine", "msgspec", "numpy", "polars", "scipy", "sortedcontainers")


class Rerun(NamedTuple):
    """Result of running an experiment again."""

    differing: dict[str, str]
    """File -> its first line that differs, before and now."""
    changed: list[str]
    """Parts of its provenance that are different now."""


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


def rerun(folder: str | Path, run: Callable[[Experiment, Path], object], out: Path | None = None) -> Rerun:
    """Run the experiment of a folder again, and compare what comes out with what is there.

    Args:
        folder: Folder of a ``lab run``, which is not changed.
        run: Runs an experiment, and writes its files to a folder.
        out: Folder for the new files; None: they are deleted.

    Raises ConfigError if the folder has no experiment, and what ``run`` raises.
    """
    described = Path(folder) / "experiment.json"
    if not described.is_file():
        raise ConfigError(f"{folder}: has no experiment.json; 'aioengine lab run' writes one into --out")
    experiment = Experiment.read(described)
    with tempfile.TemporaryDirectory() as temporary:
        new = Path(temporary) / "run" if out is None else out
        run(experiment, new)
        pairs = {name: _difference(described.with_name(name), new / name) for name in RESULTS}
        before, now = read_json(described), read_json(new / "experiment.json")
    changed = _changed(before.get("provenance"), now.get("provenance"))
    if before.get("costs") != now.get("costs"):
        changed.append("costs: is another")
    return Rerun({name: text for name, text in pairs.items() if text is not None}, changed)


def _difference(before: Path, now: Path) -> str | None:
    """Return the first line that differs; None if the files are the same."""
    if not before.is_file():
        return "is not there"
    lines = (path.read_bytes().decode(errors="surrogateescape").split("\n") for path in (before, now))
    for number, (old, new) in enumerate(zip_longest(*lines, fillvalue="(no line)"), 1):
        if old != new:
            return f"line {number} was {old[:200]!r} and is {new[:200]!r}"
    return None


def _changed(before: Any, now: Any, name: str = "") -> list[str]:
    if isinstance(before, dict) and isinstance(now, dict):
        found = []
        for key in before.keys() | now.keys():
            found += _changed(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        return sorted(found)
    return [] if before == now else [f"{name}: was {before}, is {now}"]


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
