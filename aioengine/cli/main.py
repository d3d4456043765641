"""The command line: parses, runs a command, and turns its outcome into an exit code (``help.EXIT_CODES``)."""

from __future__ import annotations

import logging
import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from itertools import pairwise
from typing import Annotated

from cyclopts import App, CycloptsError, Group, Parameter
from cyclopts.config import Env

from aioengine import errors
from aioengine.cli.config.sources import PREFIX, sources
from aioengine.cli.flags import CommonFlags, in_flags
from aioengine.cli.help import EXIT_CODES, HELP_ALL, HELP_FLAGS, CompactFormatter, shown_default
from aioengine.cli.process import EXIT_FAILED, EXIT_INTERRUPTED, output_failure, process
from aioengine.cli.serving.log import configure_logging, print_line
from aioengine.config import refuse_removed
from aioengine.lab.workload.extra import needs_extra

EXIT_OK, EXIT_REFUSED = 0, 2

_WHILE_RUNNING = (
    errors.DeadlineExceeded,
    errors.EngineDead,
    errors.EngineOverloaded,
    errors.EngineStopped,
    errors.RequestRejected,
)
"""Errors that end a command after its start; other errors of this package say why it could not start."""

GROUPS = {
    "config": "Check a server's configuration.",
    "fleet": "Inspect a fleet, and drain replicas.",
    "keys": "Create a server's API keys.",
    "lab": "Evaluate scheduling policies on traces in simulated time, with the serving engine.",
    "policies": "List the scheduler policies and their parts, or check one.",
}
"""Commands that have commands of their own."""

COMMANDS = {
    "bench": ("bench", ["", "--adapters 8 32 --quantization int8"]),
    "config check": ("config.commands", ["--config server.toml --port 9000"]),
    "demo": ("demo", ["", "--requests 24 --max-tokens 64"]),
    "fleet status": ("fleet.command", [""]),
    "fleet drain": ("fleet.command", ["k3x9q2ab", "k3x9q2ab --undo"]),
    "generate": (
        "generate",
        ['"Hello" --chat --adapter path/to/sql', "< requests.jsonl > answers.jsonl"],
    ),
    "keys new": (
        "serving.keys",
        ["--tenant alice >> keys.toml", "--tenant a --scope adapters --adapter 'a/*'"],
    ),
    "lab run": (
        "lab.run",
        ["--trace azure_code.csv --adapters 200 --out results", "--arrivals gamma:rate=4,cv=4 --limit 2000"],
    ),
    "lab compare": (
        "lab.compare",
        ["--policy fcfs,vllm+lru,vtc --trace azure_code.csv --adapters 200 --slots 4,8"],
    ),
    "lab rerun": ("lab.folders", ["results"]),
    "lab new": ("lab.folders", ["my_study"]),
    "lab size": ("lab.size", ["--workload workload.toml --slo ttft_p99=2.0 itl_p95=0.05"]),
    "lab calibrate": ("lab.live", ["--out this-machine.json"]),
    "lab validate": ("lab.live", ["--calibrate this-machine.json"]),
    "plan": ("plan", ["--model path/to/model", "--config engine.toml --max-loras 16 --max-lora-rank 64"]),
    "policies": ("policies", [""]),
    "policies check": ("policies", ["my_policy.py:MyPolicy", "edf+gdsf --runs 20"]),
    "serve": ("serve", ["--lora-modules sql=path/to/sql", "--adapter-root adapters/ --keys keys.toml"]),
}
"""The commands: each with its module, which has a function of the command's last name, and arguments of its
examples."""
REMOVED = {
    "config schema": "aioengine config check names each field that is wrong",
    "config show": "aioengine config check prints the values in effect",
    "fleet adapters": "aioengine fleet status shows the adapters in each replica's slots",
    "keys check": "aioengine config check --keys FILE checks the file",
    "keys hash": "aioengine keys new makes a key, and its hash",
    "lab record": "aioengine serve --record FILE does it",
    "lab report": "call write_report(DIR) of aioengine.lab",
    "top": "the server's page (/) shows slots and queues, and GET /debug/requests the open requests",
}
"""Commands that earlier versions had, and what to do instead."""
_OF_A_SERVER = ("serve", "config check")
"""Commands that take the configuration of a server."""


def build_app(*, full_help: bool = False, unknown: list[str] | None = None) -> App:
    """Build the command tree. A command's module is imported when it, or its help, is used.

    Args:
        full_help: Help shows the folded groups of flags too.
        unknown: Parsing adds what to tell about variables that no flag has.
    """
    help_flags, flags = [*HELP_FLAGS, HELP_ALL], Group("Flags", sort_key=1)
    app = App(
        name="aioengine",
        help="Serve many LoRA adapters over one base model.",
        help_flags=help_flags,
        help_format="plaintext",
        help_formatter=CompactFormatter(full=full_help),
        help_epilogue=f"{_examples('')}\n\nFlags of a command: aioengine COMMAND --help\n{EXIT_CODES}",
        default_parameter=Parameter(negative_iterable=(), show_default=shown_default),
        group_arguments=flags,
        group_parameters=flags,
        version_flags=["--version"],
        exit_on_error=False,
        print_error=False,
    )
    for group, help_ in GROUPS.items():
        more = f"Flags of a command: aioengine {group} COMMAND --help"
        app.command(
            App(name=group, help=help_, help_flags=help_flags, help_epilogue=f"{_examples(group)}\n\n{more}")
        )
    for command, (module, _) in COMMANDS.items():
        group, _, name = command.rpartition(" ")
        where = f"aioengine.cli.{module}"
        if command in GROUPS:
            app[command].default(getattr(import_module(where), name))
            continue
        more = f"All flags: aioengine {command} {HELP_ALL}    Exit codes: aioengine --help"
        (app[group] if group else app).command(
            f"{where}:{name}",
            name=name,
            help_epilogue=f"{_examples(command)}\n\n{more}",
            config=sources([] if unknown is None else unknown) if command in _OF_A_SERVER else (),
        )
    app.register_install_completion_command(
        help="Set up completion for your shell.", group=Group("Setup", sort_key=100)
    )
    return app


def _examples(command: str) -> str:
    """Return examples of a command, of all commands in a group, or (for "") of the most used ones."""
    of = [name for name in COMMANDS if f"{name} ".startswith(f"{command} ")]
    lines = [
        f"  aioengine {name} {arguments}".rstrip()
        for name in of or ("demo", "generate", "serve", "plan")
        for arguments in COMMANDS[name][1][: None if name == command else 1]
    ]
    return "\n".join(["Examples:", *lines])


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: ``sys.argv``) and return the exit code."""
    _find_modules_here()
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug, unknown = False, list[str]()

    def run(
        *rest: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
        common: CommonFlags = CommonFlags(),
    ) -> object:
        nonlocal debug
        debug = common.debug
        common.configure_logging()
        command, bound, beside_flags = app.parse_args(rest)
        server = bound.arguments.get("server") if rest[:1] == ("serve",) else None
        if server is not None and server.log_format == "json":  # errors before it serves are JSON, too
            configure_logging("json", common.log_level or "info")
        while unknown:
            print_line(unknown.pop(0), logging.WARNING)

        def parse_again() -> dict[str, object]:
            try:
                return build_app().parse_args(rest)[1].arguments
            except CycloptsError as error:
                raise errors.ConfigError(_one_line(error)) from error

        beside = {"parse_again": parse_again, "log_level": common.log_level}
        return command(*bound.args, **bound.kwargs, **{name: beside[name] for name in beside_flags})

    try:
        app = build_app(full_help=HELP_ALL in tokens, unknown=unknown)
        app.meta.default(run)
        app.meta.config = Env(PREFIX, command=False)
        # Listed commands are imported for their one-line descriptions.
        asked = tokens[:-1] if tokens and tokens[-1] in (*HELP_FLAGS, HELP_ALL) else tokens
        if not asked or (len(asked) == 1 and asked[0] in GROUPS):
            listed = app[asked[0]] if asked else app
            for name in listed:
                listed[name]
        _refuse_removed(tokens)
        command, bound, _ = app.meta.parse_args(tokens)
        with needs_extra() if tokens[:1] == ["lab"] else nullcontext():
            result = command(*bound.args, **bound.kwargs)
    except KeyboardInterrupt:
        if not process.interrupted:  # else the process says it when it exits
            print("aioengine: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:
        if output_failure() is not None:  # the process says this, too
            return EXIT_FAILED
        if debug:
            traceback.print_exc()
        for text in (*unknown, _one_line(error)):  # a variable may be the cause
            print_line(text, logging.ERROR)
        ours = isinstance(error, (errors.AioEngineError, CycloptsError))
        return EXIT_REFUSED if ours and not isinstance(error, _WHILE_RUNNING) else EXIT_FAILED
    return result if isinstance(result, int) else EXIT_OK


def _refuse_removed(tokens: Sequence[str]) -> None:
    """Raise ConfigError for a command or a flag that earlier versions had."""
    for command, instead in REMOVED.items():
        if list(tokens[: command.count(" ") + 1]) == command.split():
            raise errors.ConfigError(f"aioengine {command} was removed: {instead}")
    for token, following in pairwise([*tokens, ""]):
        if token == "--":
            return
        if token.startswith("--"):
            name, equals, value = token.removeprefix("--").removeprefix("no-").partition("=")
            refuse_removed({name.replace("-", "_"): value if equals else following}, f"{token}: ")


def _find_modules_here() -> None:
    """Add the current folder to the import path, as ``python -m`` does, so that ``--policy
    my_module:MyPolicy`` finds a file there."""
    with suppress(OSError):  # a folder that has been removed
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, CycloptsError):
        text += f" See {' '.join(('aioengine', *(error.command_chain or ())))} --help."
    if isinstance(error, (errors.AioEngineError, CycloptsError)):
        return in_flags(text)
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"
