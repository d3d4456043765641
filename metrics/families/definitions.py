"""Every metric that an engine exports: name, labels, type and help text, in one table.

Names and units follow the Prometheus conventions: seconds, bytes, ratios (0 to 1), ``_total`` on
counters. Each series also carries the label ``engine``, which is not repeated here.

A line of the table is ``name{labels} type: help``; what is indented continues it. Names are without
``aioengine_``, and without the ``_total`` of counters. A label with values, ``kind=load|evict``, has series
for each of them from the start, at 0. The type of a histogram names its buckets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from typing import Literal, NamedTuple, cast

Kind = Literal["counter", "gauge", "histogram"]
Labels = tuple[str, ...]

_LONG = (30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds up to the longest waits of requests, so that a histogram distinguishes long waits."""
_STEP = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
_BUCKETS = {
    "": (),
    "request": (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, *_LONG),
    "step": _STEP,
    "swap": (*_STEP, *_LONG),
    "decision": (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25),
    "counts": _COUNTS,
    "few": (0.0, *_COUNTS[:8]),
    "route": (1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 5e-3, 2e-2),
}

_OWN = """
lora_slots{state} gauge: Device slots by state: free, loading, ready, draining; the states add up to
    max_loras.
lora_slot_info{slot,adapter,version,rank} gauge: 1 for the adapter that each slot holds, or is being written
    with.
lora_slot_bytes{state} gauge: The slots' memory on each device: used; free, in its largest hole; and free in
    others (fragmented).
lora_adapter_bytes{adapter,level} gauge: What each adapter in memory takes on the CPU; level is the fastest
    place that holds it, slot or cpu.
lora_slot_busy_seconds{slot} counter: Time in steps that used the slot.
lora_adapter_loaded{adapter,level,pinned} gauge: 1 for each adapter in memory; level is the fastest place that
    holds it, slot or cpu.
lora_adapters gauge: Registered adapters, wherever they are.
lora_cpu_adapters gauge: Adapters in the CPU cache, those in slots and being read included.
lora_swaps{kind=load|evict|replace} counter: Adapters copied into a slot (load), taken out of one (evict),
    superseded by a new version (replace).
lora_swap_seconds{stage=disk|cpu|slot} histogram swap: Stages of a swap: the read from disk to the CPU (disk);
    on the CPU, with requests waiting for the adapter, until a slot was there (cpu); the copy into the slot
    (slot).
lora_swap_bytes{stage=disk|slot} counter: Bytes of adapters read from disk (disk) and copied into slots
    (slot).
lora_cache_requests{level=slot|cpu,result=hit|miss} counter: Requests for adapters as they arrive: did a slot
    hold the adapter (hit or miss) and, if none did, the CPU cache?
lora_prefetch{result=used|wasted|late} counter: Reads from disk by what came of starting them early: used
    (started while no request waited for the adapter, and copied into a slot later), wasted (started so, and
    evicted from the CPU without ever having been copied into a slot), late (a request was waiting already
    when the read started).
lora_load_failures{reason=invalid|too_large|io|internal} counter: Adapters that could not be loaded: invalid,
    too_large, io or internal.
lora_resolver_failures{reason=invalid|io|internal} counter: Look-ups of adapters that failed before there was
    anything to load, such as an adapter_root that cannot be read: invalid, io or internal. A name that does
    not exist is none.
lora_cpu_adapters_limit gauge: Most adapters that the CPU cache may hold.

requests_running gauge: Requests in the batch.
requests_waiting{reason} gauge: Requests not running yet: their adapter is in no slot (adapter), or there is
    no room (capacity); or not running any more, for want of KV blocks or by the policy's decision
    (preempted).
requests_running_limit gauge: Most requests that may be in the batch (max_num_seqs).
requests_waiting_limit gauge: Most requests that may wait (max_waiting); +Inf if there is no bound.
waiting_tokens gauge: Prompt tokens of the requests that wait and have not run yet.
waiting_tokens_limit gauge: Most prompt tokens that may wait (max_waiting_tokens); +Inf if there is no bound.
requests_finished{adapter,reason} counter: Requests that have ended; reason is stop, length, abort or error.
request_queue_seconds{adapter} histogram request: From arrival to first admission to the batch.
request_adapter_wait_seconds{adapter} histogram request: Time from arrival to first admission during which the
    request's adapter was in no slot; 0 if it was in one all the while. Requests for the base model are not
    counted.
request_ttft_seconds{adapter} histogram request: From arrival to the first token.
request_inter_token_seconds{adapter} histogram step: Between two successive tokens of a request.
request_e2e_seconds{adapter} histogram request: From arrival to the end, however it ended.
prompt_tokens{adapter} counter: Prompt tokens of the requests that have ended.
generation_tokens{adapter} counter: Tokens generated for the requests that have ended.
speculation_proposed_tokens{adapter} counter: Tokens proposed by speculation, and computed to be checked.
speculation_accepted_tokens{adapter} counter: Proposed tokens that were what would have been chosen anyway.
prompt_cached_tokens counter: Prompt tokens that the prefix cache supplied.
requests_refused{bound=server|tenant} counter: Requests refused because too many wait; bound says which limit:
    server or tenant.

tenant_requests{tenant,reason} counter: Requests of tenants that have ended; reason is stop, length, abort or
    error.
tenant_prompt_tokens{tenant} counter: Prompt tokens of the tenant's requests that have ended.
tenant_generation_tokens{tenant} counter: Tokens generated for the tenant's requests that have ended.
tenant_http_responses{tenant,status} counter: Answers of the HTTP server; the tenant is none for requests
    without a good key.

http_responses{route,status,code} counter: Answers of the HTTP server: the route, the status (499: the client
    went away; an error's also where it came in the middle of a stream), and the error's code, empty if there
    was none.
http_requests_active gauge: Requests to the HTTP server that have not been answered in full, without probes
    and pages.
tls_certificate_expiry_seconds gauge: Unix time at which the server's TLS certificate expires.
config_last_reload_successful{file} gauge: 1 while the server runs with what the file holds: keys (the keys
    file), config (all that SIGHUP reads). 0 if the file was refused, or cannot be read.

policy_decision_seconds histogram decision: Time that the policy took for the decision of a step.
policy_refusals{reason} counter: Items of policy decisions that the core refused, by its reason.
policy_errors counter: Times that the policy raised or returned no decision.
policy_overruns counter: Decisions that took longer than policy_time_budget.
policy_replacements counter: Times that the policy was replaced for good by the built-in safe one, for
    overrunning too often.

step_seconds{phase=prefill|decode|mixed} histogram step: Time of a model step; phase is prefill, decode or
    mixed.
step_tokens{phase=prefill|decode} counter: Tokens as they are computed in steps; phase is prefill or decode.
schedule_seconds histogram decision: Time that the policy and the core together took to form a batch.
batch_sequences histogram counts: Requests in a step.
batch_adapters histogram few: Distinct adapters in a step.
preemptions counter: Requests taken off the batch, to be computed again later.
kv_cache_usage_ratio gauge: KV blocks that running requests hold, as a share of all (0 to 1).
kv_cache_blocks gauge: KV blocks that there are.
listener_failures counter: Exceptions that event listeners have raised.
engine_state{state} gauge: 1 for the state that the engine is in: starting, ready, draining (it finishes what
    it has accepted), degraded (the model's processes were lost and are being started again) or dead.
build_info{version,kernels,python,torch,model_impl,quantization,batch_invariant} gauge: 1; the labels say what
    runs here.
executor_restarts counter: Times that the model's processes were lost and started again.
grammar_compiles{outcome=compiled|invalid|limit|failed} counter: Grammars compiled for guided decoding, by
    outcome: compiled, invalid (malformed or not supported), limit (it took too much), failed (its process was
    lost).
grammar_compile_seconds histogram request: Time of a compile, waiting for its turn left out.
grammars_kept gauge: Compiled grammars that are kept.
log_dropped counter: Lines of the server's log that were dropped because the earlier ones were not read.
event_loop_lag_seconds histogram step: How late the event loop runs a timer that is due; measured four times a
    second.
"""

_PROCESS = """
process_cpu_seconds counter: User and system CPU time of the process.
process_start_time_seconds gauge: Unix time at which the process was started.
process_resident_memory_bytes gauge: Memory of the process that is in RAM.
process_virtual_memory_bytes gauge: Virtual memory of the process.
process_open_fds gauge: File descriptors that the process has open.
process_max_fds gauge: File descriptors that the process may have open.
process_threads gauge: Threads of the process.
event_loop_tasks gauge: Tasks of the event loop that have not ended.
"""
"""The process, under the names that all Prometheus clients use; exported by ``aioengine serve``."""

_VLLM = """
vllm:num_requests_running{model_name} gauge: Requests in the batch.
vllm:num_requests_waiting{model_name} gauge: Requests that are not running yet.
vllm:kv_cache_usage_perc{model_name} gauge: KV blocks that running requests hold, as a share of all (0 to 1).
vllm:lora_requests_info{max_lora,running_lora_adapters,waiting_lora_adapters} gauge: Unix time of this
    snapshot. running_lora_adapters are ready in a slot; waiting_lora_adapters are in none, and requests wait
    for them; both are separated by commas. max_lora is the number of slots.
vllm:lora_adapter_loaded{model_name,adapter_name,level,pinned,rank} gauge: 1 for each adapter in memory; level
    is gpu if a slot holds it (on a CPU too), and cpu if only the CPU cache does.
vllm:max_gpu_lora_adapters{model_name} gauge: Device slots.
vllm:num_gpu_loaded_lora_adapters{model_name} gauge: Adapters in slots.
vllm:num_cpu_loaded_lora_adapters{model_name} gauge: Adapters in the CPU cache, those in slots included.
vllm:lora_adapter_load_seconds{model_name,transition} histogram swap: Transitions of adapters: the read from
    disk to the CPU (load), and the copy into a slot (activate).
"""
"""Under the names that routers read (``metrics_compat="vllm"``)."""

_FLEET = """
fleet_route_seconds histogram route: Time that a routing decision took.
fleet_decisions{reason} counter: Routing decisions by reason.
fleet_router_failures{kind=raised|nonsense|slow|replaced} counter: What the router got wrong.
fleet_migrations{cause=lost|silent|hung|dead|refused} counter: Requests that went on at another replica, by
    what became of theirs.
fleet_losses{cause=lost|silent|hung|dead} counter: Replicas that were lost.
fleet_misroutes counter: Requests that went to a replica for an adapter in its memory, which was not there any
    more.
fleet_adapter_conflicts counter: Adapters that were found with different content on two replicas.
fleet_replicas_wanted gauge: Replicas that the fleet should have.
fleet_replica_up gauge: 1 if it takes requests.
fleet_knowledge_age_seconds gauge: Age of its last report.
fleet_replica_requests gauge: Its requests of this gateway.
fleet_adapter_copies{adapter} gauge: Replicas that hold it.
fleet_adapter_copies_wanted{adapter} gauge: Replicas that should, by the plan.
"""
"""Of a fleet's gateway. There all series, also those of replicas, have the label ``replica`` too."""


class Definition(NamedTuple):
    """One metric."""

    name: str
    """Its name without the ``_total`` that a counter's series get."""
    kind: Kind
    help: str
    labels: Labels = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, "+Inf" left out."""
    initial: tuple[Labels, ...] = ()
    """Label values of the series that exist from the start; ``((),)`` without labels."""

    @property
    def unit(self) -> str:
        """Unit at the end of the name, if there is one: seconds, bytes or ratio."""
        last = self.name.rsplit("_", 1)[-1]
        return last if last in ("seconds", "bytes", "ratio") else ""

    @property
    def exposed(self) -> str:
        """Name of the metric in queries."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


_ENTRY = re.compile(r"(\S+?)(?:\{(.*?)\})? (counter|gauge|histogram) ?(\w*): (.*)")


def _read(table: str) -> Iterator[tuple[str, Definition]]:
    """Yield the metrics of a table, by the names that it has for them."""
    for line in re.sub(r"\n +", " ", table.strip()).splitlines():
        if entry := _ENTRY.fullmatch(line):
            name, labels, kind, buckets, text = entry.groups("")
            pairs = [label.partition("=") for label in labels.split(",") if label]
            known = [values.split("|") for _, _, values in pairs]
            full = name if ":" in name or name.startswith("process_") else f"aioengine_{name}"
            initial = tuple(product(*known)) if all(map(all, known)) else ()
            yield (
                name,
                Definition(
                    full,
                    cast(Kind, kind),
                    text,
                    tuple(label for label, _, _ in pairs),
                    _BUCKETS[buckets],
                    initial,
                ),
            )


OWN, PROCESS, VLLM, FLEET = (dict(_read(table)) for table in (_OWN, _PROCESS, _VLLM, _FLEET))
ALL = {**OWN, **PROCESS, **VLLM, **FLEET}
"""Metrics by their names in the table."""
