"""config.json and generation_config.json: what they say, and how they are made true to the output.

The dtype that most of the output is stored in, its layers and every list that has an entry for each of them, whether it
has a head of its own, how many tokens it knows, and the ids of the special ones.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from streammerge.base.dtypes import DTYPES, RECIPE_DTYPES
from streammerge.plan.names import head_of, sense_of, stacks, vocabulary_of
from streammerge.plan.plan import Plan
from streammerge.plan.scaled import SUFFIXES, fitting_block
from streammerge.plan.view import Model
from streammerge.run.moe_config import make_moe_config
from streammerge.storage.checkpoint import Checkpoint, TensorSpec
from streammerge.storage.jsonfile import dump_map, parse_map, read_bytes, read_map

CONFIG_NAME, GENERATION_NAME = "config.json", "generation_config.json"
# Lists of the numbers of some layers: mlp_only_layers, attn_layer_indices, full_attn_idxs.
_NUMBERS_OF_LAYERS = re.compile(r"layers|layer_ind|idxs|layer_ids")
# The flag by which a config says that the head is the embedding.
_TIED = "tie_word_embeddings"
_QUANTISATION = "quantization_config"
# How configs call the number of layers.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")
# Keys whose values are ids of tokens.
_TOKEN_IDS = re.compile(
    r"(^|_)token_(ids?|index)$|^((begin_)?suppress_tokens|bad_words_ids|force_words_ids|forced_decoder_ids)$"
)
# The one with pairs of a position and an id.
_PAIRS = "forced_decoder_ids"


def output_config(plan: Plan, file: Path) -> bytes:
    """The donor's config.json, in `file`, for the output. Raises InputError."""
    content = read_bytes(file)
    config = parse_map(content, file)
    changed = _set_experts(plan, config)
    changed |= _set_layers(plan, config) | _set_dtype(plan, config) | _set_tied(plan, config)
    changed |= _set_vocabulary(plan, config) | _set_token_ids(plan, config, CONFIG_NAME)
    changed |= _set_quantisation(plan, config)
    return dump_map(config) if changed else content


def output_generation_config(plan: Plan, file: Path) -> bytes:
    """The donor's generation_config.json, in `file`, for the output. Raises InputError."""
    content = read_bytes(file)
    config = parse_map(content, file)
    return dump_map(config) if _set_token_ids(plan, config, GENERATION_NAME) else content


def architecture(checkpoint: Checkpoint) -> str | None:
    """What the config.json beside a checkpoint says it is, if there is one that says so."""
    found = _config_of(checkpoint).get("architectures")
    return str(found[0]) if isinstance(found, list) and found else None


def language_type(checkpoint: Checkpoint) -> str | None:
    """What kind of model the config.json beside a checkpoint says that it is, or its language part, if it says so."""
    config = _config_of(checkpoint)
    found = _at(config, ("text_config",)).get("model_type") or config.get("model_type")
    return found if isinstance(found, str) else None


def says_tied(checkpoint: Checkpoint) -> bool | None:
    """Whether the config.json beside a checkpoint says that its head is its embedding; None when it says nothing."""
    config = _config_of(checkpoint)
    flags = [own[_TIED] for path in _maps(config) if isinstance((own := _at(config, path)).get(_TIED), bool)]
    return flags[0] if flags else None


def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """How the config.json beside a checkpoint says that its weights are quantised, or None."""
    found = _quantisation(_config_of(checkpoint))
    return str(found.get("quant_method", "quantised")) if found else None


def scale_block_of(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """The rows and columns that one scale is for, as the config.json beside a checkpoint says; or None."""
    found = _quantisation(_config_of(checkpoint))
    # As transformers and DeepSeek write it, and as compressed-tensors does.
    blocks = [found.get("weight_block_size")]
    groups = found.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        blocks.append(weights.get("block_structure") if isinstance(weights, dict) else None)
    return next((block for each in blocks if (block := _block(each)) is not None), None)


def _block(told: object) -> tuple[int, int] | None:
    """Rows and columns, if that is what a configuration has there."""
    if isinstance(told, list) and len(told) == 2 and all(type(size) is int and size > 0 for size in told):
        return told[0], told[1]
    return None


def _quantisation(config: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says of quantised weights, in itself or in its text part."""
    for path in _maps(config):
        found = _at(config, path).get(_QUANTISATION)
        if isinstance(found, dict):
            return found
    return {}


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json beside a checkpoint; empty when there is none that can be read."""
    try:
        config = json.loads((checkpoint.directory / CONFIG_NAME).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _set_experts(plan: Plan, config: dict[str, Any]) -> bool:
    """Where a model with experts is made of dense ones."""
    moe, ground = plan.recipe.moe, plan.ground
    if moe is None or ground is None:
        return False
    make_moe_config(config, ground.architecture, len(moe.experts), moe.per_token)
    return True


def _set_layers(plan: Plan, config: dict[str, Any]) -> bool:
    """Where layers were put together anew: their number, and every list that has an entry for each layer."""
    before = stacks(plan.checkpoints[0].tensors)
    sources: list[dict[str, Any]] = []
    changed = False
    for path in _maps(config):
        # A part of the configuration speaks of the longest stack of its kind.
        sense = sense_of(".".join(path))
        donor = max(_of_sense(sense, before).values(), default=0)
        layers = max(_of_sense(sense, plan.layers).values(), key=len, default=())
        if len(layers) in (0, donor) and all(layer == (0, i) for i, layer in enumerate(layers)):
            continue
        sources = sources or _configs(plan, config)
        # What a text model says at the top, one that sees says in a part.
        own = _at(config, path)
        owners = [own, *(_at(each, path) or (each if sense == "text" else {}) for each in sources[1:])]
        counts = [key for key in _LAYER_COUNTS if own.get(key) == donor]
        for key in counts:
            own[key] = len(layers)
            changed = True
        if not counts:
            continue
        for key, value in list(own.items()):
            if not isinstance(value, list):
                continue
            # A source without such a list has the donor's.
            lists = [found if isinstance(found := owner.get(key), list) else value for owner in owners]
            if len(value) == donor and _is_by_layer(key, donor):
                lists = [found or value for found in lists]
                # It may be shorter than that source has layers.
                own[key] = [lists[number][min(layer, len(lists[number]) - 1)] for number, layer in layers]
            elif _NUMBERS_OF_LAYERS.search(key) and all(type(item) is int and 0 <= item < donor for item in value):
                own[key] = [i for i, (number, layer) in enumerate(layers) if layer in lists[number]]
    return changed


_Any = TypeVar("_Any")


def _of_sense(sense: str, by_stack: Mapping[str, _Any]) -> dict[str, _Any]:
    """What belongs to stacks of one sense; a model of one sense is all that its configuration is about."""
    found = {stack: value for stack, value in by_stack.items() if sense_of(stack) == sense}
    return found or (dict(by_stack) if sense == "text" else {})


def _configs(plan: Plan, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The configurations beside all checkpoints, the donor's first; of one without any, the donor's."""
    others = [checkpoint.directory / CONFIG_NAME for checkpoint in plan.checkpoints[1:]]
    return [config, *(read_map(other) if other.is_file() else config for other in others)]


def _set_vocabulary(plan: Plan, config: dict[str, Any]) -> bool:
    """Where tables of tokens have other rows than the donor's: by the recipe's tokenizer, or an adapter's tokens."""
    shapes = {name: spec.shape for name, spec in plan.checkpoints[0].tensors.items()}
    made = vocabulary_of({tensor.name: tensor.shape for tensor in plan.tensors}) or {}
    before = vocabulary_of(shapes) or {}
    rows = {before[name]: made[name] for name in reversed(before) if name in made and before[name] != made[name]}
    if not rows:
        return False
    changed = False
    for path in _maps(config):
        own = _at(config, path)
        for key in [key for key, value in own.items() if "vocab_size" in key and value in rows]:
            own[key] = rows[own[key]]
            changed = True
    if not changed:
        # It goes without saying there, by the class's default, which now is another number.
        inner = config.get("text_config")
        (inner if isinstance(inner, dict) else config)["vocab_size"] = next(reversed(rows.values()))
    return True


def _set_token_ids(plan: Plan, config: dict[str, Any], name: str) -> bool:
    """Where special tokens have other ids than in the donor: those that the tokenizer's model says, or else the same
    tokens' new ones. `name` is the file's."""
    changed = False
    for path, key, new in _token_ids(plan, config, name):
        own = _at(config, path)
        changed |= own[key] != new
        own[key] = new
    return changed


def lost_tokens(plan: Plan) -> list[str]:
    """A sentence for each key of the configurations whose token is none of the output's."""
    lost = []
    for name in (CONFIG_NAME, GENERATION_NAME) if plan.vocabulary is not None else ():
        config = read_map(plan.checkpoints[0].directory / name)
        for path, key, new in _token_ids(plan, config, name):
            if new is None and _at(config, path)[key] is not None:
                full = ".".join((*path, key))
                lost.append(f"{name}: what {full} names is no token of the output; it becomes null")
    return lost


def reserved_ids(directory: Path) -> frozenset[int]:
    """The ids that a model's configurations give a meaning."""
    found: set[int] = set()
    for name in (CONFIG_NAME, GENERATION_NAME):
        config = read_map(directory / name)
        for path in _maps(config):
            for key, value in _at(config, path).items():
                if _TOKEN_IDS.search(key):
                    found |= {each for each in _numbers(value) if each >= 0}
    return frozenset(found)


def _token_ids(plan: Plan, config: dict[str, Any], name: str) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """Where a configuration names tokens by their ids: map, key, and the value for the output."""
    donor, joined = plan.models[0], plan.vocabulary
    if joined is None or donor.vocabulary is None:
        return
    source = next((model for model in plan.models if _is_of(model, joined.directory)), donor)
    assert source.vocabulary is not None
    theirs = config if source is donor else read_map(plan.checkpoints[source.checkpoint].directory / name)
    for path in _maps(config):
        other = _at(theirs, path)
        for key, value in _at(config, path).items():
            if _TOKEN_IDS.search(key):
                model, given = (source, other[key]) if other.get(key) is not None else (donor, value)
                assert model.vocabulary is not None
                translated = _translated_pairs if key == _PAIRS else _translated
                yield path, key, translated(given, model.vocabulary.tokens, joined.ids)


def _is_of(model: Model, directory: Path) -> bool:
    return model.vocabulary is not None and model.vocabulary.directory == directory


def _numbers(value: Any) -> Iterator[int]:
    """The ids in a value."""
    if isinstance(value, list):
        for each in value:
            yield from _numbers(each)
    elif isinstance(value, int) and not isinstance(value, bool):
        yield value


def _translated(value: Any, tokens: Mapping[int, str], ids: Mapping[str, int]) -> Any:
    """Ids as they are in the output; what is of no token here stays, and of none there becomes null.

    What is null in a list is left out, and so is a list in it that has less than before.
    """
    if isinstance(value, list):
        made = []
        for each in value:
            new = _translated(each, tokens, ids)
            whole = not isinstance(each, list) or (new is not None and len(new) == len(each))
            if new is not None and whole:
                made.append(new)
        return made or (None if value else value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in tokens:
        return value
    return ids.get(tokens[value])


def _translated_pairs(value: Any, tokens: Mapping[int, str], ids: Mapping[str, int]) -> Any:
    """The same of a list of pairs, of which the second is an id."""
    pairs = [each for each in value if isinstance(each, list) and len(each) == 2] if isinstance(value, list) else []
    made = [[place, new] for place, number in pairs if (new := _translated(number, tokens, ids)) is not None]
    return made or (None if value else value)


def _set_tied(plan: Plan, config: dict[str, Any]) -> bool:
    """Where the output has a head of its own and the donor had none: loaders must not throw it away."""
    if plan.tied or head_of(tensor.name for tensor in plan.tensors) is None:
        return False
    changed = False
    for path in _maps(config):
        own = _at(config, path)
        # Without the flag many kinds of models are tied.
        if own.get(_TIED) or (not path and plan.donor_is_tied and _TIED not in own):
            own[_TIED] = False
            changed = True
    return changed


def _is_by_layer(key: str, layers: int) -> bool:
    """Whether a list as long as there are layers is one of them: of a small model it could be any other list."""
    return "layer" in key or (layers > 4 and "token" not in key and key != "architectures")


def _maps(config: dict[str, Any]) -> list[tuple[str, ...]]:
    """Where the maps of a config are: its own, and those in it, as the `text_config` of models that see."""
    found: list[tuple[str, ...]] = [()]
    for path in found:
        found += [(*path, key) for key, value in _at(config, path).items() if isinstance(value, dict)]
    return found


def _at(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The map at `path`, empty where there is none."""
    for key in path:
        inner = config.get(key)
        config = inner if isinstance(inner, dict) else {}
    return config


def _set_quantisation(plan: Plan, config: dict[str, Any]) -> bool:
    """Where the weights are in 8 bits with scales, or were: what the first such model says, or nothing any more."""
    before = _quantisation(config)
    codes = [tensor for tensor in plan.tensors if DTYPES[tensor.dtype].kind == "quantised"]
    if not codes:
        for path in _maps(config):
            _at(config, path).pop(_QUANTISATION, None)
        return bool(before)
    scales = {tensor.name: tensor.shape for tensor in plan.tensors}
    scales |= {own.scale_name: own.scale_shape for tensor in codes if (own := tensor.scaling) is not None}
    suffix = next((end for end in SUFFIXES if codes[0].name + end in scales), "")
    wanted, tensors = _told(plan, suffix)
    if not wanted:
        # As DeepSeek's models say it, and transformers reads it.
        wanted = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": None}
    _set_left(plan, wanted, tensors)
    if wanted.get("quant_method") == "fp8":
        wanted["fmt"] = "e5m2" if codes[0].dtype == "F8_E5M2" else "e4m3"
        told = _block(wanted.get("weight_block_size"))
        found = fitting_block(codes[0].shape, scales.get(codes[0].name + suffix, ()), told)
        wanted["weight_block_size"] = wanted.get("weight_block_size") if found in (None, told) else list(found)
    # Scales of activations, which were left out.
    if "activation_scheme" in wanted:
        wanted["activation_scheme"] = "dynamic"
    groups = wanted.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        activations = group.get("input_activations") if isinstance(group, dict) else None
        if isinstance(activations, dict):
            activations["dynamic"] = True
    if wanted == before:
        return False
    for path in _maps(config):
        _at(config, path).pop(_QUANTISATION, None)
    config[_QUANTISATION] = wanted
    return True


def _told(plan: Plan, suffix: str) -> tuple[dict[str, Any], Mapping[str, TensorSpec]]:
    """What the first checkpoint says that stores weights as the output does, and its tensors; or nothing."""
    for checkpoint in plan.checkpoints:
        found = _quantisation(_config_of(checkpoint))
        if found and any(name.endswith(suffix) for name in checkpoint.tensors):
            return copy.deepcopy(found), checkpoint.tensors
    return {}, {}


def _set_left(plan: Plan, wanted: dict[str, Any], tensors: Mapping[str, TensorSpec]) -> None:
    """Name the modules that are not in 8 bits, but for those that are not in the model of `tensors` that is told of."""
    key = "ignore" if wanted.get("quant_method") == "compressed-tensors" else "modules_to_not_convert"
    matrices = [tensor for tensor in plan.tensors if len(tensor.shape) == 2 and tensor.name.endswith(".weight")]
    coded = {tensor.name for tensor in matrices if DTYPES[tensor.dtype].kind == "quantised"}
    before = [each for each in wanted.get(key) or [] if isinstance(each, str)]
    # Of modules that are in 8 bits now it is not true any more.
    kept = [each for each in before if not any(name.startswith(f"{each}.") for name in coded)]
    # What a name of several modules stood for is named one by one then.
    known = {name for name, spec in tensors.items() if DTYPES[spec.dtype].kind == "float" and kept == before}
    left = {tensor.name for tensor in matrices} - coded - known
    added = sorted({name.removesuffix(".weight") for name in left} - set(kept))
    if added or kept != before:
        wanted[key] = [*kept, *added]


def _set_dtype(plan: Plan, config: dict[str, Any]) -> bool:
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        # Where there are codes, it is of what they stand for.
        if tensor.dtype in RECIPE_DTYPES.values() and DTYPES[tensor.dtype].kind == "float":
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    if not sizes:
        return False
    stored = max(sizes, key=lambda name: sizes[name])
    name = next(written for written, dtype in RECIPE_DTYPES.items() if dtype == stored)
    key = "torch_dtype" if "torch_dtype" in config else "dtype"
    if config.get(key) == name:
        return False
    config[key] = name
    return True
