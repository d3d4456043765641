"""The digest of a mix, which each of its outputs has."""

from __future__ import annotations

from hashlib import sha256
from typing import cast

import pytest

from aioengine.core.adapters import mix as mixes
from aioengine.core.adapters.mix import MixEntry
from aioengine.core.state import AdapterEntry, AdapterFiles


def test_it_is_computed_once_for_the_content_of_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    computed: list[bytes] = []
    monkeypatch.setattr(mixes, "sha256", lambda content: computed.append(content) or sha256(content))
    parts = [AdapterEntry(uid, f"a{uid}", 1, "") for uid in range(2)]
    mix = MixEntry(9, "m", 1, [(part, 0.5) for part in parts], cast(AdapterFiles, None))
    assert [mix.digest for _ in range(3)] == [""] * 3
    parts[0].digest = "x"
    assert mix.digest == ""
    parts[1].digest = "y"
    assert {mix.digest for _ in range(50)} == {sha256(b"[('x', 0.5), ('y', 0.5)]").hexdigest()}
    assert len(computed) == 1
    parts[1].digest = "z"  # read again, with other content
    assert mix.digest == sha256(b"[('x', 0.5), ('z', 0.5)]").hexdigest()
