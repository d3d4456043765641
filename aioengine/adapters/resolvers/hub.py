"""Adapters from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from aioengine.adapters.peft.folder import CONFIG_FILE
from aioengine.adapters.resolvers.base import ADAPTER_FILES, BlockingResolver
from aioengine.errors import AdapterInvalid, AdapterLoadError, AdapterNotFound, ConfigError
from aioengine.model.files.hub import HubId, download, has_hub, parse_hub_id


class HubResolver(BlockingResolver):
    """The adapter "owner/name", or "hf:owner/name", is that repository on the Hub (extra ``hub``).

    Only the adapter's files are downloaded, into the cache of ``huggingface_hub``, which is enough when
    the Hub cannot be reached.

    Args:
        owners: Whose repositories may be asked for. None: anybody's; then whoever can name an adapter
            in a request can have any repository downloaded.
        revision: Branch, tag or commit, for names that have none.
        cache_dir: In place of the cache that ``HF_HOME`` names.
        token: In place of the one that is stored or in ``HF_TOKEN``.
        local_files_only: Never ask the Hub.

    Raises ConfigError if ``huggingface_hub`` is not installed.
    """

    def __init__(
        self,
        owners: Collection[str] | None = None,
        *,
        revision: str | None = None,
        cache_dir: str | None = None,
        token: str | None = None,
        local_files_only: bool = False,
    ) -> None:
        super().__init__()
        if not has_hub():
            raise ConfigError("adapters from the Hugging Face Hub need: pip install 'aioengine[hub]'")
        if isinstance(owners, str):
            raise ConfigError(f"owners={owners!r}: must be a list of owners' names, or None for any")
        self._owners = owners
        self._revision = revision
        self._cache_dir = cache_dir
        self._token = token
        self._local_files_only = local_files_only

    def find(self, name: str) -> Path:
        hub_id = parse_hub_id(name)
        if hub_id is None:
            raise AdapterNotFound("not the name of a repository on the Hub (owner/name)", name=name)
        if self._owners is not None and hub_id.repo.split("/")[0] not in self._owners:
            raise AdapterNotFound("its owner is not among those whose repositories are served", name=name)
        return self._fetch(name, hub_id)

    async def resolve_path(self, name: str, path: str) -> Path:
        """The local folder of "hf:owner/name[@revision]", for the adapter ``name``, whoever the owner is.

        Raises AdapterInvalid for another form, AdapterNotFound, AdapterLoadError.
        """
        hub_id = parse_hub_path(name, path)
        return await self._in_thread(name, lambda: self._fetch(name, hub_id))

    def _fetch(self, name: str, hub_id: HubId) -> Path:
        from huggingface_hub import constants, errors  # optional

        repo = HubId(hub_id.repo, hub_id.revision or self._revision)
        path = f"hf:{repo.repo}" + (f"@{repo.revision}" if repo.revision else "")
        try:
            folder = download(
                repo,
                ADAPTER_FILES,
                cache_dir=self._cache_dir,
                token=self._token,
                local_files_only=self._local_files_only,
            )
        except errors.GatedRepoError as error:
            raise AdapterLoadError(
                "the repository is gated: ask for access on the Hub, and set HF_TOKEN", name=name, path=path
            ) from error
        except (
            errors.RepositoryNotFoundError,
            errors.RevisionNotFoundError,
            errors.HFValidationError,
        ) as error:
            raise AdapterNotFound(
                "the Hub has no such repository or revision (a private one needs HF_TOKEN)",
                name=name,
                path=path,
            ) from error
        except errors.LocalEntryNotFoundError as error:
            if self._local_files_only or constants.HF_HUB_OFFLINE:
                raise AdapterNotFound(
                    "not in the local cache, and the Hub is not to be asked (offline)", name=name, path=path
                ) from error
            raise AdapterLoadError(
                "the Hub cannot be reached, and the local cache does not have it",
                name=name,
                path=path,
                transient=True,
            ) from error
        except Exception as error:  # it raises many unrelated types
            raise AdapterLoadError(
                f"not to be had from the Hub: {type(error).__name__}: {error}", name=name, path=path
            ) from error
        if not (folder / CONFIG_FILE).is_file():
            raise AdapterNotFound(
                f"the repository has no {CONFIG_FILE}: it is no adapter", name=name, path=path
            )
        return folder


def parse_hub_path(name: str, path: str) -> HubId:
    """The repository that a path "hf:owner/name[@revision]" means. Raises AdapterInvalid."""
    hub_id = parse_hub_id(path)
    if hub_id is None:
        raise AdapterInvalid(
            "a path that begins with hf: must be hf:owner/name or hf:owner/name@revision",
            name=name,
            path=path,
        )
    return hub_id
