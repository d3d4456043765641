"""The tokenizer inside a GGUF file, rebuilt as a Hugging Face ``tokenizers.Tokenizer``."""

from __future__ import annotations

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from aioengine.errors import ConfigError
from aioengine.model.files.gguf import GGUFFile

_CONTROL, _USER_DEFINED = 3, 4
"""Values of ``tokenizer.ggml.token_type`` for tokens that are matched before any splitting."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORD_SPLIT = (
    _CONTRACTIONS + r"|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern published with Llama 3 and Qwen 2, which differ in how many digits make one piece."""
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED_SPLIT = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""The pattern published with GPT-4o's vocabulary (https://github.com/openai/tiktoken), which GPT-OSS has."""
_THREE_DIGITS = ("llama-bpe", "llama3", "smaug-bpe", "dbrx", "glm4", "chatglm-bpe")


def build_tokenizer(file: GGUFFile) -> Tokenizer | None:
    """Return the file's tokenizer, or None if it is of a kind (or splits text in a way) not known here.

    Byte-level BPE (``gpt2``) with the splitting rules of Llama 3, Qwen 2, GPT-2, SmolLM, OLMo, Granite,
    GLM-4 and GPT-OSS, and SentencePiece BPE (``llama``). Raises ConfigError if the file or its tokenizer is
    malformed.
    """
    kind = file.get("tokenizer.ggml.model")
    rebuild = {"gpt2": _byte_level_bpe, "llama": _sentencepiece_bpe}.get(kind)
    if rebuild is None:
        return None
    try:
        tokenizer = rebuild(file)
    except ConfigError:
        raise
    except Exception as e:  # tokenizers raises nothing more specific
        raise ConfigError(f"{file.path}: the tokenizer in the file is malformed: {e}") from e
    if tokenizer is None:
        return None
    _add_special_tokens(tokenizer, file)
    if file.get("tokenizer.ggml.add_bos_token", kind == "llama"):
        bos_id = file.require("tokenizer.ggml.bos_token_id")
        bos = tokenizer.id_to_token(bos_id)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
        )
    return tokenizer


def _byte_level_bpe(file: GGUFFile) -> Tokenizer | None:
    """Byte-level BPE: GPT-2's byte alphabet and ranked merges, split first by the named rule."""
    pre = str(file.get("tokenizer.ggml.pre", "default"))
    splitter = _splitter(pre)
    if splitter is None:
        return None
    vocab = {token: i for i, token in enumerate(file.require("tokenizer.ggml.tokens"))}
    merges = [merge.partition(" ")[::2] for merge in file.require("tokenizer.ggml.merges")]
    ignore_merges = pre in ("llama-bpe", "llama3")
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=ignore_merges))
    if pre == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitter
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _splitter(pre: str) -> pre_tokenizers.PreTokenizer | None:
    if pre in ("default", "gpt-2", "gpt2", "olmo"):
        return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if pre in ("smollm", "refact"):
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    if pre not in (*_THREE_DIGITS, "qwen2", "gpt-4o"):
        return None
    words = _WORD_SPLIT.format(digits="" if pre == "qwen2" else "{1,3}")
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_CASED_SPLIT if pre == "gpt-4o" else words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _sentencepiece_bpe(file: GGUFFile) -> Tokenizer | None:
    """SentencePiece BPE as ranked merges: a token of higher score is merged before one of lower."""
    tokens: list[str] = file.require("tokenizer.ggml.tokens")
    scores: list[float] = file.require("tokenizer.ggml.scores")
    vocab = {token: i for i, token in enumerate(tokens)}
    merges: list[tuple[str, str]] = []
    for token in sorted(vocab, key=lambda token: (-scores[vocab[token]], vocab[token])):
        splits = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        pairs = [(a, b) for a, b in splits if a in vocab and b in vocab]
        merges.extend(sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]])))
    unknown = tokens[file.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(vocab=vocab, merges=merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", "▁")]
    undo: list[decoders.Decoder] = [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
    ]
    if file.get("tokenizer.ggml.add_space_prefix", True):
        steps.insert(0, normalizers.Prepend("▁"))
        undo.append(decoders.Strip(content=" ", left=1, right=0))
    tokenizer.normalizer = normalizers.Sequence(steps)
    tokenizer.decoder = decoders.Sequence(undo)
    return tokenizer


def _add_special_tokens(tokenizer: Tokenizer, file: GGUFFile) -> None:
    types = file.get("tokenizer.ggml.token_type", [])
    for i, kind in enumerate(types):
        if kind in (_CONTROL, _USER_DEFINED):
            token = tokenizer.id_to_token(i)
            special = kind == _CONTROL
            tokenizer.add_tokens([AddedToken(token, special=special, normalized=False)])
