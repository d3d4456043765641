"""``aioengine``, which notes in a file how many objects its garbage collector leaves alone and has visited.

AIOENGINE_COLLECTED=FILE python -m support.collected serve ...
"""

from __future__ import annotations

import gc
import json
import os
from pathlib import Path
from typing import Any

from aioengine.__main__ import run

FILE = "AIOENGINE_COLLECTED"


def note(phase: str, info: dict[str, Any]) -> None:
    """Write ``{"frozen": ..., "visited": ...}`` when a full collection begins."""
    if phase == "start" and info["generation"] == 2:
        file = Path(os.environ[FILE])
        text = json.dumps({"frozen": gc.get_freeze_count(), "visited": len(gc.get_objects())})
        file.with_suffix(".new").write_text(text)
        file.with_suffix(".new").rename(file)


if __name__ == "__main__":
    gc.callbacks.append(note)
    run()
