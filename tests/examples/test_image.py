"""The example's image, built with buildah and run, which takes minutes and so has to be asked for.

``AIOENGINE_TEST_BASE`` names a base image that buildah has (docs: examples/deploy/README.md), or
``AIOENGINE_TEST_IMAGE`` an image that was built before.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.tiny_chat import build_chat_model

SOURCE = Path(__file__).resolve().parents[2]
BASE, IMAGE = os.environ.get("AIOENGINE_TEST_BASE"), os.environ.get("AIOENGINE_TEST_IMAGE")
pytestmark = [
    pytest.mark.skipif(shutil.which("buildah") is None, reason="there is no buildah"),
    pytest.mark.skipif(not (BASE or IMAGE), reason="AIOENGINE_TEST_BASE names no base image to build on"),
]
READ_ONLY = """
root=$1
ip link set lo up
mount --bind "$root" "$root"
mount --bind "$2" "$root/mnt"
mount --rbind /dev "$root/dev"
mount -t proc proc "$root/proc"
mount -t tmpfs tmpfs "$root/tmp"
mount -t tmpfs -o uid=65532,gid=65532 tmpfs "$root/cache"
mount -o remount,bind,ro "$root"
mount -o remount,bind,ro "$root/mnt"
shift 2
exec chroot --userspec=65532:65532 "$root" env -i "$@"
"""
"""Runs a program in the image's root (1), which is read-only, with a folder (2) as /mnt, and with no network
but a loopback interface. The other arguments are its environment and its words."""

CLIENT = """
"$@" & server=$!
trap 'kill -KILL $server' EXIT
python - <<'end'
import json, time, urllib.error, urllib.request

def ask(path, **body):
    data = json.dumps(body).encode() if body else None
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request("http://127.0.0.1:8000" + path, data, headers)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.read().decode()

for _ in range(600):
    try:
        ask("/ready")
        break
    except (urllib.error.URLError, OSError):
        time.sleep(0.2)
print(ask("/v1/completions", model="tiny", prompt="Hi", max_tokens=4, ignore_eos=True))
print(ask("/metrics"))
end
touch /opt/x /mnt/x 2>/dev/null && echo written
kill -TERM $server
trap - EXIT
wait $server
echo "rc=$?"
find /cache -type f | sed 's/^/in the cache: /'
"""
"""Starts the server that its words name, asks it, and ends it."""


def buildah(*arguments: str) -> str:
    done = subprocess.run(["buildah", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    image = IMAGE or "localhost/aioengine:tested"
    if not IMAGE:
        file = SOURCE / "examples" / "deploy" / "Dockerfile"
        options = ["--isolation", "chroot", "--pull=never", "--build-arg", f"BASE={BASE}"]
        buildah("build", *options, "-f", str(file), "-t", image, str(SOURCE))
    name = buildah("from", "--pull=never", image).strip()
    yield name
    buildah("rm", name)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts need root")
def test_it_serves_with_a_read_only_root_and_without_a_network(container: str, tmp_path: Path) -> None:
    for file in build_chat_model(tmp_path / "tiny").iterdir():
        file.chmod(0o644)  # weights are written for their owner alone
    config = json.loads(buildah("inspect", container))["OCIv1"]["config"]
    serve = [*config["Entrypoint"], *config["Cmd"], "--model", "/mnt/tiny", "--max-model-len", "500"]
    script = ["unshare", "--mount", "--net", "sh", "-e", "-c", READ_ONLY, "sh"]
    inside = [*config["Env"], "sh", "-c", CLIENT, "sh", *serve]
    root = buildah("mount", container).strip()
    tmp_path.chmod(0o755)
    done = subprocess.run(
        [*script, root, str(tmp_path), *inside], capture_output=True, text=True, check=False
    )
    said = done.stdout + done.stderr
    assert '"completion_tokens":4' in done.stdout.replace(" ", ""), said[-3000:]
    assert 'aioengine_engine_state{engine="default",state="ready"} 1' in done.stdout, said[-3000:]
    kernels = {part for part in done.stdout.split('"') if part.startswith("cpu-")}
    assert kernels, "it does not run on the prebuilt kernels"
    assert "rc=0" in done.stdout.splitlines(), said[-3000:]
    assert "written" not in done.stdout.splitlines()
    assert "in the cache: " not in done.stdout, "it compiled what should have been prebuilt"
