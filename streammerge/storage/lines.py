"""Lines that prove themselves: a checksum and JSON each, for files that grow and may be cut off anywhere.

A line that is torn or damaged ends the file: what follows it is not trusted.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from typing import Any


def checked_line(fields: Mapping[str, Any]) -> bytes:
    """The line that holds `fields`."""
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return b"%08x %s\n" % (zlib.crc32(text), text)


def read_lines(content: bytes) -> tuple[list[dict[str, Any]], int]:
    """The fields of every sound line from the start on, and the bytes that these lines take."""
    found = []
    sound = 0
    for line in content.splitlines(keepends=True):
        text = line[9:-1]
        if not line.endswith(b"\n") or line[8:9] != b" " or not text.startswith(b"{"):
            break
        if b"%08x" % zlib.crc32(text) != line[:8]:
            break
        try:
            found.append(json.loads(text))
        except (ValueError, RecursionError):
            # Not written by us, whatever its checksum says.
            break
        sound += len(line)
    return found, sound
