"""Slots of one size, by bytes, and in one memory with the KV cache, in simulation: mixed ranks on a trace.

    python -m benchmarks.policies.slot_memory AzureLLMInferenceTrace_code.csv
    python -m benchmarks.policies.slot_memory AzureLLMInferenceTrace_code.csv --figure slots.svg

All have the same memory: that of ``--slots`` slots of rank 64, and ``--kv`` for the KV cache. Slots that
share a memory hold at most ``--most`` adapters. Prints for each policy the copies into slots for each request
(moves of adapters included) and the times to first token: means over the seeds, half the width of their 95%
intervals (Student's t), and the ratio of means. The last rows have the fewest copies that any choice of
victims could make if requests were served strictly in order of arrival (``fewest_copies``), with slots of one
size and by bytes. A policy may make fewer, since it serves requests that wait for an adapter together.
"""

from __future__ import annotations

import argparse
import statistics
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

MEASURES = {
    "copies a request": lambda summary: summary["swaps"]["slot_copies_per_request"],
    "mean TTFT, s": lambda summary: summary["ttft_seconds"]["mean"],
    "p99 TTFT, s": lambda summary: summary["ttft_seconds"]["p99"],
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
    roomy: bool
    """Whether the CPU cache has room for all adapters with each kind of slots. By default it goes by the
    bytes of the slots, where these share a memory, and what leaves it leaves its slot, too."""

    def experiment(
        self, policy: str, seed: int, slots: int, slot_memory: int | str | None = None, total: int = 0
    ) -> Experiment:
        """Make an experiment. ``total``: bytes that slots have, if they share a memory with the KV cache."""
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
            max_cpu_lora_bytes=all_of_them if self.roomy else None,
            kv_cache_memory=self.kv + (total if slot_memory == "shared" else 0),
        )  # fmt: skip

    def slots_bytes(self, slots: int) -> int:
        """Return the bytes of slots of rank 64."""
        config = self.experiment("fcfs", 0, slots).engine_config()
        return load_costs(self.preset).plan(config).slot_pool_bytes


def setting_flags(*, scale: float, limit: int) -> argparse.ArgumentParser:
    """Make a parser with the flags of a :class:`Setting`, and these defaults."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("trace")
    parser.add_argument("--ranks", default="8:0.7,16:0.2,64:0.1")
    parser.add_argument("--adapters", type=int, default=200)
    parser.add_argument("--scale", type=float, default=scale, help="how much faster than in the trace")
    parser.add_argument("--kv", default="16GiB", help="for the KV cache")
    parser.add_argument("--limit", type=int, default=limit)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--preset", default="llama3-8b-h100")
    parser.add_argument("--figure", type=Path, help="SVG to draw")
    return parser


def setting_of(args: argparse.Namespace, *, roomy: bool = False) -> Setting:
    kv = parse_bytes(args.kv, field="kv")
    return Setting(args.trace, args.limit, args.scale, args.adapters, args.ranks, args.preset, kv, roomy)


def measure(experiment: Experiment) -> list[float]:
    with tempfile.TemporaryDirectory() as folder:
        summary: dict[str, Any] = run(experiment, folder).summary
    return [measure(summary) for measure in MEASURES.values()]


def bounds(experiment: Experiment, slots: int, memory: int) -> list[float]:
    """Return the fewest copies a request, in order of arrival, into ``slots`` and into ``memory`` bytes."""
    workload, costs = experiment.open_workload(), load_costs(experiment.preset)
    sizes = {shape.name: rounded(costs.adapter_nbytes(shape.rank)) for shape in workload.adapters}
    number = {name: index for index, name in enumerate(sizes)}
    wanted = [number[arrival.adapter] for arrival in workload if arrival.adapter is not None]
    ones = fewest_copies([1] * len(sizes), wanted, slots)
    by_bytes = fewest_copies(list(sizes.values()), wanted, memory)
    return [ones / len(wanted), by_bytes / len(wanted)]


Columns = Sequence[Sequence[float]]
"""The values of each measure, one for each seed."""


def figure(found: Mapping[str, Mapping[str, Columns]], title: str, note: str) -> bytes:
    """Draw a bar for each kind of slots, in groups by policy, for each measure. Returns an SVG."""

    def make() -> Any:
        drawn, panels = new_figure(title, height=3.4, columns=len(MEASURES))
        for index, (panel, measure) in enumerate(zip(panels, MEASURES, strict=True)):
            for place, mode in enumerate(next(iter(found.values()))):
                bars = [mean_and_half(rows[mode][index]) for rows in found.values()]
                means, halves = [mean for mean, _ in bars], [half or 0.0 for _, half in bars]
                at = [group + (place - 1) * 0.27 for group in range(len(found))]
                panel.bar(
                    at, means, 0.25, yerr=halves, color=LIGHT.palette[place], ecolor=LIGHT.text, label=mode
                )
            panel.set_xticks(range(len(found)), list(found), rotation=25)
            panel.set_title(measure)
        legend_above(panels[0], bbox_to_anchor=(0.0, 1.12))
        footnote(drawn, note, LIGHT)
        return drawn

    return vectors(draw("slot-memory", note, LIGHT, make))["svg"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], parents=[setting_flags(scale=2.0, limit=4000)]
    )
    parser.add_argument("--policies", nargs="*", default=["fcfs", "fcfs+gdsf", "chameleon"])
    parser.add_argument("--slots", type=int, default=16, help="slots of one size")
    parser.add_argument("--most", type=int, default=128, help="adapters in a memory that slots share")
    args = parser.parse_args()

    setting = setting_of(args)
    memory = setting.slots_bytes(args.slots)
    title = f"{args.adapters} adapters of ranks {args.ranks}, {memory / 2**30:.2f} GiB for slots"
    table = new_table(title, "policy", "slots", *MEASURES, texts=2)
    console = Console(stderr=True)
    modes: dict[str, tuple[int, int | str | None]] = {
        "of one size": (args.slots, None),
        "by bytes": (args.most, memory),
        "shared": (args.most, "shared"),
    }
    found: dict[str, dict[str, Columns]] = {}
    for policy in track(args.policies, console=console, disable=not console.is_terminal):
        means: list[list[float]] = []
        for mode, (slots, shared) in modes.items():
            runs = [setting.experiment(policy, seed, slots, shared, memory) for seed in range(args.seeds)]
            rows = [measure(one) for one in runs]
            columns = found.setdefault(policy, {})[mode] = list(zip(*rows, strict=True))
            means.append([statistics.fmean(column) for column in columns])
            table.add_row(policy, mode, *(interval(column, 3) for column in columns))
        for mode, after in zip(list(modes)[1:], means[1:], strict=True):
            ratios = [f"{b / a:.2f}" if a else "" for a, b in zip(means[0], after, strict=True)]
            table.add_row("", f"ratio, {mode}", *ratios, style="bold", end_section=mode == "shared")
    least = [
        bounds(setting.experiment("fcfs", seed, args.slots), args.slots, memory) for seed in range(args.seeds)
    ]
    for mode, column in zip(modes, zip(*least, strict=True), strict=False):
        table.add_row("fewest, in order of arrival", mode, interval(column, 3))
    one, other = (statistics.fmean(column) for column in zip(*least, strict=True))
    table.add_row("", "ratio, by bytes", f"{other / one:.2f}" if one else "", style="bold")
    Console().print(table)
    if args.figure is not None:
        note = f"{args.limit:,} requests of {Path(args.trace).stem}, {args.scale:g} times as fast; "
        note += f"{title}; means over {args.seeds} seeds, with their 95% intervals."
        head = "What slots of other kinds save in copies, and in time to first token"
        args.figure.write_bytes(figure(found, head, note))


if __name__ == "__main__":
    main()
