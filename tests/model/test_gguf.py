"""GGUF: shapes, tensors and tokenizers come back as the original had them."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_gguf import bpe_fields, tiny_model, write_gguf, write_tokenizer_gguf
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from aioengine.errors import ConfigError
from aioengine.model.files import gguf as files
from aioengine.model.files.gguf import GGUFFile
from aioengine.model.files.stored import Stored
from aioengine.model.files.weights import expanding
from aioengine.model.rope import attention_scaling, inverse_frequencies
from aioengine.model.spec import ModelSpec, RopeSpec
from aioengine.model.text import gguf_tokenizer


def read_all(path: Path) -> dict[str, torch.Tensor]:
    """Quantized weights are expanded."""
    file = GGUFFile(path)
    return {
        name: stored.whole()
        if isinstance(stored, Stored)
        else expanding(stored, torch.float32, name).rows(0, stored.shape[0])
        for name, stored in files.read_file(file, files.read_spec(file)).items()
    }


def read_spec(path: Path) -> ModelSpec:
    return files.read_spec(GGUFFile(path))


def build_tokenizer(path: Path) -> Tokenizer | None:
    return gguf_tokenizer.build_tokenizer(GGUFFile(path))


# --- tensors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("F32", torch.float32), ("F16", torch.float16), ("BF16", torch.bfloat16)],
)
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_float_tensors_come_back_exactly(tmp_path: Path, family: str, kind: str, dtype: torch.dtype) -> None:
    overrides = {"attention_bias": True} if family == "llama" else {}
    model = tiny_model(family, **overrides)
    tensors = read_all(write_gguf(tmp_path / "m.gguf", model, family, kind))
    expected = model.state_dict()
    assert tensors.keys() == expected.keys()
    for name, tensor in tensors.items():
        stored = dtype if tensor.ndim > 1 else torch.float32
        assert tensor.dtype == stored, name
        assert torch.equal(tensor, expected[name].to(stored)), name


def test_tied_embeddings_have_no_head(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama", tie_word_embeddings=True), "llama")
    assert read_spec(path).tie_embeddings
    assert "lm_head.weight" not in read_all(path)


def test_an_unknown_tensor_is_refused_by_name(tmp_path: Path) -> None:
    extra = {"blk.0.ffn_gate_inp.weight": np.ones((2, 64), dtype=np.float32)}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", tensors=extra)
    with pytest.raises(ConfigError, match=r"m\.gguf.*ffn_gate_inp"):
        read_all(path)


def test_metadata_reads_as_the_package_reads_it(tmp_path: Path) -> None:
    words = ["", "a", "\u00e9t\u00e9", "\U0001f600" * 40, "\n"]
    fields = {
        "tokens": words,
        "token_type": [1, 2, 3],
        "scores": [0.5, -1.0],
        "one": ["alone"],
        "add_bos": True,
    }
    path = write_tokenizer_gguf(tmp_path / "m.gguf", fields)
    theirs, ours = gguf.GGUFReader(path), GGUFFile(path)
    assert ours.get("tokenizer.ggml.tokens") == words
    for key, field in theirs.fields.items():
        assert ours.get(key) == field.contents(), key


def test_an_array_that_is_longer_than_the_file_is_refused(tmp_path: Path) -> None:
    path = write_tokenizer_gguf(tmp_path / "m.gguf", {"tokens": ["a", "b"]})
    data = path.read_bytes()
    at = data.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    path.write_bytes(data[:at] + (2**40).to_bytes(8, "little") + data[at + 8 :])
    with pytest.raises(ConfigError, match=r"m\.gguf: not a readable GGUF file"):
        GGUFFile(path)


# --- spec ----------------------------------------------------------------------------------------


def test_spec_of_a_llama(tmp_path: Path) -> None:
    tokenizer = {"bos_token_id": 1, "eos_token_id": 2, "eot_token_id": 7}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", tokenizer=tokenizer)
    spec = read_spec(path)
    assert (spec.num_heads, spec.num_kv_heads, spec.rms_norm_eps, spec.max_position) == (4, 2, 1e-5, 256)
    assert (spec.family, spec.dtype, spec.rope) == ("llama", "float32", RopeSpec())
    assert (spec.bos_token_id, spec.eos_token_ids) == (1, (2, 7))


def test_a_sliding_window_makes_it_a_mistral(tmp_path: Path) -> None:
    metadata = {"llama.attention.sliding_window": 32}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", metadata=metadata)
    spec = read_spec(path)
    assert spec.family == "mistral"
    assert spec.sliding_windows == (32, 32)


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        ({"type": "none"}, RopeSpec()),
        ({"type": "linear", "factor": 4.0}, RopeSpec(type="linear", factor=4.0)),
        (
            {"type": "yarn", "factor": 8.0, "original_context_length": 32},
            RopeSpec(type="yarn", factor=8.0, original_max_position=32),
        ),
    ],
)
def test_rope_scaling(tmp_path: Path, scaling: dict[str, Any], expected: RopeSpec) -> None:
    metadata = {f"llama.rope.scaling.{key}": value for key, value in scaling.items()}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", metadata=metadata)
    assert read_spec(path).rope == expected


def test_llama3_rope_is_its_divisors(tmp_path: Path) -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = tiny_model("llama", head_dim=64, num_attention_heads=1, num_key_value_heads=1)
    model.config.rope_parameters = {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](model.config, torch.device("cpu"))
    plain = 500000.0 ** -(torch.arange(0, 64, 2) / 64)
    metadata = {"llama.rope.freq_base": 500000.0}
    divisors = (plain / scaled).numpy()
    path = write_gguf(
        tmp_path / "m.gguf", model, "llama", metadata=metadata, tensors={"rope_freqs.weight": divisors}
    )
    rope = read_spec(path).rope
    torch.testing.assert_close(inverse_frequencies(rope, 64), scaled, rtol=3e-7, atol=0)
    assert attention_scaling(rope) == 1.0 and read_spec(path).max_position == 256
    assert "rope_freqs.weight" not in read_all(path)

    wrong = {"rope_freqs.weight": divisors[:5]}
    other = write_gguf(tmp_path / "other.gguf", model, "llama", metadata=metadata, tensors=wrong)
    with pytest.raises(ConfigError, match=r"rope_freqs.* has 5 numbers, expected 32"):
        read_spec(other)


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"general.architecture": "mamba"}, r"'mamba' is not supported.*llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "num_experts_per_tok is missing"),
        ({"llama.rope.scaling.type": "longrope"}, r"longrope.*supported: none, linear, yarn"),
        ({"llama.rope.dimension_count": 8}, r"rope\.dimension_count=8"),
        ({"llama.attention.head_count_kv": [2, 1]}, "differs between layers"),
        ({"split.count": 3}, r"3 files.*--merge"),
    ],
)
def test_unsupported_models_are_refused(tmp_path: Path, metadata: dict[str, Any], message: str) -> None:
    arch = metadata.pop("general.architecture", "llama")
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), arch, metadata=metadata)
    with pytest.raises(ConfigError, match=message):
        read_spec(path)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    good = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama").read_bytes()
    for content in (None, b"", b"not a model at all, but long enough", good[:-5000], good[:300]):
        path = tmp_path / "bad.gguf"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(ConfigError, match=r"bad\.gguf"):
            read_spec(path)


def test_a_tensor_of_the_wrong_size_is_refused(tmp_path: Path) -> None:
    metadata = {"llama.attention.head_count_kv": 4}
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", metadata=metadata)
    with pytest.raises(ConfigError, match=r"blk\.0\.attn_k\.weight.*32 rows, expected 64"):
        read_all(path)


def test_a_malformed_tokenizer_is_refused(tmp_path: Path) -> None:
    fields = bpe_fields(byte_level_tokenizer(splitter_of("gpt-2")), "gpt-2")
    fields["merges"] = ["no such", *fields["merges"]]
    path = write_tokenizer_gguf(tmp_path / "t.gguf", fields)
    with pytest.raises(ConfigError, match=r"t\.gguf.*malformed"):
        build_tokenizer(path)


def test_without_the_gguf_package_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ConfigError, match=r"pip install 'aioengine\[gguf\]'"):
        read_spec(tmp_path / "m.gguf")


# --- tokenizer: byte-level BPE -------------------------------------------------------------------

TEXTS = [
    "In 2024 the 3 quick brown foxes weren't  jumping.\n\n  Over 1234567 lazy dogs!",
    "naïve café 日本語 😀🎉👩‍👩‍👧",
    "camelCase ABCdef I'VE https://a.b/c//\n ÀÉîü",
    " leading and trailing  ",
    "tabs\tand\r\nlines\n",
    "<|im_start|>user\nHi there<|im_end|>\n",
    "",
]


def byte_level_tokenizer(splitter: pre_tokenizers.PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = splitter
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3 + ["user there the quick 1234 2024"] * 5, trainer)
    return tokenizer


def splitter_of(pre: str) -> pre_tokenizers.PreTokenizer:
    """The splitting rule of the published model, from transformers where it states one."""
    own = pre in ("qwen2", "gpt-4o")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own)
    if pre == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if own:
        from tokenizers import Regex
        from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

        split = pre_tokenizers.Split(Regex(GGUF_PRE_TOKENIZER_SPLITS[pre]), "isolated")
        return pre_tokenizers.Sequence([split, byte_level])
    return byte_level


@pytest.mark.parametrize("pre", ["smollm", "qwen2", "gpt-2", "gpt-4o"])
def test_byte_level_tokenizer_encodes_as_the_original(tmp_path: Path, pre: str) -> None:
    original = byte_level_tokenizer(splitter_of(pre))
    rebuilt = build_tokenizer(write_tokenizer_gguf(tmp_path / "t.gguf", bpe_fields(original, pre)))
    assert rebuilt is not None
    for text in TEXTS:
        ids = rebuilt.encode(text).ids
        assert ids == original.encode(text).ids, text
        assert rebuilt.decode(ids, skip_special_tokens=False) == text
    ids = rebuilt.encode("<|im_start|>user<|im_end|>").ids
    assert (ids[0], ids[-1]) == (1, 2)
    assert rebuilt.decode(ids) == "user"  # control tokens are skipped by default


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("llama-bpe", ["123", "456", "7"]),
        ("glm4", ["123", "456", "7"]),
        ("refact", ["1", "2", "3", "4", "5", "6", "7"]),
    ],
)
def test_digits_split_as_the_rule_says(tmp_path: Path, pre: str, pieces: list[str]) -> None:
    fields = bpe_fields(byte_level_tokenizer(splitter_of(pre)), pre)
    rebuilt = build_tokenizer(write_tokenizer_gguf(tmp_path / "t.gguf", fields))
    assert rebuilt is not None
    assert rebuilt.pre_tokenizer is not None
    assert [piece for piece, _ in rebuilt.pre_tokenizer.pre_tokenize_str("1234567")] == pieces


def test_bos_is_put_first_when_the_file_says_so(tmp_path: Path) -> None:
    fields = bpe_fields(byte_level_tokenizer(splitter_of("gpt-2")), "gpt-2")
    fields["add_bos_token"] = True
    rebuilt = build_tokenizer(write_tokenizer_gguf(tmp_path / "t.gguf", fields))
    assert rebuilt is not None
    with_bos, without = rebuilt.encode("quick"), rebuilt.encode("quick", add_special_tokens=False)
    assert with_bos.ids == [1, *without.ids]


def test_unknown_tokenizers_are_none(tmp_path: Path) -> None:
    fields = bpe_fields(byte_level_tokenizer(splitter_of("gpt-2")), "gpt-2")
    for change in ({"model": "bert"}, {"pre": "never-heard-of"}):
        path = write_tokenizer_gguf(tmp_path / "t.gguf", fields | change)
        assert build_tokenizer(path) is None
    assert build_tokenizer(write_tokenizer_gguf(tmp_path / "none.gguf", {})) is None


def test_chat_template(tmp_path: Path) -> None:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    assert GGUFFile(write_tokenizer_gguf(tmp_path / "none.gguf", {})).chat_template is None
    path = write_tokenizer_gguf(tmp_path / "t.gguf", {"chat_template": template})
    assert GGUFFile(path).chat_template == template


# --- tokenizer: SentencePiece BPE ----------------------------------------------------------------

PIECES = ["▁", "h", "e", "l", "o", "w", "r", "d", "he", "ll", "llo", "▁he", "▁w", "or", "lo", "hello"]
PIECES += ["▁hello", "ld", "wo", "world", "▁wor", "▁world"]
SPM_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
SPM_SCORES = [0.0] * 259 + [-float(i) for i in range(len(PIECES))]


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    fields = {
        "model": "llama",
        "tokens": SPM_TOKENS,
        "scores": SPM_SCORES,
        "token_type": [2, 3, 3] + [6] * 256 + [1] * len(PIECES),
        "bos_token_id": 1,
        "eos_token_id": 2,
        "unknown_token_id": 0,
    }
    path = tmp_path_factory.mktemp("spm") / "t.gguf"
    rebuilt = build_tokenizer(write_tokenizer_gguf(path, fields))
    assert rebuilt is not None
    return rebuilt


def sentencepiece_by_definition(text: str) -> list[int]:
    """Merge the adjacent pair of the best score until none is left; unknown characters as bytes."""
    vocab = {token: i for i, token in enumerate(SPM_TOKENS)}
    parts = list("▁" + text.replace(" ", "▁"))
    while True:
        pairs = [(-SPM_SCORES[vocab[a + b]], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in vocab]
        if not pairs:
            break
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    ids: list[int] = []
    for part in parts:
        known = part in vocab
        ids += [vocab[part]] if known else [vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
    return ids


@given(st.text(alphabet="helowrd zé😀", min_size=1, max_size=24))
def test_sentencepiece_merges_by_score(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text).ids
    assert ids == [1, *sentencepiece_by_definition(text)]
    assert sentencepiece.decode(ids) == text


def test_the_rebuilt_tokenizer_can_be_saved(tmp_path: Path, sentencepiece: Tokenizer) -> None:
    sentencepiece.save(str(tmp_path / "tokenizer.json"))
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["byte_fallback"] is True
    again = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert again.encode("hello world").ids == sentencepiece.encode("hello world").ids
