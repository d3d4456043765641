"""A wheel with compiled kernels needs no compiler where it is installed; a cache must be executable."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from aioengine.kernels.cpu import build

ROOT = Path(__file__).resolve().parents[2]
LEVEL = next(iter(build.levels()))

pytestmark = pytest.mark.skipif(
    build.obstacle() is not None, reason="needs a C++ compiler, to make what is then used without"
)


def copy_image_context(to: Path) -> None:
    """Copy what an image is built from: what ``.dockerignore`` lets through of the sources."""
    first, *others = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()[1:]
    assert first == "*", "all is left out but what is named"
    left_out = shutil.ignore_patterns(*(line.removeprefix("**/") for line in others if line[0] != "!"))
    for name in (line[1:] for line in others if line[0] == "!"):
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, to / name, ignore=left_out)
        else:
            shutil.copy(ROOT / name, to / name)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the level of this machine, as an image's build makes it; its library comes from the cache the
    second time."""
    folder, source = tmp_path_factory.mktemp("dist"), tmp_path_factory.mktemp("source")
    copy_image_context(source)
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder)]
    environment = {**os.environ, "AIOENGINE_PREBUILD_KERNELS": LEVEL}
    done = subprocess.run(
        [*command, str(source)], capture_output=True, text=True, check=False, env=environment
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (made,) = folder.glob("*.whl")
    return made


@pytest.mark.slow
def test_a_wheel_runs_without_a_compiler(wheel: Path, tmp_path: Path) -> None:
    assert "-py3-none-linux_" in wheel.name, "it is for any Python, and for one platform"
    site, cache = tmp_path / "site", tmp_path / "cache"
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(site)
        libraries = [name for name in packed.namelist() if ".so" in name]
    assert len(libraries) == 1 and libraries[0].startswith(f"aioengine/kernels/cpu/prebuilt/cpu-{LEVEL}-")
    program = (
        "from aioengine.kernels.cpu import build, shared_library\n"
        "shared_library.load()\n"
        "print(build.compiled(), build.obstacle(), len(shared_library.openmp_runtimes()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={"PATH": "/nowhere", "PYTHONPATH": str(site), "XDG_CACHE_HOME": str(cache)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / libraries[0]), "None", "1"], "torch's OpenMP, and no second one"
    assert not cache.exists(), "nothing was compiled"


@pytest.mark.slow
def test_a_prebuilt_library_of_other_sources_is_not_used(
    wheel: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with zipfile.ZipFile(wheel) as packed:
        packed.extractall(tmp_path)
    folder = tmp_path / "aioengine" / "kernels" / "cpu"
    monkeypatch.setattr(build, "PREBUILT", folder / "prebuilt")
    assert build.compiled().parent == folder / "prebuilt"
    monkeypatch.setattr(build, "SOURCES", folder / "src")
    (folder / "src" / "ops.h").write_text("// changed\n", encoding="utf-8")
    assert build.prebuilt(LEVEL) is None


def test_levels_are_those_of_the_architecture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'avx1024' is no level of \w+; these are: .*generic"):
        build.prebuild(tmp_path, ["avx1024"])


def test_a_library_for_another_architecture_takes_a_compiler_for_it(tmp_path: Path) -> None:
    machine = "riscv64" if platform.machine() != "riscv64" else "aarch64"
    with pytest.raises(ValueError, match=f"compiles for .*; set CXX to a compiler for {machine}"):
        build.prebuild(tmp_path, machine=machine)
