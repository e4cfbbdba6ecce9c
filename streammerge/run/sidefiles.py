"""Everything in OUT that is not weights: what is copied from the donor, and the model card.

The donor is the base, or else the first model. Copied is every file beside its weights that is not weights itself:
tokenizer, chat template, generation config, processors, code, licence. config.json is copied with its dtype mended, and
with its numbers of layers and lists by layer where the recipe puts layers together anew.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import yaml

from streammerge.base.dtypes import RECIPE_DTYPES
from streammerge.base.errors import InputError
from streammerge.plan.names import embedding_of, head_of, stacks
from streammerge.plan.plan import Plan
from streammerge.plan.view import Model
from streammerge.run.hub import HUB_NAME
from streammerge.storage.checkpoint import Checkpoint, leads_outside

RECIPE_NAME = "mergekit_config.yml"
CARD_NAME = "README.md"
_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".npz", ".partial"}
_OURS = {CARD_NAME, RECIPE_NAME, "streammerge.manifest.json"}
_LARGEST = 256_000_000
# Lists of the numbers of some layers: mlp_only_layers, attn_layer_indices, full_attn_idxs.
_NUMBERS_OF_LAYERS = re.compile(r"layers|layer_ind|idxs|layer_ids")
# The flag by which a config says that the head is the embedding.
_TIED = "tie_word_embeddings"
# How configs call the number of layers.
_LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers")


def copied_files(plan: Plan) -> list[Path]:
    """The donor's files that go along. None for a donor that is a single file without a config.json."""
    return [file for file in _beside_weights(plan) if _why_left(file) is None]


def left_files(plan: Plan) -> list[str]:
    """A sentence for each of the donor's files that would go along and does not."""
    return [f"{file}: {why}, and is not copied" for file in _beside_weights(plan) if (why := _why_left(file))]


def _why_left(file: Path) -> str | None:
    if (target := leads_outside(file.parent, file.name)) is not None:
        return f"is a link to {target}, outside its directory"
    return "is larger than a side file should be" if file.stat().st_size > _LARGEST else None


def _beside_weights(plan: Plan) -> list[Path]:
    donor = plan.checkpoints[0]
    if not donor.path.is_dir() and not (donor.directory / "config.json").exists():
        return []
    return [
        file
        for file in sorted(donor.directory.iterdir())
        if file.is_file()
        and file.suffix not in _WEIGHTS
        and not file.name.startswith(".")
        and not file.name.endswith(".index.json")
        and file.name not in _OURS
    ]


def side_files(plan: Plan) -> dict[str, bytes]:
    """Everything in OUT but weights, index and manifest: name to content. Raises InputError."""
    files = {file.name: side_file(plan, file) for file in copied_files(plan)}
    return files | {RECIPE_NAME: plan.recipe.text.encode(), CARD_NAME: model_card(plan)}


def side_file(plan: Plan, file: Path) -> bytes:
    """The content a copied file gets in OUT. Raises InputError."""
    content = _read(file)
    return _config(plan, file, content) if file.name == "config.json" else content


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise InputError(f"{file}: cannot be read: {error.strerror}.") from error


def _config(plan: Plan, file: Path, content: bytes) -> bytes:
    """config.json true to the output: the dtype that most of it is stored in, its layers, whether it has a head."""
    config = _read_config(file, content)
    changed = _set_layers(plan, config) | _set_dtype(plan, config) | _set_tied(plan, config)
    changed |= _set_vocabulary(plan, config)
    if not changed:
        return content
    text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Half a character, as an escape: it stays one.
        return (json.dumps(config, indent=2) + "\n").encode()


def _read_config(file: Path, content: bytes) -> dict[str, Any]:
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{file}: is not JSON ({error}).") from None
    if not isinstance(config, dict):
        raise InputError(f"{file}: is not a JSON object.")
    return config


def architecture(checkpoint: Checkpoint) -> str | None:
    """What the config.json beside a checkpoint says it is, if there is one that says so."""
    found = _config_of(checkpoint).get("architectures")
    return str(found[0]) if isinstance(found, list) and found else None


def says_tied(checkpoint: Checkpoint) -> bool | None:
    """Whether the config.json beside a checkpoint says that its head is its embedding; None when it says nothing."""
    config = _config_of(checkpoint)
    flags = [own[_TIED] for path in _maps(config) if isinstance((own := _at(config, path)).get(_TIED), bool)]
    return flags[0] if flags else None


def quantisation_of(checkpoint: Checkpoint) -> str | None:
    """How the config.json beside a checkpoint says that its weights are quantised, or None."""
    found = _config_of(checkpoint).get("quantization_config")
    return str(found.get("quant_method", "quantised")) if isinstance(found, dict) else None


def _config_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """The config.json beside a checkpoint; empty when there is none that can be read."""
    try:
        config = json.loads((checkpoint.directory / "config.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return config if isinstance(config, dict) else {}


def _set_layers(plan: Plan, config: dict[str, Any]) -> bool:
    """Where layers were put together anew: their number, and every list that has an entry for each layer."""
    donor = max(stacks(plan.checkpoints[0].tensors).values(), default=0)
    if len(plan.layers) in (0, donor) and all(layer == (0, i) for i, layer in enumerate(plan.layers)):
        return False
    sources = [config]
    for checkpoint in plan.checkpoints[1:]:
        other = checkpoint.directory / "config.json"
        sources.append(_read_config(other, _read(other)) if other.is_file() else config)
    changed = False
    for path in _maps(config):
        owners = [_at(source, path) for source in sources]
        own = owners[0]
        counts = [key for key in _LAYER_COUNTS if own.get(key) == donor]
        for key in counts:
            own[key] = len(plan.layers)
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
                own[key] = [lists[number][min(layer, len(lists[number]) - 1)] for number, layer in plan.layers]
            elif _NUMBERS_OF_LAYERS.search(key) and all(type(item) is int and 0 <= item < donor for item in value):
                own[key] = [i for i, (number, layer) in enumerate(plan.layers) if layer in lists[number]]
    return changed


def _set_vocabulary(plan: Plan, config: dict[str, Any]) -> bool:
    """Where the embedding has other rows than the donor's, as an adapter with tokens of its own makes it."""
    tensors = plan.checkpoints[0].tensors
    name = embedding_of(tensors)
    rows = next((tensor.shape[:1] for tensor in plan.tensors if tensor.name == name), ())
    if name is None or not rows or rows == tensors[name].shape[:1]:
        return False
    changed = False
    for path in _maps(config):
        own = _at(config, path)
        if own.get("vocab_size") == tensors[name].shape[0]:
            own["vocab_size"] = rows[0]
            changed = True
    return changed


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
    """Where the maps of a config are: its own, and one level down, as the `text_config` of models that see."""
    return [(), *((key,) for key, value in config.items() if isinstance(value, dict))]


def _at(config: dict[str, Any], path: tuple[str, ...]) -> dict[str, Any]:
    """The map at `path`, empty where there is none."""
    for key in path:
        inner = config.get(key)
        config = inner if isinstance(inner, dict) else {}
    return config


def _set_dtype(plan: Plan, config: dict[str, Any]) -> bool:
    sizes: dict[str, int] = {}
    for tensor in plan.tensors:
        if tensor.dtype in RECIPE_DTYPES.values():
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


def model_card(plan: Plan) -> bytes:
    """A README.md the Hub understands: what was merged, how, from what under which licence."""
    licences = [_licences(plan, model) for model in plan.models]
    every = {licence for own in licences for licence in own}
    known = sorted({licence for licence in every if licence})
    front: dict[str, object] = {
        "library_name": "transformers",
        "tags": ["merge", "mergekit", "streammerge"],
    }
    # The Hub knows names, not somebody's folders.
    parts = [part.partition("@")[0] for model in plan.models for part in model.reference.split("+")]
    named = [part for part in dict.fromkeys(parts) if HUB_NAME.fullmatch(part)]
    if named:
        front["base_model"] = named
    if len(known) == 1 and None not in every:
        front["license"] = known[0]
    elif known:
        front["license"] = "other"
        front["license_name"] = "licences-of-the-inputs"
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", plan.recipe.text)), default=0))
    rows = "\n".join(
        f"| {'base' if model.reference in plan.recipe.bases else 'model'} | {_cell(model.reference)} | "
        f"{' and '.join(licence or 'not stated' for licence in own)} |"
        for model, own in zip(plan.models, licences, strict=True)
    )
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"
        f"# A merge by {plan.method.name}\n\n"
        f"Made with StreamMerge. What went in:\n\n| role | model | licence |\n|---|---|---|\n{rows}\n\n"
        f"The licences of all inputs apply.\n\n## Recipe\n\n{fence}yaml\n{plan.recipe.text.rstrip()}\n{fence}\n\n"
        f"Checksums and versions are in `streammerge.manifest.json`; `streammerge verify` checks them.\n"
    ).encode()


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


def _licences(plan: Plan, model: Model) -> list[str | None]:
    """The licence of a model, and that of its adapter."""
    numbers = [model.checkpoint, *([] if model.adapter is None else [model.adapter[0]])]
    return [_licence(plan.checkpoints[number].directory) for number in numbers]


def _licence(directory: Path) -> str | None:
    """The licence that a model's own card states, or None."""
    card = directory / CARD_NAME
    if not card.is_file() or card.stat().st_size > _LARGEST:
        return None
    match = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
    try:
        front = yaml.safe_load(match[1]) if match else None
    except (yaml.YAMLError, RecursionError, ValueError, KeyError, AttributeError, TypeError):
        return None
    licence = front.get("license") if isinstance(front, dict) else None
    return licence if isinstance(licence, str) else None
