"""Every metric that an engine exports: name, type, help text, labels and buckets, in one place.

Names and units follow the Prometheus conventions: seconds, bytes, ratios (0 to 1), ``_total`` on
counters. Each series also carries the label ``engine``, which is not repeated here.

The file is long because it is one table, with one entry for each metric.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Kind = Literal["counter", "gauge", "histogram"]

_LONG = (30.0, 60.0, 120.0, 300.0, 600.0)
"""Upper bounds up to the longest waits of requests, so that a histogram distinguishes long waits."""
REQUEST_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, *_LONG)
STEP_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
SWAP_SECONDS = (*STEP_SECONDS, *_LONG)
DECISION_SECONDS = (0.00005, 0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.05, 0.25)
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)


class Definition(NamedTuple):
    """One metric. ``name`` is without the ``_total`` that a counter's series get."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram's buckets, "+Inf" left out."""

    @property
    def unit(self) -> str:
        """Unit at the end of the name, if there is one: seconds, bytes or ratio."""
        last = self.name.rsplit("_", 1)[-1]
        return last if last in ("seconds", "bytes", "ratio") else ""

    @property
    def exposed(self) -> str:
        """Name of the metric in queries."""
        return f"{self.name}_total" if self.kind == "counter" else self.name


# Slots and adapters

LORA_SLOTS = Definition(
    "aioengine_lora_slots",
    "gauge",
    "Device slots by state: free, loading, ready, draining; the states add up to max_loras.",
    ("state",),
)
LORA_SLOT_INFO = Definition(
    "aioengine_lora_slot_info",
    "gauge",
    "1 for the adapter that each slot holds, or is being written with.",
    ("slot", "adapter", "version", "rank"),
)
LORA_SLOT_BYTES = Definition(
    "aioengine_lora_slot_bytes",
    "gauge",
    "The slots' memory on each device: used; free, in its largest hole; and free in others (fragmented); "
    "and, where they share it with the KV cache, that of KV blocks (kv).",
    ("state",),
)
LORA_ADAPTER_BYTES = Definition(
    "aioengine_lora_adapter_bytes",
    "gauge",
    "What each adapter in memory takes on the CPU; level is the fastest place that holds it, slot or cpu.",
    ("adapter", "level"),
)
LORA_SLOT_BUSY = Definition(
    "aioengine_lora_slot_busy_seconds", "counter", "Time in steps that used the slot.", ("slot",)
)
LORA_ADAPTER_LOADED = Definition(
    "aioengine_lora_adapter_loaded",
    "gauge",
    "1 for each adapter in memory; level is the fastest place that holds it, slot or cpu.",
    ("adapter", "level", "pinned"),
)
LORA_ADAPTERS = Definition("aioengine_lora_adapters", "gauge", "Registered adapters, wherever they are.")
LORA_CPU_ADAPTERS = Definition(
    "aioengine_lora_cpu_adapters",
    "gauge",
    "Adapters in the CPU cache, those in slots and being read included.",
)
LORA_SWAPS = Definition(
    "aioengine_lora_swaps",
    "counter",
    "Adapters copied into a slot (load), taken out of one (evict), superseded by a new version (replace), "
    "and copied to another place of the slots' memory, so that holes in it become one (move).",
    ("kind",),
)
LORA_SWAP_SECONDS = Definition(
    "aioengine_lora_swap_seconds",
    "histogram",
    "Stages of a swap: the read from disk to the CPU (disk); on the CPU, with requests waiting for the "
    "adapter, until a slot was there (cpu); the copy into the slot (slot).",
    ("stage",),
    SWAP_SECONDS,
)
LORA_SWAP_BYTES = Definition(
    "aioengine_lora_swap_bytes",
    "counter",
    "Bytes of adapters read from disk (disk) and copied into slots (slot).",
    ("stage",),
)
LORA_CACHE_REQUESTS = Definition(
    "aioengine_lora_cache_requests",
    "counter",
    "Requests for adapters as they arrive: did a slot hold the adapter (hit or miss) and, if none did, "
    "the CPU cache?",
    ("level", "result"),
)
LORA_PREFETCH = Definition(
    "aioengine_lora_prefetch",
    "counter",
    "Reads from disk by what came of starting them early: used (started while no request waited for the "
    "adapter, and copied into a slot later), wasted (started so, and evicted from the CPU without ever "
    "having been copied into a slot), late (a request was waiting already when the read started).",
    ("result",),
)
LORA_LOAD_FAILURES = Definition(
    "aioengine_lora_load_failures",
    "counter",
    "Adapters that could not be loaded: invalid, too_large, io or internal.",
    ("reason",),
)

LORA_RESOLVER_FAILURES = Definition(
    "aioengine_lora_resolver_failures",
    "counter",
    "Look-ups of adapters that failed before there was anything to load, such as an adapter_root that cannot "
    "be read: invalid, io or internal. A name that does not exist is none.",
    ("reason",),
)
LORA_CPU_ADAPTERS_LIMIT = Definition(
    "aioengine_lora_cpu_adapters_limit", "gauge", "Most adapters that the CPU cache may hold."
)

# Requests

REQUESTS_RUNNING = Definition("aioengine_requests_running", "gauge", "Requests in the batch.")
REQUESTS_WAITING = Definition(
    "aioengine_requests_waiting",
    "gauge",
    "Requests not running yet: their adapter is in no slot (adapter), or there is no room (capacity); or not "
    "running any more, for want of KV blocks or by the policy's decision (preempted).",
    ("reason",),
)
REQUESTS_RUNNING_LIMIT = Definition(
    "aioengine_requests_running_limit", "gauge", "Most requests that may be in the batch (max_num_seqs)."
)
REQUESTS_WAITING_LIMIT = Definition(
    "aioengine_requests_waiting_limit",
    "gauge",
    "Most requests that may wait (max_waiting); +Inf if there is no bound.",
)
WAITING_TOKENS = Definition(
    "aioengine_waiting_tokens", "gauge", "Prompt tokens of the requests that wait and have not run yet."
)
WAITING_TOKENS_LIMIT = Definition(
    "aioengine_waiting_tokens_limit",
    "gauge",
    "Most prompt tokens that may wait (max_waiting_tokens); +Inf if there is no bound.",
)
REQUESTS_FINISHED = Definition(
    "aioengine_requests_finished",
    "counter",
    "Requests that have ended; reason is stop, length, abort or error.",
    ("adapter", "reason"),
)
REQUEST_QUEUE = Definition(
    "aioengine_request_queue_seconds",
    "histogram",
    "From arrival to first admission to the batch.",
    ("adapter",),
    REQUEST_SECONDS,
)
REQUEST_ADAPTER_WAIT = Definition(
    "aioengine_request_adapter_wait_seconds",
    "histogram",
    "Time from arrival to first admission during which the request's adapter was in no slot; 0 if it "
    "was in one all the while. Requests for the base model are not counted.",
    ("adapter",),
    REQUEST_SECONDS,
)
REQUEST_TTFT = Definition(
    "aioengine_request_ttft_seconds",
    "histogram",
    "From arrival to the first token.",
    ("adapter",),
    REQUEST_SECONDS,
)
REQUEST_INTER_TOKEN = Definition(
    "aioengine_request_inter_token_seconds",
    "histogram",
    "Between two successive tokens of a request.",
    ("adapter",),
    STEP_SECONDS,
)
REQUEST_E2E = Definition(
    "aioengine_request_e2e_seconds",
    "histogram",
    "From arrival to the end, however it ended.",
    ("adapter",),
    REQUEST_SECONDS,
)
PROMPT_TOKENS = Definition(
    "aioengine_prompt_tokens", "counter", "Prompt tokens of the requests that have ended.", ("adapter",)
)
GENERATION_TOKENS = Definition(
    "aioengine_generation_tokens",
    "counter",
    "Tokens generated for the requests that have ended.",
    ("adapter",),
)
PROPOSED_TOKENS = Definition(
    "aioengine_speculation_proposed_tokens",
    "counter",
    "Tokens proposed by speculation, and computed to be checked.",
    ("adapter",),
)
ACCEPTED_TOKENS = Definition(
    "aioengine_speculation_accepted_tokens",
    "counter",
    "Proposed tokens that were what would have been chosen anyway.",
    ("adapter",),
)
PROMPT_CACHED_TOKENS = Definition(
    "aioengine_prompt_cached_tokens", "counter", "Prompt tokens that the prefix cache supplied."
)

REFUSED = Definition(
    "aioengine_requests_refused",
    "counter",
    "Requests refused because too many wait; bound says which limit: server, tenant or adapter.",
    ("bound",),
)

# Tenants

TENANT_REQUESTS = Definition(
    "aioengine_tenant_requests",
    "counter",
    "Requests of tenants that have ended; reason is stop, length, abort or error.",
    ("tenant", "reason"),
)
TENANT_PROMPT_TOKENS = Definition(
    "aioengine_tenant_prompt_tokens",
    "counter",
    "Prompt tokens of the tenant's requests that have ended.",
    ("tenant",),
)
TENANT_GENERATION_TOKENS = Definition(
    "aioengine_tenant_generation_tokens",
    "counter",
    "Tokens generated for the tenant's requests that have ended.",
    ("tenant",),
)
TENANT_RESPONSES = Definition(
    "aioengine_tenant_http_responses",
    "counter",
    "Answers of the HTTP server; the tenant is none for requests without a good key.",
    ("tenant", "status"),
)

# The HTTP server

HTTP_RESPONSES = Definition(
    "aioengine_http_responses",
    "counter",
    "Answers of the HTTP server: the route, the status (499: the client went away; an error's also where it "
    "came in the middle of a stream), and the error's code, empty if there was none.",
    ("route", "status", "code"),
)
HTTP_ACTIVE = Definition(
    "aioengine_http_requests_active",
    "gauge",
    "Requests to the HTTP server that have not been answered in full, without probes and pages.",
)

TLS_EXPIRES = Definition(
    "aioengine_tls_certificate_expiry_seconds",
    "gauge",
    "Unix time at which the server's TLS certificate expires.",
)
CONFIG_LOADED = Definition(
    "aioengine_config_last_reload_successful",
    "gauge",
    "1 while the server runs with what the file holds: keys (the keys file), config (all that SIGHUP reads). "
    "0 if the file was refused, or cannot be read.",
    ("file",),
)

# Policy

POLICY_DECISION = Definition(
    "aioengine_policy_decision_seconds",
    "histogram",
    "Time that the policy took for the decision of a step.",
    (),
    DECISION_SECONDS,
)
POLICY_REFUSALS = Definition(
    "aioengine_policy_refusals",
    "counter",
    "Items of policy decisions that the core refused, by its reason.",
    ("reason",),
)
POLICY_ERRORS = Definition(
    "aioengine_policy_errors", "counter", "Times that the policy raised or returned no decision."
)
POLICY_OVERRUNS = Definition(
    "aioengine_policy_overruns", "counter", "Decisions that took longer than policy_time_budget."
)
POLICY_REPLACEMENTS = Definition(
    "aioengine_policy_replacements",
    "counter",
    "Times that the policy was replaced for good by the built-in safe one, for overrunning too often.",
)

# Engine

STEP = Definition(
    "aioengine_step_seconds",
    "histogram",
    "Time of a model step; phase is prefill, decode or mixed.",
    ("phase",),
    STEP_SECONDS,
)
STEP_TOKENS = Definition(
    "aioengine_step_tokens",
    "counter",
    "Tokens as they are computed in steps; phase is prefill or decode.",
    ("phase",),
)
SCHEDULE = Definition(
    "aioengine_schedule_seconds",
    "histogram",
    "Time that the policy and the core together took to form a batch.",
    (),
    DECISION_SECONDS,
)
BATCH_SEQUENCES = Definition("aioengine_batch_sequences", "histogram", "Requests in a step.", (), COUNTS)
BATCH_ADAPTERS = Definition(
    "aioengine_batch_adapters", "histogram", "Distinct adapters in a step.", (), (0.0, *COUNTS[:8])
)
PREEMPTIONS = Definition(
    "aioengine_preemptions", "counter", "Requests taken off the batch, to be computed again later."
)
KV_CACHE_USAGE = Definition(
    "aioengine_kv_cache_usage_ratio",
    "gauge",
    "KV blocks that running requests hold, as a share of all (0 to 1).",
)
KV_CACHE_BLOCKS = Definition("aioengine_kv_cache_blocks", "gauge", "KV blocks that there are.")
MEMORY_UNPLANNED = Definition(
    "aioengine_device_memory_unplanned_bytes",
    "gauge",
    "Device memory that the start took beyond the memory plan (negative: less than it), on the rank where "
    "that is most; only on GPUs.",
)
KV_BLOCKS_PINNED = Definition(
    "aioengine_kv_blocks_pinned",
    "gauge",
    "KV blocks whose contents requests have pinned in the prefix cache.",
)
KV_PINS_LOST = Definition(
    "aioengine_kv_pins_lost",
    "counter",
    "Pinned KV blocks that were reused before their time, because requests needed them.",
)
LISTENER_FAILURES = Definition(
    "aioengine_listener_failures",
    "counter",
    "Exceptions that event listeners have raised.",
)
ENGINE_STATE = Definition(
    "aioengine_engine_state",
    "gauge",
    "1 for the state that the engine is in: starting, ready, draining (it finishes what it has accepted), "
    "degraded (the model's processes were lost and are being started again) or dead.",
    ("state",),
)
BUILD_INFO = Definition(
    "aioengine_build_info",
    "gauge",
    "1; the labels say what runs here.",
    ("version", "kernels", "python", "torch", "model_impl", "quantization", "batch_invariant"),
)
EXECUTOR_RESTARTS = Definition(
    "aioengine_executor_restarts",
    "counter",
    "Times that the model's processes were lost and started again.",
)
GRAMMAR_COMPILES = Definition(
    "aioengine_grammar_compiles",
    "counter",
    "Grammars compiled for guided decoding, by outcome: compiled, invalid (malformed or not supported), "
    "limit (it took too much), overloaded (no room), failed.",
    ("outcome",),
)
GRAMMAR_COMPILE = Definition(
    "aioengine_grammar_compile_seconds",
    "histogram",
    "Time of a compile, waiting for its turn left out.",
    (),
    REQUEST_SECONDS,
)
GRAMMARS_KEPT = Definition("aioengine_grammars_kept", "gauge", "Compiled grammars that are kept.")
LOG_DROPPED = Definition(
    "aioengine_log_dropped",
    "counter",
    "Lines of the server's log that were dropped because the earlier ones were not read.",
)
EVENT_LOOP_LAG = Definition(
    "aioengine_event_loop_lag_seconds",
    "histogram",
    "How late the event loop runs a timer that is due; measured four times a second.",
    (),
    STEP_SECONDS,
)

# The process, under the names that all Prometheus clients use; exported by `aioengine serve`

PROCESS_CPU = Definition("process_cpu_seconds", "counter", "User and system CPU time of the process.")
PROCESS_START = Definition(
    "process_start_time_seconds", "gauge", "Unix time at which the process was started."
)
PROCESS_RESIDENT = Definition(
    "process_resident_memory_bytes", "gauge", "Memory of the process that is in RAM."
)
PROCESS_VIRTUAL = Definition("process_virtual_memory_bytes", "gauge", "Virtual memory of the process.")
PROCESS_OPEN_FDS = Definition("process_open_fds", "gauge", "File descriptors that the process has open.")
PROCESS_MAX_FDS = Definition("process_max_fds", "gauge", "File descriptors that the process may have open.")
PROCESS_THREADS = Definition("process_threads", "gauge", "Threads of the process.")
EVENT_LOOP_TASKS = Definition(
    "aioengine_event_loop_tasks", "gauge", "Tasks of the event loop that have not ended."
)

# Under the names that routers read (metrics_compat="vllm")

_MODEL = ("model_name",)
VLLM_RUNNING = Definition("vllm:num_requests_running", "gauge", "Requests in the batch.", _MODEL)
VLLM_WAITING = Definition("vllm:num_requests_waiting", "gauge", "Requests that are not running yet.", _MODEL)
VLLM_KV_CACHE_USAGE = Definition(
    "vllm:kv_cache_usage_perc",
    "gauge",
    "KV blocks that running requests hold, as a share of all (0 to 1).",
    _MODEL,
)
VLLM_LORA_REQUESTS = Definition(
    "vllm:lora_requests_info",
    "gauge",
    "Unix time of this snapshot. running_lora_adapters are ready in a slot; waiting_lora_adapters are in "
    "none, and requests wait for them; both are separated by commas. max_lora is the number of slots.",
    ("max_lora", "running_lora_adapters", "waiting_lora_adapters"),
)
VLLM_LORA_LOADED = Definition(
    "vllm:lora_adapter_loaded",
    "gauge",
    "1 for each adapter in memory; level is gpu if a slot holds it (on a CPU too), and cpu if only the CPU "
    "cache does.",
    ("model_name", "adapter_name", "level", "pinned", "rank"),
)
VLLM_MAX_GPU_LORA = Definition("vllm:max_gpu_lora_adapters", "gauge", "Device slots.", _MODEL)
VLLM_GPU_LORA = Definition("vllm:num_gpu_loaded_lora_adapters", "gauge", "Adapters in slots.", _MODEL)
VLLM_CPU_LORA = Definition(
    "vllm:num_cpu_loaded_lora_adapters",
    "gauge",
    "Adapters in the CPU cache, those in slots included.",
    _MODEL,
)
VLLM_LORA_LOAD_SECONDS = Definition(
    "vllm:lora_adapter_load_seconds",
    "histogram",
    "Transitions of adapters: the read from disk to the CPU (load), and the copy into a slot (activate).",
    ("model_name", "transition"),
    SWAP_SECONDS,
)

ALL = tuple(value for value in globals().copy().values() if isinstance(value, Definition))
VLLM = tuple(definition for definition in ALL if definition.name.startswith("vllm:"))
PROCESS = (*(d for d in ALL if d.name.startswith("process_")), EVENT_LOOP_TASKS)
OWN = tuple(definition for definition in ALL if definition not in VLLM and definition not in PROCESS)
