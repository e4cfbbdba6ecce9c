"""A PEFT adapter: what its files say of each tensor of a base model.

    LoRA        W + scale · B·A          scale = alpha / r, or alpha / √r (rsLoRA); r and alpha may go by module
    transposed  W + scale · (B·A)ᵀ       embeddings, and layers that store (in, out): fan_in_fan_out
    DoRA        the same, every output scaled to a norm of its own
    saved       modules_to_save, and embeddings saved whole: they take the place of the base's

What a key of the file changes must be there: an adapter that fits only in part is for another base.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streammerge.base.dtypes import DTYPES
from streammerge.base.errors import InputError, UserError
from streammerge.plan.names import vocabulary_of
from streammerge.plan.pickled import open_model
from streammerge.storage.checkpoint import Checkpoint, TensorSpec, leads_outside

CONFIG_NAME = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_MAX_CONFIG_BYTES = 10_000_000
_LARGEST_NUMBER = 1e30

_PREFIX = re.compile(r"base_model\.model\.")
_PART = re.compile(
    r"(?P<module>.+)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.default)?(?P<weight>\.weight)?"
)
_SAVED = re.compile(r"\.(?:modules_to_save(?:\.default)?|base_layer)\.")
# Settings under which the weights mean something else than here.
_UNKNOWN = ("alora_invocation_tokens", "arrow_config", "kasa_config", "layer_replication", "lora_bias",
            "megatron_config", "target_parameters", "trainable_token_indices", "use_bdlora", "use_qalora")  # fmt: skip
# Adapters that begin from a changed base, which is written nowhere.
_CHANGED_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# Patterns are from strangers, and a regular expression can take for ever. These cannot: groups are not repeated, single
# letters thrice at most, and few may be missing.
_REPEATED_GROUP, _REPEAT, _MAYBE = re.compile(r"\)\s*[*+{]"), re.compile(r"[*+{]"), re.compile(r"(?<!\()\?")
_MOST_REPEATS, _MOST_MAYBES, _LONGEST_PATTERN = 3, 6, 1000


@dataclass(frozen=True)
class Change:
    """The change of one tensor: left · right · scale, with left (rows, rank) and right (rank, columns).

    Stored are `left` and `right`, or when `transposed` their transposes. Rows are the tensor's first dimension, columns
    all others. `magnitude` has the norm of every row of the changed tensor, or when `transposed` of every column.
    """

    checkpoint: int
    left: TensorSpec
    right: TensorSpec
    rank: int
    scale: float
    transposed: bool
    magnitude: TensorSpec | None

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        """What is read for it."""
        return (self.left, self.right, *([] if self.magnitude is None else [self.magnitude]))

    @property
    def facts(self) -> list[Any]:
        """What decides its bits, besides the file."""
        return [self.checkpoint, [spec.name for spec in self.specs], self.rank, self.scale, self.transposed]


@dataclass(frozen=True)
class Adapter:
    """The weights of an adapter, and its configuration."""

    checkpoint: Checkpoint
    config: Mapping[str, Any]


def open_adapter(path: Path) -> Adapter:
    """The LoRA adapter in the directory `path`. Raises InputError; UserError for kinds that cannot be folded."""
    file = path / CONFIG_NAME
    try:
        with file.open("rb") as opened:
            config = json.loads(opened.read(_MAX_CONFIG_BYTES))
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}. Is {path} a PEFT adapter?") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise InputError(f"{file}: is not a JSON object.")
    _check_kind(file, config)
    weights = next((path / name for name in _WEIGHTS if (path / name).exists()), None)
    if weights is None:
        raise InputError(f"{path}: holds none of {' and '.join(_WEIGHTS)}.")
    if (target := leads_outside(path, weights.name)) is not None:
        raise InputError(f"{weights}: is a link to {target}, outside {path}. Refused.")
    return Adapter(open_model(weights), config)


def _check_kind(file: Path, config: Mapping[str, Any]) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise UserError(
            f"{file}: is a {kind} adapter; LoRA (with rsLoRA and DoRA) can be folded in, others cannot yet."
        )
    unknown = [key for key in _UNKNOWN if config.get(key)]
    if unknown:
        raise UserError(f"{file}: sets {', '.join(unknown)}, which cannot be folded in. Merge it with PEFT first.")
    begins = config.get("init_lora_weights")
    if isinstance(begins, str) and begins.lower().startswith(_CHANGED_BASE):
        raise UserError(
            f"{file}: was trained from a base that {begins} had changed, and holds only the difference to that. "
            f"Save it with PEFT's path_initial_model_for_weight_conversion, or merge it with PEFT first."
        )


class _Broken(Exception):
    """What is wrong with one key; becomes one line of an error."""


def changes_of(adapter: Adapter, number: int, base: Mapping[str, TensorSpec],
               named: str) -> tuple[dict[str, Change], dict[str, TensorSpec]]:  # fmt: skip
    """What an adapter changes in the tensors of `base`, and what it replaces, by the base's names.

    `number` is that of the adapter's checkpoint in the plan; `named` is the reference, for errors. Raises UserError
    when it does not fit, with everything that is wrong.
    """
    fitting = _Fitting(adapter, number, base)
    problems = list(fitting.run())
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:10])
        more = f"\n  - and {len(problems) - 10} more" if len(problems) > 10 else ""
        trained = adapter.config.get("base_model_name_or_path")
        advice = f"It says that it was trained on {trained!r}." if isinstance(trained, str) and trained else ""
        raise UserError(f"{named}: the adapter does not fit this base:\n{shown}{more}\n{advice}".rstrip())
    return fitting.changes, fitting.saved


class _Fitting:
    """The work on one adapter and one base."""

    def __init__(self, adapter: Adapter, number: int, base: Mapping[str, TensorSpec]) -> None:
        self._adapter, self._number, self._base = adapter, number, base
        self._roots = sorted({name.split(".", 1)[0] for name in base if "." in name})
        found = vocabulary_of({name: spec.shape for name, spec in base.items()})
        self._tables = found or {}
        self.changes: dict[str, Change] = {}
        self.saved: dict[str, TensorSpec] = {}

    def run(self) -> Iterator[str]:
        """Fill `changes` and `saved`; yields what is wrong."""
        parts: dict[str, dict[str, TensorSpec]] = {}
        for key, spec in self._adapter.checkpoint.tensors.items():
            name = _PREFIX.sub("", key, count=1)
            match = _PART.fullmatch(name)
            try:
                if match is not None:
                    parts.setdefault(match["module"], {})[match["part"]] = spec
                elif "lora_" in name.rpartition(".")[0].rpartition(".")[2]:
                    raise _Broken("is no part of a LoRA layer that is known here")
                else:
                    self._save(_SAVED.sub(".", name), spec)
            except _Broken as broken:
                yield f"{key} {broken}"
        for module, own in parts.items():
            try:
                self._change(module, own)
            except _Broken as broken:
                yield f"{module}: {broken}"

    def _save(self, name: str, spec: TensorSpec) -> None:
        target = self._find(name)
        if target is None:
            raise _Broken("is of no tensor of the base")
        ours, theirs = DTYPES[self._base[target].dtype], DTYPES[spec.dtype]
        if "quantised" in (ours.kind, theirs.kind) or (ours != theirs and "exact" in (ours.kind, theirs.kind)):
            raise _Broken(f"is stored as {theirs.name}, the base's as {ours.name}")
        before = self._base[target].shape
        # Tokens may have been added; a table is then longer, and nothing else is.
        longer = target in self._tables and spec.shape[1:] == before[1:]
        if spec.shape != before and not longer:
            raise _Broken(f"is {list(spec.shape)}, the base's tensor is {list(before)}")
        if self.saved.setdefault(target, spec) is not spec:
            raise _Broken(f"stands there twice for {target}")

    def _change(self, module: str, parts: Mapping[str, TensorSpec]) -> None:
        target = self._find(f"{module}.weight")
        if target is None:
            raise _Broken("the base has no such module")
        kinds = sorted(set(parts) - {"lora_magnitude_vector"})
        if kinds not in (["lora_A", "lora_B"], ["lora_embedding_A", "lora_embedding_B"]):
            raise _Broken(f"has {', '.join(kinds) or 'a magnitude'} only, where A and B belong together")
        # What is saved whole beside it is what it was trained on.
        shape = (self.saved.get(target) or self._base[target]).shape
        if DTYPES[self._base[target].dtype].kind != "float":
            raise _Broken(f"the base's is stored as {self._base[target].dtype}; weights of it must be unquantised")
        a, b = parts[kinds[0]], parts[kinds[1]]
        for spec in (a, b):
            if DTYPES[spec.dtype].kind != "float" or len(spec.shape) < 2:
                raise _Broken(f"{spec.name} is {spec.dtype} of shape {list(spec.shape)}, not a matrix of floats")
        rank = a.shape[0]
        expected = self._setting(module, "rank_pattern", "r")
        if rank < 1:
            raise _Broken("has rank 0")
        if rank != expected:
            raise _Broken(f"has rank {rank}, its configuration says {expected:g}")
        if b.shape[1] != rank or any(size != 1 for size in b.shape[2:]):
            raise _Broken(f"A is {list(a.shape)} and B is {list(b.shape)}, which do not multiply")
        transposed = self._is_transposed(kinds[0] == "lora_embedding_A", shape, a, b)
        magnitude = parts.get("lora_magnitude_vector")
        if (magnitude is not None) != bool(self._adapter.config.get("use_dora")):
            raise _Broken(f"{'has a' if magnitude else 'lacks its'} magnitude; the configuration says use_dora "
                          f"{bool(self._adapter.config.get('use_dora'))}")  # fmt: skip
        if magnitude is not None and math.prod(magnitude.shape) != b.shape[0]:
            raise _Broken(f"its magnitude is {list(magnitude.shape)}, of {b.shape[0]} outputs")
        alpha = self._setting(module, "alpha_pattern", "lora_alpha")
        scale = alpha / (math.sqrt(rank) if self._adapter.config.get("use_rslora") else rank)
        left, right = (a, b) if transposed else (b, a)
        if target in self.changes:
            raise _Broken(f"is the second change of {target}")
        self.changes[target] = Change(self._number, left, right, rank, scale, transposed, magnitude)

    def _is_transposed(self, embedding: bool, shape: tuple[int, ...], a: TensorSpec, b: TensorSpec) -> bool:
        rows, columns = shape[0] if shape else 1, math.prod(shape[1:])
        straight = (b.shape[0], math.prod(a.shape[1:])) == (rows, columns) and (
            len(shape) == 2 or a.shape[1:] == shape[1:]
        )
        across = len(shape) == 2 and (a.shape[1], b.shape[0]) == (rows, columns) and len(a.shape) == 2
        asked = embedding or bool(self._adapter.config.get("fan_in_fan_out"))
        if asked and across:
            return True
        # Without the flag the shapes decide, as PEFT lets the kind of layer do.
        if not embedding and straight:
            return False
        if not embedding and across:
            return True
        raise _Broken(f"its change is {[b.shape[0], *a.shape[1:]]}, the base's tensor is {list(shape)}")

    def _setting(self, module: str, patterns: str, usual: str) -> float:
        """The rank or alpha of a module: of the first pattern that its name ends with, or the usual one."""
        given = self._adapter.config.get(patterns) or {}
        if not isinstance(given, dict):
            raise _Broken(f"{patterns} is not a map")
        value = next((value for pattern, value in given.items() if _ends_with(module, pattern)), None)
        value = self._adapter.config.get(usual) if value is None else value
        # An integer may have more digits than a float has room for, and than are printed.
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < _LARGEST_NUMBER:
            shown = "a very large integer" if isinstance(value, int) else repr(value)
            raise _Broken(f"{usual} is {shown}, not a number that can be used")
        return float(value)

    def _find(self, name: str) -> str | None:
        """The base's name of a tensor: the same, or without a first word (`transformer.`), or with one more."""
        if name in self._base:
            return name
        shorter = name.split(".", 1)[-1]
        candidates = [shorter, *(f"{root}.{name}" for root in self._roots)]
        found = [candidate for candidate in candidates if candidate in self._base]
        return found[0] if len(found) == 1 else None


def _ends_with(module: str, pattern: str) -> bool:
    repeats, maybes = len(_REPEAT.findall(pattern)), len(_MAYBE.findall(pattern))
    intricate = _REPEATED_GROUP.search(pattern) or repeats > _MOST_REPEATS or maybes > _MOST_MAYBES
    if intricate or len(pattern) > _LONGEST_PATTERN:
        raise _Broken(f"the pattern {pattern!r} is too intricate to be matched safely")
    try:
        with warnings.catch_warnings():
            # Of what may mean something else in Python some day: [[a] is of sets in other languages.
            warnings.simplefilter("ignore", FutureWarning)
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
    except (re.error, RecursionError, OverflowError) as error:
        raise _Broken(f"the pattern {pattern!r} is no regular expression ({error})") from None
