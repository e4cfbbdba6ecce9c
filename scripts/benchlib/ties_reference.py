"""TIES over one whole tensor, from the paper's three steps, to compare a merged tensor with.

    trim       per model, keep the k = max(1, int(density * n)) largest |delta|; of equal ones the first by position
    elect      the sign of the weighted sum; a sum of zero counts as positive
    merge      base + (sum of the kept deltas of that sign) / (sum of their weights), rounded once to bfloat16

The cut is found by partially sorting all n magnitudes, on purpose another way than histograms, which takes four bytes
per element, one model at a time. What comes after the cut is done in chunks, in float32 and in float64.

Run as `python -m benchlib.ties_reference`; prints JSON.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

CHUNK_ELEMENTS = 1 << 20

Bits = npt.NDArray[np.uint16]
Single = npt.NDArray[np.float32]
Double = npt.NDArray[np.float64]
Floats = TypeVar("Floats", Single, Double)


@dataclass
class Cut:
    """The smallest magnitude that is kept, and how many of the elements that have exactly it may still be."""

    magnitude: np.float32
    num_equal: int

    def keep(self, magnitudes: Single) -> npt.NDArray[np.bool_]:
        """Which elements of the next chunk are kept; chunks must come in order."""
        kept = magnitudes > self.magnitude
        equal = np.flatnonzero(magnitudes == self.magnitude)[: self.num_equal]
        kept[equal] = True
        self.num_equal -= len(equal)
        return kept


@dataclass
class Difference:
    different: int = 0
    most_steps: int = 0  # distance in bfloat16 values that lie between

    def add(self, found: Bits, expected: Bits) -> None:
        steps = np.abs(_to_ordered(found) - _to_ordered(expected))
        self.different += int(np.count_nonzero(steps))
        self.most_steps = max(self.most_steps, int(steps.max(initial=0)))


def compare(
    base: Path, models: list[Path], merged: Path, *, tensor: str, density: float, weight: float
) -> dict[str, Any]:
    base_bits, merged_bits = _open_tensor(base, tensor), _open_tensor(merged, tensor)
    model_bits = [_open_tensor(model, tensor) for model in models]
    cuts = [_find_cut(bits, base_bits, density) for bits in model_bits]
    single, double = Difference(), Difference()
    for start in range(0, len(base_bits), CHUNK_ELEMENTS):
        chunk = slice(start, start + CHUNK_ELEMENTS)
        base_values = _to_float32(base_bits[chunk])
        kept = []
        for bits, cut in zip(model_bits, cuts, strict=True):
            delta = _to_float32(bits[chunk]) - base_values
            kept.append(np.where(cut.keep(np.abs(delta)), delta, np.float32(0)))
        found = np.asarray(merged_bits[chunk])
        single.add(found, _round_float32(_merge(base_values, kept, np.float32(weight))))
        in_double = _merge(base_values.astype(np.float64), [k.astype(np.float64) for k in kept], np.float64(weight))
        double.add(found, _round_float64(in_double))
    return {"elements": len(base_bits), "float32": vars(single), "float64": vars(double)}


def _find_cut(model: Bits, base: Bits, density: float) -> Cut:
    num_elements = len(base)
    magnitudes = np.empty(num_elements, dtype=np.float32)
    for start in range(0, num_elements, CHUNK_ELEMENTS):
        chunk = slice(start, start + CHUNK_ELEMENTS)
        magnitudes[chunk] = np.abs(_to_float32(model[chunk]) - _to_float32(base[chunk]))
    num_kept = max(1, int(density * num_elements))
    smallest = num_elements - num_kept  # its place in ascending order
    magnitudes.partition(smallest)
    cut = magnitudes[smallest]
    # All that is greater now lies behind it; so the equal ones to keep are num_kept less those.
    num_greater = int(np.count_nonzero(magnitudes[smallest:] > cut))
    return Cut(cut, num_kept - num_greater)


def _merge(base: Floats, kept: list[Floats], weight: Any) -> Floats:
    weighted = [weight * delta for delta in kept]
    elected = np.where(sum(weighted) >= 0, 1, -1)
    total, divisor = np.zeros_like(base), np.zeros_like(base)
    for delta in weighted:
        agrees = np.sign(delta) == elected
        total += np.where(agrees, delta, 0)
        divisor += np.where(agrees, weight, 0)
    divisor[divisor == 0] = 1
    return base + total / divisor


def _open_tensor(path: Path, name: str) -> Bits:
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        entry = json.loads(file.read(header_bytes))[name]
    start, end = entry["data_offsets"]
    return np.memmap(path, dtype=np.uint16, mode="r", offset=8 + header_bytes + start, shape=((end - start) // 2,))


def _to_float32(bits: Bits) -> Single:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _round_float32(values: Single) -> Bits:
    """To bfloat16, to nearest, ties to even; for finite values."""
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def _round_float64(values: Double) -> Bits:
    """To bfloat16 in one rounding: first to float32 towards odd, which keeps what the second step must know."""
    single = values.astype(np.float32)
    bits = single.view(np.uint32)
    bits -= np.abs(single.astype(np.float64)) > np.abs(values)  # now rounded towards zero
    bits |= single.astype(np.float64) != values
    return _round_float32(single)


def _to_ordered(bits: Bits) -> npt.NDArray[np.int32]:
    """Neighbouring bfloat16 values become neighbouring integers; -0 and 0 are the same."""
    signed = bits.astype(np.int32)
    return np.where(signed < 0x8000, signed, 0x8000 - signed).astype(np.int32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", type=Path)
    parser.add_argument("--base", type=Path, required=True)
    parser.add_argument("--merged", type=Path, required=True)
    parser.add_argument("--tensor", required=True)
    parser.add_argument("--density", type=float, required=True)
    parser.add_argument("--weight", type=float, required=True)
    options = parser.parse_args()
    result = compare(
        options.base,
        options.models,
        options.merged,
        tensor=options.tensor,
        density=options.density,
        weight=options.weight,
    )
    print(json.dumps(result))


if __name__ == "__main__":
    main()
