"""Copies with slots by bytes as a share of those with slots of one size, over the size of the memory.

    python -m benchmarks.policies.memory_sizes AzureLLMInferenceTrace_code.csv
    python -m benchmarks.policies.memory_sizes AzureLLMInferenceTrace_code.csv --figure memory-sizes.svg

Each row has the memory of so many slots of rank 64, beside ``--kv`` for the KV cache: as slots of one size,
as slots by bytes, and in one memory with the KV cache. Prints the copies into slots for each request, and
their ratios to those with slots of one size for the same arrivals: means over the seeds, and half the width
of their 95% intervals (Student's t). "foresight" are the copies that no choice of victims by bytes could be
below if requests were served strictly in order of arrival (``fewest_copies``). A policy that serves the
requests for an adapter together may be below it. The CPU cache has room for all adapters.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track

from aioengine.lab.report.style import LIGHT, draw, footnote, legend_above, new_figure, vectors
from benchmarks.policies.intervals import interval, mean_and_half
from benchmarks.policies.slot_memory import Setting, bounds, measure, setting_flags, setting_of
from benchmarks.shared.report import new_table

COUNTS = ("of one size", "by bytes", "shared", "foresight")
RATIOS = ("by bytes", "foresight", "shared")
GOAL = 1 / 3

Columns = Mapping[str, Sequence[float]]
"""The values of each kind of slots, one for each seed."""


def copies(setting: Setting, policy: str, slots: int, memory: int, most: int, seeds: int) -> Columns:
    """Return the copies a request with each kind of slots."""
    modes: dict[str, tuple[int, int | str | None]] = {
        "of one size": (slots, None),
        "by bytes": (most, memory),
        "shared": (most, "shared"),
    }
    return {
        name: [measure(setting.experiment(policy, seed, *mode, memory))[0] for seed in range(seeds)]
        for name, mode in modes.items()
    }


def ratios(found: Columns) -> Columns:
    """Return each kind's copies as shares of those with slots of one size, seed by seed."""
    base = found["of one size"]
    return {name: [a / b for a, b in zip(found[name], base, strict=True)] for name in RATIOS}


def figure(found: Mapping[str, Mapping[int, Columns]], note: str) -> bytes:
    """Draw the ratios over the size of the memory, a panel for each policy. Returns an SVG."""

    def make() -> Any:
        title = "Copies into slots, as a share of those with slots of one size"
        drawn, panels = new_figure(title, height=3.2, columns=len(found))
        for panel, (policy, sizes) in zip(panels, found.items(), strict=True):
            for place, kind in enumerate(RATIOS):
                points = [mean_and_half(ratios(columns)[kind]) for columns in sizes.values()]
                panel.errorbar(
                    range(len(sizes)), [mean for mean, _ in points], yerr=[half or 0.0 for _, half in points],
                    color=LIGHT.palette[place], marker="o", capsize=3, label=kind,
                )  # fmt: skip
            panel.axhline(GOAL, color=LIGHT.text, linewidth=0.8, linestyle=":", label="a third")
            panel.set_xticks(range(len(sizes)), [str(slots) for slots in sizes])
            panel.set_ylim(0.0, 1.0)
            panel.set_title(f"{policy}: memory of so many slots")
        legend_above(panels[0], bbox_to_anchor=(0.0, 1.12))
        footnote(drawn, note, LIGHT)
        return drawn

    return vectors(draw("memory-sizes", note, LIGHT, make))["svg"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], parents=[setting_flags(scale=0.5, limit=1500)]
    )
    parser.add_argument("--policies", nargs="*", default=["joint", "chameleon"])
    parser.add_argument("--slots", nargs="*", type=int, default=[4, 8, 16, 32], help="slots of rank 64")
    parser.add_argument("--most", type=int, default=200, help="adapters in a memory that slots share")
    args = parser.parse_args()
    setting, console = setting_of(args, roomy=True), Console(stderr=True)
    title = f"{args.limit:,} requests of {Path(args.trace).stem}, {args.scale:g} times as fast; "
    title += f"{args.adapters} adapters of ranks {args.ranks}"
    heads = [*(f"{kind}, copies" for kind in COUNTS), *(f"{kind}, ratio" for kind in RATIOS)]
    table = new_table(title, "policy", "memory", *heads, texts=2)
    found: dict[str, dict[int, Columns]] = {policy: {} for policy in args.policies}
    for slots in track(args.slots, console=console, disable=not console.is_terminal):
        memory = setting.slots_bytes(slots)
        runs = (setting.experiment("fcfs", seed, slots) for seed in range(args.seeds))
        least = [bounds(run, slots, memory)[1] for run in runs]
        for policy, sizes in found.items():
            counted = copies(setting, policy, slots, memory, args.most, args.seeds)
            sizes[slots] = {**counted, "foresight": least}
    for policy, sizes in found.items():
        for slots, columns in sizes.items():
            counts = (interval(columns[kind], 3) for kind in COUNTS)
            shares = ratios(columns)
            text = f"{slots} slots, {setting.slots_bytes(slots) / 2**30:.2f} GiB"
            table.add_row(policy, text, *counts, *(interval(shares[kind]) for kind in RATIOS))
    Console(width=160).print(table)
    if args.figure is not None:
        note = f"{title}; means over {args.seeds} seeds, with their 95% intervals."
        args.figure.write_bytes(figure(found, note))


if __name__ == "__main__":
    main()
