"""Write synthetic checkpoints in less than a gigabyte of memory, whatever their size.

    for each tensor, for each tile:  first = N(0, 0.02), or N(1, 0.02) for a vector, rounded to bfloat16
                                     each other model = first + N(0, 0.001), rounded to bfloat16

Run as `python -m benchlib.writer SPEC.json`, where the file holds a CheckpointSpec; the models go beside it.
"""

import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from io import BufferedWriter
from pathlib import Path

import torch

from benchlib.checkpoints import BYTES_PER_ELEMENT, CheckpointSpec, shard_name

TILE_ELEMENTS = 4 << 20
SPREAD = 0.02
NOISE = 1e-3


class _TileSource:
    """Owns one random generator per model; makes the same tile of every model at once."""

    def __init__(self, num_models: int, seed: int, *, repeat: bool) -> None:
        self._generators = [torch.Generator().manual_seed(seed + model) for model in range(num_models)]
        self._repeat = repeat
        self._full_tiles: list[torch.Tensor] = []

    def make(self, num_elements: int, mean: float) -> list[torch.Tensor]:
        if not self._repeat or mean != 0.0:
            return self._draw(num_elements, mean)
        if not self._full_tiles:
            self._full_tiles = self._draw(TILE_ELEMENTS, mean)
        return [tile[:num_elements] for tile in self._full_tiles]

    def _draw(self, num_elements: int, mean: float) -> list[torch.Tensor]:
        first_generator, *others = self._generators
        first = torch.empty(num_elements).normal_(mean, SPREAD, generator=first_generator).bfloat16()
        return [first, *((first + torch.empty(num_elements).normal_(0, NOISE, generator=g)).bfloat16() for g in others)]


def write_checkpoints(directory: Path, spec: CheckpointSpec) -> None:
    source = _TileSource(len(spec.models), spec.seed, repeat=spec.repeat_noise)
    for model in spec.models:
        (directory / model).mkdir(exist_ok=True)
        (directory / model / "config.json").write_text(json.dumps(spec.config, indent=2) + "\n")
    names = list(spec.tensors)
    weight_map: dict[str, str] = {}
    for number in range(spec.shards):
        part = names[len(names) * number // spec.shards : len(names) * (number + 1) // spec.shards]
        name = shard_name(number, spec.shards)
        weight_map |= dict.fromkeys(part, name)
        _write_shards(
            [directory / model / name for model in spec.models], {each: spec.tensors[each] for each in part}, source
        )
    if spec.shards > 1:
        index = json.dumps({"metadata": {"total_size": spec.tensor_bytes}, "weight_map": weight_map})
        for model in spec.models:
            (directory / model / "model.safetensors.index.json").write_text(index)


def _write_shards(paths: Sequence[Path], tensors: Mapping[str, tuple[int, ...]], source: _TileSource) -> None:
    """The same shard of every model."""
    header = _build_header(tensors)
    with ExitStack() as stack:
        files: list[BufferedWriter] = []
        for path in paths:
            file = stack.enter_context(path.open("wb"))
            file.write(header)
            files.append(file)
        for shape in tensors.values():
            num_elements = math.prod(shape)
            mean = 1.0 if len(shape) == 1 else 0.0
            for start in range(0, num_elements, TILE_ELEMENTS):
                tiles = source.make(min(TILE_ELEMENTS, num_elements - start), mean)
                for file, tile in zip(files, tiles, strict=True):
                    file.write(tile.view(torch.uint8).numpy().data)
        for file in files:
            file.flush()
            os.fsync(file.fileno())


def _build_header(tensors: Mapping[str, tuple[int, ...]]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + BYTES_PER_ELEMENT * math.prod(shape)
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensor data starts at a multiple of 8, as the library has it
    return len(text).to_bytes(8, "little") + text


def main() -> None:
    spec_path = Path(sys.argv[1])
    fields = json.loads(spec_path.read_text())
    fields["models"] = tuple(fields["models"])
    write_checkpoints(spec_path.parent, CheckpointSpec(**fields))


if __name__ == "__main__":
    main()
