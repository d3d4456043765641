"""The command line: parses, runs a command, and turns its outcome into an exit code.

Exit codes:
    0    everything asked for was done
    1    the command ran, but some of it failed (requests, or output that cannot be written)
    2    nothing was run: wrong usage, wrong configuration, or it does not fit the machine
    3    a run of the lab is not valid (its policy failed, and another one decided in its place), or a checked
         policy breaks a rule
    130  interrupted
    141  whoever read the output has gone (128 + SIGPIPE, as with other tools)
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from itertools import pairwise

from cyclopts import (
    App,
    CycloptsError,
    Group,
    MissingArgumentError,
    UnknownCommandError,
    UnusedCliTokensError,
)

from aioengine import errors
from aioengine.cli.common import CommonFlags
from aioengine.cli.config.sources import use_sources
from aioengine.cli.flags import in_flags
from aioengine.cli.generate.request_lines import LINE_FORMAT
from aioengine.cli.help import EXIT_CODES, HELP_ALL, HELP_FLAGS, CompactFormatter
from aioengine.cli.process import EXIT_FAILED, EXIT_INTERRUPTED, process
from aioengine.cli.serving.log import print_error
from aioengine.config import refuse_removed

EXIT_OK, EXIT_REFUSED = 0, 2

_WHILE_RUNNING = (
    errors.DeadlineExceeded,
    errors.EngineDead,
    errors.EngineOverloaded,
    errors.EngineStopped,
    errors.RequestRejected,
)
"""Errors that end a command after its start; other errors of this package say why it could not start."""

_EXAMPLES = """\
  aioengine demo
  aioengine generate "Once upon a time" --adapter path/to/adapter
  aioengine generate --lora-modules sql=path/to/sql < requests.jsonl > answers.jsonl
  aioengine plan --model path/to/model --max-loras 8 --max-lora-rank 16"""

COMMANDS = {
    "bench": """\
  aioengine bench
  aioengine bench --adapters 8 32 --quantization int8
  aioengine bench --requests 8 --adapters 4 --rank 32 --repeats 5""",
    "config": """\
  aioengine config check --config server.toml
  aioengine config schema > aioengine.schema.json""",
    "demo": """\
  aioengine demo
  aioengine demo --requests 24 --max-tokens 64
  aioengine demo | cat                            plain lines instead of the live view""",
    "fleet": """\
  aioengine fleet status
  aioengine fleet drain k3x9q2ab""",
    "generate": """\
  aioengine generate "How many users are there?" --chat --adapter path/to/sql
  aioengine generate --lora-modules sql=path/to/sql < requests.jsonl > answers.jsonl
  echo '{"prompt": "Hello", "n": 2, "temperature": 1}' | aioengine generate""",
    "keys": """\
  aioengine keys new --tenant alice >> keys.toml
  aioengine serve --keys keys.toml""",
    "lab": """\
  aioengine lab run --trace azure_code.csv --adapters 200 --popularity zipf:1.0 --out results
  aioengine lab compare --policy fcfs,vllm+lru,vtc --trace azure_code.csv --adapters 200 --slots 4,8""",
    "plan": """\
  aioengine plan --model path/to/model
  aioengine plan --config engine.toml --max-loras 16 --max-lora-rank 64""",
    "policies": """\
  aioengine policies
  aioengine generate "Hello" --policy edf+gdsf+lookahead""",
    "top": """\
  aioengine top
  aioengine top --url http://replica-3:8000 --every 5""",
    "serve": """\
  aioengine serve --lora-modules sql=path/to/sql
  aioengine serve --model path/to/model --adapter-root adapters/ --api-key-file keys.txt
  aioengine serve --host 0.0.0.0 --port 80 --log-format json""",
}
"""The commands, each with its examples. ``name`` is the function ``name`` in ``aioengine.cli.name``, or a
group of commands."""

LAB_COMMANDS = {
    "run": """\
  aioengine lab run --trace azure_code.csv --adapters 200 --popularity zipf:1.0 --out results
  aioengine lab run --arrivals gamma:rate=4,cv=4 --limit 2000 --policy my_policy.py:MyPolicy
  aioengine lab run --experiment results/experiment.json --out again""",
    "compare": """\
  aioengine lab compare --policy fcfs,vllm+lru,vtc,chameleon,oracle --trace azure_code.csv \\
      --limit 5000 --adapters 200 --slots 4,8,16 --seeds 5 --out results
  aioengine lab compare --experiment results/comparison.json --out again""",
    "rerun": """\
  aioengine lab rerun results""",
    "new": """\
  aioengine lab new my_study""",
    "workload": """\
  aioengine lab workload workload.toml --plot
  aioengine lab workload azure_code.csv""",
    "size": """\
  aioengine lab size --workload workload.toml --slo ttft_p99=2.0 itl_p95=0.05
  aioengine lab size --workload azure_code.csv --slo ttft_p99=2.0 --replicas 1""",
    "report": """\
  aioengine lab report results
  aioengine lab report results --rank-by latency_seconds.mean""",
    "calibrate": """\
  aioengine lab calibrate --out this-machine.json
  aioengine lab run --preset this-machine.json ...""",
    "record": """\
  aioengine lab record requests.jsonl --model path/to/model --lora-modules sql=path/to/sql
  aioengine lab run --trace requests.jsonl ...""",
    "validate": """\
  aioengine lab validate --calibrate this-machine.json
  aioengine lab validate --preset this-machine.json
  aioengine lab validate --preset this-machine.json --loads 0.5 --repeats 5""",
}
_ALONE = {"policies": "aioengine.cli.policies:policies"}
"""Groups that are also commands themselves."""
_ROOMS = {"demo", "generate"}
"""Commands with a folder, where they are in the file ``command``."""

GROUPS = {
    "policies": (
        {
            "check": """\
  aioengine policies check my_policy.py:MyPolicy
  aioengine policies check edf+gdsf --runs 20""",
        },
        "aioengine.cli.policies:",
        "List the scheduler policies and their parts, or check one.",
    ),
    "config": (
        {
            "check": "  aioengine config check --config server.toml --port 9000",
            "show": "  AIOENGINE_MAX_LORAS=8 aioengine config show --config server.toml",
            "schema": "  aioengine config schema > aioengine.schema.json",
        },
        "aioengine.cli.config.commands:",
        "Check, show and describe a server's configuration.",
    ),
    "fleet": (
        {
            "status": """\
  aioengine fleet status
  RAY_ADDRESS=head:6379 aioengine fleet status""",
            "adapters": "  aioengine fleet adapters",
            "drain": """\
  aioengine fleet drain k3x9q2ab
  aioengine fleet drain k3x9q2ab --undo""",
        },
        "aioengine.cli.fleet.command:",
        "Inspect a fleet, and drain replicas.",
    ),
    "keys": (
        {
            "new": """\
  aioengine keys new --tenant alice >> keys.toml
  aioengine keys new --tenant prometheus --scope metrics
  aioengine keys new --tenant team-a --scope generate --scope adapters --adapter 'team-a/*'""",
            "hash": "  aioengine keys hash < key.txt",
            "check": "  aioengine keys check keys.toml",
        },
        "aioengine.cli.serving.keys:",
        "Create and check a server's API keys.",
    ),
    "lab": (
        LAB_COMMANDS,
        "aioengine.cli.lab.{0}:",
        "Evaluate scheduling policies on traces in simulated time, with the serving engine.",
    ),
}
"""Groups of commands: the commands with their examples, where they are (``{0}`` is the command's name; the
function has this name, too), and the help."""


def build_app(*, full_help: bool = False) -> App:
    """Build the command tree. A command's module is imported when it, or its help, is used.

    Args:
        full_help: Help shows the folded groups of flags too.
    """
    app = App(
        name="aioengine",
        help="Serve many LoRA adapters over one base model.",
        help_flags=[*HELP_FLAGS, HELP_ALL],
        help_format="plaintext",
        help_formatter=CompactFormatter(full=full_help),
        help_epilogue=f"Examples:\n{_EXAMPLES}\n\nFlags of a command: aioengine COMMAND --help\n{EXIT_CODES}",
        group_parameters=Group("Flags", sort_key=1),
        version_flags=["--version"],
        exit_on_error=False,
        print_error=False,
    )
    for name, examples in COMMANDS.items():
        if name in GROUPS:
            app.command(_build_group(name, examples))
            continue
        epilogue = _epilogue(name, examples)
        if full_help and name == "generate":
            epilogue = f"JSON lines:\n{LINE_FORMAT}\n\n{epilogue}"
        module = f"{name}.command" if name in _ROOMS else name
        app.command(f"aioengine.cli.{module}:{name}", name=name, help_epilogue=epilogue)
    app.register_install_completion_command(
        help="Set up completion for your shell.", group=Group("Setup", sort_key=100)
    )
    return app


def _build_group(group: str, examples: str) -> App:
    commands, where, help_ = GROUPS[group]
    app = App(
        name=group,
        help=help_,
        help_flags=[*HELP_FLAGS, HELP_ALL],
        help_epilogue=f"Examples:\n{examples}\n\nFlags of a command: aioengine {group} COMMAND --help",
    )
    if group in _ALONE:
        module, _, function = _ALONE[group].partition(":")
        app.default(getattr(import_module(module), function))
    for name, lines in commands.items():
        app.command(
            f"{where.format(name)}{name}", name=name, help_epilogue=_epilogue(f"{group} {name}", lines)
        )
    return app


def _epilogue(name: str, examples: str) -> str:
    more = f"All flags: aioengine {name} {HELP_ALL}    Exit codes: aioengine --help"
    return f"Examples:\n{examples}\n\n{more}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: ``sys.argv``) and return the exit code."""
    _find_modules_here()
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    common, unknown = CommonFlags(), list[str]()
    try:
        app = build_app(full_help=HELP_ALL in tokens)
        # Listed commands are imported for their one-line descriptions.
        if not tokens or tokens[0] in (*HELP_FLAGS, HELP_ALL):
            for name in COMMANDS:
                app[name]
        elif tokens[0] in GROUPS and (not tokens[1:] or tokens[1] in (*HELP_FLAGS, HELP_ALL)):
            for name in GROUPS[tokens[0]][0]:
                app[tokens[0]][name]
        _refuse_removed_flags(tokens)
        use_sources(app, tokens, unknown)
        command, bound, beside_flags = app.parse_args(tokens)
        common = bound.arguments.get("common") or common
        common.configure_logging()
        result = command(*bound.args, **bound.kwargs, **dict.fromkeys(beside_flags, unknown))
    except KeyboardInterrupt:
        if process.ending is None:  # else the process says it when it exits
            print("aioengine: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except UnknownCommandError as error:
        hint = " Flags come after the command." if tokens[0].startswith("-") else ""
        print(f"aioengine: {_one_line(error)}{hint}", file=sys.stderr)
        return EXIT_REFUSED
    except Exception as error:
        if common.debug:
            traceback.print_exc()
        for complaint in unknown:  # one of them may be the cause
            print_error(complaint)
        print_error(_one_line(error))
        refused = isinstance(error, (errors.AioEngineError, CycloptsError)) and not isinstance(
            error, _WHILE_RUNNING
        )
        return EXIT_REFUSED if refused else EXIT_FAILED
    return result if isinstance(result, int) else EXIT_OK


def _refuse_removed_flags(tokens: Sequence[str]) -> None:
    for token, following in pairwise([*tokens, ""]):
        if token == "--":
            return
        if token.startswith("--"):
            name, equals, value = token.removeprefix("--").partition("=")
            refuse_removed({name.replace("-", "_"): value if equals else following}, f"{token}: ")


def _find_modules_here() -> None:
    """Add the current folder to the import path, as ``python -m`` does, so that ``--policy
    my_module:MyPolicy`` finds a file there."""
    with suppress(OSError):  # a folder that has been removed
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, UnusedCliTokensError):
        command = " ".join(("aioengine", *(error.command_chain or ())))
        text = f"{' '.join(error.unused_tokens or ())!r}: {command} takes no such value; see --help"
    if isinstance(error, MissingArgumentError) and error.argument is not None:
        command = " ".join(("aioengine", *(error.command_chain or ())))
        name = error.argument.name
        if error.argument.field_info.is_positional:
            name = name.lstrip("-").upper()
        missing = f"{name} is not given" if error.keyword is None else f"{error.keyword} has no value"
        text = f"{missing}; see {command} --help"
    if isinstance(error, (errors.AioEngineError, CycloptsError)):
        return in_flags(text)
    return f"unexpected {type(error).__name__}: {text} (--debug shows where)"
