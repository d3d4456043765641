"""Slots of one size and by bytes, in simulation: mixed ranks on a trace.

    python -m benchmarks.policies.slot_memory AzureLLMInferenceTrace_code.csv
    python -m benchmarks.policies.slot_memory AzureLLMInferenceTrace_code.csv --slots 4 8 16 32 48 --seeds 3

Both kinds have the same memory: that of so many slots of rank 64, beside ``--kv`` for the KV cache. Slots
that share a memory hold at most ``--most`` adapters. The CPU cache has room for all adapters; by default it
goes by the bytes of the slots where these share a memory, and what leaves it leaves its slot, too. Prints
for each policy and memory the copies into slots for each request (moves of adapters included) and the times
to first token: means over the seeds, half the width of their 95% intervals (Student's t), and the ratios to
slots of one size, seed by seed. "foresight" are the fewest copies that any choice of victims could make if
requests were served strictly in order of arrival (``fewest_copies``). A policy may make fewer, since it
serves requests that wait for an adapter together.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.progress import track

from aioengine.checks import parse_bytes
from aioengine.core.adapters.arena import rounded
from aioengine.lab import Experiment, WorkloadSpec, run
from aioengine.lab.costs.presets import load_costs
from aioengine.lab.report.style import LIGHT, draw, footnote, legend_above, new_figure, vectors
from benchmarks.policies.fewest_copies import fewest_copies
from benchmarks.policies.intervals import interval, mean_and_half
from benchmarks.shared.report import new_table

COPIES, P99 = "copies a request", "p99 TTFT, s"
MEASURES = {
    COPIES: lambda summary: summary["swaps"]["slot_copies_per_request"],
    "mean TTFT, s": lambda summary: summary["ttft_seconds"]["mean"],
    P99: lambda summary: summary["ttft_seconds"]["p99"],
}


class Setting(NamedTuple):
    """What all runs have in common."""

    trace: str
    limit: int
    scale: float
    """How much faster the requests come than in the trace."""
    adapters: int
    ranks: str
    preset: str
    kv: int
    """Bytes for the KV cache."""

    def experiment(self, policy: str, seed: int, slots: int, slot_memory: int | None = None) -> Experiment:
        all_of_them = self.adapters * load_costs(self.preset).adapter_nbytes(64)
        workload = WorkloadSpec(
            trace=self.trace,
            limit=self.limit,
            scale=self.scale,
            adapters=self.adapters,
            popularity="zipf:1.0",
            ranks=self.ranks,
        )
        return Experiment(
            workload=workload, policy=policy, preset=self.preset, slots=slots, slot_memory=slot_memory,
            cpu_loras=max(self.adapters, slots), max_lora_rank=64, seed=seed,
            max_cpu_lora_bytes=all_of_them,
            kv_cache_memory=self.kv,
        )  # fmt: skip

    def slots_bytes(self, slots: int) -> int:
        """Return the bytes of slots of rank 64."""
        config = self.experiment("fcfs", 0, slots).engine_config()
        return load_costs(self.preset).plan(config).slot_pool_bytes


KINDS = ("of one size", "by bytes")
FORESIGHT = tuple(f"foresight, {kind}" for kind in KINDS)
GOAL = 1 / 3

Columns = Mapping[str, Sequence[float]]
"""The values of each measure, one for each seed."""
Found = Mapping[str, Mapping[int, Mapping[str, Columns]]]
"""Columns by policy, size of the memory in slots, and kind of slots."""


def measured(setting: Setting, policy: str, seeds: int, slots: int, most: int) -> dict[str, Columns]:
    """Run a policy with each kind of slots in the same memory."""
    memory = setting.slots_bytes(slots)
    modes: dict[str, tuple[int, int | None]] = dict(zip(KINDS, [(slots, None), (most, memory)], strict=True))
    found: dict[str, Columns] = {}
    for kind, mode in modes.items():
        rows = [measure(setting.experiment(policy, seed, *mode)) for seed in range(seeds)]
        found[kind] = dict(zip(MEASURES, zip(*rows, strict=True), strict=True))
    return found


def measure(experiment: Experiment) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        summary: dict[str, Any] = run(experiment, folder).summary
    return [measure(summary) for measure in MEASURES.values()]


def foresight(setting: Setting, seeds: int, slots: int) -> dict[str, Columns]:
    """Return the fewest copies for requests in order of arrival, with slots of one size and by bytes."""
    memory = setting.slots_bytes(slots)
    rows = [bounds(setting.experiment("fcfs", seed, slots), slots, memory) for seed in range(seeds)]
    return {kind: {COPIES: column} for kind, column in zip(FORESIGHT, zip(*rows, strict=True), strict=True)}


def bounds(experiment: Experiment, slots: int, memory: int) -> list[float]:
    """Return the fewest copies a request, in order of arrival, into ``slots`` and into ``memory`` bytes."""
    workload, costs = experiment.open_workload(), load_costs(experiment.preset)
    sizes = {shape.name: rounded(costs.adapter_nbytes(shape.rank)) for shape in workload.adapters}
    number = {name: index for index, name in enumerate(sizes)}
    wanted = [number[arrival.adapter] for arrival in workload if arrival.adapter is not None]
    ones = fewest_copies([1] * len(sizes), wanted, slots)
    by_bytes = fewest_copies(list(sizes.values()), wanted, memory)
    return [ones / len(wanted), by_bytes / len(wanted)]


def ratios(found: Mapping[str, Columns], kind: str, measure: str) -> list[float]:
    """Return the values of one kind of slots divided by those of slots of one size, seed by seed."""
    return [a / b for a, b in zip(found[kind][measure], found[KINDS[0]][measure], strict=True)]


def bars(found: Found, title: str, note: str) -> bytes:
    """Draw a bar for each kind of slots, in groups by policy, for each measure. Returns an SVG."""

    def make() -> Any:
        drawn, panels = new_figure(title, height=3.4, columns=len(MEASURES))
        for panel, measure in zip(panels, MEASURES, strict=True):
            for place, kind in enumerate(KINDS):
                rows = [next(iter(sizes.values()))[kind][measure] for sizes in found.values()]
                means, halves = zip(*map(_mean_and_half, rows), strict=True)
                at = [group + (place - 0.5) * 0.27 for group in range(len(found))]
                panel.bar(
                    at, means, 0.25, yerr=halves, color=LIGHT.palette[place], ecolor=LIGHT.text, label=kind
                )
            panel.set_xticks(range(len(found)), list(found), rotation=25)
            panel.set_title(measure)
        legend_above(panels[0], bbox_to_anchor=(0.0, 1.12))
        footnote(drawn, note, LIGHT)
        return drawn

    return vectors(draw("slot-memory", note, LIGHT, make))["svg"]


def lines(found: Found, note: str) -> bytes:
    """Draw the ratios of copies over the size of the memory, a panel for each policy. Returns an SVG."""

    def make() -> Any:
        title = "Copies into slots, as a share of those with slots of one size"
        drawn, panels = new_figure(title, height=3.2, columns=len(found))
        for panel, (policy, sizes) in zip(panels, found.items(), strict=True):
            for place, kind in enumerate((KINDS[1], FORESIGHT[1])):
                if kind not in next(iter(sizes.values())):
                    continue
                points = [_mean_and_half(ratios(size, kind, COPIES)) for size in sizes.values()]
                panel.errorbar(
                    range(len(sizes)), [mean for mean, _ in points], yerr=[half for _, half in points],
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


def _mean_and_half(values: Sequence[float]) -> tuple[float, float]:
    mean, half = mean_and_half(values)
    return mean, half or 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("trace")
    parser.add_argument("--policies", nargs="*", default=["fcfs", "chameleon"])
    parser.add_argument("--slots", nargs="*", type=int, default=[8], help="sizes of the memory, in slots")
    parser.add_argument("--most", type=int, default=200, help="adapters in a memory that slots share")
    parser.add_argument("--ranks", default="8:0.7,16:0.2,64:0.1")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--scale", type=float, default=0.5, help="how much faster than in the trace")
    parser.add_argument("--kv", default="16GiB", help="for the KV cache")
    parser.add_argument("--limit", type=int, default=1500, help="requests")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="llama3-8b-h100")
    parser.add_argument("--no-foresight", action="store_true", help="it takes long for many requests")
    parser.add_argument("--figure", type=Path, help="SVG to draw: over the sizes, if there are several")
    args = parser.parse_args()

    kv = parse_bytes(args.kv, field="kv")
    setting = Setting(args.trace, args.limit, args.scale, args.adapters, args.ranks, args.preset, kv)
    title = f"{args.limit:,} requests of {Path(args.trace).stem}, {args.scale:g} times as fast; "
    title += f"{args.adapters} adapters of ranks {args.ranks}"
    table = new_table(title, "policy", "memory", "slots", *MEASURES, "copies, ratio", "p99, ratio", texts=3)
    errors = Console(stderr=True)
    found: dict[str, dict[int, dict[str, Columns]]] = {policy: {} for policy in args.policies}
    for slots in track(args.slots, console=errors, disable=not errors.is_terminal):
        least = {} if args.no_foresight else foresight(setting, args.seeds, slots)
        for policy, sizes in found.items():
            sizes[slots] = {**measured(setting, policy, args.seeds, slots, args.most), **least}
    for policy, sizes in found.items():
        for slots, kinds in sizes.items():
            memory = f"{slots} slots, {setting.slots_bytes(slots) / 2**30:.2f} GiB"
            for kind, columns in kinds.items():
                values = [interval(columns[name], 3) if name in columns else "" for name in MEASURES]
                shares = [
                    interval(ratios(kinds, kind, name)) if name in columns and kind != KINDS[0] else ""
                    for name in (COPIES, P99)
                ]
                table.add_row(
                    policy, memory, kind, *values, *shares, end_section=kind == next(reversed(kinds))
                )
    Console(width=160).print(table)
    if args.figure is not None:
        note = f"{title}; means over {args.seeds} seeds, with their 95% intervals."
        if len(args.slots) > 1:
            args.figure.write_bytes(lines(found, note))
        else:
            head = "What slots of other kinds save in copies, and in time to first token"
            note = f"{setting.slots_bytes(args.slots[0]) / 2**30:.2f} GiB for slots; {note}"
            args.figure.write_bytes(bars(found, head, note))


if __name__ == "__main__":
    main()
