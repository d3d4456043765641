"""Finds the files of a configuration's ``model``, and reads their spec."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import msgspec

from aioengine.checks import nearest
from aioengine.errors import ConfigError
from aioengine.info import LoadProgress
from aioengine.model.files import hf_config
from aioengine.model.files.embedded import EMBEDDED_MODEL, embedded_model_dir
from aioengine.model.files.hf.config_file import NotNative
from aioengine.model.files.sources import HubId, download, explain, has_hub, parse_hub_id
from aioengine.model.spec import ModelImpl, ModelSpec, Quantization

_GIVE = f"give a Hugging Face model folder, a .gguf file, {EMBEDDED_MODEL!r}, or a Hub id such as 'org/name'"


def resolve_model(model: str, progress: LoadProgress | None = None) -> Path:
    """Return the folder or GGUF file that ``model`` names.

    A path takes precedence over a name. "smollm2-135m" is the embedded default; "org/name",
    "org/name@revision" or "hf:org/name" is looked up on the Hugging Face Hub when ``huggingface_hub`` is
    installed (offline, its cache is enough).

    Raises ConfigError if there is nothing of this name.
    """
    path = Path(model).expanduser()
    if path.is_file() and path.suffix != ".gguf":
        raise ConfigError(f"model={model!r}: a file, but not a .gguf file; {_GIVE}")
    if path.exists():
        return path
    if model == EMBEDDED_MODEL:
        return embedded_model_dir(progress)
    hub_id = parse_hub_id(model)
    if hub_id is not None:
        return _from_hub(model, hub_id)
    hint = nearest(model, [EMBEDDED_MODEL])
    raise ConfigError(f"model={model!r}: no such folder or file{hint}; {_GIVE}")


def _from_hub(model: str, hub_id: HubId) -> Path:
    if not has_hub():
        raise ConfigError(
            f"model={model!r}: no such folder; to fetch it from the Hugging Face Hub, "
            "pip install 'aioengine[hub]'"
        )
    try:
        return download(hub_id, ["*.safetensors", "*.json", "*.jinja"])
    except Exception as error:  # the hub raises many unrelated types
        raise ConfigError(f"model={model!r}: no such folder, and {explain(error)}") from error


def read_spec(path: Path, impl: ModelImpl = "auto", quantization: Quantization = "none") -> ModelSpec:
    """Read the spec of a model folder or GGUF file, without reading weights.

    ``impl`` says what is to run it: "native", "transformers" (then it is a
    :class:`~aioengine.model.generic.spec.GenericSpec`), or "auto", the first of them that can. With
    ``quantization``, the checkpoint's quantized weights are expanded, and quantized again. Raises ConfigError
    if the model cannot be run in this way.
    """
    if impl == "transformers":
        return _generic(path)
    if path.suffix == ".gguf":
        from aioengine.model.files import gguf  # imports torch

        spec = gguf.read_spec(gguf.GGUFFile(path))
    else:
        try:
            spec = hf_config.read_spec(path)
        except NotNative as error:
            if impl == "native":
                raise
            return _generic(path, error)
    return spec if quantization == "none" else msgspec.structs.replace(spec, packed={})


def _generic(path: Path, error: ConfigError | None = None) -> ModelSpec:
    """Return the spec for transformers, of a model that the native decoder does not run because of
    ``error``; None: it was not asked."""
    if importlib.util.find_spec("transformers") is None:
        why = "" if error is None else f"{error}; it may run with "
        raise ConfigError(
            f"{why}model_impl='transformers', which needs pip install 'aioengine[transformers]'"
        )
    from aioengine.model.generic import describe  # imports torch and transformers

    return describe.read_spec(path, None if error is None else str(error))
