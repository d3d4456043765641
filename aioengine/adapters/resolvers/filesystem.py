"""Adapters in the subfolders of one folder."""

from __future__ import annotations

import os
from pathlib import Path

from aioengine.adapters.peft.folder import CONFIG_FILE, why_no_adapter
from aioengine.adapters.resolvers.base import ADAPTER_FILES, BlockingResolver, is_plain_name
from aioengine.errors import AdapterLoadError, AdapterNotFound, ConfigError
from aioengine.model.pooling import POOLING_FILE


class FilesystemResolver(BlockingResolver):
    """The adapter "team/sql" is the folder ``root/team/sql``; folders that come later are found too.

    Nothing outside ``root`` can be reached: not by an absolute path, not by "..", and not by a symbolic link,
    whether of a folder or of an adapter's file. Links are followed when a name is resolved, and what is
    registered is the folder behind them. Anyone who can write in ``root`` could replace a file by a link
    after that. So only people who may add adapters should be able to write there.

    Raises ConfigError if ``root`` is not a folder.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        super().__init__()
        self.root = Path(root).expanduser().absolute()
        if not self.root.is_dir():
            raise ConfigError(
                f"adapter_root={os.fspath(root)!r}: no such folder; give the folder that has the adapters "
                "as subfolders"
            )

    def find(self, name: str) -> Path:
        if not is_plain_name(name):
            raise AdapterNotFound("not a name below adapter_root", name=name)
        try:
            root = self.root.resolve(strict=True)
            folder = (root / name).resolve()
            files = ("", *ADAPTER_FILES, POOLING_FILE)
            inside = all((folder / file).resolve().is_relative_to(root) for file in files)
            found = inside and (folder / CONFIG_FILE).is_file()
        except (OSError, RuntimeError) as error:  # RuntimeError: a loop of links, before Python 3.13
            if isinstance(error, OSError) and not self.root.is_dir():
                raise AdapterLoadError(
                    f"adapter_root cannot be read: {error.strerror}", name=name, path=str(self.root)
                ) from error
            inside = found = False
        if not found:
            there = inside and folder.is_dir()
            reason = why_no_adapter(str(folder)) if there else "there is no folder of this name"
            raise AdapterNotFound(f"not registered, and below adapter_root {reason}", name=name)
        return folder
