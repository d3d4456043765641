"""Functions of all workers: they read a job, run its cases, and write the time of each.

A worker is a script (`run_*.py`) that runs in a peer's own environment, which has none of this package. This
folder is its `sys.path[0]`, so no file in it may be called like a module that a peer imports.

The job is a JSON object on standard input: `model` (a path), `settings` (of the variant), `adapters` (paths;
empty: adapters are off) and `cases`. The result, a JSON object, goes to the file named by the first argument.
"""

import json
import sys
import time


class Case:
    """Prompts to continue at once: lists of token ids, and for each the number of its adapter, or None."""

    def __init__(self, name, prompts, output, adapters):
        self.name = name
        self.prompts = prompts
        self.output = output
        self.adapters = adapters

    def shorter(self, output):
        return Case(self.name, self.prompts, min(output, self.output), self.adapters)

    def by_adapter(self):
        """Return the indices of the prompts by adapter, for peers that have one adapter in a batch."""
        groups = {}
        for i, adapter in enumerate(self.adapters):
            groups.setdefault(adapter, []).append(i)
        return groups


def read_job():
    """Return the job; its cases become `Case` objects."""
    job = json.load(sys.stdin)
    job["cases"] = [Case(**case) for case in job["cases"]]
    return job


def run(job, version, generate):
    """Time each case, after a warm-up with its prompts and four output tokens. The result is written again
    after each.

    `generate(case)` returns the list of output token ids for each prompt. Raises ValueError if one has
    another length than requested, because then the peer did other work.
    """
    seconds, first = {}, {}
    for case in job["cases"]:
        generate(case.shorter(4))
        start = time.perf_counter()
        outputs = generate(case)
        seconds[case.name] = time.perf_counter() - start
        lengths = {len(tokens) for tokens in outputs}
        if len(outputs) != len(case.prompts) or lengths != {case.output}:
            raise ValueError(f"{case.name}: {len(outputs)} outputs of {sorted(lengths)} tokens")
        first[case.name] = [int(tokens[0]) for tokens in outputs]
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump({"version": version, "seconds": seconds, "first": first}, file)
