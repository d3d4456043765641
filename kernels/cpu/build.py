"""Compiles the CPU kernels once for each machine, into a cache folder.

The library has a plain C interface and needs neither torch nor Python to be built: any C++ compiler with
OpenMP will do, in a few seconds. The cache's key covers the sources, the compiler and the flags, so a new
version, another compiler or another CPU gets a library of its own.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

logger = logging.getLogger("aioengine")

SOURCES = Path(__file__).parent / "src"
COMPILE_SECONDS = 300
"""It takes some 15 of one core's; more where others work too."""
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"),
)
SANITIZE = "AIOENGINE_CPU_SANITIZE"
"""Environment variable: 1 compiles with sanitizers, for tests. Their libraries must be preloaded."""
_SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g",
)
# By what the CPU must have: (name, CPU features, compiler flags), best first.
_LEVELS = (
    (
        "avx512_bf16",
        ("avx512_bf16", "avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
        ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni"),
    ),
    (
        "avx512_vnni",
        ("avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq"),
        ("-march=x86-64-v4", "-mavx512vnni"),
    ),
    ("avx512", ("avx512f", "avx512bw", "avx512vl", "avx512dq"), ("-march=x86-64-v4",)),
    ("avx2", ("avx2", "fma", "f16c", "bmi2"), ("-march=x86-64-v3",)),
)


class Unavailable(Exception):
    """The library cannot be had; the message says why and what would help."""


def compiled(level: str | None = None, *, extra_flags: Sequence[str] = ()) -> Path:
    """The compiled library. Compiles it (blocking, a few seconds) if the cache has it not.

    ``level`` is one of :func:`levels`, by default the best; ``extra_flags`` are for the compiler.
    Raises Unavailable.
    """
    compiler = _compiler()
    supported = levels()
    level = level or next(iter(supported))
    sanitizers = _SANITIZERS if os.environ.get(SANITIZE) == "1" else ()
    command = [compiler, *FLAGS, *supported[level], *sanitizers, *extra_flags]
    sources = sorted(SOURCES.glob("*.cpp"))
    path = _cache_folder() / f"cpu-{level}-{_key(command, sources)}.so"
    if not path.exists():
        logger.info("compiling the CPU kernels (%s) with %s, once", level, compiler)
        _compile(command, sources, path)
    return path


def obstacle() -> str | None:
    """Why there will be no library, as far as that is known without compiling it."""
    try:
        _compiler()
    except Unavailable as error:
        return str(error)
    return None


def levels() -> dict[str, tuple[str, ...]]:
    """The instruction sets that the kernels can be compiled for here, best first, with compiler flags."""
    found: dict[str, tuple[str, ...]] = {}
    if platform.machine() in ("x86_64", "AMD64"):
        features = _cpu_features()
        found = {name: flags for name, needed, flags in _LEVELS if features.issuperset(needed)}
    return {**found, "generic": ()}


def _cpu_features() -> set[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("flags"):
                    return set(line.split(":", 1)[1].split())
    except OSError:
        pass
    return set()


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise Unavailable(f"no C++ compiler is found ({', '.join(names)}); install g++ or clang++, or set CXX")


def _key(command: Sequence[str], sources: Sequence[Path]) -> str:
    digest = hashlib.sha256("\0".join(command).encode())
    try:
        digest.update(subprocess.run([command[0], "--version"], capture_output=True, check=False).stdout)
    except OSError as error:
        raise Unavailable(f"{command[0]} cannot be run: {error}") from error
    for file in (*sources, *sorted(SOURCES.glob("*.h"))):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()[:16]


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "aioengine" / "kernels"


def _compile(command: list[str], sources: Sequence[Path], path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            objects = [Path(folder) / f"{source.stem}.o" for source in sources]
            # The largest first, or it would be waited for alone.
            pairs = sorted(zip(sources, objects, strict=True), key=lambda pair: -pair[0].stat().st_size)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                commands = ([*command, "-c", str(source), "-o", str(to)] for source, to in pairs)
                for _ in pool.map(_run_compiler, commands):
                    pass
            built = Path(folder) / "kernels.so"
            _run_compiler([*command, *map(str, objects), "-o", str(built)])
            os.replace(built, path)  # whole or not at all, whoever else compiles
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the kernels cannot be compiled into {path.parent}: {error}") from error


def _run_compiler(command: Sequence[str]) -> None:
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        errors="replace",
        timeout=COMPILE_SECONDS,
        check=False,
        env={name: value for name, value in os.environ.items() if name != "LD_PRELOAD"},
    )
    if done.returncode != 0:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise Unavailable(f"{command[0]} failed with status {done.returncode}: {first}")
