"""From the ``model`` of a configuration to files on disk, and from those to a spec."""

from __future__ import annotations

import difflib
from pathlib import Path

from aioengine.errors import ConfigError
from aioengine.model.spec import ModelSpec

EMBEDDED_MODEL = "smollm2-135m"
"""The name that stands for the embedded model in ``EngineConfig.model``."""


def resolve_model(model: str) -> Path:
    """The folder or GGUF file that ``model`` names.

    A path wins over a name. "smollm2-135m" is the embedded default; "org/name" is looked up on the
    Hugging Face Hub when ``huggingface_hub`` is installed (offline, its cache is enough).

    Raises ConfigError if there is nothing of this name.
    """
    path = Path(model).expanduser()
    if path.exists():
        return path
    if model == EMBEDDED_MODEL:
        from aioengine.model.embedded import embedded_model_dir  # needs gguf

        return embedded_model_dir()
    if model.count("/") == 1 and not model.startswith((".", "/", "~")):
        return _from_hub(model)
    close = difflib.get_close_matches(model, [EMBEDDED_MODEL], n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ConfigError(
        f"model={model!r}: no such folder or file{hint}; give a Hugging Face model folder, a .gguf file, "
        f"{EMBEDDED_MODEL!r}, or a Hub id such as 'org/name'"
    )


def _from_hub(model: str) -> Path:
    try:
        from huggingface_hub import snapshot_download  # optional
    except ImportError:
        raise ConfigError(
            f"model={model!r}: no such folder; to fetch it from the Hugging Face Hub, "
            "pip install 'aioengine[hub]'"
        ) from None
    try:
        patterns = ["*.safetensors", "*.json", "*.jinja"]
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # the hub raises many unrelated types
        raise ConfigError(
            f"model={model!r}: no such folder, and not to be had from the Hub: {error}"
        ) from error


def read_spec(path: Path) -> ModelSpec:
    """The spec of a model folder or GGUF file, without reading weights."""
    if path.suffix == ".gguf":
        from aioengine.model import gguf  # optional dependency

        return gguf.read_spec(path)
    from aioengine.model import hf_config  # siblings are imported when needed

    return hf_config.read_spec(path)
