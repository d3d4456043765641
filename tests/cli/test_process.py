"""How the program ends when it is interrupted, or its output goes nowhere. It runs in a process each time."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.cli_programs import run_program, run_script, run_shell
from support.selection import mostly_slow

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals and shells")

INTERRUPTED = "aioengine: interrupted\n"
SMALL = ["--kv-cache-memory", "8MiB", "--device", "cpu", "--max-tokens", "4", "--ignore-eos"]


WHILE_IMPORTING = """
import os, signal, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == watched:
            os.kill(os.getpid(), signal.SIGINT)

watched = sys.argv.pop(1)
sys.meta_path.insert(0, Interrupt())
from aioengine.__main__ import run
run()
"""


MODULES = ["aioengine.cli.main", "cyclopts", "uvloop", "aioengine.engine", "torch"]


@pytest.mark.parametrize("module", mostly_slow(MODULES, "torch"))
def test_interrupted_at_any_moment(module: str, model: Path) -> None:
    """As early as the first import of the command line, as late as the model's loading (torch)."""
    done = run_script(WHILE_IMPORTING, module, "generate", "Hello", "--model", str(model), *SMALL)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", INTERRUPTED)


def test_interrupted_while_a_thread_loads_that_would_not_end() -> None:
    script = """
import os, signal, threading
from aioengine.runtime import assemble

def build(*_):
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait()

assemble._build_here = build
from aioengine.__main__ import run
run()
"""
    done = run_script(script, "generate", "Hello")
    assert (done.returncode, done.stdout, done.stderr) == (130, "", INTERRUPTED)


STUBBORN = """
import asyncio, os, signal, sys
from aioengine.cli import process as module
from aioengine.cli.process import process
from aioengine.cli.loop import run

module.GRACE_SECONDS = float(sys.argv[1])
process.install()

async def stubborn():
    os.kill(os.getpid(), signal.SIGINT)
    try:
        await asyncio.Event().wait()
    finally:
        print("cleaning up", flush=True)
        if len(sys.argv) > 2:
            os.kill(os.getpid(), signal.SIGINT)
        while True:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                pass

run(stubborn())
"""


def test_a_second_interrupt_forces_the_end() -> None:
    done = run_script(STUBBORN, "100", "again")
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaning up\n", INTERRUPTED)


def test_cleaning_up_has_its_time_and_no_more() -> None:
    done = run_script(STUBBORN, "0.1")
    assert (done.returncode, done.stdout, done.stderr) == (130, "cleaning up\n", INTERRUPTED)


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As for a shell's background job."""
    script = """
import os, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from aioengine.cli.process import process
process.install()
os.kill(os.getpid(), signal.SIGINT)
process.exit(0)
"""
    assert run_script(script).returncode == 0


@pytest.mark.parametrize("command", ["policies", "generate"])
@pytest.mark.slow
def test_a_reader_that_has_gone(command: str, model: Path) -> None:
    """Nobody reads: quietly 141, as for any tool in a pipe. A batch stops, though nothing else ends it."""
    read, write = os.pipe()
    os.close(read)
    arguments: list[str] = []
    lines = '{"prompt": "Hello", "max_tokens": 400, "ignore_eos": true}\n' * 300
    if command == "generate":
        arguments = ["--model", str(model), *SMALL, "--max-num-seqs", "1"]
    try:
        done = run_program(command, *arguments, input=lines, stdout=write)
    finally:
        os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("redirection", "reason"), [(">&-", "Bad file descriptor"), ("> /dev/full", "No space left on device")]
)
@pytest.mark.parametrize("command", ["policies", "generate"])
def test_output_that_cannot_be_written(redirection: str, reason: str, command: str, model: Path) -> None:
    if redirection.endswith("/dev/full") and not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full")
    arguments = ["Hello", "--model", str(model), *SMALL] if command == "generate" else []
    done = run_shell(redirection, command, *arguments)
    assert done.returncode == 1
    assert done.stderr == f"aioengine: cannot write to standard output: {reason}\n"


def test_no_standard_error() -> None:
    done = run_shell("2>&-", "plan", "--model", "/nowhere")
    assert (done.returncode, done.stdout) == (2, "")


def test_no_standard_input() -> None:
    done = run_shell("<&-", "generate")
    assert done.returncode == 2
    assert "no JSON lines" in done.stderr and done.stderr.count("\n") == 1


def test_the_installed_program_is_the_module() -> None:
    """What ``pip install`` makes of the entry point must be the function that takes over signals."""
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="console_scripts", name="aioengine")
    assert entry.value == "aioengine.__main__:run"


INTERRUPT_ITSELF = """
import os, signal
from aioengine.cli.process import process
process.install()
os.kill(os.getpid(), signal.SIGINT)
"""


@pytest.mark.parametrize("full", [True, False])
def test_a_pipe_that_nobody_reads_holds_up_no_end(full: bool) -> None:
    read, write = os.pipe()
    os.set_blocking(write, False)
    while full:
        try:
            os.write(write, b"x" * 4096)
        except BlockingIOError:
            break
    os.set_blocking(write, True)
    ended = subprocess.run([sys.executable, "-c", INTERRUPT_ITSELF], stderr=write, timeout=60, check=False)
    os.close(write)
    with open(read, "rb") as pipe:
        said = pipe.read().lstrip(b"x")
    assert ended.returncode == 130
    assert said == (b"" if full else INTERRUPTED.encode())
