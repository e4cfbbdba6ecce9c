"""The rate of the disk: several threads read the files past the page cache, each its own stretch, in large pieces.

Needs no third-party package. Run as `python -m benchlib.disk_rate FILE…`; prints {"bytes_per_second": …}.
"""

import argparse
import json
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PIECE_BYTES = 4 << 20
THREADS = 4


def read_stretch(path: Path, first: int, last: int) -> int:
    """Read the pieces `first` to `last`, exclusive, of a file with O_DIRECT; returns the bytes read."""
    buffer = mmap.mmap(-1, PIECE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # aligned to pages
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        return sum(os.preadv(descriptor, [buffer], piece * PIECE_BYTES) for piece in range(first, last))
    finally:
        os.close(descriptor)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path)
    options = parser.parse_args()
    began = time.perf_counter()
    done = 0
    with ThreadPoolExecutor(THREADS) as pool:
        for path in options.files:
            pieces = -(-path.stat().st_size // PIECE_BYTES)
            bounds = [pieces * i // THREADS for i in range(THREADS + 1)]
            done += sum(pool.map(read_stretch, [path] * THREADS, bounds, bounds[1:]))
    print(json.dumps({"bytes_per_second": done / (time.perf_counter() - began)}))


if __name__ == "__main__":
    main()
