"""PEFT's methods: each is served exactly, folded exactly, or refused.

``python tests/adapters/test_peft_methods.py`` writes the table of docs/adapters.md.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from support.peft_files import CONFIG, WEIGHTS, edit_config, edit_weights, read, refused
from support.peft_methods import FOLDED, changes, rows, save, table

from aioengine.errors import AdapterTooLarge

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "adapters.md"
MARKS = (
    "<!-- methods: written by python tests/adapters/test_peft_methods.py -->\n",
    "<!-- end of methods -->\n",
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_the_page_says_what_becomes_of_each() -> None:
    """The installed PEFT may be another than the one that the page was written with: what only one of them
    has is not compared, and a method that is new is refused."""
    said = {}
    for line in _table(PAGE.read_text()).splitlines()[2:]:
        names, served, how = (cell.strip() for cell in line.strip("|").split("|"))
        said |= dict.fromkeys(names.split(", ") if names[:5] != "LORA," else [names], (served, how))
    for names, served, how in rows():
        for name in names:
            assert (served, how) == said.get(name, (served, how)), name
            assert name in said or served == "no", name
    assert len(said) > 50


@pytest.mark.parametrize("method", sorted(FOLDED))
def test_a_folded_adapter_changes_weights_as_peft_does(tmp_path: Path, method: str) -> None:
    expected = changes(save(tmp_path, method, **FOLDED[method]))
    packed = read(tmp_path)
    assert packed.tensors.keys() == expected.keys() and packed.rank > 1
    for place, (a, b) in packed.tensors.items():
        assert expected[place].abs().max() > 0.01
        torch.testing.assert_close(b @ a, expected[place])


def test_ranks_and_alphas_of_single_modules(tmp_path: Path) -> None:
    patterns = {"rank_pattern": {"q_proj": 2, "layers.1.mlp.up_proj": 4}, "alpha_pattern": {"v_proj": 7}}
    expected = changes(save(tmp_path, "LOHA", r=3, alpha=5, **patterns))
    packed = read(tmp_path)
    assert {place: len(a) for place, (a, _) in packed.tensors.items()} == {
        (layer, module): {"q_proj": 4, "v_proj": 9, "up_proj": 16 if layer else 9}[module]
        for layer, module in expected
    }
    for place, (a, b) in packed.tensors.items():
        torch.testing.assert_close(b @ a, expected[place])


@pytest.mark.parametrize("options", [{"decompose_both": True}, {"decompose_factor": 2}, {"r": 64}])
def test_kronecker_factors_whole_and_in_two(tmp_path: Path, options: dict[str, int]) -> None:
    expected = changes(save(tmp_path, "LOKR", **{"r": 1, "alpha": 3, **options}))
    packed = read(tmp_path, max_rank=64)
    for place, (a, b) in packed.tensors.items():
        torch.testing.assert_close(b @ a, expected[place])


def test_a_pruned_adalora_module_changes_nothing(tmp_path: Path) -> None:
    save(tmp_path, "ADALORA", **FOLDED["ADALORA"])
    pruned = "base_model.model.model.layers.0.self_attn.q_proj.lora_"

    def prune(tensors: dict[str, torch.Tensor]) -> None:
        for name, axis in (("A", 0), ("B", 1), ("E", 0)):
            tensors[pruned + name] = tensors[pruned + name].narrow(axis, 0, 0).contiguous()

    edit_weights(tmp_path, prune)
    a, b = read(tmp_path).tensors[0, "q_proj"]
    assert not (b @ a).any()


def test_a_folded_rank_that_no_slot_has_room_for(tmp_path: Path) -> None:
    save(tmp_path, "LOHA", r=5, alpha=5)
    refused(tmp_path, "rank 25", "max_lora_rank is 16", kind=AdapterTooLarge)


def test_what_is_wrong_with_a_folded_adapter_is_said(tmp_path: Path) -> None:
    save(tmp_path, "VERA", **FOLDED["VERA"])
    whole = (tmp_path / WEIGHTS).read_bytes()
    key = "base_model.model.model.layers.0.self_attn.q_proj.vera_lambda_b"

    edit_weights(tmp_path, lambda tensors: tensors.pop("base_model.vera_A"))
    refused(tmp_path, "base_model.vera_A", "save_projection=True")
    (tmp_path / WEIGHTS).write_bytes(whole)
    edit_weights(tmp_path, lambda tensors: tensors.pop(key))
    refused(tmp_path, "model.layers.0.self_attn.q_proj", "do not fit")
    (tmp_path / WEIGHTS).write_bytes(whole)
    edit_weights(tmp_path, lambda tensors: tensors.update({key: torch.zeros(3)}))
    refused(tmp_path, "vera_lambda_b [3]")
    (tmp_path / WEIGHTS).write_bytes(whole)
    edit_weights(tmp_path, lambda tensors: tensors.update({key.replace("vera", "hada"): torch.zeros(3)}))
    refused(tmp_path, "unknown key", "hada_lambda_b")
    (tmp_path / WEIGHTS).write_bytes(whole)
    for fields in ({"target_modules": ["q_proj"]}, {"bias": "all"}, {"use_dora": True}, {"new_field": 3}):
        before = (tmp_path / CONFIG).read_text()
        edit_config(tmp_path, **fields)
        refused(tmp_path)
        (tmp_path / CONFIG).write_text(before)
    edit_config(tmp_path, target_modules=["q_proj", "v_proj", "up_proj", "down_proj"])
    refused(tmp_path, "down_proj", "no weights for it")


def _table(page: str) -> str:
    return page.partition(MARKS[0])[2].partition(MARKS[1])[0]


if __name__ == "__main__":
    text = PAGE.read_text()
    PAGE.write_text(text.replace(MARKS[0] + _table(text), MARKS[0] + table()))
