"""Patterns find what ``re``, with which PEFT matches, finds; or they are refused."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.peft_files import base_model, edit_config, make, read, refused

from aioengine.adapters.peft.patterns import Pattern, PatternError
from aioengine.adapters.peft.read import KnownPlans

NAMES = [
    *(
        f"model.layers.{layer}.{parent}.{module}"
        for layer in (0, 1, 10, 21)
        for parent, module in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "up_proj"))
    ),
    "model.embed_tokens",
    "lm_head",
    "",
]
UNSLOTH = (
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|gate_proj|up_proj|down_proj|o_proj).*?)|(?:\bmodel\.layers\."
    r"[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\.(?:(?:k_proj|v_proj|q_proj|up_proj)))"
)
WRITTEN = [
    *(r".*\.(q_proj|o_proj)", UNSLOTH, r".*q_proj$", r"^model\.layers\.\d+\..*", r"(?P<head>lm_head)"),
    *(r"(?i)MODEL\.LAYERS\..*Q_PROJ", r".*layers\.(1{1,}0?)\..*", r"[][.a-z_0-9]+", r"(?s:.*)head"),
    *(r"(?-i:lm_HEAD)|(?i:lm_HEAD)", r".*\b\d\b.*", r".*{proj", r"model\.embed\_tokens", r"", r"a|"),
]
REFUSED = [
    *(r"(?=.*q_proj).*", r"(?!.*mlp).*", r".*(?<=q_)proj", r"(.)\1.*", r"(?P<a>.)(?P=a)", r"(?>a*)b"),
    *(r"a*+b", r"(a)?(?(1)b|c)", r"(?x) a b", r"a{2000}", "(a|b)" * 300, r"((a{99}){99}){99}", "\ud800"),
    *("model\\", "(", "[a", "*", r"(?a)\w+", r"(?#note).*o_proj", r".*\Z", r".*layers\.\d{,1}\..*"),
    r"[[:alpha:]]+",
]


def found(compiled: Any, names: list[str] = NAMES) -> list[str]:
    return [name for name in names if compiled(name)]


@pytest.mark.parametrize("text", WRITTEN, ids=range(len(WRITTEN)))
def test_as_re(text: str) -> None:
    with warnings.catch_warnings(action="ignore"):
        assert found(Pattern(text, whole=True).matches) == found(re.compile(text).fullmatch)
        assert found(Pattern(text).matches) == found(re.compile(text).match)


@pytest.mark.parametrize("text", REFUSED, ids=range(len(REFUSED)))
def test_refused(text: str) -> None:
    with pytest.raises(PatternError):
        Pattern(text)


atoms = st.sampled_from(
    [
        *"aq_.[]()|*+?^${}-01\\,:",
        *("model", "layers", "proj", r"\.", r"\d", r"\w", r"\b", r"\Z", r"\_", r"\-", r"\]", ".*", ".*?"),
        *("(?:", "(?i)", "(?i:", "(?#", "(?P<n>", "[^", "[a-z]", "[[", "--", "&&", "{1,2}", "{,2}", "{2}"),
    ]
)


@settings(max_examples=500, deadline=None)
@given(st.lists(atoms, max_size=9).map("".join), st.booleans())
@pytest.mark.slow
def test_what_is_matched_is_what_re_matches(text: str, whole: bool) -> None:
    try:
        pattern = Pattern(text, whole=whole)
        with warnings.catch_warnings(action="ignore"):
            compiled = re.compile(text)
    except (PatternError, re.error):  # PEFT loads no adapter whose pattern ``re`` does not know
        return
    names = [*NAMES, "a", "q", "model", "aq", "a.q", "0", "__", "[a]", "q_proj"]
    assert found(pattern.matches, names) == found(compiled.fullmatch if whole else compiled.match, names)


NOT_TAKEN = "(?!.*mlp).*"
"""An expression that PEFT takes, and RE2 does not."""


@pytest.mark.parametrize(
    "fields",
    [
        {"target_modules": r"(?!.*mlp).*proj"},
        {"target_modules": "all-linear", "exclude_modules": r"(?=.*mlp).*"},
        {
            "target_modules": ["q_proj", "up_proj"],
            "layers_to_transform": [1],
            "layers_pattern": "(?=l)layers",
        },
    ],
)
def test_the_tensors_say_which_modules_where_an_expression_is_not_taken(
    tmp_path: Path, fields: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    make(tmp_path, **fields)
    known: KnownPlans = {}
    actual = [read(tmp_path, known=known) for _ in range(2)]
    config = peft.LoraConfig(**{"r": 4, **fields})
    model = peft.get_peft_model(base_model(), config)
    expected = {
        (int(name.split(".")[4]), name.split(".")[6])
        for name, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }
    assert [set(packed.tensors) for packed in actual] == [expected] * 2
    assert caplog.text.count("RE2 does not take") == 1
    assert str(tmp_path) in caplog.text


def test_a_key_that_is_not_taken_is_refused(tmp_path: Path) -> None:
    make(tmp_path, target_modules=["q_proj"])
    for field in ("rank_pattern", "alpha_pattern"):
        edit_config(tmp_path, rank_pattern={}, alpha_pattern={})
        edit_config(tmp_path, **{field: {NOT_TAKEN: 4}})
        refused(tmp_path, field, NOT_TAKEN, "RE2 does not take", "name the modules instead")
