"""A model as a stage of a recipe sees it: a checkpoint, or what an earlier stage makes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from streammerge.base.errors import UserError
from streammerge.plan.adapter import Adapter, Change, changes_of
from streammerge.plan.gather import Gathered, Read
from streammerge.plan.names import embedding_of, head_of, stacks
from streammerge.plan.scaled import Found, Scaled
from streammerge.plan.vocab import Vocabulary
from streammerge.storage.checkpoint import Checkpoint, TensorSpec

MOST_LAYERS = 100_000
# By stack, for each of its layers a checkpoint and the layer there.
Origins = Mapping[str, tuple[tuple[int, int], ...]]
_SHOWN = 5


class Operand(Protocol):
    """A tensor that can be merged with others: of a checkpoint, or made by a stage."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Folded:
    """A tensor as an adapter makes it, of the base with a change in it or whole; or one that is gathered, or scaled.

    It counts as of the model's own `dtype`, but is rounded to that only when it is the result as it stands.
    """

    read: Read | Gathered | Scaled
    change: Change | None
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return self.read.shape


@dataclass(frozen=True)
class Model:
    """A model of the recipe, by the numbers of its checkpoint and its adapter's in the plan.

    `tied` is what its config.json says of its head: that it is the embedding, that it is not, or nothing. `commits` are
    those of the Hub that its files, and its adapter's, are of. `vocabulary` and `template` are those of its tokenizer
    and None where it has none, or nobody needs to know. `scale_block` is what its configuration says that a scale of
    8-bit weights is for: rows and columns.
    """

    reference: str
    checkpoint: int
    adapter: tuple[int, Adapter] | None = None
    tied: bool | None = None
    commits: tuple[str, ...] = ()
    vocabulary: Vocabulary | None = None
    template: str | None = None
    scale_block: tuple[int, int] | None = None


@dataclass(frozen=True)
class View:
    """A model: its tensors by name, in order, and for each layer of its stacks the checkpoint's layer behind it.

    A `tied` one uses its embedding as head, whatever is stored. `left_out` are tensors of its checkpoint that are no
    weights.
    """

    model: str
    tensors: Mapping[str, Operand]
    origins: Origins
    vocabulary: Vocabulary | None = None
    tied: bool = False
    left_out: tuple[str, ...] = ()


def view_of(model: Model, checkpoints: Sequence[Checkpoint]) -> View:
    """A model as a stage sees it.

    Raises UserError when its adapter does not fit, or 8-bit weights and their scales.
    """
    number, own = model.checkpoint, checkpoints[model.checkpoint].tensors
    found = Found(number, own, model.scale_block)
    if found.problems:
        shown = "\n".join(f"  - {problem}" for problem in found.problems[:_SHOWN])
        more = f"\n  - and {len(found.problems) - _SHOWN} more" if len(found.problems) > _SHOWN else ""
        raise UserError(f"{model.reference}: its 8-bit weights cannot be read:\n{shown}{more}")
    stored = _dtype_beside(own)
    if found.hidden:
        own = {
            name: replace(spec, dtype=stored) if name in found.scaled else spec
            for name, spec in own.items()
            if name not in found.hidden
        }
    tensors: dict[str, Operand] = {
        name: Folded(found.scaled[name], None, stored) if name in found.scaled else Read(number, spec)
        for name, spec in own.items()
    }
    if model.adapter is not None:
        second, adapter = model.adapter
        changes, saved = changes_of(adapter, second, own, model.reference)
        for name in {**saved, **changes}:
            before = found.scaled.get(name) or Read(number, own[name])
            read = Read(second, saved[name]) if name in saved else before
            tensors[name] = Folded(read, changes.get(name), own[name].dtype)
    # A name may hold any number: then nothing is known of layers.
    origins = {
        stack: tuple((number, layer) for layer in range(depth))
        for stack, depth in stacks(own).items()
        if depth <= MOST_LAYERS
    }
    tied = _is_tied(tensors, model)
    return View(model.reference, tensors, origins, model.vocabulary, tied, tuple(found.left_out))


def _dtype_beside(tensors: Mapping[str, TensorSpec]) -> str:
    """The dtype that 8-bit weights count as: what the model has most of besides them, or BF16."""
    found = [spec.dtype for spec in tensors.values() if spec.dtype in ("BF16", "F16")]
    return max(dict.fromkeys(found), key=found.count, default="BF16")


def with_heads(views: Sequence[View]) -> tuple[list[View], bool]:
    """The same models, and if one of them has a head all have: that of a tied one is its embedding, whatever is stored.

    Also whether all are tied, so that the result is.
    """
    heads = {head for view in views if (head := head_of(view.tensors)) is not None}
    tied = all(view.tied for view in views)
    if len(heads) != 1:
        return list(views), not heads and tied
    (head,) = heads
    made = []
    for view in views:
        embedding = embedding_of(view.tensors) if view.tied else None
        own = view.tensors if embedding is None else {**view.tensors, head: view.tensors[embedding]}
        made.append(replace(view, tensors=own))
    return made, tied


def _is_tied(tensors: Mapping[str, Operand], model: Model) -> bool:
    head = head_of(tensors)
    # A head that an adapter changed is one of its own, whatever the base's config says.
    if head is not None and isinstance(tensors[head], Folded):
        return False
    return model.tied if model.tied is not None else head is None
