"""``aioengine lab new``: begins a study."""

from __future__ import annotations

from aioengine.cli.flags import Given


def new(folder: Given, /) -> int:
    """Write a study that runs as it is: a policy, a workload, a comparison and a notebook.

    Args:
        folder: Name of the study, and of its new folder.
    """
    from aioengine.lab.runs.study import new_study

    for file in new_study(folder):
        print(file)
    print(f"next: aioengine policies check {folder / 'policy.py'}:MyPolicy")
    print(f"      python {folder / 'compare.py'}")
    return 0
