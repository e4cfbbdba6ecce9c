"""A causal language model without weights, run piece by piece: front, one block after the other, back.

Any model of `transformers` will do whose blocks sit in one `ModuleList`, also one that sees: it is shown texts alone,
and what such a forward does not call needs no weights. It is built empty; the weights of one piece
at a time are put in and taken out again. The model's own forward makes the masks, positions and rotary tables and calls
its own blocks: a block's `forward` is replaced on the spot, so that it hands out what it was called with or passes on
hidden states that were computed before.

    front    embeddings: hidden states of a batch
    block i  hidden states in, hidden states out
    back     final norm and head: logits, at chosen positions only
"""

from __future__ import annotations

import copy
import inspect
import threading
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import xxhash
from accelerate import init_empty_weights
from torch import Tensor, nn

from streammerge.base.errors import InputError, ShapeMismatch, UserError
from streammerge.plan.names import layer_of, listing, sense_of
from streammerge.study.batches import Batch

# Layers that take a mask and positions as they are given, so that choices can share a prompt.
_MASKED = {"full_attention", "sliding_attention"}


# Two tokens, to see how a model calls its blocks.
_PROBE = Batch(torch.zeros(1, 2, dtype=torch.int64), torch.zeros(1, 2, dtype=torch.int64), None, (2,), ())


class _Enough(Exception):
    """Ends a forward once its last block was called."""


class _Extra:
    """Stands for what a block returns besides hidden states, where those are passed on without running it."""


class Network:
    """The empty model of one checkpoint directory, and the weights that are in it now."""

    def __init__(self, directory: Path, device: torch.device) -> None:
        """Build it from `config.json`. Raises InputError or UserError when there is no model to run in it."""
        self.model = _build(directory)
        self.device = device
        self._directory = directory
        stack, blocks = _find_blocks(self.model, directory)
        self.stack = stack
        self._blocks: list[nn.Module] = list(blocks)
        # What the blocks do when the model's forward calls them; every thread has its own.
        self._handlers = threading.local()
        # The type and length of what a block returns, unless it is hidden states alone.
        self._returned: tuple[type[Any], int] | None = None
        for i, block in enumerate(self._blocks):
            self._take_over(i, block)
        self._own = [type(block).forward for block in self._blocks]
        self._names = _Names(self.model)
        self._accepts = set(inspect.signature(type(self.model).forward).parameters)
        for buffer in self.model.buffers():
            buffer.data = buffer.data.to(device)
        self._front_modules = self._modules_before_the_blocks()
        self._returned = self._form_returned()
        self._idle_modules = self._modules_without_use()
        self._check_flow()

    def twin(self) -> Network:
        """Another empty model of the same kind."""
        return Network(self._directory, self.device)

    @property
    def num_units(self) -> int:
        """Front, blocks, back."""
        return len(self._blocks) + 2

    @property
    def identity(self) -> str:
        """Names what decides scores besides weights and tokens: the configuration, and the kind of device."""
        settings = f"{self.model.config.to_json_string()} {self.device.type}"
        return xxhash.xxh3_128_hexdigest(settings.encode())

    @property
    def config(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def width(self) -> int:
        """Values of a hidden state."""
        size: int = self.config.hidden_size
        return size

    @property
    def longest(self) -> int | None:
        """Tokens of the context, where the configuration says."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def window(self) -> int | None:
        """Tokens that a sliding layer sees, or None."""
        return getattr(self.config, "sliding_window", None)

    @property
    def can_share_prompts(self) -> bool:
        """Whether the model does as told by positions and a mask for every pair of tokens (up to `window` tokens)."""
        kinds = set(getattr(self.config, "layer_types", None) or ["full_attention"])
        # GPT-Neo's local layers count columns, whatever the positions.
        own = getattr(self.config, "alibi", False) or "local" in (getattr(self.config, "attention_layers", None) or ())
        return "position_ids" in self._accepts and kinds <= _MASKED and not own

    def units_of(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]:
        """For each tensor of a checkpoint the units that need it; () for one that the model does not know or use.

        Raises UserError when the checkpoint lacks a parameter of the model.
        """
        units: dict[str, tuple[int, ...]] = {}
        found: set[str] = set()
        for name in names:
            targets = self._names.targets(name)
            found |= targets
            units[name] = tuple(sorted({unit for target in targets for unit in self._units(target)}))
        missing = [name for name in self._names.needed if name not in found]
        if missing:
            raise UserError(
                f"{type(self.model).__name__} needs {listing(missing)}, which the checkpoint does not hold."
            )
        return units

    def check_shapes(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise ShapeMismatch for tensors that are not of the shapes the model has, or of layers beyond its."""
        blocks = self.num_units - 2
        beyond = [
            name
            for name in shapes
            if (layer := layer_of(name)) is not None and layer[1] >= blocks and not self._names.targets(name)
        ]
        if beyond:
            raise ShapeMismatch(
                f"{beyond[0]} is of a layer beyond the {blocks} of {self._directory}. Models that are scored together "
                f"have as many layers: merge a recipe that changes their number, and score its directory alone."
            )
        wrong = self._names.misshapen(shapes)
        if wrong:
            name, found, expected = wrong[0]
            more = f" So do {len(wrong) - 1} more tensors." if len(wrong) > 1 else ""
            raise ShapeMismatch(
                f"{name} is {list(found)}, and the {type(self.model).__name__} of {self._directory} has "
                f"{list(expected)} there.{more} Models that are scored together are of one architecture, size and "
                f"vocabulary."
            )

    def parameters_of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The model's parameters from tensors as a checkpoint names them, in float32 on the device."""
        wide = {name: tensor.to(self.device, torch.float32 if tensor.is_floating_point() else tensor.dtype)
                for name, tensor in tensors.items()}  # fmt: skip
        return self._names.convert(wide)

    def put(self, parameters: Mapping[str, Tensor]) -> None:
        """Put the parameters of a unit in."""
        for name, value in parameters.items():
            self._names.put(name, value)

    def take_out(self) -> None:
        """Leave every parameter outside the blocks as zeros that take no memory, and those of the blocks empty."""
        self._empty(0.0)

    def _empty(self, outside: float) -> None:
        for name, shape in self._names.shapes.items():
            if name.startswith(f"{self.stack}."):
                self._names.put(name, torch.empty(shape, device="meta"))
            else:
                self._names.put(name, torch.full((), outside, device=self.device).expand(shape))

    def call(self, batch: Batch, block: int) -> tuple[Tensor, dict[str, Any]]:
        """What `block` is called with in a forward of `batch`: (rows, width, hidden) as the front made them, the rest.

        The hidden states mean something only while the front's weights are in.
        """
        caught: list[tuple[Tensor, dict[str, Any]]] = []

        def catch(i: int, hidden: Tensor, rest: dict[str, Any]) -> Tensor:
            if i == block:
                caught.append((hidden, rest))
                raise _Enough
            return hidden

        self._handlers.now = catch
        try:
            self._forward(batch)
        except _Enough:
            return caught[0]
        raise UserError(f"{type(self.model).__name__} never calls its block {block}; it cannot be run piece by piece.")

    def run_block(self, block: int, hidden: Tensor, rest: dict[str, Any]) -> Tensor:
        """(rows, width, hidden) after a block, whose weights must be in."""
        out = self._own[block](self._blocks[block], hidden, **rest)
        result: Tensor = out[0] if isinstance(out, tuple | list) else out
        return result

    def logits(self, hidden: Tensor) -> Tensor:
        """(positions, vocabulary) of hidden states (positions, hidden) after the last block, the back's weights in.

        Norm and head see each position for itself, so any positions may go together.
        """
        positions = len(hidden)

        def give(i: int, passing: Tensor, rest: dict[str, Any]) -> Tensor:
            return hidden[:, None] if i == len(self._blocks) - 1 else passing

        self._handlers.now = give
        # Rows of one token: there may be more positions than a context has.
        nothing = torch.zeros(positions, 1, dtype=torch.int64, device=self.device)
        given = {"input_ids": nothing, "attention_mask": torch.ones_like(nothing)}
        if "position_ids" in self._accepts:
            given["position_ids"] = nothing
        out = self.model(**given, use_cache=False)
        logits: Tensor = out.logits[:, 0]
        return logits

    def _forward(self, batch: Batch) -> Any:
        return self.model(**self.arguments(batch), use_cache=False)

    def arguments(self, batch: Batch) -> dict[str, Tensor]:
        """What the model's forward takes for a batch."""
        given = {"input_ids": batch.ids.to(self.device), "attention_mask": batch.attention_mask().to(self.device)}
        if batch.branches is not None:
            given["position_ids"] = batch.positions.to(self.device)
        return given

    def _units(self, target: str) -> tuple[int, ...]:
        if target.startswith(f"{self.stack}."):
            return (int(target[len(self.stack) + 1 :].split(".", 1)[0]) + 1,)
        owner = target.rpartition(".")[0]
        if owner in self._idle_modules:
            return ()
        before = owner in self._front_modules
        tied = any(source == target for source in self._names.tied.values())
        return (0, self.num_units - 1) if before and tied else (0,) if before else (self.num_units - 1,)

    def _modules_before_the_blocks(self) -> tuple[str, ...]:
        """The modules with parameters that a forward calls before its first block."""
        return self._called(lambda: self.call(_PROBE, 0))

    def _modules_without_use(self) -> frozenset[str]:
        """The modules with parameters that no text needs, in a model that has some for more than texts."""
        owners = {name.rpartition(".")[0] for name in self._names.shapes if not name.startswith(f"{self.stack}.")}
        if all(sense_of(owner) == "text" for owner in owners):
            return frozenset()
        nothing = torch.zeros(1, self.width, device=self.device)
        return frozenset(owners - set(self._called(lambda: self.logits(nothing))))

    def _called(self, run: Callable[[], object]) -> tuple[str, ...]:
        """The modules with parameters, outside the blocks, that are called."""
        called: list[str] = []
        hooks = []
        for name, module in self.model.named_modules():
            if (
                name
                and not f"{name}.".startswith(f"{self.stack}.")
                and next(module.parameters(recurse=False), None) is not None
            ):
                hooks.append(module.register_forward_pre_hook(lambda *_, name=name: called.append(name)))
        self.take_out()
        try:
            with torch.inference_mode():
                run()
        finally:
            for hook in hooks:
                hook.remove()
        return tuple(dict.fromkeys(called))

    def _take_over(self, i: int, block: nn.Module) -> None:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            names = [name for name in inspect.signature(type(block).forward).parameters if name != "self"]
            rest = dict(zip(names[1:], args, strict=False)) | kwargs
            passed = self._handlers.now(i, hidden_states, rest)
            if self._returned is None:
                return passed
            kind, length = self._returned
            return kind([passed, *(_Extra() for _ in range(length - 1))])

        block.forward = forward

    def _form_returned(self) -> tuple[type[Any], int] | None:
        """What a block's own forward returns, found without weights."""
        with torch.inference_mode():
            hidden, rest = self.call(_PROBE, 0)
            block = copy.deepcopy(self._blocks[0]).to("meta")
            try:
                out = self._own[0](block, _without_values(hidden), **_without_values(rest))
            except Exception:  # noqa: BLE001
                # Any model's code may fail without values to look at (a router does). One tensor is then the guess, and
                # `_check_flow` refuses the model where it is wrong.
                return None
        return (type(out), len(out)) if isinstance(out, tuple | list) else None

    def _check_flow(self) -> None:
        """Raise UserError when a block needs more of what is before it than hidden states: it would not get that."""
        last = len(self._blocks) - 1
        found = []
        try:
            with torch.inference_mode():
                for outside in (0.0, 1.0):
                    self._empty(outside)
                    found.append(self.call(_PROBE, last)[1])
            alike = _alike(*found)
        except Exception:  # noqa: BLE001
            # Any model's code may fail on what a block did not return: it needs more than hidden states, said below.
            alike = False
        self.take_out()
        if not alike:
            raise UserError(
                f"{self._directory}: the blocks of {type(self.model).__name__} hand each other more than hidden "
                f"states; it cannot be run piece by piece."
            )


class _Names:
    """How a checkpoint's tensors become the model's parameters: transformers' own renamings and conversions."""

    def __init__(self, model: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self._model = model
        transforms = get_model_conversion_mapping(model)
        self._renamings = [transform for transform in transforms if isinstance(transform, WeightRenaming)]
        self._converters = [transform for transform in transforms if isinstance(transform, WeightConverter)]
        self._by_pattern = {pattern: one for one in self._converters for pattern in one.source_patterns}
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        # Target and source of tied parameters; where nothing is tied, the map is empty.
        self.tied: dict[str, str] = dict(getattr(model, "all_tied_weights_keys", None) or {})
        self._meta = dict(model.state_dict())
        self._owners = {name: _owner(model, name) for name in self.shapes}

    @property
    def needed(self) -> list[str]:
        """Parameters that a checkpoint must give."""
        return [name for name, _ in self._model.named_parameters() if name not in self.tied]

    def targets(self, name: str) -> set[str]:
        """The parameters that a tensor of a checkpoint goes into."""
        target, pattern = self._renamed(name)
        if target not in self.shapes or target in self.tied:
            return set()
        if pattern is None:
            return {target}
        first, *others = self._by_pattern[pattern].target_patterns
        return {target, *(target.replace(first, other) for other in others)} & set(self.shapes)

    def misshapen(self, shapes: Mapping[str, tuple[int, ...]]) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
        """Names whose shape is not that of the parameter they become as they are, with both shapes."""
        wrong = []
        for name, shape in shapes.items():
            target, pattern = self._renamed(name)
            if pattern is None and target in self.shapes and tuple(self.shapes[target]) != shape:
                wrong.append((name, shape, tuple(self.shapes[target])))
        return wrong

    def convert(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by name."""
        parameters: dict[str, Tensor] = {}
        collecting: dict[str, Any] = {}
        for name, tensor in sorted(tensors.items(), key=lambda item: _natural(item[0])):
            target, pattern = self._renamed(name)
            if target not in self.shapes or target in self.tied:
                continue
            if pattern is None:
                parameters[target] = tensor
                continue
            if target not in collecting:
                collecting[target] = copy.deepcopy(self._by_pattern[pattern])
            collecting[target].add_tensor(target, name, pattern, tensor)
        for target, converter in collecting.items():
            try:
                made = converter.convert(target, model=self._model, config=self._model.config)
            except RuntimeError:
                made = {}
            ready = {key: value[0] if isinstance(value, list) else value for key, value in made.items()}
            if not ready or any(value.shape != self.shapes[key] for key, value in ready.items()):
                raise UserError(
                    f"{type(self._model).__name__} needs {target}, of the shape {list(self.shapes[target])}, and the "
                    f"checkpoint's tensors do not make that: does it lack some of them?"
                )
            parameters |= ready
        return parameters

    def put(self, name: str, value: Tensor) -> None:
        for alias in (name, *(target for target, source in self.tied.items() if source == name)):
            owner, attribute = self._owners[alias]
            if attribute in owner._parameters:
                owner._parameters[attribute] = nn.Parameter(value, requires_grad=False)
            else:
                owner._buffers[attribute] = value

    def _renamed(self, name: str) -> tuple[str, str | None]:
        from transformers.core_model_loading import rename_source_key

        prefix = self._model.base_model_prefix
        target, pattern = rename_source_key(name, self._renamings, self._converters, prefix, self._meta)
        if target not in self.shapes and name in self.shapes:
            target, pattern = rename_source_key(name, [], [], prefix, self._meta)
        return target, pattern


def _build(directory: Path) -> Any:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

    if not (directory / "config.json").is_file():
        raise InputError(f"{directory}: holds no config.json, which says what model it is.")
    try:
        config = AutoConfig.from_pretrained(directory, trust_remote_code=False)
        # What sees is asked about texts, and must not be taken for its language part alone.
        sees = type(config) in AutoModelForImageTextToText._model_mapping
        kind: Any = AutoModelForImageTextToText if sees else AutoModelForCausalLM
        with init_empty_weights(include_buffers=False):
            model = kind.from_config(config, dtype=torch.float32)
    except (OSError, StrictDataclassError) as error:
        raise InputError(f"{directory}: holds no config.json that transformers reads: {_first_line(error)}") from None
    except ValueError as error:
        raise UserError(f"{directory}: cannot be run as a causal language model: {_first_line(error)}") from None
    architectures = getattr(config, "architectures", None) or [type(model).__name__]
    if type(model).__name__ not in architectures:
        raise UserError(
            f"{directory}: is a {architectures[0]}; models are run as causal language models only "
            f"({type(model).__name__} here). Encoders and other heads are not supported."
        )
    model.eval()
    return model


def _find_blocks(model: Any, directory: Path) -> tuple[str, nn.ModuleList]:
    """The one ModuleList that is as long as the configuration says the model is deep."""
    depth = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    fitting = [(name, module) for name, module in lists if len(module) == depth]
    outer = [
        (name, module)
        for name, module in fitting
        if not any(name.startswith(f"{other}.") for other, _ in fitting if other != name) and sense_of(name) == "text"
    ]
    if len(outer) != 1:
        found = ", ".join(f"{name} ({len(module)})" for name, module in lists if name.count(".") < 3) or "none"
        raise UserError(
            f"{directory}: the blocks of {type(model).__name__} are not found: expected one ModuleList of "
            f"{depth} (num_hidden_layers), found {found}."
        )
    return outer[0]


def _without_values(content: Any) -> Any:
    """The same, its tensors on the device that has no memory."""
    if isinstance(content, Tensor):
        return content.to("meta")
    if isinstance(content, dict):
        return {key: _without_values(value) for key, value in content.items()}
    if type(content) in (tuple, list):
        return type(content)(_without_values(value) for value in content)
    return content


def _alike(one: Any, other: Any) -> bool:
    """Whether all tensors in both are equal, and nothing in them is what a block would have returned."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return all(_alike(value, other[key]) for key, value in one.items())
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_alike, one, other))
    return not isinstance(one, _Extra)


def _owner(model: Any, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _natural(name: str) -> list[tuple[int, int | str]]:
    """Sorts numbers in names as numbers: experts are collected in their order."""
    return [(0, int(part)) if part.isdigit() else (1, part) for part in name.split(".")]


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]
