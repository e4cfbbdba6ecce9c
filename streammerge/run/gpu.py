"""The lane of one GPU: tiles go through a small ring of device buffers, three streams at work at once.

    copy in    waits for the ring buffer to be free       host slot -> ring buffer
    compute    waits for the copy in                      programs, eagerly
    copy out   waits for compute                          ring buffer -> the slot's output area

Order is kept by events; the host waits only where it needs a result. The arena is pinned in place, so copies are
direct. Not yet run on a GPU: see docs/design.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from streammerge.base.errors import DoesNotFit, StreamMergeError, UserError
from streammerge.base.units import format_size
from streammerge.kernels.compiled import Signature
from streammerge.kernels.contract import Arguments, Look, Program, evaluate
from streammerge.run.arena import Area, Arena
from streammerge.run.lane import Merged, Stretch, count_nonfinite
from streammerge.run.profile import Spent

_RING = 3
# An allowance for the temporaries of eager programs, in slots; not measured.
_TEMPORARIES = 8


def choose_device(name: str) -> torch.device:
    """The device of `--device cpu|cuda|cuda:N|auto`. Raises UserError when there is none such."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device: {name!r} is none of cpu, cuda, cuda:N, auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device: {name} is not there; torch sees {torch.cuda.device_count()} CUDA devices.")
    return device


class _Piece(NamedTuple):
    """What a program is called with, but for its arguments."""

    inputs: list[Tensor]
    out: Tensor | None
    starts: Tensor | None
    keys: Tensor | None


@dataclass
class _Buffer:
    """One place of the ring, and the event after which it may be filled again."""

    memory: Tensor
    free: torch.cuda.Event


class CudaLane:
    """One GPU. Owns the ring, the streams and the pinning of the arena."""

    def __init__(self, device: torch.device, arena: Arena, limit_bytes: int | None) -> None:
        """Raises DoesNotFit when the ring and its temporaries need more than `limit_bytes` or than is free."""
        self._device = device
        torch.cuda.set_device(device)
        free, total = torch.cuda.mem_get_info(device)
        limit = min(free, limit_bytes or free)
        need = _RING * arena.slot_bytes + _TEMPORARIES * 2 * arena.slot_bytes
        if need > limit:
            raise DoesNotFit(
                f"{device}: this merge needs {format_size(need)} of GPU memory, {format_size(limit)} may be used. "
                f"Give a larger --max-gpu-memory or a smaller --max-memory (its tiles are smaller)."
            )
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total), device)
        self._arena = arena.tensor
        self._check(torch.cuda.cudart().cudaHostRegister(self._arena.data_ptr(), self._arena.nbytes, 0))  # type: ignore[no-untyped-call]
        self._copy_in, self._compute, self._copy_out = (torch.cuda.Stream(device) for _ in range(3))  # type: ignore[no-untyped-call]
        self._ring = [
            _Buffer(torch.empty(arena.slot_bytes, dtype=torch.uint8, device=device), _event()) for _ in range(_RING)
        ]
        self._turn = 0
        # What a device does is not timed: its work goes on after the call.
        self.spent = Spent()

    def look(self, look: Look, signature: Signature, stretch: Stretch) -> Callable[[], list[Any]]:
        buffer, values, _ = self._upload([area.tensor for area in stretch.inputs], None)
        pieces = _pieces(stretch, values, None)
        with torch.cuda.stream(self._compute):
            arguments = self._arguments(look.arguments)
            results = [
                evaluate(look.program, signature.work, inputs, signature.has_base, None, self._small(starts),
                         self._small(keys), arguments)
                for inputs, _, starts, keys in pieces
            ]  # fmt: skip
            buffer.free.record(self._compute)

        def answer() -> list[Any]:
            # Computed means copied, too: the tile may be given back.
            with torch.cuda.stream(self._compute):
                found = [result.cpu() for result in results]
            if look.digest is None:
                return found
            digested = []
            for host, piece in zip(found, pieces, strict=True):
                assert piece.starts is not None
                digested.append(look.digest(host, piece.starts))
            return digested

        return answer

    def merge(
        self, program: Program, signature: Signature, stretch: Stretch, out: Area, arguments: Arguments
    ) -> Merged:
        buffer, values, result = self._upload([area.tensor for area in stretch.inputs], out.tensor)
        assert result is not None
        with torch.cuda.stream(self._compute):
            here = self._arguments(arguments)
            for inputs, place, starts, keys in _pieces(stretch, values, result):
                evaluate(program, signature.work, inputs, signature.has_base, place, self._small(starts),
                         self._small(keys), here)  # fmt: skip
            counts = torch.stack([count_nonfinite(x, stretch.elements) for x in (*values, result)])
            computed = _event()
            computed.record(self._compute)
        with torch.cuda.stream(self._copy_out):
            self._copy_out.wait_event(computed)
            out.tensor.copy_(result, non_blocking=True)
            buffer.free.record(self._copy_out)
            done = _event()
            done.record(self._copy_out)

        def nonfinite() -> tuple[list[int], int]:
            *before, after = counts.tolist()
            return before, after

        return Merged(done.synchronize, nonfinite)

    def close(self) -> None:
        torch.cuda.synchronize(self._device)
        self._check(torch.cuda.cudart().cudaHostUnregister(self._arena.data_ptr()))  # type: ignore[no-untyped-call]

    def _upload(self, inputs: Sequence[Tensor], out: Tensor | None) -> tuple[_Buffer, list[Tensor], Tensor | None]:
        """Start copying a tile to the next buffer; compute waits for it. The result's place is after the inputs."""
        buffer = self._ring[self._turn]
        self._turn = (self._turn + 1) % _RING
        places = []
        start = 0
        for tensor in inputs if out is None else (*inputs, out):
            places.append(buffer.memory[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape))
            start += tensor.nbytes
        copied = _event()
        with torch.cuda.stream(self._copy_in):
            self._copy_in.wait_event(buffer.free)
            for place, tensor in zip(places, inputs, strict=False):
                place.copy_(tensor, non_blocking=True)
            copied.record(self._copy_in)
        self._compute.wait_event(copied)
        return buffer, places[: len(inputs)], None if out is None else places[-1]

    def _small(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(self._device)

    def _arguments(self, arguments: Arguments) -> dict[str, Tensor]:
        return {name: value.to(self._device) for name, value in arguments.items()}

    @staticmethod
    def _check(code: int) -> None:
        if int(code) != 0:
            raise StreamMergeError(f"CUDA could not pin the buffers (error {int(code)}).")


def _pieces(stretch: Stretch, inputs: list[Tensor], out: Tensor | None) -> list[_Piece]:
    """A stretch on the device: whole, or by rows a piece for every unit."""
    grain = stretch.grain
    if grain.width is None:
        return [_Piece(inputs, out, stretch.starts, stretch.keys)]

    def rows(tensor: Tensor, first: int) -> Tensor:
        return tensor.view(-1)[first : min(first + grain.unit, stretch.elements)].view(-1, grain.width or 1)

    return [
        _Piece(
            [rows(x, unit * grain.unit) for x in inputs],
            None if out is None else rows(out, unit * grain.unit),
            None if stretch.starts is None else stretch.starts[unit : unit + 1],
            None if stretch.keys is None else stretch.keys[unit : unit + 1],
        )
        for unit in range(grain.units(stretch.elements))
    ]


def _event() -> torch.cuda.Event:
    return torch.cuda.Event()  # type: ignore[no-untyped-call]
