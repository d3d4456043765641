"""What is not an adapter that can be served is refused with what it is and what to do about it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_files import CONFIG, WEIGHTS, edit_config, edit_weights, read, refused

from aioengine.adapters.resolvers.filesystem import FilesystemResolver
from aioengine.errors import AdapterInvalid, AdapterNotFound


def test_a_merged_model(adapter: Path) -> None:
    for file in (CONFIG, WEIGHTS):
        (adapter / file).unlink()
    (adapter / "config.json").write_text("{}")
    refused(adapter, f"no {CONFIG}", "save_pretrained, before merge_and_unload")


def test_the_folder_above_that_of_a_named_adapter(adapter: Path, tmp_path: Path) -> None:
    shutil.move(adapter, tmp_path / "saved" / "mine")
    refused(tmp_path / "saved", f"no {CONFIG}", "give its folder mine")
    with pytest.raises(AdapterNotFound, match="give its folder mine"):
        FilesystemResolver(tmp_path).find("saved")


@pytest.mark.parametrize(
    ("fields", "advice"),
    [
        ({"peft_type": "C3A"}, "peft.save_as_lora"),
        ({"peft_type": "IA3"}, "merge_and_unload"),
        ({"peft_type": "PREFIX_TUNING"}, "train a LoRA adapter"),
        ({"modules_to_save": ["lm_head"]}, "merge_and_unload"),
        ({"bias": "all"}, "merge_and_unload"),
        ({"trainable_token_indices": [1]}, "merge_and_unload"),
    ],
)
def test_other_methods_say_what_to_do(adapter: Path, fields: dict[str, Any], advice: str) -> None:
    edit_config(adapter, **fields)
    refused(adapter, *fields, advice)


@pytest.mark.parametrize("wrapper", ["_orig_mod.", "_checkpoint_wrapped_module.", "_fsdp_wrapped_module."])
def test_keys_of_wrapped_modules_are_those_of_the_modules(adapter: Path, wrapper: str) -> None:
    expected = read(adapter)

    def rename(tensors: dict[str, torch.Tensor]) -> None:
        for key in list(tensors):
            new = key.replace("model.layers", f"{wrapper}model.layers").replace("q_proj", f"{wrapper}q_proj")
            tensors[new] = tensors.pop(key)

    edit_weights(adapter, rename)
    actual = read(adapter)
    assert actual.tensors.keys() == expected.tensors.keys()
    for place, pair in expected.tensors.items():
        assert all(map(torch.equal, pair, actual.tensors[place]))


def test_a_message_is_short_and_can_be_sent_whatever_it_quotes(adapter: Path) -> None:
    edit_config(adapter, target_modules=["q" * 20_000], bias="\U0001f600" * 10_000)
    with pytest.raises(AdapterInvalid, match="bias") as caught:
        read(adapter)
    assert len(json.dumps(str(caught.value), ensure_ascii=False).encode()) < 2100
