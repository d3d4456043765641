"""Claims of papers and projects, run again in simulation: what comes out is printed, and nothing is asserted.

    python -m benchmarks.policies.papers slora        # throughput from 5 to 2,000 adapters
    python -m benchmarks.policies.papers chameleon    # p99 time to first token, against S-LoRA's baseline
    python -m benchmarks.policies.papers vtc          # difference of service between two backlogged clients
    python -m benchmarks.policies.papers toppings     # steps that wait for loads; rank-aware order
    python -m benchmarks.policies.papers loraserve    # a fleet in which ranks are kept apart
    python -m benchmarks.policies.papers ray          # one hot adapter on two replicas (ray #48741)
    python -m benchmarks.policies.papers llmd         # replicas chosen by the prefixes that they have cached

``--quick`` runs a small part of each, in seconds. Setups and results: docs/lab-papers.md.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.policies.papers.chameleon import chameleon
from benchmarks.policies.papers.loraserve import loraserve
from benchmarks.policies.papers.routers import llmd, ray
from benchmarks.policies.papers.runs import Lab, in_processes
from benchmarks.policies.papers.slora import slora
from benchmarks.policies.papers.toppings import toppings
from benchmarks.policies.papers.vtc import vtc

PAPERS: dict[str, Callable[[Lab], Table]] = {
    "slora": slora,
    "chameleon": chameleon,
    "vtc": vtc,
    "toppings": toppings,
    "loraserve": loraserve,
    "ray": ray,
    "llmd": llmd,
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("paper", choices=PAPERS)
    parser.add_argument("--quick", action="store_true", help="a small part of it")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="runs at a time")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        parser.error(f"--jobs {args.jobs}: must be at least 1")
    with tempfile.TemporaryDirectory() as folder:
        Console().print(PAPERS[args.paper](Lab(in_processes(args.jobs), args.quick, Path(folder))))


if __name__ == "__main__":
    main()
