"""What a LoRA of the difference between two models holds: which matrices, in which form, and what must be left out.

matrix       a module's weight of two dimensions           MODEL - BASE ≈ B·A
transposed   embeddings, and layers that store (in, out)   MODEL - BASE ≈ (B·A)ᵀ
left         everything else: norms, biases, convolutions, fused experts. Looked at, so that it can be said how much
             of the difference they are
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import ShapeMismatch, UserError
from streammerge.plan.document import nearest
from streammerge.plan.gather import Read
from streammerge.plan.names import head_of, is_buffer, listing, vocabulary_of
from streammerge.plan.scaled import Scaled, quantised_as
from streammerge.plan.view import Folded, Model, Operand, view_of, with_heads
from streammerge.storage.checkpoint import Checkpoint

DTYPE_NAMES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
DEFAULT_RANK, DEFAULT_MAX_RANK = 16, 128
_SHOWN = 10

# Modules that look a row up, by the last word of their names; PEFT has another kind of layer for them.
_EMBEDDING = re.compile(
    r"(^|[._])(embed_tokens(_per_layer)?|embed_in|wte|wpe|tok_embeddings|(word|position|token_type)_embeddings|"
    r"word_embedding|position_embedding|embeddings?)$|^([^.]+\.)?shared$"
)
# Not all modules that look up take rows alone: OPT's and BART's add an offset of their own.
_POSITIONS = re.compile(r"(^|\.)embed_positions\.weight$")
# Models whose layers are Conv1D, which stores (in, out), and how those layers are called.
_IN_OUT_MODELS = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer"}
_IN_OUT_LAYER = re.compile(r"\.(c_attn|c_proj|c_fc|q_attn)$")

# Why tensors are left out that can go along whole.
BIAS, VECTOR = "a bias", "a vector, no matrix"

Operands = tuple[Read | Scaled, Read | Scaled]


@dataclass(frozen=True)
class Wanted:
    """What is asked for.

    The rank is a number, or the fewest that hold the share `energy` of a tensor's squares, but `max_rank` at most.
    Names that hold one of `include` and none of `exclude` are looked at. With `keep_whole` norms and biases go along as
    they are. `dtype` is what the factors are stored in.
    """

    rank: int | None = None
    energy: float | None = None
    max_rank: int | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    keep_whole: bool = False
    dtype: str = "F32"
    seed: int = 0

    @property
    def share(self) -> float | None:
        """The share of squares that is enough: of all of them a billionth may be missing, which is rounding."""
        return None if self.energy is None else min(self.energy, 1 - 1e-9)

    @property
    def most(self) -> int:
        """The largest rank there may be."""
        if self.energy is not None:
            return self.max_rank or DEFAULT_MAX_RANK
        return self.rank or DEFAULT_RANK

    def check(self) -> None:
        """Raise UserError for numbers that mean nothing."""
        if self.rank is not None and self.energy is not None:
            raise UserError("--rank and --energy: give one of them. --max-rank bounds what --energy may choose.")
        if self.rank is not None and self.rank < 1:
            raise UserError(f"--rank {self.rank}: must be 1 or more.")
        if self.max_rank is not None and self.max_rank < 1:
            raise UserError(f"--max-rank {self.max_rank}: must be 1 or more.")
        if self.max_rank is not None and self.energy is None:
            raise UserError("--max-rank bounds what --energy chooses; without --energy give --rank alone.")
        if self.energy is not None and not 0 < self.energy <= 1:
            raise UserError(f"--energy {self.energy:g}: must be above 0 and at most 1: a share of the squares.")


@dataclass(frozen=True)
class Pair:
    """One tensor of both models, to be seen as a matrix of `rows` and `columns`: the last dimension, and all others."""

    name: str
    shape: tuple[int, ...]
    model: Read | Scaled
    base: Read | Scaled

    @property
    def operands(self) -> Operands:
        return self.model, self.base

    @property
    def columns(self) -> int:
        return self.shape[-1] if self.shape else 1

    @property
    def rows(self) -> int:
        return math.prod(self.shape[:-1])

    @property
    def elements(self) -> int:
        return self.rows * self.columns

    @property
    def nbytes(self) -> int:
        return self.model.nbytes + self.base.nbytes


@dataclass(frozen=True)
class Target:
    """A matrix that becomes two factors. `embedding` says which kind of layer PEFT has for it."""

    pair: Pair
    embedding: bool
    transposed: bool

    @property
    def module(self) -> str:
        return self.pair.name.removesuffix(".weight")


@dataclass(frozen=True)
class Left:
    """A tensor that becomes no factors, and why. `exact` ones are not of floats: whether they differ is all there is to
    say. `whole` ones can go along as they are."""

    pair: Pair
    why: str
    exact: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Extraction:
    """All tensors of two models: in the model's order, and with the names that were asked to be left alone.

    `modules` are those of all weights, whatever becomes of them. `tied` says that embedding and head are one.
    """

    targets: tuple[Target, ...]
    left: tuple[Left, ...]
    unseen: tuple[str, ...]
    modules: tuple[str, ...]
    transposes: bool
    tied: bool

    def whole_beside(self, differing: set[str]) -> list[str]:
        """The tensors that go along whole if those do that differ: with them all others of their modules.

        PEFT replaces a module with all it has, and takes for it every module whose name ends so.
        """
        by_module: dict[str, list[Left]] = {}
        for left in self.left:
            by_module.setdefault(left.pair.name.rpartition(".")[0], []).append(left)
        matrices = {target.module for target in self.targets}
        found = []
        for module, own in by_module.items():
            names = [each.pair.name for each in own if each.whole and each.pair.name in differing]
            # A bias beside a matrix needs no replacement.
            if module not in matrices and any(name.endswith(".weight") for name in names):
                alike = any(other != module and (other.endswith(module) or other.startswith(f"{module}."))
                            for other in self.modules)  # fmt: skip
                names = [] if alike or not all(each.whole for each in own) else [each.pair.name for each in own]
            found += names
        return found


def plan_extraction(model: Model, base: Model, checkpoints: Sequence[Checkpoint], wanted: Wanted,
                    model_type: str | None) -> Extraction:  # fmt: skip
    """What is to be done about each tensor. `model_type` is what config.json says.

    Raises UserError and ShapeMismatch, with everything that does not fit.
    """
    for each in (model, base):
        if each.adapter is not None:
            raise UserError(
                f"{each.reference}: is a base with an adapter. Write that model first (a passthrough recipe of it), "
                "then extract."
            )
        if (found := quantised_as(checkpoints[each.checkpoint].tensors)) is not None:
            raise UserError(
                f"{each.reference}: is quantised by {found[0]}. Differences of its codes mean nothing. {found[1]}."
            )
    views, tied = with_heads([view_of(each, checkpoints) for each in (model, base)])
    own_head = head_of(checkpoints[base.checkpoint].tensors)
    theirs, ours = ({name: each for name, each in view.tensors.items() if not is_buffer(name)} for view in views)
    if own_head is None and tied and (added := head_of(theirs)) is not None:
        # The model stores what the base does not: once more its embedding.
        theirs, ours = _without(theirs, added), _without(ours, added)
    chosen = _filtered(theirs, ours, wanted)
    _check_names(theirs, ours, chosen, model.reference, base.reference)
    _check_shapes(theirs, ours, chosen, model.reference, base.reference)
    targets: list[Target] = []
    left: list[Left] = []
    for name in theirs:
        if name not in chosen:
            continue
        pair = Pair(name, theirs[name].shape, _read(theirs[name]), _read(ours[name]))
        kinds = {DTYPES[operand.dtype].kind for operand in pair.operands}
        if kinds != {"float"}:
            left.append(Left(pair, "not of floats", exact=True))
        elif own_head is None and name == head_of(theirs):
            left.append(Left(pair, "the base has no head of its own, but uses its embedding"))
        elif (why := _why_left(pair)) is None:
            embedding = _EMBEDDING.search(name.removesuffix(".weight")) is not None
            in_out = model_type in _IN_OUT_MODELS and _IN_OUT_LAYER.search(name.removesuffix(".weight")) is not None
            targets.append(Target(pair, embedding, embedding or in_out))
        else:
            left.append(Left(pair, why, whole=len(pair.shape) == 1 and name.endswith((".weight", ".bias"))))
    if not targets:
        raise UserError("There is no matrix to look at: no tensor of two dimensions that is the weight of a module.")
    return Extraction(
        tuple(targets),
        tuple(left),
        tuple(name for name in ours if name not in chosen),
        tuple(dict.fromkeys(name.rpartition(".")[0] for name in ours if "." in name)),
        any(target.transposed and not target.embedding for target in targets),
        tied,
    )


def _why_left(pair: Pair) -> str | None:
    """Why a tensor of floats becomes no factors; None if it does."""
    if len(pair.shape) < 2:
        return BIAS if pair.name.endswith("bias") else VECTOR
    if len(pair.shape) > 2:
        return f"of {len(pair.shape)} dimensions"
    if not pair.name.endswith(".weight"):
        return "no weight of a module"
    if _POSITIONS.search(pair.name):
        return "positions, for which PEFT has no layer"
    return None if pair.elements else "empty"


def _filtered(theirs: Mapping[str, Operand], ours: Mapping[str, Operand], wanted: Wanted) -> set[str]:
    names = list(dict.fromkeys([*theirs, *ours]))
    for flag, texts in (("--include", wanted.include), ("--exclude", wanted.exclude)):
        for text in texts:
            if not any(text in name for name in names):
                parts = sorted({part for name in names for part in name.split(".")})
                raise UserError(f"{flag} {text}: is part of no tensor's name.{nearest(text, parts)}")
    return {
        name
        for name in names
        if (not wanted.include or any(text in name for text in wanted.include))
        and not any(text in name for text in wanted.exclude)
    }


def _check_names(theirs: Mapping[str, Operand], ours: Mapping[str, Operand], chosen: set[str], model: str,
                 base: str) -> None:  # fmt: skip
    lines = []
    for own, other, has, lacks in ((theirs, ours, model, base), (ours, theirs, base, model)):
        alone = [name for name in own if name in chosen and name not in other]
        if alone:
            lines.append(f"  - {lacks} lacks {len(alone)} that {has} has: {listing(alone)}")
    if lines:
        shown = "\n".join(lines)
        raise UserError(
            f"The two models do not hold the same tensors:\n{shown}\nIs {base} what {model} was made from? What should "
            f"not be compared can be left out: --exclude TEXT."
        )


def _check_shapes(theirs: Mapping[str, Operand], ours: Mapping[str, Operand], chosen: set[str], model: str,
                  base: str) -> None:  # fmt: skip
    wrong = [name for name in theirs if name in chosen and theirs[name].shape != ours[name].shape]
    if not wrong:
        return
    lines = [f"  {name}: {list(theirs[name].shape)}, the base's is {list(ours[name].shape)}" for name in wrong]
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    tables = vocabulary_of({name: each.shape for name, each in ours.items()}) or {}
    advice = ""
    if all(name in tables for name in wrong):
        leaving = " ".join(f"--exclude {name.removesuffix('.weight').rpartition('.')[2]}" for name in wrong)
        advice = (
            "\nThese are tables of tokens, and tokens were added or removed: a low-rank change has the base's shape. "
            f"To leave them out: {leaving}."
        )
    raise ShapeMismatch(
        f"{model} and {base} hold tensors of different shapes:\n" + "\n".join(lines[:_SHOWN]) + more + advice
    )


def _read(operand: Operand) -> Read | Scaled:
    read = operand.read if isinstance(operand, Folded) else operand
    assert isinstance(read, Read | Scaled)
    return read


def _without(tensors: Mapping[str, Operand], name: str) -> dict[str, Operand]:
    return {each: operand for each, operand in tensors.items() if each != name}
