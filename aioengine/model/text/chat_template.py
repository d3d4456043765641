"""Chat templates through jinja2.

They come with the model and are untrusted: they run in jinja2's immutable sandbox. The length of their loops
depends on the client, so the time and the text of one rendering are bounded. A rendering holds the
interpreter lock; a long one releases it at short intervals.
"""

from __future__ import annotations

import json
import threading
import time
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from aioengine.checks import check_items
from aioengine.errors import ConfigError, RequestInvalid

MAX_SECONDS = 1.0
"""Processor time that one rendering may take. 2,048 messages and 128 tools take a fiftieth of it with the
templates of common models."""
MAX_TEXT = 2**25
"""Characters that a template may write."""
MAX_ITEMS = 2**17
"""Items of all lists in the messages, tools and variables of one rendering. A filter such as ``tojson``
cannot be interrupted while it writes them."""
AT_A_STRETCH = 0.002
"""Seconds after which a rendering releases the interpreter lock, as far as jinja2 can be interrupted."""
LET_GO = 0.0005
"""Seconds that it then waits, so that other threads can take the lock."""
LOOK_AGAIN = 32
"""Steps of a template between two readings of the clock."""


def read_chat_template(path: Path) -> str:
    """Read a template's file. Raises ConfigError also if it does not compile."""
    try:
        source = path.read_text(encoding="utf-8")
        ChatTemplate(source)
        return source
    except (OSError, ValueError) as error:
        raise ConfigError(f"chat_template {path}: cannot be read: {error}") from error
    except (jinja2.TemplateError, RecursionError) as error:
        raise ConfigError(f"chat_template {path}: is not a Jinja template: {error}") from error


class ChatTemplate:
    """A compiled chat template. Safe to share between threads.

    Raises jinja2.TemplateError, RecursionError if the source cannot be compiled.
    """

    def __init__(self, source: str) -> None:
        self._environment = _Environment()
        self._template = self._environment.from_string(source)

    def render(self, variables: dict[str, Any]) -> str:
        """Render the template. Raises :class:`~aioengine.errors.RequestInvalid` if the template fails, or
        takes more than ``MAX_ITEMS``, ``MAX_SECONDS`` or ``MAX_TEXT``."""
        check_items("the messages, tools and variables of the chat template", variables, MAX_ITEMS)
        budget = self._environment.current.budget = _Budget()
        parts: list[str] = []
        try:
            for part in self._template.generate(variables):
                budget.write(part)
                parts.append(part)
        except RequestInvalid:
            raise
        except Exception as error:  # untrusted template code: a TypeError is as possible as its own
            raise RequestInvalid(
                f"the chat template refused the messages: {type(error).__name__}: {error}"
            ) from error
        finally:
            self._environment.current.budget = None
        return "".join(parts)


class _Budget:
    """Budget of one rendering, in one thread."""

    def __init__(self) -> None:
        self._end = time.thread_time() + MAX_SECONDS
        self._steps = 0
        self._text = 0
        self._held_since = time.perf_counter()

    def write(self, part: str) -> None:
        self._text += len(part)
        if self._text > MAX_TEXT:
            raise RequestInvalid(
                f"the chat template makes more than {MAX_TEXT} characters of these messages and tools; send "
                "fewer"
            )
        self.step()

    def step(self) -> None:
        self._steps += 1
        if self._steps % LOOK_AGAIN:
            return
        if time.perf_counter() - self._held_since > AT_A_STRETCH:
            if time.thread_time() > self._end:
                raise RequestInvalid(
                    f"the chat template takes more than {MAX_SECONDS:g} s for these messages and tools; send "
                    "fewer"
                )
            time.sleep(LET_GO)
            self._held_since = time.perf_counter()


class _Current(threading.local):
    budget: _Budget | None = None


class _Environment(ImmutableSandboxedEnvironment):
    """The environment that transformers renders chat templates in. Whatever a template looks up counts as a
    step of its rendering."""

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
        )
        self.current = _Current()
        # jinja2's own escapes HTML characters.
        self.filters["tojson"] = partial(json.dumps, ensure_ascii=False)
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def getitem(self, obj: Any, argument: Any) -> Any:
        self._step()
        return super().getitem(obj, argument)

    def getattr(self, obj: Any, attribute: str) -> Any:
        self._step()
        return super().getattr(obj, attribute)

    def call(self, /, *args: Any, **kwargs: Any) -> Any:
        self._step()
        return super().call(*args, **kwargs)

    def _step(self) -> None:
        budget = self.current.budget
        if budget is not None:
            budget.step()


class _Generation(jinja2.ext.Extension):
    """``{% generation %}...{% endgeneration %}``: marks the assistant's text for training; no effect."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
