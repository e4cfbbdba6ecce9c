"""A guess at how long a merge takes, before it runs: a short probe of the inputs' disk, and measured rates.

A guess is what it is: the page cache, other programs and the output's disk can change it several times over.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from streammerge.plan.budget import Schedule, bytes_to_read
from streammerge.plan.gather import Read
from streammerge.plan.plan import Plan
from streammerge.plan.tensor import TensorPlan
from streammerge.storage.source import Source

_PROBE_BYTES = 64 << 20
_PROBE_SECONDS = 0.25
# Start, import of torch, headers: measured 1.3 s on the machine of docs/bench.md.
_START_SECONDS = 1.5
# Nobody probes the output's disk by writing to it before anything is decided.
_WRITE_BYTES_PER_SECOND = 1.2e9
# Where there is nothing that could be tried.
_UNKNOWN_BYTES_PER_SECOND = 1e9


def estimate_seconds(plan: Plan, tensors: Sequence[TensorPlan], schedule: Schedule, computing: float) -> float:
    """About how many seconds merging `tensors` takes, of which the arithmetic alone takes `computing`."""
    reading = bytes_to_read(tensors, schedule) / _read_rate(plan)
    writing = sum(tensor.nbytes for tensor in tensors) / _WRITE_BYTES_PER_SECOND
    return _START_SECONDS + max(reading, writing, computing)


def _read_rate(plan: Plan) -> float:
    """Bytes per second that the largest input tensor is read with, for a quarter of a second at most."""
    reads = (read for tensor in plan.tensors for read in tensor.reads if isinstance(read, Read))
    read = max(reads, key=lambda read: read.nbytes, default=None)
    if read is None:
        return _UNKNOWN_BYTES_PER_SECOND
    spec = read.spec
    if spec.nbytes == 0:
        return _UNKNOWN_BYTES_PER_SECOND
    source = Source(plan.checkpoints[read.checkpoint])
    try:
        buffer = memoryview(bytearray(min(spec.nbytes, 4 << 20)))
        began = time.perf_counter()
        done = 0
        while done < min(spec.nbytes, _PROBE_BYTES) and time.perf_counter() - began < _PROBE_SECONDS:
            size = min(len(buffer), spec.nbytes - done)
            source.read_into(buffer[:size], spec.file, spec.offset + done)
            done += size
        return done / max(1e-6, time.perf_counter() - began)
    finally:
        source.close()
