"""The CPU library on aarch64: its flags there, and, where a cross compiler is, what comes of them."""

from __future__ import annotations

import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from aioengine.kernels.cpu import build

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
PROGRAM = Path(__file__).with_name("other_cpu.cpp")


def test_no_instructions_of_other_cpus_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for machine in ("aarch64", "arm64", "riscv64"):
        monkeypatch.setattr(platform, "machine", lambda name=machine: name)
        assert build.levels() == {"generic": ()}


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
def test_it_compiles_for_aarch64_and_computes_there(tmp_path: Path) -> None:
    """With the library's own flags, but neither optimised, which takes minutes, nor shared."""
    assert COMPILER is not None
    flags = [flag for flag in build.FLAGS if flag not in ("-O3", "-shared")]
    program = tmp_path / "program"
    sources = [*sorted(build.SOURCES.glob("*.cpp")), PROGRAM]
    command = [COMPILER, *flags, "-O0", "-static", *map(str, sources), "-o", str(program)]
    compiled = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert compiled.returncode == 0, compiled.stderr
    if EMULATOR is None:
        return
    done = subprocess.run([EMULATOR, program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "all as expected\n"), done.stdout + done.stderr
