"""The dtypes a safetensors file may hold, by their names in the file.

`rank` is the position in the order by which the library sorts tensors (higher first); `bits` is the size of one
element. `kind` says what a merge may do with it: float arithmetic, copying only, or nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["float", "exact", "quantised"]


@dataclass(frozen=True)
class DType:
    """One element type: its name in the file, size, place in the writer's order, and kind."""

    name: str
    bits: int
    rank: int
    kind: Kind
    torch_name: str | None

    @property
    def itemsize(self) -> int:
        """Bytes of one element. Sub-byte types have none and are never asked."""
        assert self.bits % 8 == 0, self.name
        return self.bits // 8


_TABLE: tuple[tuple[str, int, Kind, str | None], ...] = (
    ("BOOL", 8, "exact", "bool"),
    ("F4", 4, "quantised", None),
    ("F6_E2M3", 6, "quantised", None),
    ("F6_E3M2", 6, "quantised", None),
    ("U8", 8, "exact", "uint8"),
    ("I8", 8, "exact", "int8"),
    ("F8_E5M2", 8, "quantised", "float8_e5m2"),
    ("F8_E4M3", 8, "quantised", "float8_e4m3fn"),
    ("F8_E8M0", 8, "quantised", "float8_e8m0fnu"),
    ("F8_E4M3FNUZ", 8, "quantised", "float8_e4m3fnuz"),
    ("F8_E5M2FNUZ", 8, "quantised", "float8_e5m2fnuz"),
    ("I16", 16, "exact", "int16"),
    ("U16", 16, "exact", "uint16"),
    ("F16", 16, "float", "float16"),
    ("BF16", 16, "float", "bfloat16"),
    ("I32", 32, "exact", "int32"),
    ("U32", 32, "exact", "uint32"),
    ("F32", 32, "float", "float32"),
    ("C64", 64, "exact", "complex64"),
    ("F64", 64, "float", "float64"),
    ("I64", 64, "exact", "int64"),
    ("U64", 64, "exact", "uint64"),
)

DTYPES: dict[str, DType] = {
    name: DType(name, bits, rank, kind, torch_name) for rank, (name, bits, kind, torch_name) in enumerate(_TABLE)
}

# What a recipe may write after `dtype:` and `out_dtype:`. In 8 bits, numbers are stored with scales (plan/scaled.py).
RECIPE_DTYPES: dict[str, str] = {
    "bfloat16": "BF16", "float16": "F16", "float32": "F32", "float64": "F64",
    "float8_e4m3fn": "F8_E4M3", "float8_e5m2": "F8_E5M2",
}  # fmt: skip


def promote(names: list[str]) -> str:
    """The float dtype that holds every value of all `names`: one of them, or F32 for F16 with BF16."""
    distinct = set(names)
    if distinct == {"F16", "BF16"}:
        return "F32"
    return max(distinct, key=lambda name: DTYPES[name].rank)
