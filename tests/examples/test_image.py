"""The example's image, built with buildah and run, which takes minutes and so has to be asked for.

``AIOENGINE_TEST_BASE`` names a base image that buildah has (docs: examples/deploy/README.md), or
``AIOENGINE_TEST_IMAGE`` an image that was built before.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from aioengine import __version__

SOURCE = Path(__file__).resolve().parents[2]
BASE, IMAGE = os.environ.get("AIOENGINE_TEST_BASE"), os.environ.get("AIOENGINE_TEST_IMAGE")
pytestmark = [
    pytest.mark.skipif(shutil.which("buildah") is None, reason="there is no buildah"),
    pytest.mark.skipif(not (BASE or IMAGE), reason="AIOENGINE_TEST_BASE names no base image to build on"),
]
Run = Callable[[str], subprocess.CompletedProcess[str]]


def buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """Runs a shell command in a container of the image, as its user."""
    image = IMAGE or "localhost/aioengine:tested"
    if not IMAGE:
        file = SOURCE / "examples" / "deploy" / "Dockerfile"
        options = ["--isolation", "chroot", "--pull=never", "--build-arg", f"BASE={BASE}"]
        buildah("build", *options, "-f", str(file), "-t", image, str(SOURCE))
    name = buildah("from", "--pull=never", image).strip()

    def command(text: str) -> subprocess.CompletedProcess[str]:
        words = ["buildah", "run", "--isolation", "chroot", name, "--", "sh", "-c", text]
        return subprocess.run(words, capture_output=True, text=True, check=False)

    yield command
    buildah("rm", name)


def test_it_runs_the_program_as_its_user(run: Run) -> None:
    done = run("id -u; id -g; aioengine --version")
    assert done.stdout.split() == ["65532", "65532", __version__], done.stderr


def test_kernels_for_every_level_are_in_it(run: Run) -> None:
    done = run("find /opt/aioengine -path '*aioengine*' -name '*.so' | wc -l")
    assert int(done.stdout) > 1, done.stderr


@pytest.mark.parametrize(("place", "writable"), [("/opt/x", False), ("/etc/x", False), ("/cache/x", True)])
def test_it_writes_to_its_cache_only(run: Run, place: str, writable: bool) -> None:
    assert (run(f"touch {place}").returncode == 0) == writable
