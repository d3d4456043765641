"""Finds the class of transformers for a folder's configuration. Code that comes with a model never runs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from aioengine.checks import read_json
from aioengine.errors import ConfigError
from aioengine.model.files.folder import INDEX, SINGLE, tensors
from aioengine.model.files.stored import Stored
from aioengine.model.spec import MAX_LAYERS

_AUTO: Any = transformers.AutoModelForCausalLM
_OTHER = "Use a model whose class is part of transformers"


class TransformersClass:
    """The class that runs the model of a folder.

    Raises :class:`ConfigError` with the reason if transformers has no decoder for it.
    """

    def __init__(self, path: Path) -> None:
        if path.suffix == ".gguf":
            raise ConfigError(f"{path}: model_impl='transformers' reads model folders, no GGUF files")
        self.path = path
        raw = read_json(path / "config.json")
        try:
            self.config: Any = transformers.AutoConfig.from_pretrained(
                str(path), trust_remote_code=False, local_files_only=True
            )
        except Exception as error:  # whatever a configuration class makes of odd values
            known, code = raw.get("model_type") in transformers.CONFIG_MAPPING, ""
            if raw.get("auto_map"):
                code = " The folder names code of its own (auto_map), which is never run (trust_remote_code)."
            what = f"model_type={raw.get('model_type')!r}, architectures={raw.get('architectures')!r}"
            raise ConfigError(
                f"{self.path}/config.json: transformers {transformers.__version__} cannot make a model of it "
                f"({what}): {one_line(error)}.{code} {'Correct config.json' if known else _OTHER}"
            ) from error
        self._refuse(raw)

    def _refuse(self, raw: dict[str, Any]) -> None:
        """Refuse models that can never run here, before any probe."""
        where, kind = f"{self.path}/config.json", self.config.model_type
        if getattr(self.config, "is_encoder_decoder", False):
            raise ConfigError(
                f"{where}: {kind!r} is an encoder-decoder model; only decoder-only causal language "
                "models are served"
            )
        if raw.get("quantization_config") is not None:
            raise ConfigError(
                f"{where}: quantization_config: quantized checkpoints run natively only, not with "
                "model_impl='transformers' (docs/models.md has the families); use an unquantized checkpoint"
            )

    def no_keys_and_values(self, why: str) -> ConfigError:
        """Make the error for a model that caches something other than keys and values."""
        return ConfigError(
            f"{self.path}: {self.config.model_type!r} keeps more of its past than keys and values ({why}), "
            "which paged caches and batches of the engine cannot hold (state-space and hybrid models); use a "
            "model whose layers all attend"
        )

    @property
    def text_config(self) -> Any:
        return self.config.get_text_config(decoder=True)

    def on_meta(self) -> Any:
        """Return the model without memory for its weights. Raises ConfigError if it cannot be built."""
        layers = getattr(self.text_config, "num_hidden_layers", 0)
        if isinstance(layers, int) and layers > MAX_LAYERS:
            raise ConfigError(f"{self.path}/config.json: num_hidden_layers={layers}: must be <= {MAX_LAYERS}")
        try:
            with torch.device("meta"):
                model = _AUTO.from_config(self.config, trust_remote_code=False)
        except Exception as error:
            raise ConfigError(
                f"{self.path}: transformers {transformers.__version__} has no causal language model for "
                f"{self.config.model_type!r}: {one_line(error)}"
            ) from error
        return _quiet(model)

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """Return the model with its weights, which are read once, into their place.

        Raises ConfigError if they cannot be read or do not fit the configuration.
        """
        stored = tensors(self.path) if any((self.path / name).exists() for name in (SINGLE, INDEX)) else {}
        logging: Any = transformers.utils.logging
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            with torch.device(device):
                model, report = _AUTO.from_pretrained(
                    str(self.path),
                    config=self.config,
                    dtype=dtype,
                    trust_remote_code=False,
                    local_files_only=True,
                    output_loading_info=True,
                    ignore_mismatched_sizes=True,  # they are looked at here
                )
        except Exception as error:
            raise ConfigError(
                f"{self.path}: transformers cannot load the weights: {one_line(error)}; the checkpoint is "
                "damaged, or does not belong to this config.json"
            ) from error
        finally:
            if shown:
                logging.enable_progress_bar()
        self._check(model, report, stored)
        return _quiet(model).requires_grad_(False).to(device)

    def _check(self, model: Any, report: Any, stored: Mapping[str, Stored]) -> None:
        """Check that the checkpoint has all parameters of the model as numbers of its shapes, and no other
        ones of its layers."""
        missing, extra = sorted(report["missing_keys"]), sorted(report["unexpected_keys"])
        for name, found, expected in sorted(report["mismatched_keys"]):
            raise ConfigError(
                f"{self.path}: {name}: expected shape {tuple(expected)} from the configuration, found "
                f"{tuple(found)}; the weights do not belong to this config.json"
            )
        if missing:
            raise ConfigError(
                f"{self.path}: {len(missing)} parameters are missing: {', '.join(missing[:3])}; the weights "
                "do not belong to this config.json"
            )
        for key, tensor in stored.items():
            if key.endswith(".weight") and not tensor.dtype.startswith(("F", "BF")):
                raise ConfigError(
                    f"{self.path}: {key}: expected floating point, found {tensor.dtype}; the checkpoint is "
                    "damaged, or quantized in a way that config.json does not name"
                )
        lists = {name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
        for key in extra:
            parts = key.split(".")
            if any(".".join(parts[:end]) in lists for end in range(len(parts))):
                raise ConfigError(
                    f"{self.path}: unexpected parameter {key}; the {type(model).__name__} that config.json "
                    "describes has no place for it"
                )


def _quiet(model: Any) -> Any:
    """Put the model into evaluation mode, and switch off its check of the tokens for padding, because there
    is none."""
    for module in model.modules():
        if hasattr(module, "warn_if_padding_and_no_attention_mask"):
            module.warn_if_padding_and_no_attention_mask = lambda *_, **__: None
    return model.eval()


def one_line(error: Exception) -> str:
    """Return an exception's message in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}{'...' if len(text) > 300 else ''}"
