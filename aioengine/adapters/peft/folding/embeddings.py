"""Rows of the embeddings and of the model's head that a file replaces: single ones, or all.

PEFT's rules: ``trainable_token_indices`` has the rows of some tokens. If the model's head is tied to its
embeddings, these rows are the head's as well, unless the head has a list of its own. ``modules_to_save`` has
a whole matrix, which is only the head's if it is named, or ``ensure_weight_tying`` is set. A whole matrix is
served as the rows that differ from the base model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor

from aioengine.adapters.peft.config import MAX_TRAINED_TOKENS, MERGE, PeftLoraConfig, named_by
from aioengine.adapters.peft.folder import CONFIG_FILE, invalid_config, invalid_weights
from aioengine.adapters.peft.values import Part
from aioengine.model.slots.image import is_finite
from aioengine.model.slots.tokens import TokenTable, TokenTables, TrainedTokens
from aioengine.model.spec import EMBEDDING_MODULES, NO_LAYER, ModelSpec

_PIECE = 1 << 20
"""Numbers that are compared at a time."""


class EmbeddingParts:
    """The rows and matrices that ``config`` says a file has. Raises AdapterInvalid if they cannot be served
    over this model."""

    def __init__(self, config: PeftLoraConfig, spec: ModelSpec) -> None:
        self._spec = spec
        if spec.impl != "native":
            invalid_config(
                "trained tokens (trainable_token_indices, modules_to_save) are supported only in models that "
                f"the native decoder runs: {MERGE}"
            )
        names = {module: spec.module_name(NO_LAYER, module) for module in EMBEDDING_MODULES}
        self._ids = {
            module: ids
            for module, name in names.items()
            for end, ids in config.tokens.items()
            if named_by(name, (end,))
        }
        embedded, headed = (self._ids.get(module) for module in EMBEDDING_MODULES)
        tied = spec.tie_embeddings and embedded is not None
        self.tied = tied and (headed in (None, embedded) or bool(config.ensure_weight_tying))
        """Whether the rows of the embeddings are the head's as well."""
        if self.tied:
            self._ids.pop("lm_head", None)
        self._saved = {module for module, name in names.items() if named_by(name, config.saved)}
        if self._saved and config.ensure_weight_tying and spec.tie_embeddings:
            self._saved = set(EMBEDDING_MODULES)
        for module, ids in self._ids.items():
            if max(ids) >= spec.vocab_size:
                invalid_config(
                    f"trainable_token_indices has token {max(ids)} of {module}, and the base model has "
                    f"{spec.vocab_size}; resized embeddings cannot be served: {MERGE}"
                )
            if module in self._saved:
                invalid_config(f"{module} in trainable_token_indices and in modules_to_save")
        listed = f"trainable_token_indices of {CONFIG_FILE}"
        whole = "the base model's; were the embeddings resized, or was the adapter trained on another model?"
        self.parts = {
            Part((NO_LAYER, module), "tokens"): (len(ids), listed) for module, ids in self._ids.items()
        } | {Part((NO_LAYER, module), "saved"): (spec.vocab_size, whole) for module in self._saved}
        """The tensors that the file must have: their numbers of rows, and why."""

    def check_targets(self, targets: Set[str]) -> None:
        """Raise AdapterInvalid if one of the ``targets`` of LoRA is replaced as well."""
        replaced = self._ids.keys() | self._saved | ({"lm_head"} if self.tied else set())
        for module in sorted(targets & replaced):
            invalid_config(
                f"LoRA on {module}, whose rows are trained as well (trainable_token_indices or "
                "modules_to_save), which PEFT cannot compute either: train it with one of the two"
            )

    def trained(
        self,
        tensors: Mapping[tuple[str, str], Tensor],
        base_weight: Callable[[str], Tensor],
        dtype: torch.dtype,
    ) -> TrainedTokens | None:
        """Return the rows that differ from the base model's, in ``dtype``.

        Args:
            tensors: The file's, by module and kind.
            base_weight: The base model's weight [vocabulary, hidden] of a module.

        Raises AdapterInvalid if there are too many, or values are not finite in ``dtype``.
        """
        tables: dict[str, TokenTable] = {}
        rows: list[Tensor] = []
        for (module, kind), tensor in sorted(tensors.items()):  # the embeddings' rows come first
            if kind == "tokens":
                ids = self._ids[module]
                order = sorted(range(len(ids)), key=ids.__getitem__)
                tables[module] = TokenTable(tuple(sorted(ids)), len(rows))
            elif order := _differing(module, tensor, base_weight(module)):
                tables[module] = TokenTable(tuple(order), len(rows))
            rows += [tensor[row] for row in order]
        if not rows:
            return None
        whole = torch.stack([row.to(dtype) for row in rows])
        for module, table in tables.items():
            if not is_finite(whole[table.first : table.first + len(table.ids)]):
                invalid_weights(
                    f"rows of {module} overflow {dtype}, or contain NaN or infinity; set lora_dtype to "
                    "bfloat16 or float32"
                )
        embedding = tables.get("embed_tokens", TokenTable())
        head = tables.get("lm_head", embedding if self.tied else TokenTable())
        return TrainedTokens(TokenTables(embedding, head, len(whole)), whole)


def _differing(module: str, saved: Tensor, base: Tensor) -> list[int]:
    """Return the tokens whose rows are not the base model's, in the less exact of both dtypes."""
    if base.shape != saved.shape:
        invalid_weights(
            f"whole {module} in modules_to_save need tensor_parallel_size=1; train the tokens with "
            "trainable_token_indices instead"
        )
    ids: list[int] = []
    step = max(1, _PIECE // saved.shape[1])
    for begin in range(0, len(saved), step):
        theirs, ours = saved[begin : begin + step], base[begin : begin + step].to("cpu")
        differs = (theirs.to(ours.dtype) != ours).logical_and_(ours.to(theirs.dtype) != theirs)
        ids += [begin + row for row in differs.any(1).nonzero().flatten().tolist()]
    if len(ids) > MAX_TRAINED_TOKENS:
        invalid_weights(
            f"{len(ids)} of {len(saved)} rows of {module} differ from the base model's, and at most "
            f"{MAX_TRAINED_TOKENS} can be swapped: train single tokens with trainable_token_indices, or "
            f"{MERGE}"
        )
    return ids
