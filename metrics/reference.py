"""docs/metrics.md, made from the metrics' definitions: ``python -m aioengine.metrics.reference``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from aioengine.metrics.families import definitions as d

_INTRO = """\
# Metrics

<!-- Written by `python -m aioengine.metrics.reference > docs/metrics.md`. -->

Every engine has a registry of its own, `engine.metrics.registry`, a `prometheus_client.CollectorRegistry`:
nothing is registered globally. Gauges are read from the engine at the moment of the scrape; counters and
histograms add up its events. `engine.add_listener` gives an application the same events.

## Ways out

- **A port**, served by a thread, for applications that have no web server:

  ```python
  from aioengine.metrics import serve_metrics

  with serve_metrics(engine, 9464):  # http://127.0.0.1:9464/metrics
      ...
  ```

- **An application that has a metrics endpoint**: add `engine.metrics.registry`, or answer with
  `engine.metrics.expose(accept_header)`, which returns the text and its content type and is the quicker of
  the two.
- **Several engines in one scrape**: give each another `EngineConfig.name`, the label `engine` of its
  series, and serve `combined_registry(engine_a, engine_b)`.
- **Traces** (extra `otel`): `aioengine.metrics.tracing.trace_requests(engine, tracer_provider)` makes a
  span of each request, with the children `queue`, `adapter_wait`, `prefill` and `decode`; see
  [monitoring.md](monitoring.md#traces).

Metrics may be read from any thread. A scrape takes its snapshot on the event loop, between two of the loop's
callbacks, so that its numbers belong to one moment; it fails if the loop does not answer within 5 seconds.
A scraper that asks for OpenMetrics gets exemplars with the request's id on `aioengine_request_ttft_seconds`
and `aioengine_request_e2e_seconds`.
"""

_CARDINALITY = """\
## Cardinality

In the request metrics the first `max_adapter_labels` adapters (100) have a label of their own, the others
share `other`, and the base model is `base`. (An adapter of that name is `base (adapter)`.) An adapter in
`other` that has had more than twice the requests of the least used one that has a label takes its place.
When an adapter loses its label, because of that or because it is unloaded, its series disappear and their
values are added to those of `other`: a sum over `adapter` never goes down. `rate()` looks at each series
alone, however, and sees such an addition as a jump of `other`; where that matters, set `max_adapter_labels`
no lower than the number of adapters in use.

The label `tenant` is bounded alike, by `max_tenant_labels` (100); answers without a known key count under
`none`. Without keys, clients are tenants by address, under made-up names. The labels of
`aioengine_http_responses_total` are of fixed sets: what no route is for is `other`.

`aioengine_lora_slot_info` and `aioengine_lora_adapter_loaded` carry real names: there are at most
`max_loras` and `max_cpu_loras` of them at a time.
"""

_VLLM = """\
## For request routers

With `metrics_compat="vllm"` (`--metrics-compat vllm`) the engine also exports these names, which routers
read: those that follow the model server protocol of the Kubernetes Gateway API inference extension, and
llm-d's. `model_name` is the base model's name in requests:
"""


def reference() -> str:
    """Write the reference page in Markdown."""
    return "\n".join(
        [
            _INTRO,
            "## Series\n",
            "All of them also have the label `engine` (`EngineConfig.name`).\n",
            *_table(d.OWN),
            "",
            "`aioengine serve` also exports its process; an application has that from elsewhere:\n",
            *_table(d.PROCESS),
            "",
            "## Buckets\n",
            "Upper bounds of the histograms' buckets:\n",
            *_buckets(d.OWN),
            "",
            _CARDINALITY,
            _VLLM,
            *_table(d.VLLM),
            "",
        ]
    )


def _table(definitions: Iterable[d.Definition]) -> Iterator[str]:
    yield "| Name | Type | Labels | What it is |"
    yield "|---|---|---|---|"
    for definition in definitions:
        labels = ", ".join(f"`{label}`" for label in definition.labels)
        yield f"| `{definition.exposed}` | {definition.kind} | {labels} | {definition.help} |"


def _buckets(definitions: Iterable[d.Definition]) -> Iterator[str]:
    by_bounds: dict[tuple[float, ...], list[str]] = {}
    for definition in definitions:
        if definition.kind == "histogram":
            by_bounds.setdefault(definition.buckets, []).append(definition.name)
    for bounds, names in by_bounds.items():
        yield f"- {', '.join(f'`{name}`' for name in names)}: {', '.join(f'{bound:g}' for bound in bounds)}"


if __name__ == "__main__":
    print(reference(), end="")
