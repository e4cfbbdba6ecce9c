"""Models on the Hub: `org/name@revision` becomes a folder in the download cache, at one commit.

Only what a merge needs is fetched: the weights that a loader would take, and the small files beside them. Nothing is
asked when a path is there, or a whole commit in the cache is named.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from streammerge.base.errors import DoesNotFit, InputError
from streammerge.base.units import format_size
from streammerge.storage.checkpoint import INDEX_NAME, SINGLE_NAME, read_index
from streammerge.storage.sink import free_bytes

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")
# What goes along: configuration, tokenizers, templates, code, licences. No pictures, no weights of other programs.
_SMALL_SUFFIXES = {".json", ".jinja", ".txt", ".py", ".model", ".tiktoken", ".md", ".yaml", ".yml"}
_SMALL_NAMES = re.compile(r"(licen[cs]e|notice|copying|use_policy)", re.IGNORECASE)
# Kinds of weights, the first that there is: index, single file, and what they are else called.
_KINDS = (
    (INDEX_NAME, SINGLE_NAME, re.compile(r"(?!consolidated|adapter_).*\.safetensors")),
    ("pytorch_model.bin.index.json", "pytorch_model.bin", re.compile(r"pytorch_model-\d+-of-\d+\.bin")),
    (None, "adapter_model.safetensors", None),
    (None, "adapter_model.bin", None),
)
# hf_xet keeps gigabytes of what it downloads in memory unless told otherwise.
_XET_BUFFERS = {"SIZE": 256 << 20, "PERFILE_SIZE": 64 << 20, "LIMIT": 512 << 20}


def fetch_model(name: str, revision: str | None, note: Callable[[str], None]) -> Path:
    """The folder of a model of the Hub, downloaded if need be.

    Raises InputError when it is not there, not open to this user, or the Hub cannot be asked and the cache has it not;
    DoesNotFit when it is larger than the disk.
    """
    for key, size in _XET_BUFFERS.items():
        os.environ.setdefault(f"HF_XET_RECONSTRUCTION_DOWNLOAD_BUFFER_{key}", str(size))
    from huggingface_hub import errors

    # What its HTTP client raises when nobody answers.
    unreachable: type[Exception] = errors.HTTPError  # type: ignore[attr-defined]
    if revision is not None and _COMMIT.fullmatch(revision) and (folder := _cached(name, revision)) is not None:
        return folder
    asked = name if revision is None else f"{name}@{revision}"
    try:
        return _fetch(name, revision, note)
    except errors.GatedRepoError:
        raise InputError(
            f"{asked}: is given only to who agreed to its terms: do that at https://huggingface.co/{name}, then log in "
            f"(hf auth login)."
        ) from None
    except errors.RepositoryNotFoundError:
        raise InputError(
            f"{asked}: is no path here and no model on the Hub. If it is a private one, log in first (hf auth login)."
        ) from None
    except errors.RevisionNotFoundError:
        raise InputError(f"{asked}: the Hub has the model, but no revision {revision!r}.") from None
    except errors.HFValidationError as error:
        raise InputError(f"{asked}: {_first_line(error)}") from None
    except (errors.OfflineModeIsEnabled, unreachable, OSError) as error:
        folder = _cached(name, revision)
        if folder is None:
            raise InputError(
                f"{asked}: is no path here, and not in the download cache either ({_cache()}); the Hub could not be "
                f"asked: {_first_line(error)} Where it can: hf download {name}."
            ) from None
        note(f"{asked}: the Hub could not be asked; taken from the download cache ({folder.name[:12]})")
        return folder


def commit_of(path: Path) -> str | None:
    """The commit whose files lie in a folder of the download cache."""
    folder = path.absolute()
    return folder.name if _COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots" else None


def _fetch(name: str, revision: str | None, note: Callable[[str], None]) -> Path:
    from huggingface_hub import HfApi, hf_hub_download, snapshot_download

    info = HfApi().model_info(name, revision=revision)
    commit = info.sha
    if commit is None:
        raise InputError(f"{name}: the Hub names no commit.")
    names = [file.rfilename for file in info.siblings or ()]

    def indexed(index: str) -> Iterable[str]:
        return read_index(Path(hf_hub_download(name, index, revision=commit))).values()

    wanted = [glob.escape(file) for file in wanted_files(names, indexed)]
    if not wanted:
        raise InputError(f"{name}: holds no weights that can be merged.")
    files: Any = snapshot_download(name, revision=commit, allow_patterns=wanted, dry_run=True)
    missing = sum(file.file_size for file in files if file.will_download)
    if missing:
        free = free_bytes(next(place for place in (_cache(), *_cache().parents) if place.exists()))
        if missing > free:
            raise DoesNotFit(
                f"{name}: {format_size(missing)} are to be downloaded to {_cache()}, {format_size(free)} are free. "
                f"Free some, or set HF_HOME to a larger disk."
            )
        note(f"{name}: downloading {format_size(missing)} at commit {commit[:12]}")
    # By its branch, so that the cache knows later what that was; and by the commit, should the branch have moved since.
    folder = Path(snapshot_download(name, revision=revision, allow_patterns=wanted))
    return folder if folder.name == commit else Path(snapshot_download(name, revision=commit, allow_patterns=wanted))


def wanted_files(names: Iterable[str], indexed: Callable[[str], Iterable[str]]) -> list[str]:
    """Which files of a repository a merge needs; none when it has no weights. `indexed` gives an index's files."""
    there = [name for name in names if "/" not in name]
    for index, single, others in _KINDS:
        weights = {single} & set(there)
        if index in there:
            assert index is not None
            weights = {index, *indexed(index)}
        elif not weights and others is not None:
            weights = {name for name in there if others.fullmatch(name)}
        if weights:
            return sorted(weights | {name for name in there if _goes_along(name)})
    return []


def _goes_along(name: str) -> bool:
    if name.endswith(".index.json"):
        return False
    return Path(name).suffix.lower() in _SMALL_SUFFIXES or _SMALL_NAMES.match(name) is not None


def _cached(name: str, revision: str | None) -> Path | None:
    """The folder of a revision of which all that is wanted is in the cache, or None."""
    from huggingface_hub import errors, get_cached_repo_tree, hf_hub_download, snapshot_download

    def indexed(index: str) -> Iterable[str]:
        return read_index(Path(hf_hub_download(name, index, revision=revision, local_files_only=True))).values()

    try:
        try:
            names = [file.path for file in get_cached_repo_tree(name, revision=revision)]
        except errors.CachedRepoTreeNotFoundError:
            # Downloaded by an older program: what there is must do.
            wanted = None
        else:
            wanted = [glob.escape(file) for file in wanted_files(names, indexed)]
        return Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=wanted))
    except (OSError, ValueError, InputError):
        return None


def _cache() -> Path:
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def _first_line(error: Exception) -> str:
    text = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return text if text.endswith(".") else f"{text}."
