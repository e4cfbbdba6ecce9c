"""What a merge method is.

A method sees numbers only. Its `program` is a pure function of one tile; what it must know of the whole tensor first,
it finds by looking: `measure` is a generator that yields `Look`s (run this program over these elements), is sent the
answers, and returns the arguments of the program.

    arguments = measure(problem)           # yields looks, if the method needs any
    for each tile: out = program(tile, arguments)

A tile is whole units. A unit is a block of 65,536 elements, the last one of a tensor filled up with zeros; or, for a
method that must see whole rows of a matrix, as many rows as fit in a block, and one at least. A program must give the
same result for a unit wherever it lies, so results never depend on tile sizes or threads.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from streammerge.kernels.rowsort import sort_rows

BLOCK = 65536

# The argument with masks that are kept, (units, models, WORDS) int32: bit b of word w is that of element 32 w + b.
KEPT, WORDS = "kept", BLOCK // 32

# What a measure takes out of a tensor at a time, where there is memory and where there is little: keys and indices.
MOST_SIFTED, FEWEST_SIFTED = 1 << 21, 1 << 18

Arguments = Mapping[str, Tensor]
Value = float | bool | str


class Grain(NamedTuple):
    """How a tensor is cut: into units of `unit` elements, flat, or whole rows of `width` elements."""

    unit: int
    width: int | None

    def units(self, elements: int) -> int:
        """How many units so many elements are."""
        return -(-elements // self.unit)


FLAT = Grain(BLOCK, None)


def grain_of(shape: Sequence[int], *, by_rows: bool) -> Grain:
    """How a tensor of `shape` is cut. A row runs along the last dimension; a vector is one row."""
    if not by_rows:
        return FLAT
    width = max(1, shape[-1] if shape else 1)
    return Grain(max(1, BLOCK // width) * width, width)


class Tile(NamedTuple):
    """What a program sees. All of `base` and `models` have the work dtype and shape (blocks, BLOCK).

    By rows, a tile is one unit: they have shape (rows, width), and what follows is of one block. A program by width
    sees several, (units, rows, width).

    `starts` (blocks, 1) int64 is the index in the tensor of each block's first element; `keys` (blocks, models, 2)
    int32 are the keys of the random bits, or, when these come one after the other, (blocks, models, BLOCK) float32 are
    random numbers, or what was kept of an earlier look at these blocks. They are None unless the program asks for them.
    `ordered` is what its `orders` made of the rows.
    """

    base: Tensor | None
    models: Sequence[Tensor]
    starts: Tensor | None
    keys: Tensor | None
    ordered: Tensor | None = None

    def deltas(self) -> list[Tensor]:
        """Each model minus the base."""
        assert self.base is not None
        return [model - self.base for model in self.models]


@dataclass(frozen=True)
class Argument:
    """One argument of a program: `shape` counts models as "K"; a `dtype` of None is the work dtype.

    "any" is a size that the tensor decides: such programs are compiled only by width.
    """

    name: str
    shape: tuple[int | Literal["K", "any"], ...] = ("K",)
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Program:
    """A pure function of a tile that can be run eagerly or compiled, with the same bits.

    `function(tile, arguments, **options)` gives the merged tile in the shape of the tile when `merges`, else partial
    results with blocks as their first dimension (by rows: of one block). It and functions among its options must be
    importable by module and name.
    """

    function: Callable[..., Tensor]
    arguments: tuple[Argument, ...] = ()
    options: tuple[tuple[str, bool | int | str | Callable[..., Any]], ...] = ()
    merges: bool = False
    needs_starts: bool = False
    needs_keys: bool = False
    # For a program by rows: another one is run first, and its result (blocks, models, BLOCK), with every row sorted, is
    # in the tile. Neither program sees the rows themselves then, and both can be compiled.
    orders: Program | None = None
    # A program that is used by rows and does not look at them: compiled, it sees units as blocks filled up with zeros.
    sees_no_rows: bool = False
    # For a program by rows: it is compiled for each width of rows, and sees units as (units, rows, width).
    by_width: bool = False
    # Its keys are masks that were kept (KEPT).
    kept: bool = False
    # So many blocks are run at a time, when it is run eagerly by a thread of the processor.
    eager_blocks: int = 1
    # What it costs per element and model on one thread, eagerly and compiled: whether compiling pays, and what a plan
    # says of the time.
    eager_ns: float = 2.0
    compiled_ns: float = 0.5

    @property
    def label(self) -> str:
        """`streammerge.methods.ties:apply(consensus=True)`: what a profile or a cache calls it."""
        options = ", ".join(
            f"{name}={_name(value) if callable(value) else repr(value)}" for name, value in self.options
        )
        return f"{_name(self.function)}({options})"

    def __call__(self, tile: Tile, arguments: Arguments) -> Tensor:
        return self.function(tile, arguments, **dict(self.options))


@dataclass(frozen=True)
class Look:
    """A question about the tensor: run `program` over `spans` of it, or over all of it.

    `spans` are (first element, number of elements); they are packed one after the other into blocks, or by rows are
    whole units each. The answer is the partial results of all blocks in order, concatenated. With `digest`, every piece
    of partial results (some whole blocks) is handed to it with its tile starts, and the answer is the list of what it
    returns, in order. With `fold`, pieces are handed to that instead, one after the other in order, and there is no
    answer: for partial results that are too large to keep.
    """

    program: Program
    arguments: Arguments
    spans: tuple[tuple[int, int], ...] | None = None
    digest: Callable[[Tensor, Tensor], Any] | None = None
    fold: Callable[[Any], None] | None = None

    def answer(self, parts: list[Any]) -> Any:
        """What `measure` is sent, from the pieces in order."""
        if self.fold is not None:
            return None
        return parts if self.digest is not None else torch.cat(parts)


Measuring = Generator[Look, Any, dict[str, Tensor]]
# A question to each of many tensors, None for those that are not asked; the answers; what was found for each.
Surveying = Generator[list[Look | None], list[Any], list[Any]]
Scope = Literal["tensor", "layer", "model"]


@dataclass(frozen=True)
class Param:
    """One parameter of a recipe. A `default` of None means that the recipe must give it, unless it is `optional`.

    `choices` are the texts a "text" may be. Without `vectors`, tensors of fewer than two dimensions have the default
    whatever the recipe says.
    """

    name: str
    meaning: str
    default: Value | None = None
    per_model: bool = False
    kind: Literal["number", "integer", "boolean", "text"] = "number"
    choices: tuple[str, ...] = ()
    optional: bool = False
    vectors: bool = True


@dataclass(frozen=True)
class Settings:
    """The parameters of one tensor, resolved: `shared` by name, `models` one value per non-base model.

    `depth` says how far along the layers the tensor is, 0 to 1, for methods that ask (`Method.by_depth`). With
    `sequential`, a float dtype, random numbers come one after the other, as mergekit draws them, and are compared with
    shares rounded to it.
    """

    shared: Mapping[str, Value | None]
    models: Mapping[str, tuple[Value | None, ...]]
    depth: float = 0.0
    sequential: torch.dtype | None = None

    def number(self, name: str) -> float:
        value = self.shared[name]
        assert value is not None
        return float(value)

    def flag(self, name: str) -> bool:
        return bool(self.shared[name])

    def text(self, name: str) -> str:
        return str(self.shared[name])

    def numbers(self, name: str) -> list[float]:
        return [float(value) for value in self.models[name] if value is not None]


@dataclass(frozen=True)
class Problem:
    """One tensor to merge, as `measure` sees it: its size, number of models, parameters, and the work dtype.

    `models` are counted without the base. `found` is what a survey of many tensors found out for this one. With `keeps`
    there is memory for masks (`Method.keeps`): then `measure` may return them as the argument KEPT. `sifts` is how many
    entries it may take out of the tensor at a time.
    """

    elements: int
    models: int
    settings: Settings
    work: torch.dtype
    grain: Grain = FLAT
    has_base: bool = True
    found: Any = None
    keeps: bool = False
    sifts: int = FEWEST_SIFTED

    @property
    def units(self) -> int:
        return self.grain.units(self.elements)

    def tensor(self, values: Sequence[float]) -> Tensor:
        """Numbers as an argument of a program."""
        return torch.tensor(values, dtype=self.work)


@dataclass(frozen=True)
class Method:
    """A merge method: its declaration and its functions. One instance per file in `methods/`."""

    name: str
    doc: str
    params: tuple[Param, ...]
    # Whether the base is a place to measure deltas from, an ordinary input, or the one where the recipe names it.
    base: Literal["required", "ignored", "optional"]
    min_models: int
    max_models: int | None
    # The program that merges, for given settings.
    program: Callable[[Settings], Program]
    measure: Callable[[Problem], Measuring]
    # How often the inputs are looked at, the merging pass included, when nothing stays in memory. The second argument
    # says whether all inputs are of 16 bits: then many deltas are equal. The third is the number of elements.
    passes: Callable[[Settings, bool, int], int]
    # Other programs that `measure` runs over whole tensors, as a rule: worth compiling.
    looks: Callable[[Settings, bool, int], tuple[Program, ...]] = field(default=lambda settings, narrow, elements: ())
    # The input whose values are the result as they stand (0 is the base where there is one), or None.
    copies: Callable[[Settings], int | None] = field(default=lambda settings: None)
    # Problems with settings of one tensor, as sentences.
    check: Callable[[Settings], list[str]] = field(default=lambda settings: [])
    # Whether `measure` would like to keep a bit per element and model for the merging pass; and the program that merges
    # with these masks, and looks then worth compiling.
    keeps: Callable[[Settings], bool] = field(default=lambda settings: False)
    kept_programs: Callable[[Settings], tuple[Program, tuple[Program, ...]]] | None = None
    # Whether it looks for cuts, and so takes entries out of tensors (`Problem.sifts`).
    cuts: Callable[[Settings], bool] = field(default=lambda settings: False)
    # Whether its programs must see whole rows. They are then run eagerly.
    by_rows: Callable[[Settings], bool] = field(default=lambda settings: False)
    # Whether it asks for `Settings.depth`.
    by_depth: Callable[[Settings], bool] = field(default=lambda settings: False)
    # Which tensors must be looked at together before one of them can be merged, and how: `survey` is given their
    # problems in the order of their names and returns what it found for each, as lists of numbers (`Problem.found`).
    scope: Callable[[Settings], Scope] = field(default=lambda settings: "tensor")
    survey: Callable[[Sequence[Problem]], Surveying] | None = None
    # How often a survey looks at all of them.
    survey_passes: int = 0


def _name(function: Callable[..., Any]) -> str:
    return f"{function.__module__}:{function.__qualname__}"


def evaluate(program: Program, work: torch.dtype, inputs: Sequence[Tensor], has_base: bool, out: Tensor | None,
             starts: Tensor | None, keys: Tensor | None, arguments: Arguments,
             ordered: Tensor | None = None) -> Tensor:  # fmt: skip
    """Run a program on stored inputs of any float dtype, each in the shape of the tile; base first if `has_base`.

    A merging program writes `out`, rounding once (to nearest, ties to even), and returns per block or row 0, or NaN
    when an input or the result is not finite. Others return their partial results. By width, tensors of two dimensions
    are one unit.
    """
    if program.by_width and inputs[0].dim() == 2:
        inputs, out = [stored[None] for stored in inputs], None if out is None else out[None]
    values = [stored.to(work) for stored in inputs]
    tile = Tile(values[0] if has_base else None, values[has_base:], starts, keys, ordered)
    if program.orders is not None and ordered is None:
        tile = tile._replace(ordered=sort_rows(program.orders(tile, arguments), inputs[0].shape[-1]))
    result = program(tile, arguments)
    if out is None:
        return result
    stored_result = round_once(result, out.dtype)
    out.copy_(stored_result)
    rounded = stored_result.to(work)
    # x - x is 0 for every finite x and NaN otherwise: one sum tells whether to look closer.
    probe = rounded - rounded
    for value in values:
        probe = probe + (value - value)
    return probe.sum(-1)


def round_once(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` in `dtype`, rounded to nearest even, once.

    torch turns float64 into a 16-bit float by way of float32 and so rounds twice. Rounding to odd on the way makes the
    second rounding see which side the first one fell on.
    """
    if values.dtype is not torch.float64 or dtype.itemsize > 2:
        return values.to(dtype)
    nearest = values.to(torch.float32)
    away = nearest.abs().to(torch.float64) > values.abs()
    inward = torch.where(away, torch.nextafter(nearest, torch.zeros_like(nearest)), nearest)
    inexact = inward.to(torch.float64) != values
    return (inward.view(torch.int32) | inexact.to(torch.int32)).view(torch.float32).to(dtype)
