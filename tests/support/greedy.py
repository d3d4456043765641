"""The greedy answer of a model of transformers and peft, with which an engine's is compared."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

Likeliest = Callable[[tuple[int, ...]], list[int]]
"""A model: the likeliest token after each token of a text."""


class Greedy(Sequence[int]):
    """The next ``count`` tokens. One pass of the model over prompt and answer says whether an answer equals
    them: each token must be the likeliest after those before it. For who reads them they are generated."""

    def __init__(self, model: Likeliest, prompt: Sequence[int], count: int) -> None:
        self._model, self._prompt, self._count = model, tuple(prompt), count

    def __eq__(self, answer: object) -> bool:
        if not isinstance(answer, Sequence) or len(answer) != self._count:
            return False
        likeliest = self._model((*self._prompt, *answer))
        return likeliest[len(self._prompt) - 1 : -1] == [*answer]

    @functools.cached_property
    def _tokens(self) -> list[int]:
        text = self._prompt
        for _ in range(self._count):
            text = *text, self._model(text)[-1]
        return [*text[len(self._prompt) :]]

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, place):  # type: ignore[no-untyped-def, override]
        return self._tokens[place]

    def __repr__(self) -> str:
        return repr(self._tokens)
