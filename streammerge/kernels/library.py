"""A compiled program's shared library, called through its C interface.

torch's own loader holds Python's lock while a program runs, so that two threads take turns (2.7 ms a call on one
thread, 2.6 on two, torch 2.13.0, 2026-11-24). ctypes lets the lock go. Tensors are handed over as views of their
memory; what comes back stays where it is.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16",
    torch.int32: "int32", torch.int64: "int64",
}  # fmt: skip
_Int64s = ctypes.POINTER(ctypes.c_int64)


class Library:
    """One library with room for some calls at a time. Raises OSError when it cannot be loaded or set up."""

    def __init__(self, path: Path, threads: int) -> None:
        library = ctypes.CDLL(str(path))
        container, outputs = ctypes.c_void_p(), ctypes.c_size_t()
        failed = library.AOTInductorModelContainerCreateWithDevice(
            ctypes.byref(container), ctypes.c_size_t(threads), b"cpu", None
        )
        if failed:
            raise OSError(f"{path}: the library cannot be set up")
        library.AOTInductorModelContainerGetNumOutputs(container, ctypes.byref(outputs))
        self._run, self._container, self._outputs = library.AOTInductorModelContainerRun, container, outputs.value

    def __call__(self, flat: Sequence[Tensor]) -> Tensor:
        """The first result of the program, in the memory it was written to, which goes with the tensor.

        Tensors are in the order the program was exported with.
        """
        torch_ = _torch()
        handles, results = (ctypes.c_void_p * len(flat))(), (ctypes.c_void_p * self._outputs)()
        for i, tensor in enumerate(flat):
            handles[i] = torch_.view(tensor)
        # The program owns the views from here on.
        failed = self._run(
            self._container, handles, ctypes.c_size_t(len(flat)), results, ctypes.c_size_t(self._outputs), None, None
        )
        if failed:
            raise RuntimeError("a compiled program failed")
        result: Tensor = torch_.tensor(_Handles(list(results), torch_))
        return result


class _Handles:
    """Results of a program, which lie in its memory as long as this is there."""

    def __init__(self, handles: list[int], torch_: _Torch) -> None:
        self.handles, self._torch = handles, torch_

    def __del__(self) -> None:
        for handle in self.handles:
            self._torch.delete(handle)


class _Torch:
    """The C functions of torch that make tensors of memory and look into them; short, they keep Python's lock."""

    def __init__(self) -> None:
        self._c = ctypes.PyDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
        self._cpu = self._c.aoti_torch_device_type_cpu()
        self._codes = {dtype: getattr(self._c, f"aoti_torch_dtype_{name}")() for dtype, name in _DTYPES.items()}
        self._of_code = {code: dtype for dtype, code in self._codes.items()}

    def view(self, tensor: Tensor) -> int | None:
        """A handle of the same memory."""
        rank = tensor.dim()
        handle = ctypes.c_void_p()
        failed = self._c.aoti_torch_create_tensor_from_blob(
            ctypes.c_void_p(tensor.data_ptr()), ctypes.c_int64(rank), (ctypes.c_int64 * rank)(*tensor.shape),
            (ctypes.c_int64 * rank)(*tensor.stride()), ctypes.c_int64(0), ctypes.c_int32(self._codes[tensor.dtype]),
            ctypes.c_int32(self._cpu), ctypes.c_int32(0), ctypes.byref(handle),
        )  # fmt: skip
        if failed:
            raise RuntimeError("torch made no view of a tensor")
        return handle.value

    def tensor(self, results: _Handles) -> Tensor:
        """The numbers behind the first handle, where they lie; it has all of them for as long as it is there."""
        rank, code = ctypes.c_int64(), ctypes.c_int32()
        sizes, strides, data = _Int64s(), _Int64s(), ctypes.c_void_p()
        tensor = ctypes.c_void_p(results.handles[0])
        self._c.aoti_torch_get_dim(tensor, ctypes.byref(rank))
        self._c.aoti_torch_get_dtype(tensor, ctypes.byref(code))
        self._c.aoti_torch_get_sizes(tensor, ctypes.byref(sizes))
        self._c.aoti_torch_get_strides(tensor, ctypes.byref(strides))
        self._c.aoti_torch_get_data_ptr(tensor, ctypes.byref(data))
        dtype = self._of_code[code.value]
        shape, steps = sizes[: rank.value], strides[: rank.value]
        extent = 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        assert data.value is not None
        memory: Any = (ctypes.c_char * (extent * dtype.itemsize)).from_address(data.value)
        memory.owner = results
        return torch.frombuffer(memory, dtype=dtype).as_strided(shape, steps)

    def delete(self, handle: int) -> None:
        self._c.aoti_torch_delete_tensor_object(ctypes.c_void_p(handle))


@cache
def _torch() -> Any:
    return _Torch()
