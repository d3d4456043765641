"""The dashboard's charts: titles, explanations, units and PromQL.

The file is long because it is one table, in the order of the dashboard's rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from grafana_foundation_sdk.models import units

HERE = 'instance=~"$instance",engine=~"$engine"'
"""The selection that every expression is held to."""

FREE = "(free)"
"""Stands for the adapter of an empty slot; no adapter can have this name."""


class Query(NamedTuple):
    """One PromQL expression. ``legend`` names its series; a panel's several queries need distinct ones."""

    expr: str
    legend: str


class Chart(NamedTuple):
    """A time series panel, ``width`` of Grafana's 24 columns wide."""

    title: str
    description: str
    unit: str
    queries: Sequence[Query]
    width: int = 8
    stacked: bool = False
    top: float | None = None
    """The axis' upper end; by default what the data needs."""


def rate(counter: str, by: str, where: str = "") -> str:
    """Build a rate per second, summed over all labels except ``by``."""
    return f"sum by ({by}) (rate({counter}{{{HERE}{where}}}[$__rate_interval]))"


def quantiles(histogram: str, by: str, where: str = "", suffix: str = "") -> list[Query]:
    """Build the median and the 99th percentile for each combination of the labels ``by``."""
    buckets = rate(f"{histogram}_bucket", f"le, {by}", where)
    label = " ".join(f"{{{{{name.strip()}}}}}" for name in by.split(","))
    return [
        Query(f"histogram_quantile({q}, {buckets})", f"{label} p{q * 100:g}{suffix}") for q in (0.5, 0.99)
    ]


def hit_ratio() -> str:
    lookups = "aioengine_lora_cache_requests_total"
    hits, all_ = rate(lookups, "level", ',result="hit"'), rate(lookups, "level")
    return f"({hits} or 0 * {all_}) / {all_}"


SUMMARY = [
    Chart(
        "Slots in use",
        "Share of the slots that hold an adapter, drain, or are being copied to.",
        units.PercentUnit,
        [
            Query(
                f'1 - sum(aioengine_lora_slots{{{HERE},state="free"}}) / sum(aioengine_lora_slots{{{HERE}}})',
                "in use",
            )
        ],
    ),
    Chart(
        "Slot hit rate",
        "Share of the arriving requests whose adapter was in a slot already. Low with busy slots means "
        "that the working set of adapters is larger than max_loras.",
        units.PercentUnit,
        [Query(hit_ratio().replace(HERE, f'{HERE},level="slot"'), "slot")],
    ),
    Chart(
        "Requests waiting",
        "Requests that wait for their adapter, or for room in the batch.",
        units.Short,
        [Query(f"sum(aioengine_requests_waiting{{{HERE}}})", "waiting")],
    ),
    Chart(
        "Tokens computed",
        "Prompt and generated tokens together, per second.",
        units.CountsPerSecond,
        [Query(f"sum(rate(aioengine_step_tokens_total{{{HERE}}}[$__rate_interval]))", "tokens")],
    ),
]

ADAPTERS = [
    Chart(
        "Slots by state",
        "Ready slots hold an adapter that requests can use; loading and draining ones are being changed.",
        units.Short,
        [Query(f"sum by (state) (aioengine_lora_slots{{{HERE}}})", "{{state}}")],
        stacked=True,
    ),
    Chart(
        "Memory of the slots",
        "What adapters take of it on each device, and what is free: in the largest hole, or in "
        "others (fragmented).",
        units.BytesIEC,
        [Query(f"sum by (state) (aioengine_lora_slot_bytes{{{HERE}}})", "{{state}}")],
        stacked=True,
    ),
    Chart(
        "Largest adapters",
        "The ten adapters that take most memory on the CPU, and the fastest place that holds each.",
        units.BytesIEC,
        [
            Query(
                f"topk(10, max by (adapter, level) (aioengine_lora_adapter_bytes{{{HERE}}}))",
                "{{adapter}}, {{level}}",
            )
        ],
    ),
    Chart(
        "Hit rate by level",
        "Arriving requests that found their adapter in a slot and, of those that did not, on the CPU. "
        "A miss on the CPU is a read from disk.",
        units.PercentUnit,
        [Query(hit_ratio(), "{{level}}")],
        top=1,
    ),
    Chart(
        "Swaps by kind",
        "Adapters copied into a slot (load), taken out of one (evict), superseded by a new version "
        "(replace), and moved together to make a hole (move). As many loads as evictions, all the time, is "
        "thrashing.",
        units.OpsPerSecond,
        [Query(rate("aioengine_lora_swaps_total", "kind"), "{{kind}}")],
    ),
    Chart(
        "Swaps by stage",
        "Adapters read from disk to the CPU (disk), held up there because no slot was free (cpu), and "
        "copied into a slot (slot).",
        units.OpsPerSecond,
        [Query(rate("aioengine_lora_swap_seconds_count", "stage"), "{{stage}}")],
    ),
    Chart(
        "Swap latency by stage",
        "How long one read (disk), wait for a slot (cpu) or copy (slot) takes.",
        units.Seconds,
        quantiles("aioengine_lora_swap_seconds", "stage"),
    ),
    Chart(
        "Adapter wait",
        "How long requests waited with their adapter in no slot, by adapter; counted at admission.",
        units.Seconds,
        quantiles("aioengine_request_adapter_wait_seconds", "adapter", ',adapter=~"$adapter"'),
    ),
    Chart(
        "Prefetches",
        "Adapters read ahead of their turn: used, evicted unused (wasted), or begun when a request was "
        "waiting already (late).",
        units.OpsPerSecond,
        [Query(rate("aioengine_lora_prefetch_total", "result"), "{{result}}")],
    ),
    Chart(
        "Load failures",
        "Adapters that could not be read or did not fit, by reason.",
        units.OpsPerSecond,
        [Query(rate("aioengine_lora_load_failures_total", "reason"), "{{reason}}")],
    ),
    Chart(
        "CPU cache",
        "Adapters in CPU memory, those in slots and those being read included.",
        units.Short,
        [
            Query(
                f"aioengine_lora_cpu_adapters{{{HERE}}}",
                "{{instance}} {{engine}}",
            )
        ],
    ),
]

REQUESTS = [
    Chart(
        "Time to first token by adapter",
        "From arrival to the first token.",
        units.Seconds,
        quantiles("aioengine_request_ttft_seconds", "adapter", ',adapter=~"$adapter"'),
        width=12,
    ),
    Chart(
        "Queue by reason",
        "Requests in the batch, and those waiting: for their adapter to come to a slot, or for room.",
        units.Short,
        [
            Query(f"sum by (reason) (aioengine_requests_waiting{{{HERE}}})", "waiting: {{reason}}"),
            Query(f"sum(aioengine_requests_running{{{HERE}}})", "running"),
        ],
        width=12,
        stacked=True,
    ),
    Chart(
        "Tokens per second",
        "Tokens as they are computed: of prompts (prefill) and generated (decode).",
        units.CountsPerSecond,
        [Query(rate("aioengine_step_tokens_total", "phase"), "{{phase}}")],
    ),
    Chart(
        "Time between tokens",
        "Of one request, from one token to the next.",
        units.Seconds,
        quantiles("aioengine_request_inter_token_seconds", "engine"),
    ),
    Chart(
        "Requests ended by reason",
        "stop and length are ordinary ends; error is the engine's, abort the client's.",
        units.RequestsPerSecond,
        [Query(rate("aioengine_requests_finished_total", "reason"), "{{reason}}")],
    ),
]

ENGINE = [
    Chart(
        "KV cache use",
        "Share of the KV blocks that running requests hold. Near 100 % requests are preempted.",
        units.PercentUnit,
        [Query(f"aioengine_kv_cache_usage_ratio{{{HERE}}}", "{{instance}} {{engine}}")],
        top=1,
    ),
    Chart(
        "Step time by phase",
        "How long the model takes for one step.",
        units.Seconds,
        quantiles("aioengine_step_seconds", "phase"),
    ),
    Chart(
        "Event-loop lag",
        "How late the event loop runs a timer that is due. High: something blocks the loop.",
        units.Seconds,
        quantiles("aioengine_event_loop_lag_seconds", "engine"),
    ),
    Chart(
        "Policy refusals and errors",
        "Items of decisions that the core refused, by reason; decisions that failed; and those that took "
        "longer than policy_time_budget. All are zero with a correct and quick policy.",
        units.OpsPerSecond,
        [
            Query(rate("aioengine_policy_refusals_total", "reason"), "refused: {{reason}}"),
            Query(rate("aioengine_policy_errors_total", "engine"), "failed: {{engine}}"),
            Query(rate("aioengine_policy_overruns_total", "engine"), "too slow: {{engine}}"),
        ],
    ),
    Chart(
        "Policy decision time",
        "What the policy takes to decide a step.",
        units.Seconds,
        quantiles("aioengine_policy_decision_seconds", "engine"),
    ),
    Chart(
        "Preemptions",
        "Requests taken off the batch for want of KV blocks, to be computed again later.",
        units.OpsPerSecond,
        [Query(rate("aioengine_preemptions_total", "engine"), "{{engine}}")],
    ),
    Chart(
        "Batch size",
        "Requests in a step, and the distinct adapters among them.",
        units.Short,
        [
            *quantiles("aioengine_batch_sequences", "engine", suffix=" requests"),
            *quantiles("aioengine_batch_adapters", "engine", suffix=" adapters"),
        ],
    ),
    Chart(
        "Time in the queue",
        "From arrival to the first step, for whatever reason. Adapter wait is the part of it without a slot.",
        units.Seconds,
        quantiles("aioengine_request_queue_seconds", "engine"),
    ),
    Chart(
        "Grammar compiles by outcome",
        "Of guided decoding: compiled, refused as invalid, ended at a limit, without room, or failed.",
        units.OpsPerSecond,
        [Query(rate("aioengine_grammar_compiles_total", "outcome"), "{{outcome}}")],
    ),
]


SERVICE = [
    Chart(
        "Answers by status",
        "Answers of the HTTP server per second; 499 is a client that went away.",
        units.RequestsPerSecond,
        [Query(rate("aioengine_http_responses_total", "status"), "{{status}}")],
        stacked=True,
    ),
    Chart(
        "Errors and refusals by code",
        "Answers with an error's code, per second.",
        units.RequestsPerSecond,
        [Query(rate("aioengine_http_responses_total", "code", ',code!=""'), "{{code}}")],
    ),
    Chart(
        "Request duration",
        "From arrival to the end, of all adapters together.",
        units.Seconds,
        quantiles("aioengine_request_e2e_seconds", "engine"),
    ),
    Chart(
        "Tokens by tenant",
        "Tokens generated for the requests that have ended, per second.",
        units.CountsPerSecond,
        [Query(rate("aioengine_tenant_generation_tokens_total", "tenant"), "{{tenant}}")],
        stacked=True,
    ),
    Chart(
        "Answers by tenant",
        "Per second, by status.",
        units.RequestsPerSecond,
        [Query(rate("aioengine_tenant_http_responses_total", "tenant, status"), "{{tenant}} {{status}}")],
    ),
    Chart(
        "Engine state",
        "1 for the state that each engine is in.",
        units.Short,
        [
            Query(
                f"sum by (instance, engine, replica, state) (aioengine_engine_state{{{HERE}}}) > 0",
                "{{instance}} {{replica}} {{state}}",
            ),
            Query(
                f"sum by (instance) (aioengine_http_requests_active{{{HERE}}})", "{{instance}} open requests"
            ),
        ],
    ),
]

LIMITS = [
    Chart(
        "Queue and batch against their limits",
        "Shares of max_waiting and max_num_seqs.",
        units.PercentUnit,
        [
            Query(
                f"sum by (instance, engine) (aioengine_requests_waiting{{{HERE}}})"
                f" / sum by (instance, engine) (aioengine_requests_waiting_limit{{{HERE}}})",
                "{{engine}} waiting",
            ),
            Query(
                f"aioengine_requests_running{{{HERE}}} / aioengine_requests_running_limit{{{HERE}}}",
                "{{engine}} running",
            ),
            Query(
                f"aioengine_lora_cpu_adapters{{{HERE}}} / aioengine_lora_cpu_adapters_limit{{{HERE}}}",
                "{{engine}} CPU cache",
            ),
        ],
        top=1.0,
    ),
    Chart(
        "Pinned adapters",
        "Adapters that are kept in a slot.",
        units.Short,
        [Query(f'count by (adapter) (aioengine_lora_adapter_loaded{{{HERE},pinned="true"}})', "{{adapter}}")],
    ),
    Chart(
        "Prefix cache",
        "Share of the prompts' tokens that the prefix cache supplied.",
        units.PercentUnit,
        [
            Query(
                rate("aioengine_prompt_cached_tokens_total", "engine")
                + " / clamp_min("
                + rate("aioengine_prompt_tokens_total", "engine")
                + ", 1e-6)",
                "{{engine}}",
            )
        ],
    ),
    Chart(
        "Failures of loads and look-ups",
        "Adapters that could not be loaded, and look-ups that failed, per second.",
        units.CountsPerSecond,
        [
            Query(rate("aioengine_lora_load_failures_total", "reason"), "load {{reason}}"),
            Query(rate("aioengine_lora_resolver_failures_total", "reason"), "look-up {{reason}}"),
        ],
    ),
    Chart(
        "Restarts of the model's processes",
        "Each restart failed the requests that were running.",
        units.Short,
        [
            Query(
                f"sum by (engine) (increase(aioengine_executor_restarts_total{{{HERE}}}[$__rate_interval]))",
                "{{engine}}",
            )
        ],
    ),
    Chart(
        "What runs",
        "1 for each version with its kernels.",
        units.Short,
        [
            Query(
                f"count by (version, kernels, torch) (aioengine_build_info{{{HERE}}})",
                "{{version}} {{kernels}} torch {{torch}}",
            )
        ],
    ),
]

PROCESS = [
    Chart(
        "Resident memory",
        "Memory of the server's process; processes of the model are not included.",
        units.BytesIEC,
        [Query(f"process_resident_memory_bytes{{{HERE}}}", "{{instance}} {{replica}}")],
    ),
    Chart(
        "Processor time",
        "Cores that the process keeps busy.",
        units.Short,
        [Query(rate("process_cpu_seconds_total", "instance, replica"), "{{instance}} {{replica}}")],
    ),
    Chart(
        "File descriptors, threads and tasks",
        "A number that grows and never shrinks shows a leak.",
        units.Short,
        [
            Query(f"process_open_fds{{{HERE}}}", "{{instance}} {{replica}} descriptors"),
            Query(f"process_threads{{{HERE}}}", "{{instance}} {{replica}} threads"),
            Query(f"aioengine_event_loop_tasks{{{HERE}}}", "{{instance}} {{replica}} tasks"),
        ],
    ),
    Chart(
        "Age of the process",
        "Seconds since its start; a fall to 0 is a restart.",
        units.Seconds,
        [Query(f"time() - process_start_time_seconds{{{HERE}}}", "{{instance}} {{replica}}")],
    ),
    Chart(
        "Log lines lost",
        "Lines per second that were dropped, because the earlier ones were not read.",
        units.CountsPerSecond,
        [Query(rate("aioengine_log_dropped_total", "instance"), "{{instance}}")],
    ),
]

FLEET = [
    Chart(
        "Replicas that take requests",
        "Those that the door sends requests to, and those that there should be.",
        units.Short,
        [
            Query(f"sum by (engine) (aioengine_fleet_replica_up{{{HERE}}})", "{{engine}} up"),
            Query(f"max by (engine) (aioengine_fleet_replicas_wanted{{{HERE}}})", "{{engine}} wanted"),
        ],
    ),
    Chart(
        "Requests by replica",
        "Open requests of the doors at each replica: a router that herds shows here.",
        units.Short,
        [Query(f"sum by (replica) (aioengine_fleet_replica_requests{{{HERE}}})", "{{replica}}")],
    ),
    Chart(
        "Routing decisions by reason",
        "The router's reasons for choosing a replica.",
        units.CountsPerSecond,
        [Query(rate("aioengine_fleet_decisions_total", "reason"), "{{reason}}")],
    ),
    Chart(
        "Routing time",
        "Seconds that a decision takes in the door.",
        units.Seconds,
        quantiles("aioengine_fleet_route_seconds", "engine"),
    ),
    Chart(
        "Age of knowledge",
        "Since the door last heard of each replica; beyond silent_seconds (3) it is left alone.",
        units.Seconds,
        [Query(f"max by (replica) (aioengine_fleet_knowledge_age_seconds{{{HERE}}})", "{{replica}}")],
    ),
    Chart(
        "Copies of adapters",
        "Replicas that hold each adapter, and by how many the plan of the placement policy exceeds them.",
        units.Short,
        [
            Query(f"topk(10, max by (adapter) (aioengine_fleet_adapter_copies{{{HERE}}}))", "{{adapter}}"),
            Query(
                f"max by (adapter) (aioengine_fleet_adapter_copies_wanted{{{HERE}}})"
                f" - max by (adapter) (aioengine_fleet_adapter_copies{{{HERE}}}) > 0",
                "{{adapter}} missing",
            ),
        ],
    ),
    Chart(
        "Losses, migrations and misroutes",
        "Replicas lost; requests that went on elsewhere; requests sent for an adapter that had left.",
        units.CountsPerSecond,
        [
            Query(  # each door counts each of them
                f"max by (cause) (rate(aioengine_fleet_losses_total{{{HERE}}}[$__rate_interval]))",
                "lost {{cause}}",
            ),
            Query(rate("aioengine_fleet_migrations_total", "cause"), "moved {{cause}}"),
            Query(rate("aioengine_fleet_misroutes_total", "engine"), "misrouted"),
        ],
    ),
    Chart(
        "Router failures",
        "Decisions that the safe router made, because the chosen one raised, was slow or named no replica.",
        units.CountsPerSecond,
        [Query(rate("aioengine_fleet_router_failures_total", "kind"), "{{kind}}")],
    ),
]
