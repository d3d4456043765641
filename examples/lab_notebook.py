"""The policy lab from Python: two policies on the same arrivals, as data frames and as a page.

Run it cell by cell (# %%) in an editor that has them, or as a script: python lab_notebook.py [FOLDER]
"""

# %% What is offered, and to what
import sys
from pathlib import Path

import msgspec
import polars as pl

from aioengine import lab

out = Path(sys.argv[1] if len(sys.argv) > 1 else "lab-notebook")
workload = lab.WorkloadSpec(
    arrivals="gamma:rate=8,cv=3", limit=200, adapters=20, popularity="zipf:1.0", output_tokens="uniform:8..64"
)
first = lab.Experiment(workload=workload, policy="fcfs", slots=4, cpu_loras=8)

# %% One run: its figures, and its requests as a frame
result = lab.run(first, out / "fcfs")
print(
    f"{result.summary['requests_finished']} finished, p99 TTFT {result.summary['ttft_seconds']['p99']:.2f} s"
)

frames = lab.load_frames(out / "fcfs")
slow = frames.requests.with_columns(ttft=pl.col("first_token") - pl.col("arrival")).sort("ttft").tail(3)
print(slow.select("request_id", "adapter", "found", "ttft"))

# %% The same arrivals under another policy, and who was treated how
second = msgspec.structs.replace(first, policy="vllm+lru")
lab.run(second, out / "vllm")
for name in ("fcfs", "vllm"):
    clients = lab.by_client(lab.load_frames(out / name).requests, "adapter")
    print(name, "Jain's index of latency:", lab.jain(clients["latency_seconds"].drop_nulls()))

# %% A page with the figures
print(lab.write_report(out / "vllm"))
