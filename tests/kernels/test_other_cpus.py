"""The CPU library on other architectures: its levels, and, where a cross compiler is, what comes of them."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from aioengine.kernels.cpu import build

COMPILER, EMULATOR = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
PROGRAM = Path(__file__).with_name("other_cpu.cpp")
CORES = {
    "generic": ("cortex-a72", "fp asimd evtstrm aes pmull sha1 sha2 crc32"),
    "neon_dotprod": ("neoverse-n1", "fp asimd atomics fphp asimdhp asimdrdm lrcpc dcpop asimddp ssbs"),
    "neon_i8mm": ("neoverse-v1", "fp asimd atomics asimdhp asimddp sve i8mm"),
    "neon_bf16": ("neoverse-v1", "fp asimd atomics asimdhp asimddp sve i8mm bf16 dgh"),
}
"""Level -> an emulated core that can run it, and what Linux says of one whose best it is."""


def test_no_instructions_of_unknown_cpus_are_asked_for() -> None:
    assert build.runnable("riscv64", {"asimddp", "avx2"}) == {"generic": ()}


def test_levels_go_by_what_linux_says_of_the_cpu(tmp_path: Path) -> None:
    cpuinfo = tmp_path / "cpuinfo"
    names = list(CORES)
    for level, (_, features) in CORES.items():
        cpuinfo.write_text(f"processor\t: 0\nBogoMIPS\t: 100.00\nFeatures\t: {features}\n")
        found = build.runnable("aarch64", build.cpu_features(cpuinfo))
        assert list(found) == names[: names.index(level) + 1][::-1]
    assert build.cpu_features(tmp_path / "none") == set()


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None, reason="needs aarch64-linux-gnu-g++ (Debian: g++-aarch64-linux-gnu)")
@pytest.mark.parametrize("level", [level for level in CORES if level != "neon_i8mm"])  # a part of the last
def test_it_compiles_for_aarch64_and_computes_there(tmp_path: Path, level: str) -> None:
    """With the library's own flags, but not optimised, which takes minutes."""
    assert COMPILER is not None
    core, features = CORES[level]
    flags = [flag for flag in build.FLAGS if flag not in ("-O3", "-shared")]
    command = [
        COMPILER,
        *flags,
        *build.runnable("aarch64", set(features.split()))[level],
        "-O0",
        f"-I{build.SOURCES}",
    ]
    sources = [*sorted(build.SOURCES.glob("*.cpp")), PROGRAM]
    objects = [str(tmp_path / f"{source.stem}.o") for source in sources]
    program = tmp_path / "program"

    def run(*arguments: str) -> None:
        done = subprocess.run(arguments, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda source, to: run(*command, "-c", str(source), "-o", to), sources, objects))
    run(*command, "-static", *objects, "-o", str(program))
    if EMULATOR is None:
        return
    emulated = [EMULATOR, "-cpu", core, program]
    done = subprocess.run(emulated, capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout) == (0, "all as expected\n"), done.stdout + done.stderr
