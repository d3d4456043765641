"""Trained tokens as they are read: from lists and from whole matrices, and what is refused."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peft_files import CONFIG, SPEC, WEIGHTS, base_model, edit_config, edit_weights, make, read
from support.peft_files import refused as refused_anyway
from torch import Tensor

from aioengine.adapters.peft.config import MAX_TRAINED_TOKENS
from aioengine.model.slots.tokens import TokenTable, TrainedTokens

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
NAMES = {"embed_tokens": "model.embed_tokens", "lm_head": "lm_head"}
ROWS = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
HEAD = "base_model.model.lm_head.weight"


def base_weight(module: str, tie: bool = False) -> Tensor:
    return base_model(tie).get_submodule(NAMES[module]).weight.detach()


def refused(folder: Path, *words: str, **options: Any) -> None:
    refused_anyway(folder, *words, base_weight=base_weight, **options)


def tokens_of(folder: Path, **options: Any) -> TrainedTokens:
    tokens = read(folder, base_weight=base_weight, **options).tokens
    assert tokens is not None
    return tokens


ids = st.lists(st.integers(0, SPEC.vocab_size - 1), min_size=1, max_size=9, unique=True)


@settings(max_examples=8, deadline=None)
@given(embedded=ids, headed=ids, bf16=st.booleans())
def test_rows_by_list_are_put_in_order(embedded: list[int], headed: list[int], bf16: bool) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, trainable_token_indices={"embed_tokens": embedded, "lm_head": headed})
        rows: dict[str, Tensor] = {}

        def train(tensors: dict[str, Tensor]) -> None:
            for key, tensor in tensors.items():
                if "token_adapter" in key:
                    tensor.copy_(torch.randn(tensor.shape).to(torch.bfloat16).float())
                    rows[key.split(".token_adapter")[0].rpartition(".")[2]] = tensor.clone()

        edit_weights(folder, train)
        tokens = tokens_of(folder, dtype=torch.bfloat16 if bf16 else torch.float32)
    assert tokens.tables.num_rows == len(tokens.rows) == len(embedded) + len(headed)
    for table, wanted, module in (
        (tokens.tables.embedding, embedded, "embed_tokens"),
        (tokens.tables.head, headed, "lm_head"),
    ):
        assert table.ids == tuple(sorted(wanted))
        for at, token in enumerate(table.ids):
            found = tokens.rows[table.first + at].float()
            assert torch.equal(found, rows[module][wanted.index(token)])


@settings(max_examples=8, deadline=None)
@given(changed=st.sets(st.integers(0, SPEC.vocab_size - 1)), bf16=st.booleans(), ours=st.booleans())
def test_of_a_whole_matrix_the_rows_that_differ(changed: set[int], bf16: bool, ours: bool) -> None:
    """Whether the file or the model is less exact: rounding is no difference."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make(folder, modules_to_save=["lm_head"])
        head = base_weight("lm_head")

        def train(tensors: dict[str, Tensor]) -> None:
            whole = head.clone()
            whole[list(changed)] += 1
            tensors[HEAD] = whole.bfloat16() if bf16 and not ours else whole

        edit_weights(folder, train)
        rounded = head.bfloat16() if bf16 and ours else head
        tokens = read(folder, base_weight=lambda _: rounded).tokens
    if not changed:
        assert tokens is None
        return
    assert tokens is not None
    assert tokens.tables.embedding == TokenTable()
    assert tokens.tables.head == TokenTable(tuple(sorted(changed)))
    torch.testing.assert_close(tokens.rows, head[sorted(changed)] + 1, atol=0.02, rtol=0)


def test_too_many_rows_differ(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make(tmp_path, modules_to_save=["lm_head"])
    edit_weights(tmp_path, lambda tensors: tensors[HEAD].add_(1))
    assert len(tokens_of(tmp_path).rows) == SPEC.vocab_size < MAX_TRAINED_TOKENS
    monkeypatch.setattr("aioengine.adapters.peft.folding.embeddings.MAX_TRAINED_TOKENS", 63)
    refused(tmp_path, WEIGHTS, "64 of 64 rows of lm_head differ", "at most 63", "merge_and_unload")


CONFIGS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"trainable_token_indices": [1, 64]}, ("token 64", "has 64")),
    ({"trainable_token_indices": [1, 1]}, ("token 1 is there twice",)),
    ({"trainable_token_indices": [1, -1]}, ("trainable_token_indices", "Expected")),
    ({"trainable_token_indices": {"embed_tokens": True}}, ("trainable_token_indices", "Expected")),
    ({"trainable_token_indices": 7}, ("trainable_token_indices", "Expected")),
    ({"trainable_token_indices": {"up_proj": [1]}}, ("up_proj", "only rows of embed_tokens and lm_head")),
    ({"trainable_token_indices": list(range(5000))}, ("5000 tokens, more than 4096",)),
    ({"trainable_token_indices": [3, 4, 5]}, ("expected shape [3, 32]", "found [2, 32]")),
    ({"trainable_token_indices": None}, ("no such tokens in trainable_token_indices",)),
    ({"modules_to_save": ["embed_tokens"]}, ("embed_tokens in trainable_token_indices and in",)),
    ({"alora_invocation_tokens": [1]}, ("alora_invocation_tokens with trainable_token_indices",)),
    ({"target_modules": ["q_proj", "embed_tokens"]}, ("LoRA on embed_tokens, whose rows",)),
]


@pytest.mark.parametrize(("fields", "words"), CONFIGS)
def test_what_is_wrong_is_said(tmp_path: Path, fields: dict[str, Any], words: tuple[str, ...]) -> None:
    make(tmp_path, trainable_token_indices=[1, 2], target_modules=["q_proj"])
    edit_config(tmp_path, **fields)
    refused(tmp_path, CONFIG, *words)


def test_weights_that_are_wrong(tmp_path: Path) -> None:
    make(tmp_path, trainable_token_indices=[1, 2], target_modules=["q_proj"])
    whole = (tmp_path / WEIGHTS).read_bytes()
    edit_weights(tmp_path, lambda tensors: tensors.pop(ROWS))
    refused(tmp_path, WEIGHTS, "embed_tokens in trainable_token_indices", "no weights")
    (tmp_path / WEIGHTS).write_bytes(whole)
    edit_weights(tmp_path, lambda tensors: tensors[ROWS][1, 3].fill_(torch.nan))
    refused(tmp_path, WEIGHTS, "NaN")
    (tmp_path / WEIGHTS).write_bytes(whole)
    edit_weights(tmp_path, lambda tensors: tensors[ROWS][1, 3].fill_(1e38))
    refused(tmp_path, WEIGHTS, "rows of embed_tokens overflow torch.float16", dtype=torch.float16)
    edit_weights(tmp_path, lambda tensors: tensors.update({f"{ROWS}.default": torch.zeros(2, 32)}))
    refused(tmp_path, WEIGHTS, "the same weight")


def test_lora_on_a_tied_head_beside_trained_embeddings(tmp_path: Path) -> None:
    from msgspec.structs import replace

    make(tmp_path, trainable_token_indices=[1, 2], target_modules=["q_proj", "lm_head"])
    modules = ("q_proj", "lm_head")
    assert tokens_of(tmp_path, target_modules=modules).tables.head == TokenTable()
    refused(tmp_path, "LoRA on lm_head", spec=replace(SPEC, tie_embeddings=True), target_modules=modules)
