"""What the docs say of commands exists: each command has the flags that are shown with it."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from aioengine.cli.main import main
from aioengine.schedulers import available_policies
from aioengine.schedulers.routing import available_routers

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMAND = re.compile(r"^(?:\$ )?aioengine (?=[a-z])([^\n|<>&;]*)", re.MULTILINE)
GROUPS = ("lab", "fleet", "config", "keys", "policies")


def shown() -> dict[str, set[str]]:
    """Flags by command, of all pages: of blocks of code, and of code within sentences."""
    found: dict[str, set[str]] = {}
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        code = re.findall(r"```\w*\n(.*?)```", text, flags=re.DOTALL)
        code += re.findall(r"`(aioengine [^`\n]*)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
        for match in COMMAND.finditer("\n".join(code)):
            words = shlex.split(match[1].partition(" #")[0].replace("...", ""), posix=False)
            depth = (
                2
                if len(words) > 1 and words[0] in GROUPS and words[1].isalpha() and words[1].islower()
                else 1
            )
            flags = {word.partition("=")[0].strip(",.") for word in words if word.startswith("--")}
            found.setdefault(" ".join(words[:depth]), set()).update(flags - {"--help", "--help-all"})
    return found


@pytest.mark.parametrize("command", sorted(shown()))
def test_each_command_has_the_flags_that_are_shown(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*command.split(), "--help-all"]) == 0
    help_page = capsys.readouterr().out.replace("--[no-]", "--")
    known = {flag.replace("--no-", "--") for flag in re.findall(r"--[\w-]+", help_page)}
    assert {flag.replace("--no-", "--") for flag in shown()[command]} <= known


def test_each_policy_and_router_is_named_in_a_table() -> None:
    pages = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("policies.md", "fleet.md")}
    rows = {
        name: " ".join(line for line in text.splitlines() if line[:1] == "|") for name, text in pages.items()
    }
    assert [name for name in available_policies() if f"`{name}`" not in rows["policies.md"]] == []
    assert [name for name in available_routers() if f"`{name}`" not in rows["fleet.md"]] == []


SAYS_NOTHING = {"Told", "Found", "Wrong", "Steady", "Opened", "Said", "Asked", "Kept", "Hung", "Lost"}
OTHER_WORDS = re.compile("Door|Ticket|Stepper|Overlap")
"""Words that CONTRIBUTING has another one for: gateway, reservation, engine loop."""


def test_names_of_classes_are_words_of_the_field() -> None:
    folders = [ROOT / name for name in ("aioengine", "schedulers", "kernels", "metrics")]
    sources = [path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py")]
    names = set(re.findall(r"^ *class _?(\w+)", "\n".join(sources), re.MULTILINE))
    assert {name for name in names if name in SAYS_NOTHING or OTHER_WORDS.search(name)} == set()
