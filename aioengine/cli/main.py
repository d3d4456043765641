"""The entry point: parses, runs a command, and turns its outcome into an exit code.

Exit codes:
    0    everything asked for was done
    1    the command ran, but some of it failed (requests, or a policy that cannot be loaded)
    2    nothing was run: wrong usage, wrong configuration, or it does not fit the machine
    130  interrupted
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from cyclopts import App, CycloptsError

from aioengine.errors import AioEngineError

EXIT_OK, EXIT_FAILED, EXIT_REFUSED, EXIT_INTERRUPTED = 0, 1, 2, 130

_EPILOGUE = (
    "Exit codes: 0 done; 1 some of it failed; 2 wrong usage or configuration, nothing was run; "
    "130 interrupted. With --debug an error comes with its traceback."
)


_COMMANDS = {
    "demo": "Watch a small model serve four adapters through two slots.",
    "generate": "Complete a prompt, or JSON lines from standard input.",
    "plan": "Print the memory that an engine would take.",
    "policies": "List the scheduler policies.",
}


def build_app() -> App:
    """The command tree. A command's module is imported when it is used, not before."""
    app = App(
        name="aioengine",
        help="Serve many LoRA adapters over one base model.",
        help_epilogue=_EPILOGUE,
        version_flags=["--version"],
        exit_on_error=False,
        print_error=False,
        result_action="return_value",
    )
    for name, text in _COMMANDS.items():
        app.command(f"aioengine.cli.{name}:{name}", name=name, help=text)
    return app


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: ``sys.argv``) and return the exit code."""
    # As python -m does, so that --policy my_module:MyPolicy finds a module in the current folder.
    if os.getcwd() not in sys.path and "" not in sys.path:
        sys.path.append(os.getcwd())
    tokens = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in tokens
    tokens = [token for token in tokens if token != "--debug"]
    try:
        result = build_app()(tokens)
    except (AioEngineError, CycloptsError) as error:
        if debug:
            raise
        print(f"aioengine: {_one_line(error)}", file=sys.stderr)
        return EXIT_REFUSED
    except KeyboardInterrupt:
        print("aioengine: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # Whoever read the output has gone; keep the interpreter from flushing into the void.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    return result if isinstance(result, int) else EXIT_OK


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
