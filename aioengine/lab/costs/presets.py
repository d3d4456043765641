"""Cost models that come with aioengine, by name."""

from __future__ import annotations

from pathlib import Path

from aioengine.checks import nearest
from aioengine.errors import ConfigError
from aioengine.lab.costs.model import CostModel
from aioengine.lab.costs.roofline import DEVICES, estimate_of

FOLDER = Path(__file__).parent / "presets"


def available_presets() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.json")))


def load_costs(preset: str | Path) -> CostModel:
    """Return the preset of this name, the cost model in a JSON file (a path that ends in ``.json``), or the
    estimate of a model on a device (``MODEL@h100``) or on several (``MODEL@h100x4``); see
    :func:`aioengine.lab.costs.roofline.estimate_of`.

    Raises ConfigError if there is none, or if it is not valid.
    """
    if str(preset).endswith(".json"):
        return CostModel.read(Path(preset))
    model, at, device = str(preset).rpartition("@")
    if at:
        return estimate_of(model, device)
    names = available_presets()
    if preset not in names:
        hint = nearest(str(preset), names)
        raise ConfigError(
            f"preset={str(preset)!r}: there are {', '.join(names)}{hint}; or give the path of a .json file "
            f"that 'aioengine lab calibrate' wrote, or MODEL@{'|'.join(DEVICES)} for an estimate"
        )
    return CostModel.read(FOLDER / f"{preset}.json")
