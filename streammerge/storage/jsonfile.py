"""Small files beside weights: JSON objects and text, read with care and written as others write them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from streammerge.base.errors import InputError
from streammerge.storage.checkpoint import leads_outside

_MOST_BYTES = 400_000_000


def read_bytes(file: Path) -> bytes:
    """The content of a file. Raises InputError, also when it is a link out of its directory."""
    if (target := leads_outside(file.parent, file.name)) is not None:
        raise InputError(f"{file}: is a link to {target}, outside its directory. Refused.")
    try:
        if file.stat().st_size > _MOST_BYTES:
            raise InputError(f"{file}: is larger than such a file should be.")
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}.") from error


def read_text(file: Path) -> str:
    """The text in a file. Raises InputError."""
    try:
        return read_bytes(file).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start}).") from None


def read_map(file: Path) -> dict[str, Any]:
    """The JSON object in a file, empty where there is no such file. Raises InputError."""
    return parse_map(read_bytes(file), file) if file.is_file() else {}


def parse_map(text: str | bytes, file: Path) -> dict[str, Any]:
    """The JSON object that `text` is; `file` names it in errors. Raises InputError."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON ({error}).") from None
    if not isinstance(content, dict):
        raise InputError(f"{file}: is not a JSON object.")
    return content


def dump_map(content: Mapping[str, Any]) -> bytes:
    """A JSON object as the content of a file."""
    try:
        return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:
        # Half a character, as an escape: it stays one.
        return (json.dumps(content, indent=2) + "\n").encode()
