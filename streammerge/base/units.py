"""Sizes as people write them, and back.

`24GB` is 24 × 10^9 bytes, `1.5GiB` is 1.5 × 2^30, `500M` and `500MB` are the same, a plain number is bytes.
`24Gb` is refused: it would mean bits.
"""

from __future__ import annotations

import re
from decimal import Decimal

from streammerge.base.errors import UserError

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGTP]?)(i?)(B|b|)", re.IGNORECASE)
_POWERS = {"": 0, "K": 1, "M": 2, "G": 3, "T": 4, "P": 5}


def parse_size(text: str, *, flag: str = "size") -> int:
    """Bytes named by `text`. `flag` names the option in the error.

    Raises UserError for anything that is not a positive size.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{flag}: {text!r} is not a size. Write it like 24GB, 1.5GiB or 500MB.")
    number, prefix, binary, unit = match.groups()
    if unit == "b" and prefix:
        raise UserError(f"{flag}: {text!r} reads as bits. Write {number}{prefix.upper()}B for bytes.")
    if binary and not prefix:
        raise UserError(f"{flag}: {text!r} is not a size. Write it like 24GB, 1.5GiB or 500MB.")
    size = int(Decimal(number) * (1024 if binary else 1000) ** _POWERS[prefix.upper()])
    if size <= 0:
        raise UserError(f"{flag}: {text!r} must be larger than nothing.")
    return size


def parse_shard_size(text: str, *, flag: str = "--out-shard-size") -> int:
    """As `parse_size`, and mergekit's `5B`, which there means 5 × 10^9 bytes."""
    match = re.fullmatch(r"\s*(\d+)B\s*", text)
    return int(match.group(1)) * 10**9 if match else parse_size(text, flag=flag)


def format_size(size: float) -> str:
    """A size for people: binary units, three significant figures."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(size) < 1024:
            return f"{size:.0f} B" if unit == "B" else f"{size:.3g} {unit}" if size < 999.5 else f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.2f} TiB" if size < 1024 else f"{size / 1024:.2f} PiB"


def format_seconds(seconds: float) -> str:
    """A duration for people: `4.2 s`, `3 min 20 s`, `2 h 05 min`."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min"
