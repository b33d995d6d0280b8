"""Where a model, an adapter or a data set lies: a local folder or file, or a repository on the hub."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from decal.errors import DecalError


def folder(
    name: str | os.PathLike[str],
    *,
    kind: str = "model",
    revision: str | None = None,
    patterns: Sequence[str] | None = None,
    subfolder: str | None = None,
) -> Path:
    """Return the local folder of `name`, downloading a hub repository into the hub's cache if need be.

    `patterns` limits what is downloaded (an adapter needs two small files, not a whole repository).
    Raises DecalError if `name` is neither a folder here nor a repository that the hub can give.
    """
    path = Path(name)
    if not path.is_dir():
        if path.is_file():
            raise DecalError(f"the {kind} must be a folder", got=path, fix="Give the folder that holds this file.")
        path = _download(str(name), kind=kind, revision=revision, patterns=patterns)
    if subfolder:
        path = path / subfolder
        if not path.is_dir():
            raise DecalError(f"no such subfolder in the {kind}", got=path, fix="Check the `subfolder` argument.")
    return path


def _download(name: str, *, kind: str, revision: str | None, patterns: Sequence[str] | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise DecalError(f"no such {kind} folder", got=name, fix="Check the path.")
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns) if patterns else None))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        at = f" at revision {revision!r}" if revision else ""
        raise DecalError(
            f"no {kind} {name!r}{at}: there is no such folder here, and the hub gave none "
            f"({type(error).__name__}: {reason})",
            fix="Check the spelling and the network; HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE=1 apply.",
        ) from error
