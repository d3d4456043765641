"""The program ``aioengine``, also as ``python -m aioengine``."""

from __future__ import annotations

import warnings
from typing import NoReturn

from aioengine.cli.process import process


def run() -> NoReturn:
    """Run the command line of this process, and end it."""
    process.install()  # before the slow imports, so that Ctrl-C is always answered
    # Torch's warning; NumPy is not needed here.
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")
    from aioengine.cli.main import main

    process.exit(main())


if __name__ == "__main__":
    run()
