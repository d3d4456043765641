"""Finds the compiled CPU kernels: prebuilt in the package, or compiled once for each machine, into a cache.

The library has a plain C interface and needs neither torch nor Python to be built: any C++ compiler with
OpenMP will do, in a few seconds. The cache's key covers the sources, the compiler and the flags, so a new
version, another compiler or another CPU gets a separate library.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import hashlib
import itertools
import logging
import os
import platform
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

logger = logging.getLogger("aioengine")

SOURCES = Path(__file__).parent / "src"
PREBUILT = Path(__file__).parent / "prebuilt"
"""Libraries of a wheel that was built for this platform (``make wheel``)."""
COMPILE_SECONDS = 300
"""Time limit of one compilation, which takes less than 20 s on a free core."""
FLAGS = (
    *("-std=c++17", "-O3", "-shared", "-fPIC", "-fopenmp", "-fvisibility=hidden"),
    *("-ffp-contract=off", "-fno-math-errno", "-Wno-psabi"),
)
SANITIZE = "AIOENGINE_CPU_SANITIZE"
"""Environment variable: 1 compiles with sanitizers, for tests. Their libraries must be preloaded."""
FORCED = "AIOENGINE_CPU_LEVEL"
"""Environment variable: name of the level to use in place of the best one."""
TILES = "amx"
"""Level whose registers a process may use only once Linux has granted them."""
_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA = 158, 0x1023, 18
_RUNTIME = ("-static-libstdc++", "-static-libgcc")
"""Flags that link the C++ runtime in: where a library is loaded there may be an older one, on another machine
or in an environment that has its own. OpenMP is not linked in, because it must be torch's."""
_SANITIZERS = (
    "-fsanitize=address,undefined",
    "-fno-sanitize-recover=all",
    "-fno-omit-frame-pointer",
    "-O1",
    "-g",
)
_AVX512_BF16 = {"avx512_bf16", "avx512_vnni", "avx512f", "avx512bw", "avx512vl", "avx512dq"}
_AVX512_BF16_FLAGS = ("-march=x86-64-v4", "-mavx512bf16", "-mavx512vnni")
# Levels by architecture, best first: name -> (CPU features that it needs, compiler flags).
_X86 = {
    TILES: (
        {*_AVX512_BF16, "amx_tile", "amx_bf16", "amx_int8"},
        (*_AVX512_BF16_FLAGS, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mprfchw"),
    ),
    "avx512_bf16": (_AVX512_BF16, _AVX512_BF16_FLAGS),
    "avx512_vnni": (_AVX512_BF16 - {"avx512_bf16"}, ("-march=x86-64-v4", "-mavx512vnni")),
    "avx512": ({"avx512f", "avx512bw", "avx512vl", "avx512dq"}, ("-march=x86-64-v4",)),
    "avx2": ({"avx2", "fma", "f16c", "bmi2"}, ("-march=x86-64-v3",)),
    # Without AVX2 each vector becomes four or more, which takes minutes to optimize.
    "generic": (set[str](), ("-O1",)),
}
_ARM = {
    "neon_bf16": ({"asimddp", "i8mm", "bf16"}, ("-march=armv8.2-a+dotprod+i8mm+bf16",)),
    "neon_i8mm": ({"asimddp", "i8mm"}, ("-march=armv8.2-a+dotprod+i8mm",)),
    "neon_dotprod": ({"asimddp"}, ("-march=armv8.2-a+dotprod",)),
    "generic": (set[str](), ()),
}
_OTHERS: dict[str, tuple[set[str], tuple[str, ...]]] = {"generic": (set(), ())}
FOR_TESTS = {"stand_in": ("-O1", "-DAIO_TILES_STAND_IN")}
"""Levels that run anywhere and are chosen by name only: the kernels for tile registers, with these in plain
C++."""


class Unavailable(Exception):
    """The library is not available; the message says why and what would help."""


def compiled(level: str | None = None, *, extra_flags: Sequence[str] = (), use_prebuilt: bool = True) -> Path:
    """Return the compiled library. Compiles it (blocking) if neither the package nor the cache has it.

    ``level`` is one of :func:`levels`, by default the best, or of ``FOR_TESTS``; ``extra_flags`` are for the
    compiler. With the environment variable ``CXX`` no prebuilt library is used. Raises Unavailable.
    """
    supported = {**levels(), **FOR_TESTS}
    level = level or next(iter(supported))
    found = prebuilt(level) if use_prebuilt and not extra_flags else None
    if found is not None:
        return found
    return _cached(level, supported[level], extra_flags)


def prebuilt(level: str) -> Path | None:
    """Return the package's prebuilt library, if it has one made from these sources."""
    if os.environ.get("CXX") or os.environ.get(SANITIZE) == "1" or level in FOR_TESTS:
        return None
    path = PREBUILT / _prebuilt_name(level, platform.machine())
    return path if path.exists() else None


def prebuild(folder: Path, names: Sequence[str] | None = None, machine: str = "") -> None:
    """Compile the library for other machines, once for each of the levels ``names`` (None: all of them) of
    the architecture ``machine`` ("": this one's), into ``folder``. For another architecture ``CXX`` must be
    a compiler for it. Raises Unavailable, and ValueError for an unknown level."""
    machine = machine or platform.machine()
    if machine != platform.machine():
        _check_target(machine)
    known = _levels_of(machine)
    for name in names if names is not None else known:
        if name not in known:
            raise ValueError(f"{name!r} is no level of {machine}; these are: {', '.join(known)}")
        logger.info("compiling the CPU kernels (%s) for a wheel", name)
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(_cached(name, known[name][1], links=[_RUNTIME]), folder / _prebuilt_name(name, machine))


def _cached(
    level: str,
    flags: Sequence[str],
    extra_flags: Sequence[str] = (),
    links: Sequence[Sequence[str]] = (_RUNTIME, ()),
) -> Path:
    """Return the library, linked with the first of ``links`` with which the compiler can do it: not every one
    has the runtime as an archive."""
    compiler = _compiler()
    command = [compiler, *FLAGS, *flags, *extra_flags]
    if os.environ.get(SANITIZE) == "1":
        command, links = [*command, *_SANITIZERS], [()]
    version = _version(compiler)
    paths = {_cache_folder() / _library_name(level, [*command, *link, version]): link for link in links}
    found = next((path for path in paths if path.exists()), None)
    if found is None:
        logger.info("compiling the CPU kernels (%s) with %s, once", level, compiler)
        found = _compile(command, paths)
    return found


def obstacle() -> str | None:
    """Return why there will be no library, as far as that is known without compiling it."""
    if prebuilt(next(iter(levels()))) is not None:
        return None
    try:
        _compiler()
    except Unavailable as error:
        return str(error)
    return None


def levels() -> dict[str, tuple[str, ...]]:
    """Return the instruction sets that the kernels can be compiled for here, best first, with compiler
    flags. Raises ValueError if the variable AIOENGINE_CPU_LEVEL names another one."""
    features, forced = cpu_features(), os.environ.get(FORCED)
    found = runnable(platform.machine(), features)
    if not forced:
        return found
    if forced not in found:
        refused = tiles_refused() if forced == TILES and features.issuperset(_X86[TILES][0]) else None
        raise ValueError(
            f"{FORCED}={forced}: this machine cannot run that level"
            + (f" ({refused})" if refused else "")
            + f"; it can run: {', '.join(found)}"
        )
    return dict(itertools.dropwhile(lambda item: item[0] != forced, found.items()))


def runnable(machine: str, features: Collection[str]) -> dict[str, tuple[str, ...]]:
    """Return the levels of a CPU of this architecture with these features, best first, with compiler
    flags."""
    return {
        name: flags
        for name, (needs, flags) in _levels_of(machine).items()
        if needs.issubset(features) and (name != TILES or tiles_refused() is None)
    }


def better_level() -> str | None:
    """Return which better level this CPU has than the one that runs, and why that does not; None if there is
    none."""
    best, features = next(iter(levels())), cpu_features()
    for name, (needs, _) in _levels_of(platform.machine()).items():
        if name == best:
            break
        if needs.issubset(features):
            refused = tiles_refused() if name == TILES else None
            return f"{name}, but {refused or f'{FORCED} is {best}'}"
    return None


def described_level() -> str:
    """Return the level that runs, and a better one of this CPU that does not."""
    best, better = next(iter(levels())), better_level()
    return best if better is None else f"{best} (this CPU has {better})"


@functools.cache
def tiles_refused() -> str | None:
    """Ask Linux, once for the process, for the use of tile registers, whose state takes 8 KiB of each thread;
    return why it refuses. What it grants, threads and forked processes have too."""
    try:
        system_call = ctypes.CDLL(None, use_errno=True).syscall
        refused = system_call(_ARCH_PRCTL, _REQUEST_PERMISSION, _TILE_DATA) != 0
    except (AttributeError, OSError, TypeError) as error:  # no C library that could be asked
        return f"the system cannot be asked for tile registers: {error}"
    if not refused:
        return None
    code = ctypes.get_errno()
    hint = {
        errno.ENOSPC: "a thread's alternate signal stack has no room for them: load the engine before",
        errno.EINVAL: "Linux is older than 5.16, or a virtual machine hides them",
        errno.EPERM: "a seccomp filter forbids arch_prctl",
        errno.ENOSYS: "a seccomp filter forbids arch_prctl",
    }.get(code, "arch_prctl failed")
    return f"Linux does not grant tile registers: {os.strerror(code)} ({hint})"


def _levels_of(machine: str) -> Mapping[str, tuple[set[str], tuple[str, ...]]]:
    """List the levels of an architecture, for all of its CPUs."""
    return {"x86_64": _X86, "AMD64": _X86, "aarch64": _ARM, "arm64": _ARM}.get(machine, _OTHERS)


def cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> set[str]:
    """Return the CPU's features as Linux names them: its flags, or the an Arm CPU's hardware capabilities."""
    with suppress(OSError), open(cpuinfo, encoding="utf-8") as file:
        for line in file:
            if line.startswith(("flags", "Features")):
                return set(line.split(":", 1)[1].split())
    return set()


def _compiler() -> str:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    for name in names:
        found = shutil.which(name)
        if found is not None:
            return found
    raise Unavailable(f"no C++ compiler is found ({', '.join(names)}); install g++ or clang++, or set CXX")


def _check_target(machine: str) -> None:
    """Raise ValueError if the compiler compiles for another architecture than ``machine``."""
    compiler = _compiler()
    said = subprocess.run([compiler, "-dumpmachine"], capture_output=True, text=True, check=False).stdout
    if said.partition("-")[0] != machine:
        target = said.strip() or "an unknown machine"
        raise ValueError(f"{compiler} compiles for {target}; set CXX to a compiler for {machine}")


def _prebuilt_name(level: str, machine: str) -> str:
    return _library_name(level, [*FLAGS, *_levels_of(machine)[level][1]])


def _library_name(level: str, made_with: Sequence[str]) -> str:
    """Return the name of a library's file, which tells what it is made with, and of which sources."""
    digest = hashlib.sha256("\0".join(made_with).encode())
    for file in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return f"cpu-{level}-{digest.hexdigest()[:16]}.so"


def _version(compiler: str) -> str:
    try:
        return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    except OSError as error:
        raise Unavailable(f"{compiler} cannot be run: {error}") from error


def _cache_folder() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "aioengine" / "kernels"


def _compile(command: list[str], paths: Mapping[Path, Sequence[str]]) -> Path:
    """Make the first of ``paths`` that the compiler can link with these flags, and return it."""
    cache, sources = next(iter(paths)).parent, sorted(SOURCES.glob("*.cpp"))
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as folder:
            objects = [Path(folder) / f"{source.stem}.o" for source in sources]
            # The largest file first; otherwise the others would end long before it.
            pairs = sorted(zip(sources, objects, strict=True), key=lambda pair: -pair[0].stat().st_size)
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                commands = ([*command, "-c", str(source), "-o", str(to)] for source, to in pairs)
                for _ in pool.map(partial(_run_compiler, folder), commands):
                    pass
            built = Path(folder) / "kernels.so"
            attempts = list(paths.items())
            while True:
                path, link = attempts.pop(0)
                try:
                    _run_compiler(folder, [*command, *link, *map(str, objects), "-o", str(built)])
                except Unavailable:
                    if not attempts:
                        raise
                else:
                    os.replace(built, path)  # atomic, even if other processes compile, too
                    return path
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the kernels cannot be compiled into {cache}: {error}") from error


def _run_compiler(folder: str, command: Sequence[str]) -> None:
    """Run the compiler. ``folder`` takes its temporary files, because ``/tmp`` might not be writable."""
    with subprocess.Popen(
        command,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        env={**{name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}, "TMPDIR": folder},
        start_new_session=True,
    ) as driver:
        try:
            _, said = driver.communicate(timeout=COMPILE_SECONDS)
        except BaseException:
            # Ending the driver alone would leave the compiler itself running, for minutes.
            with suppress(ProcessLookupError):
                os.killpg(driver.pid, signal.SIGKILL)
            raise
    if driver.returncode != 0:
        lines = said.split("\n")
        first = next((line for line in lines if "error" in line), lines[0] or "no message")
        raise Unavailable(f"{command[0]} failed with status {driver.returncode}: {first}")
