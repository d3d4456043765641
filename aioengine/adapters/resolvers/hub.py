"""Adapters from the Hugging Face Hub."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from aioengine.adapters.peft.folder import CONFIG_FILE, failed, invalid, naming
from aioengine.adapters.resolvers.base import ADAPTER_FILES, BlockingResolver, check_size
from aioengine.errors import AdapterError, AdapterInvalid, AdapterLoadError, AdapterNotFound, ConfigError
from aioengine.model.files.sources import HubId, download, explain, has_hub, parse_hub_id

HUB_SECONDS = 10.0
"""Time limit for listing a repository on the Hub."""


class HubResolver(BlockingResolver):
    """Resolves the adapter "owner/name[@revision]", or "hf:owner/name", to that repository on the Hub (extra
    ``hub``).

    Only the adapter's files are downloaded, into the cache of ``huggingface_hub``; the cached files are used
    when the Hub cannot be reached. Its environment variables hold (``HF_HOME``, ``HF_TOKEN``,
    ``HF_HUB_OFFLINE``).

    Args:
        owners: Owners whose repositories are allowed. None allows all owners; then anyone who can name an
            adapter in a request can make the server download any repository.

    Raises ConfigError if ``huggingface_hub`` is not installed.
    """

    def __init__(self, owners: Collection[str] | None = None) -> None:
        super().__init__()
        if not has_hub():
            raise ConfigError("adapters from the Hugging Face Hub need: pip install 'aioengine[hub]'")
        if isinstance(owners, str):
            raise ConfigError(f"owners={owners!r}: must be a list of owners' names, or None for any")
        self._owners = owners

    def find(self, name: str) -> Path:
        hub_id = parse_hub_id(name)
        if hub_id is None:
            raise AdapterNotFound("not the name of a repository on the Hub (owner/name)", name=name)
        if self._owners is not None and hub_id.repo.split("/")[0] not in self._owners:
            raise AdapterNotFound("its owner is not among those whose repositories are served", name=name)
        return self.fetch(name, name)

    def fetch(self, name: str, path: str) -> Path:
        """Return the local folder of "hf:owner/name[@revision]", for the adapter ``name``, whoever the owner
        is. Blocks. Raises AdapterInvalid for another form, AdapterNotFound, AdapterLoadError."""
        repo = parse_hub_path(name, path)
        path = f"hf:{repo.repo}" + (f"@{repo.revision}" if repo.revision else "")
        with naming(name, path):
            try:
                folder = _download(repo)
            except AdapterError:
                raise
            except Exception as error:  # it raises many unrelated types
                raise _why(error) from error
            if not (folder / CONFIG_FILE).is_file():
                raise AdapterNotFound(f"the repository has no {CONFIG_FILE}: it is no adapter", name="")
        return folder


def _why(error: Exception) -> AdapterError:
    from huggingface_hub import constants, errors  # optional

    if isinstance(error, errors.LocalEntryNotFoundError):
        if constants.HF_HUB_OFFLINE:
            reason = "it is not in the local cache, and the Hub may not be asked (offline)"
            return AdapterNotFound(reason, name="")
        reason = "it is not in the local cache, and the Hub cannot be reached: check the network"
        return AdapterLoadError(reason, name="", transient=True)
    missing = errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.HFValidationError
    gone = isinstance(error, missing) and not isinstance(error, errors.GatedRepoError)
    return (AdapterNotFound if gone else AdapterLoadError)(explain(error), name="")


def _download(repo: HubId) -> Path:
    """Download the adapter's files. If the Hub cannot be asked for their sizes, only the cache is used."""
    from huggingface_hub import HfApi, errors  # optional

    try:
        info = HfApi().model_info(repo.repo, revision=repo.revision, files_metadata=True, timeout=HUB_SECONDS)
    except Exception as error:
        try:
            return download(repo, ADAPTER_FILES, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            if isinstance(error, (errors.RepositoryNotFoundError, errors.RevisionNotFoundError)):
                raise error from None  # a gated one, too
            raise
    for file in info.siblings or ():
        if file.rfilename in ADAPTER_FILES:
            if file.size is None:
                invalid(f"the Hub does not say how large {file.rfilename} is")
            check_size(file.rfilename, file.size)
    folder = download(repo, ADAPTER_FILES)
    if info.sha != folder.name:
        failed("it changed while it was downloaded; try again", transient=True)
    return folder


def parse_hub_path(name: str, path: str) -> HubId:
    """Parse a path "hf:owner/name[@revision]". Raises AdapterInvalid."""
    hub_id = parse_hub_id(path)
    if hub_id is None:
        raise AdapterInvalid(
            "a path that begins with hf: must be hf:owner/name or hf:owner/name@revision",
            name=name,
            path=path,
        )
    return hub_id
