"""Real clients against ``aioengine serve``: what each is known to send, tried with the client itself.

``make clients`` installs the clients into environments of their own and runs this with the project's. A table
says what was found; the exit code is 1 if a check failed, or a client could not be run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from aioengine.model.files.resolve import resolve_model

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
MODEL = "smollm2-135m"
ADAPTERS = ("sql", "json", "sentiment", "pirate")
START_SECONDS = 300
"""The kernels may have to be compiled."""
CLIENT_SECONDS = 1800
"""For a file of checks, also where other programs take most of the processors' time."""
AT_HOME = {
    "ANONYMIZED_TELEMETRY": "False",
    "DO_NOT_TRACK": "1",
    "LANGCHAIN_TRACING_V2": "false",
    "LITELLM_LOCAL_MODEL_COST_MAP": "True",
    "OPENAI_AGENTS_DISABLE_TRACING": "1",
}
"""The clients ask nobody but the server."""


@contextlib.contextmanager
def served(log: Path) -> Iterator[str]:
    """The address of a server with the example adapters, in float32, so that log-probabilities can be
    compared."""
    modules = [f"{name}={ROOT / 'examples' / 'adapters' / name}" for name in ADAPTERS]
    command = [sys.executable, "-m", "aioengine", "serve", "--model", MODEL, "--port", "0"]
    command += ["--dtype", "float32"]
    with log.open("wb") as file:
        process = subprocess.Popen([*command, "--lora-modules", *modules], stderr=file)
    try:
        deadline = time.monotonic() + START_SECONDS
        while (found := re.search(r"serving at (http://\S+)", log.read_text())) is None:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the server did not start:\n{log.read_text()}")
            time.sleep(0.2)
        yield found[1]
    finally:
        process.terminate()
        process.wait()


def outcomes(command: list[str], environment: dict[str, str]) -> Iterator[dict[str, Any]]:
    """What a file of checks reports. What it writes beside is shown if it fails as a whole."""
    try:
        ran = subprocess.run(
            command,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            cwd=HERE,
            timeout=CLIENT_SECONDS,
        )
        code, output, errors = ran.returncode, ran.stdout, ran.stderr
    except subprocess.TimeoutExpired as late:
        told = late.stdout or b""  # bytes, whatever "text" says
        output = told.decode(errors="replace") if isinstance(told, bytes) else told
        code, errors = -1, f"took more than {CLIENT_SECONDS} s"
    for line in output.splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            row = json.loads(line)
            if isinstance(row, dict) and "check" in row:
                yield row
    if code != 0:
        failed = {"client": command[-1], "version": "", "check": "runs", "seconds": 0}
        yield {**failed, "error": errors.strip()[-300:]}


def show(rows: list[dict[str, Any]]) -> None:
    width = [max(len(str(row[column])) for row in rows) for column in ("client", "version", "check")]
    for row in rows:
        cells = (
            str(row[column]).ljust(w) for column, w in zip(("client", "version", "check"), width, strict=True)
        )
        print(
            "  ".join(cells), f"{row['seconds']:6.1f} s", "ok" if row["error"] is None else "FAILED", sep="  "
        )
        if row["error"] is not None:
            print(f"    {row['error']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", required=True, help="of the environment that the clients are in")
    parser.add_argument("--node-modules", help="folder of the clients in JavaScript")
    parser.add_argument("--only", help="part of the name of a file of checks")
    arguments = parser.parse_args()
    folder = str(resolve_model(MODEL))
    commands = [[arguments.python, name] for name in sorted(p.name for p in HERE.glob("check_*.py"))]
    if arguments.node_modules and shutil.which("node"):
        commands.append(["node", "check_node.mjs"])
    else:
        print("there is no node: the clients in JavaScript are left out", file=sys.stderr)
    if arguments.only:
        commands = [command for command in commands if arguments.only in command[-1]]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        reference, log = Path(temporary, "reference.json"), Path(temporary, "serve.log")
        if any("lm_eval" in command[-1] for command in commands):
            command = [sys.executable, "reference.py", folder, str(ROOT / "examples" / "adapters" / "sql")]
            offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
            reference.write_bytes(
                subprocess.run(command, cwd=HERE, env=offline, capture_output=True, check=True).stdout
            )
        with served(log) as url:
            environment = AT_HOME | {
                "AIOENGINE_URL": url,
                "AIOENGINE_MODEL_FOLDER": folder,
                "AIOENGINE_REFERENCE": str(reference),
                "AIOENGINE_NODE_MODULES": str(arguments.node_modules or ""),
            }
            for command in commands:
                rows += outcomes(command, environment)
    if not rows:
        print("no check was run", file=sys.stderr)
        return 1
    show(rows)
    failed = [row for row in rows if row["error"] is not None]
    print(f"{len(rows) - len(failed)} of {len(rows)} checks passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
