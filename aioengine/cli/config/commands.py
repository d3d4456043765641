"""``aioengine config check``: checks the configuration of a server, and shows it.

One TOML file has everything: the fields of EngineConfig at its top, those of LoRAConfig in ``[lora]``, and
the flags of ``aioengine serve`` in ``[server]``. Environment variables (``AIOENGINE_`` and a flag's name)
override the file, and flags override both.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from aioengine.cli.config.checked import ELSEWHERE, FleetFlags, ServerFlags, check_all
from aioengine.cli.flags import EngineFlags
from aioengine.cli.policies import check_named
from aioengine.errors import ConfigError
from aioengine.memory_plan import plan_memory, spec_from_config
from aioengine.model.files.sources import is_source, parse_hub_id
from aioengine.model.text.chat_template import read_chat_template


def check(
    *,
    server: ServerFlags = ServerFlags(),
    engine: EngineFlags = EngineFlags(),
    fleet: FleetFlags = FleetFlags(),
) -> int:
    """Check a configuration and its paths as serve would, without starting anything, and print it as JSON.

    Printed are the file, the environment and the flags together, without API keys. Whether the memory and the
    device of this machine suffice is not checked, nor a model on the Hub, which is fetched at the start.
    """
    checked = check_all(server, engine, fleet)
    config = checked.config
    root = None if config.lora is None else config.lora.adapter_root
    if root is not None and not is_source(root) and not Path(root).expanduser().is_dir():
        raise ConfigError(
            f"LoRAConfig.adapter_root={root!r}: there is no such folder; create it, or correct the path"
        )
    check_named(config.policy)
    if config.chat_template is not None:
        read_chat_template(Path(config.chat_template))
    if Path(config.model).expanduser().exists() or parse_hub_id(config.model) is None:
        device = "cuda" if config.device == "cuda" else "cpu"
        # This machine's memory and devices may not be those of the one that serves.
        plan_memory(spec_from_config(config), config, device=device, available_bytes=sys.maxsize)
    own = {} if checked.replicas is None else msgspec.structs.asdict(checked.replicas)
    shown = {
        "engine": config,
        "fleet": {name: value for name, value in own.items() if name not in ELSEWHERE} or None,
        "server": {**vars(server), "api_key": None, "admin_key": None},
        "adapters": checked.adapters,
    }
    print(msgspec.json.format(msgspec.json.encode(shown, enc_hook=str), indent=2).decode())
    print("the configuration is good", file=sys.stderr)
    return 0
