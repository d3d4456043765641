"""The number of threads, on machines made of files."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from aioengine.kernels.cpu.cores import ENV, Cores, find_cores


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="ascii")
    return root


def siblings(pairs: dict[int, str]) -> dict[str, str]:
    folder = "sys/devices/system/cpu"
    return {f"{folder}/cpu{n}/topology/thread_siblings_list": text for n, text in pairs.items()}


def test_two_threads_of_a_core_are_one(tmp_path: Path) -> None:
    root = write(tmp_path, siblings({0: "0,4", 1: "1,5", 4: "0,4", 5: "1,5"}))
    found = find_cores([0, 1, 4, 5], root)
    assert found == Cores(4, 2) and found.threads == 2
    assert find_cores([1, 5], root).threads == 1  # an affinity mask of one core
    assert find_cores([0, 5], root).threads == 2


def test_a_system_that_tells_nothing(tmp_path: Path) -> None:
    found = find_cores(range(3), tmp_path)
    assert found == Cores(3, 3) and found.threads == 3


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "150000 100000"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/cpu.max": "400000 100000"}, 4.0),
        (
            # A group is bound by those above it.
            {
                "proc/self/cgroup": "0::/a/b",
                "sys/fs/cgroup/a/cpu.max": "200000 100000",
                "sys/fs/cgroup/a/b/cpu.max": "800000 100000",
            },
            2.0,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": "max 100000"}, math.inf),
        (
            # Version 1, where the memory's group is another one.
            {
                "proc/self/cgroup": "4:memory:/m\n3:cpu,cpuacct:/box",
                "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000",
            },
            0.5,
        ),
        (
            {
                "proc/self/cgroup": "3:cpu:/",
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000",
            },
            math.inf,
        ),
        ({"proc/self/cgroup": "0::/", "sys/fs/cgroup/cpu.max": ""}, math.inf),
    ],
)
def test_the_quota_of_control_groups(tmp_path: Path, files: dict[str, str], quota: float) -> None:
    found = find_cores(range(8), write(tmp_path, files))
    assert found.quota == quota
    assert found.threads == max(1, math.floor(min(8, quota)))


def test_who_says_a_number_gets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Cores(logical=16, physical=8, quota=6.5)
    monkeypatch.delenv(ENV, raising=False)
    assert machine.chosen(16) == 6  # nobody did: it is torch's default
    assert machine.chosen(12) == 12  # torch.set_num_threads(12)
    monkeypatch.setenv(ENV, "16")
    assert machine.chosen(16) == 16
