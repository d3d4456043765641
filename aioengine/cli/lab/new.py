"""``aioengine lab new``: writes the folder of a new study."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from aioengine.cli.common import CommonFlags


def new(
    folder: Annotated[Path, Parameter(show_default=False)], /, *, common: CommonFlags | None = None
) -> int:
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
