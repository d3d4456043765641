"""Text to token ids and back: ``tokenizer.json`` through the tokenizers library."""

from __future__ import annotations

import functools
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypedDict

import jinja2
import tokenizers
from msgspec import Meta

from aioengine.checks import check_value, read_json
from aioengine.errors import ConfigError, PromptTooLong, RequestInvalid
from aioengine.model.text.chat_template import ChatTemplate, read_chat_template
from aioengine.model.text.detokenizer import Detokenizer, TextStream, TokenBytes, special_tokens

_TOGETHER = 64
"""Maximum number of texts that are tokenized in one call."""
_SHRINKS = 4
"""How many times shorter, in bytes of UTF-8, a Unicode normal form can be than its text."""
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


class _Message(TypedDict):
    role: str
    content: str | list[dict[str, Any]]


_Messages = Annotated[
    list[_Message], Meta(min_length=1, extra={"is": "a list of {'role': ..., 'content': ...}, not empty"})
]


class Tokenizer:
    """A model's tokenizer and chat template. Safe to share between threads."""

    def __init__(
        self,
        tokenizer: tokenizers.Tokenizer,
        chat_template: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self.special_tokens: Mapping[str, str] = dict(special_tokens or {})
        """Special tokens by their names: ``bos_token``, ``eos_token``, ..."""
        self.chat_template = chat_template
        """Source of the chat template."""
        self._longest = max((len(token.encode()) for token in tokenizer.get_vocab()), default=1)
        """Bytes of the longest token."""

    @classmethod
    def load(cls, path: Path, chat_template: str | None = None) -> Tokenizer | None:
        """Read the tokenizer of a model folder (``tokenizer.json``) or GGUF file; None if it has none. The
        file ``chat_template`` takes the place of the model's own.

        Raises :class:`~aioengine.errors.ConfigError` if a file is there but malformed.
        """
        if path.suffix != ".gguf":
            tokenizer = cls._of_folder(path)
        else:
            from aioengine.model.files.gguf import GGUFFile
            from aioengine.model.text.gguf_tokenizer import build_tokenizer

            file = GGUFFile(path)
            found = build_tokenizer(file)
            tokenizer = None if found is None else cls(found, chat_template=file.chat_template)
        if tokenizer is not None and chat_template is not None:
            tokenizer.chat_template = read_chat_template(Path(chat_template))
        return tokenizer

    @classmethod
    def _of_folder(cls, model_dir: Path) -> Tokenizer | None:
        path = model_dir / "tokenizer.json"
        if not path.is_file():
            return None
        try:
            tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise ConfigError(
                f"{path}: not a tokenizer that the tokenizers library can read: {error}; "
                "download the model again or remove the file to serve token ids only"
            ) from error
        # Left over from training in some models; it would cut or pad prompts silently.
        tokenizer.no_truncation()
        tokenizer.no_padding()
        config = _read_json(model_dir / "tokenizer_config.json")
        special = _special_tokens(_read_json(model_dir / "special_tokens_map.json"))
        special |= _special_tokens(config)
        return cls(tokenizer, _chat_template(model_dir, config), special)

    @property
    def vocab_size(self) -> int:
        """Number of tokens, added ones included; a model's embedding may have more rows."""
        size: int = self._tokenizer.get_vocab_size(with_added_tokens=True)
        return size

    def encode(self, text: str, add_special_tokens: bool = True, *, limit: int | None = None) -> list[int]:
        """Tokenize ``text``; other threads go on meanwhile.

        Args:
            limit: Refuse a text of more tokens than this; if its length says so, before tokenizing.

        Raises :class:`~aioengine.errors.RequestInvalid` if ``text`` is not valid Unicode,
        :class:`~aioengine.errors.PromptTooLong` for ``limit``.
        """
        return self.encode_all([text], add_special_tokens, limit=limit)[0]

    def encode_all(
        self,
        items: Sequence[str | tuple[str, str]],
        add_special_tokens: bool = True,
        *,
        limit: int | None = None,
    ) -> list[list[int]]:
        """Tokenize each text as :meth:`encode` does, several in one call, so that other threads go on
        meanwhile although each of them may be short. Two texts that belong together get the special tokens
        that the tokenizer puts around and between them."""
        found: list[list[int]] = []
        for begin in range(0, len(items), _TOGETHER):
            some = items[begin : begin + _TOGETHER]
            try:
                for item in some:
                    texts = (item,) if isinstance(item, str) else item
                    for text in texts:
                        text.encode()
                    if limit is not None and (least := sum(map(self.least_tokens, texts))) > limit:
                        raise PromptTooLong(least, limit, at_least=True)
                encoded = self._tokenizer.encode_batch_fast(list(some), add_special_tokens=add_special_tokens)
            except (UnicodeEncodeError, TypeError, AttributeError) as error:
                raise RequestInvalid(f"prompt is not valid text: {error}") from error
            found += (one.ids for one in encoded)
            if limit is not None and (longest := max(map(len, encoded))) > limit:
                raise PromptTooLong(longest, limit)
        return found

    def least_tokens(self, text: str) -> int:
        """Return how many tokens ``text`` has at least, by its length and the longest token: normalizers make
        a text up to four times shorter. (What a tokenizer drops altogether counts as well.)"""
        return len(text.encode(errors="surrogatepass")) // (_SHRINKS * self._longest)

    def decode(self, token_ids: list[int], skip_special_tokens: bool = True) -> str:
        """Decode tokens to text; other threads go on meanwhile."""
        texts: list[str] = self._tokenizer.decode_batch([token_ids], skip_special_tokens=skip_special_tokens)
        return texts[0]

    def first_unknown(self, token_ids: Sequence[int]) -> int | None:
        """Return the index of the first id that stands for no token; None if all do. A model may have more
        ids than its tokenizer."""
        known: set[int] = set()
        for index, token in enumerate(token_ids):
            if token not in known and self._tokenizer.id_to_token(token) is None:
                return index
            known.add(token)
        return None

    @functools.cached_property
    def _special_ids(self) -> frozenset[int]:
        return special_tokens(self._tokenizer)

    def text_stream(
        self, skip_special_tokens: bool, stop: tuple[str, ...], include_stop: bool = False
    ) -> TextStream:
        """Create a text stream for one request's output."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return TextStream(Detokenizer(self._tokenizer, skipped), stop, include_stop)

    def render_chat(self, messages: list[dict[str, Any]], /, **variables: Any) -> str:
        """Render the prompt for the assistant's next turn; other threads go on meanwhile.

        ``variables`` are the template's: ``tools`` (JSON schemas of functions), ``enable_thinking`` and
        whatever else it looks at; ``add_generation_prompt=False`` leaves the next turn's opening out, and
        ``continue_final_message=True`` all that follows the last message's text, which the model goes on
        with.

        Raises :class:`~aioengine.errors.RequestInvalid` if there is no usable template, a message is
        malformed, or the template refuses the messages, or takes more than its bounds with them (see
        :mod:`aioengine.model.text.chat_template`).
        """
        check_value("messages", messages, _Messages, RequestInvalid)
        if variables.pop("continue_final_message", False):
            mark = secrets.token_hex(16)
            last = {**messages[-1], "content": _marked(messages[-1]["content"], mark)}
            text = self.render_chat([*messages[:-1], last], **{**variables, "add_generation_prompt": False})
            if mark not in text:
                raise RequestInvalid(
                    "continue_final_message: the chat template does not show the last message's text"
                )
            return text[: text.rindex(mark)]
        variables = {"add_generation_prompt": True, **self.special_tokens, **variables}
        return self._template.render({**variables, "messages": messages})

    @functools.cached_property
    def added_tokens(self) -> Mapping[str, int]:
        """Ids of tokens, special or not, that are found in a text before it is tokenized."""
        return {token.content: id_ for id_, token in self._tokenizer.get_added_tokens_decoder().items()}

    @functools.cached_property
    def token_bytes(self) -> TokenBytes:
        """Function that returns the bytes of text that a token stands for; they need not be whole characters.
        Empty for ids outside the vocabulary."""
        return TokenBytes(self._tokenizer)

    def to_json(self) -> str:
        """Return the content of a ``tokenizer.json`` that makes this tokenizer."""
        text: str = self._tokenizer.to_str()
        return text

    @functools.cached_property
    def _template(self) -> ChatTemplate:
        if self.chat_template is None:
            raise RequestInvalid("the model has no chat template; give the prompt as text or token ids")
        try:
            return ChatTemplate(self.chat_template)
        except (jinja2.TemplateError, RecursionError) as error:
            raise RequestInvalid(
                f"the model's chat template does not compile: {error}; give the prompt as text"
            ) from error


def _marked(content: str | list[dict[str, Any]], mark: str) -> str | list[dict[str, Any]]:
    """Return a message's content, with ``mark`` at the end of its text."""
    if isinstance(content, str):
        return content + mark
    return [*content, {"type": "text", "text": mark}]


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; empty if there is no such file."""
    return read_json(path) if path.exists() else {}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Return ``bos_token`` etc. of a Hugging Face file, where each is a string or {"content": string}."""
    found = {}
    for field in _SPECIAL_TOKENS:
        value = config.get(field)
        if isinstance(value, dict):
            value = value.get("content")
        if isinstance(value, str):
            found[field] = value
    return found


def _chat_template(model_dir: Path, config: Mapping[str, Any]) -> str | None:
    """Return the text of ``chat_template.jinja``, or else the template of tokenizer_config.json, whose value
    may be a list of named ones."""
    path = model_dir / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: cannot be read: {error}") from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None
