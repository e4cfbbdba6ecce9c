"""Models that are never written: each unit's tensors as a recipe would make them, made when asked for and forgotten.

A `Variant` is one version for every unit of a network (front, blocks, back). Versions with the same key have the same
bits, whichever recipe they come from, so variants share what they have in common.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import cached_property

import torch
import xxhash
from torch import Tensor

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import UserError
from streammerge.kernels.chance import stream_key
from streammerge.kernels.contract import Settings
from streammerge.kernels.dtypes import torch_dtype
from streammerge.kernels.fold import Factors, factors
from streammerge.kernels.whole import Finder, merge_whole, pad, padded
from streammerge.plan.adapter import Change
from streammerge.plan.gather import Read
from streammerge.plan.names import head_of
from streammerge.plan.plan import Plan
from streammerge.plan.scaled import Scaled
from streammerge.plan.tensor import TensorPlan
from streammerge.storage.checkpoint import Checkpoint, TensorSpec
from streammerge.storage.source import Source


@dataclass(frozen=True)
class Version:
    """One unit's tensors as one recipe makes them. `checkpoints` are the plan's, by their numbers on a shelf."""

    tensors: tuple[TensorPlan, ...]
    checkpoints: tuple[int, ...]
    seed: int
    key: str

    def reads(self) -> Iterable[tuple[int, TensorSpec]]:
        """Every tensor that is needed, and the number of its checkpoint on the shelf."""
        for tensor in self.tensors:
            for read in _reads(tensor):
                yield self.checkpoints[read.checkpoint], read.spec
            for step in tensor.steps:
                if step.change is not None:
                    for spec in step.change.specs:
                        yield self.checkpoints[step.change.checkpoint], spec


@dataclass(frozen=True)
class Variant:
    """A model that could be written: one version per unit."""

    versions: tuple[Version, ...]

    @cached_property
    def digest(self) -> str:
        """Equal for variants of equal weights."""
        return xxhash.xxh3_128_hexdigest(" ".join(version.key for version in self.versions).encode())


class Shelf:
    """The checkpoints that variants are made of. Owns the open files, and the tensors of the unit in work."""

    def __init__(self, find: Finder) -> None:
        self.find = find
        self._numbers: dict[str, int] = {}
        self._sources: list[Source] = []
        self._identities: list[str] = []
        self._loaded: dict[tuple[int, str], Tensor] = {}
        self.bytes_read = 0

    def add(self, checkpoint: Checkpoint) -> int:
        """The number of a checkpoint; it is opened the first time. Raises InputError when it changed."""
        path = str(checkpoint.path.resolve())
        if path not in self._numbers:
            self._sources.append(Source(checkpoint))
            self._numbers[path] = len(self._sources) - 1
            files = [[file.name, file.size, file.mtime_ns, file.header] for file in checkpoint.files]
            self._identities.append(xxhash.xxh3_128_hexdigest(repr((path, files)).encode()))
        return self._numbers[path]

    def identity(self, number: int) -> str:
        """Names a checkpoint's content: its files with their sizes, times and headers."""
        return self._identities[number]

    def load(self, versions: Iterable[Version]) -> None:
        """Read every tensor that `versions` need, once each."""
        for version in versions:
            for number, spec in version.reads():
                if (number, spec.name) in self._loaded:
                    continue
                rows, width = pad(spec.elements)
                values = torch.zeros(rows, width, dtype=torch_dtype(spec.dtype))
                # Through bytes: numpy knows no bfloat16.
                view = memoryview(values.view(-1).view(torch.uint8).numpy().data)[: spec.nbytes]
                self._sources[number].read_into(view, spec.file, spec.offset)
                self._loaded[number, spec.name] = values
                self.bytes_read += spec.nbytes

    def make(self, version: Version, pool: Executor) -> dict[str, Tensor]:
        """The tensors of a version, in the dtypes of its recipe's output. What it needs must have been loaded."""
        made = pool.map(lambda tensor: self._make(version, tensor), version.tensors)
        return {tensor.name: values for tensor, values in zip(version.tensors, made, strict=True)}

    def alone(self, version: Version) -> Tensor:
        """The only tensor of a version. What it needs must have been loaded."""
        (tensor,) = version.tensors
        return self._make(version, tensor)

    def forget(self) -> None:
        """Give the memory of the loaded tensors back."""
        self._loaded.clear()

    def check_unchanged(self) -> None:
        """Raise InputError if an input changed since it was opened."""
        for source in self._sources:
            source.check_unchanged()

    def close(self) -> None:
        for source in self._sources:
            source.close()

    def _make(self, version: Version, tensor: TensorPlan) -> Tensor:
        with torch.inference_mode():
            return self._make_here(version, tensor)

    def _make_here(self, version: Version, tensor: TensorPlan) -> Tensor:
        operands = [self._loaded[version.checkpoints[read.checkpoint], read.spec.name] for read in _reads(tensor)]
        flat = operands[0].view(-1)[: tensor.elements]
        for step in tensor.steps:
            found = step.found
            if step.change is not None:
                found = self._factors(version.checkpoints[step.change.checkpoint], step.change)
            keys = [stream_key(version.seed, step.stream, i) for i in range(len(step.operands) - step.has_base)]
            flat = merge_whole(
                step.method, step.settings, [operands[i] for i in step.operands], tensor.shape,
                has_base=step.has_base, work=torch_dtype(step.work), out=torch_dtype(step.dtype),
                stream_keys=keys, find=self.find, found=found,
            )  # fmt: skip
            if step is not tensor.steps[-1]:
                operands.append(padded(flat))
        return flat.view(tensor.shape)

    def _factors(self, number: int, change: Change) -> Factors:
        stored = [self._loaded[number, spec.name].view(-1)[: spec.elements] for spec in change.specs]
        left, right, *norms = (values.view(spec.shape) for values, spec in zip(stored, change.specs, strict=True))
        return factors(left, right, norms[0] if norms else None, rank=change.rank, scale=change.scale,
                       transposed=change.transposed)  # fmt: skip


def variant_of(plan: Plan, shelf: Shelf, units: Mapping[str, tuple[int, ...]], num_units: int) -> Variant:
    """The model that a plan would write. `units` says which units need a tensor. Raises UserError."""
    check_network(plan)
    checkpoints = [shelf.add(checkpoint) for checkpoint in plan.checkpoints]
    groups: list[list[TensorPlan]] = [[] for _ in range(num_units)]
    for tensor in plan.tensors:
        for unit in units.get(tensor.name, ()):
            groups[unit].append(tensor)
    return Variant(tuple(make_version(plan.seed, group, checkpoints, shelf) for group in groups))


def check_network(plan: Plan) -> None:
    """Raise UserError when the network, which is built by the donor's config, cannot take the output's weights.

    That is when the output has a head of its own and the donor has none, and when its tokens have other ids.
    """
    if not plan.tied and plan.donor_is_tied and head_of(tensor.name for tensor in plan.tensors) is not None:
        raise UserError(
            f"{plan.recipe.path}: the first model's head is its embedding and another's is not. Such a merge can be "
            f"written, but not scored yet: the network that is run is built by the first one's config."
        )
    if any(isinstance(read, Scaled) for tensor in plan.tensors for read in tensor.reads) or any(
        tensor.scaling is not None for tensor in plan.tensors
    ):
        raise UserError(
            f"{plan.recipe.path}: its weights are in 8 bits with scales. Such a merge can be written, but not scored "
            f"yet: write the models in bfloat16 first (passthrough, with `dtype: bfloat16`), and score those."
        )
    gathered = any(not isinstance(read, Read) for tensor in plan.tensors for read in tensor.reads)
    if gathered or (plan.vocabulary is not None and plan.vocabulary.changed):
        raise UserError(
            f"{plan.recipe.path}: its tokenizer gives tokens other ids than the first model has. Such a merge can be "
            f"written, but not scored yet: leave `tokenizer` out of what is analysed."
        )


def _reads(tensor: TensorPlan) -> tuple[Read, ...]:
    """What a tensor is made of: of checkpoints as they stand."""
    return tuple(read for read in tensor.reads if isinstance(read, Read))


def make_version(seed: int, tensors: Sequence[TensorPlan], checkpoints: Sequence[int], shelf: Shelf) -> Version:
    """A version of some tensors of a plan, whose `checkpoints` have these numbers on the shelf."""
    hashing = xxhash.xxh3_128()
    texts: dict[int, str] = {}
    for tensor in tensors:
        parts = [f"{tensor.name} {tensor.dtype} {tensor.shape}"]
        parts += [f"{shelf.identity(checkpoints[read.checkpoint])} {read.spec.name}" for read in _reads(tensor)]
        for step in tensor.steps:
            if id(step.settings) not in texts:
                texts[id(step.settings)] = _settings_text(step.settings)
            parts.append(
                f"{step.method.name} {texts[id(step.settings)]} {step.operands} {step.has_base} {step.dtype} "
                f"{step.work} {step.stream} {seed} {step.found}"
            )
            if step.change is not None:
                parts.append(f"{shelf.identity(checkpoints[step.change.checkpoint])} {step.change.facts[1:]}")
        hashing.update(repr(parts).encode("utf-8", "surrogatepass"))
    return Version(tuple(tensors), tuple(checkpoints), seed, hashing.hexdigest())


def version_bytes(versions: Iterable[Version]) -> tuple[int, int]:
    """What a unit takes: bytes of the inputs of all `versions`, and of the largest of them when made.

    Made, a version is in memory as its recipe's output and once more in float32; and its tensors with an adapter folded
    in, of which some are made at a time, are counted all.
    """
    inputs = {
        (number, spec.name): -(-spec.nbytes // 65536) * 65536
        for version in versions
        for number, spec in version.reads()
    }
    made = [
        sum(
            tensor.elements * (DTYPES[tensor.dtype].itemsize + 4)
            + sum(tensor.elements * DTYPES[step.dtype].itemsize for step in tensor.steps[:-1])
            for tensor in version.tensors
        )
        for version in versions
    ]
    return sum(inputs.values()), max(made, default=0)


def _settings_text(settings: Settings) -> str:
    return repr((sorted(settings.shared.items()), sorted(settings.models.items()), settings.depth))
