"""The floor of a merge: read the inputs tile by tile, write as many bytes as the output has, compute nothing.

    passes 1 to N-1   read every input
    pass N            tile by tile: read every input, write one tile

It pays what every merge pays that keeps its promises: torch is imported, each tile written is hashed (xxh3), data are
synced, and then a line is appended to a journal and synced. Run as `python -m benchlib.tile_loop`.
"""

import argparse
import mmap
import os
from collections.abc import Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path

import torch  # noqa: F401 - what a merge imports
import xxhash

TILE_BYTES = 8 << 20
SYNC_EVERY_TILES = 32  # 256 MiB, as a writer does that promises what it has finished


def run_loop(inputs: Sequence[Path], output: Path, *, output_bytes: int, num_passes: int) -> None:
    buffer = mmap.mmap(-1, TILE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    buffer.write(b"\x3c" * TILE_BYTES)  # not zeros: the memory is touched before the loop starts
    view = memoryview(buffer)
    digest = xxhash.xxh3_128()
    with ExitStack() as stack:
        sources = [stack.enter_context(path.open("rb", buffering=0)).fileno() for path in inputs]
        longest = max(os.fstat(source).st_size for source in sources)
        for _ in range(num_passes - 1):
            for offset in range(0, longest, TILE_BYTES):
                for source in sources:
                    os.preadv(source, [buffer], offset)
        sink = stack.enter_context(output.open("wb", buffering=0)).fileno()
        journal = stack.enter_context(output.with_suffix(".journal").open("wb", buffering=0))
        for tile, offset in enumerate(range(0, max(longest, output_bytes), TILE_BYTES), start=1):
            for source in sources:
                os.preadv(source, [buffer], offset)
            if offset < output_bytes:
                digest.update(view[: output_bytes - offset])
                _write_fully(sink, view[: output_bytes - offset], offset)
            if tile % SYNC_EVERY_TILES == 0:
                _promise(sink, journal, digest.hexdigest())
        _promise(sink, journal, digest.hexdigest())


def _promise(sink: int, journal: FileIO, checksum: str) -> None:
    os.fdatasync(sink)
    journal.write(f"{checksum}\n".encode())
    os.fdatasync(journal.fileno())


def _write_fully(sink: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwritev(sink, [data], offset)
        data, offset = data[written:], offset + written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("inputs", nargs="+", type=Path)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--output-bytes", type=int, required=True)
    parser.add_argument("--passes", type=int, default=1)
    options = parser.parse_args()
    run_loop(options.inputs, options.output, output_bytes=options.output_bytes, num_passes=options.passes)


if __name__ == "__main__":
    main()
