"""How many small faults the tests find: ``python tests/mutation.py`` (an hour; see CONTRIBUTING.md).

Lines are drawn by a fixed seed from the rooms below. One expression of each is made wrong in turn, the room's
tests that are not slow run until the first failure, and the file is restored. A fault that no test finds is a
line that none of them needs; some are none in truth (a bound of a cache, say). It works on the checkout that
it is in.
"""

from __future__ import annotations

import argparse
import ast
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "aioengine/core": ["tests/core", "tests/simulation"],
    "aioengine/adapters": ["tests/adapters"],
    "schedulers": ["tests/schedulers"],
}
"""Folders with the tests that must find their faults."""
_PAIRS = (
    *((ast.Lt, ast.LtE), (ast.Gt, ast.GtE), (ast.Eq, ast.NotEq), (ast.In, ast.NotIn), (ast.Is, ast.IsNot)),
    *((ast.And, ast.Or), (ast.Add, ast.Sub), (ast.Mult, ast.FloorDiv)),
)
OTHER: dict[type[ast.AST], Any] = {one: other for pair in _PAIRS for one, other in (pair, pair[::-1])}
"""Operator -> the one that takes its place."""


class Fault(NamedTuple):
    """An expression on one line, and what takes its place."""

    path: Path
    line: int
    start: int
    """Columns, in bytes."""
    end: int
    text: str


def faults(path: Path) -> Iterator[Fault]:
    """Yield the faults that can be made in a file."""
    for node in _evaluated(ast.parse(path.read_bytes())):
        wrong = _wrong(node)
        if wrong is not None and node.lineno == node.end_lineno and node.end_col_offset is not None:
            text = f"({ast.unparse(wrong)})"
            yield Fault(path, node.lineno, node.col_offset, node.end_col_offset, text)


def _evaluated(node: ast.AST) -> Iterator[ast.expr]:
    """Yield all expressions but annotations, which nothing evaluates."""
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from _evaluated(child)
    if isinstance(node, ast.expr):
        yield node


def _wrong(node: ast.expr) -> ast.expr | None:
    """Return an expression that is almost this one; None if there is none of its kind."""
    match node:
        case ast.Compare(left, [op, *ops], comparators) if type(op) in OTHER:
            return ast.Compare(left, [OTHER[type(op)](), *ops], comparators)
        case ast.BoolOp(op, values):
            return ast.BoolOp(OTHER[type(op)](), values)
        case ast.BinOp(left, op, right) if type(op) in OTHER:
            return ast.BinOp(left, OTHER[type(op)](), right)
        case ast.UnaryOp(ast.Not(), operand):
            return operand
        case ast.Constant(bool(value)):
            return ast.Constant(not value)
        case ast.Constant(int(value) | float(value)):
            return ast.Constant(value + 1)
        case ast.IfExp(test, body, orelse):
            return ast.IfExp(test, orelse, body)
        case ast.Call(ast.Name("min" | "max" as name), args, keywords):
            return ast.Call(ast.Name("max" if name == "min" else "min"), args, keywords)
    return None


def draw(room: str, count: int, seed: int) -> list[Fault]:
    """Draw lines of a room, and a fault on each."""
    rng, by_line = random.Random(f"{seed} {room}"), dict[tuple[str, int], list[Fault]]()
    for path in sorted((ROOT / room).rglob("*.py")):
        for fault in faults(path):
            by_line.setdefault((str(path), fault.line), []).append(fault)
    lines = rng.sample(sorted(by_line), min(count, len(by_line)))
    return [rng.choice(by_line[line]) for line in lines]


def is_found(fault: Fault, tests: list[str], seconds: float) -> bool:
    """Make the fault, run the tests, and restore the file. Tests that hang find it, too."""
    before = fault.path.read_bytes()
    lines = before.splitlines(keepends=True)
    line = lines[fault.line - 1]
    lines[fault.line - 1] = line[: fault.start] + fault.text.encode() + line[fault.end :]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
    try:
        fault.path.write_bytes(b"".join(lines))
        done = subprocess.run(command, cwd=ROOT, capture_output=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    finally:
        fault.path.write_bytes(before)
    return done.returncode != 0


def main() -> int:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--lines", type=int, default=60, help="of all rooms together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=600.0, help="that the tests of a room may take")
    options = parser.parse_args()
    found = total = 0
    for room, tests in ROOMS.items():
        for fault in draw(room, options.lines // len(ROOMS), options.seed):
            before = fault.path.read_bytes().splitlines()[fault.line - 1][fault.start : fault.end].decode()
            ok = is_found(fault, tests, options.seconds)
            found, total = found + ok, total + 1
            place = f"{fault.path.relative_to(ROOT)}:{fault.line}"
            print(f"{'found ' if ok else 'MISSED'} {place}: {before} -> {fault.text}", flush=True)
    print(f"{found} of {total} faults were found")
    return 0


if __name__ == "__main__":
    sys.exit(main())
