"""What a tensor's name says: its layer, where along the layers that is, and what else it is called."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cache

# The first number between dots, or at the start, counts the layers: model.layers.3.mlp.experts.5 is layer 3.
_LAYER = re.compile(r"(?:^|(?P<stack>.*?)\.)(?P<index>\d{1,9})\.")
# Words of tensors that come before the first layer; all others outside the layers come after the last.
_FRONT = re.compile(r"(^|[._])(embed(?!_out)|embeddings?|wte|wpe|patch|conv1|conv2)|(^|\.)shared\.weight$")

# Names of experts on disk, and in models of transformers 5, where the experts of a layer are one tensor.
_EXPERT = re.compile(r"\.experts\.\d+\.(w1|w3|w2|gate_proj|up_proj|down_proj)\.weight$")
_ONE_EXPERT = re.compile(r"(?P<where>.*?\.experts)\.(?P<number>\d{1,9})\.")
_ALL_EXPERTS = re.compile(r"(?P<where>.*?\.experts)\.(?!\d)")
_FUSED = {"w1": "gate_up_proj", "w3": "gate_up_proj", "w2": "down_proj", "gate_proj": "gate_up_proj",
          "up_proj": "gate_up_proj", "down_proj": "down_proj"}  # fmt: skip
_PREFIXES = ("model.", "transformer.", "gpt_neox.")


def layer_of(name: str) -> tuple[str, int] | None:
    """The stack of layers a tensor belongs to (the name before the number) and its layer, or None."""
    match = _LAYER.match(name)
    return None if match is None else (match["stack"] or "", int(match["index"]))


def in_layer(name: str, index: int) -> str:
    """The same tensor in another layer of its stack."""
    match = _LAYER.match(name)
    assert match is not None, name
    return f"{name[: match.start('index')]}{index}{name[match.end('index') :]}"


def in_first_layer(name: str) -> str:
    """The tensor's name as if it were of layer 0, if it is of any."""
    return name if layer_of(name) is None else in_layer(name, 0)


def is_front(name: str) -> bool:
    """Whether a tensor outside the layers comes before them: embeddings do, final norms and heads do not."""
    return _FRONT.search(name) is not None


def order_of(name: str) -> tuple[int, str, int]:
    """Where a tensor stands in a model: before the layers, in them, after them. To sort by."""
    layer = layer_of(name)
    return (0 if is_front(name) else 2, name, 0) if layer is None else (1, *layer)


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Every stack of layers with their number."""
    found: dict[str, int] = {}
    for name in names:
        layer = layer_of(name)
        if layer is not None:
            found[layer[0]] = max(found.get(layer[0], 0), layer[1] + 1)
    return found


# Words of stacks of layers that see or hear, and of the parts of a configuration that speak of them.
_SENSES = {"vision": re.compile(r"visi|visual|image|patch"), "audio": re.compile(r"audio|speech")}


def sense_of(name: str) -> str:
    """What a tensor, a stack of layers or a part of a configuration is of, by its name: vision, audio, or text."""
    return next((sense for sense, words in _SENSES.items() if words.search(name)), "text")


def position(index: int, layers: int) -> float:
    """Where gradients are read for a layer: 0 at the first of its slice, 1 at the last, and 1 for a single one.

    Tensors outside the layers, before or after, are at 0, as in mergekit.
    """
    return index / (layers - 1) if layers > 1 else 1.0


def answers_to(name: str, text: str) -> bool:
    """Whether a filter's text is part of a tensor's name, or of what else it is called.

    Recipes are written for several names: `block_sparse_moe` and `experts.3.w1` stand on disk where transformers 5 has
    `mlp.experts.gate_up_proj`; GPT-2 is saved with `transformer.h.0` and with `h.0`.
    """
    return text in name or name.startswith(_beyond_prefixes(text)) or text in _in_transformers(name)


@cache
def _beyond_prefixes(text: str) -> tuple[str, ...]:
    """What is left of a filter's text where it begins in a usual prefix that the file leaves out.

    The text must reach beyond it: `model` is no part of `h.0`.
    """
    return tuple(text[k:] for k in range(1, len(text)) if any(prefix.endswith(text[:k]) for prefix in _PREFIXES))


def _in_transformers(name: str) -> str:
    canonical = name.replace(".block_sparse_moe.", ".mlp.")
    match = _EXPERT.search(canonical)
    return canonical if match is None else f"{canonical[: match.start()]}.experts.{_FUSED[match[1]]}"


def expert_of(name: str) -> tuple[str, int] | None:
    """Where the experts of a layer are, and the number of the one that a tensor belongs to; or None."""
    match = _ONE_EXPERT.match(name)
    return None if match is None else (_in_transformers(match["where"]), int(match["number"]))


def experts_in_one(name: str) -> str | None:
    """Where the experts are of which a tensor holds all of a layer, as of `expert_of`; or None."""
    match = _ALL_EXPERTS.match(name)
    return None if match is None else _in_transformers(match["where"])


def names_one_expert(text: str) -> bool:
    """Whether a filter's text speaks of one expert by its number."""
    return re.search(r"(^|\.)experts\.\d", text) is not None


# What turns the last hidden states into logits, and tokens into the first ones; a tied model uses the latter for both.
_HEADS = ("lm_head.weight", "embed_out.weight")
_EMBEDDINGS = (
    "embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight",
    "shared.weight", "embeddings.weight", "token_embedding.weight",
)  # fmt: skip
# What has a row for every token wherever it stands, whatever its length.
_OF_TOKENS = re.compile(
    r"(^|[._])(embed_tokens(_per_layer)?|wte|embed_in|word_embeddings|tok_embeddings|lm_head|embed_out|shared_head\.head)"
    r"\.weight$|(^|\.)shared\.weight$"
)
# What has a row for every position or layer, and not for every token, however many there are.
_NOT_OF_TOKENS = re.compile(r"position|wpe|norm|(^|[._])ln(_|\.|\d)|token_type|type_embed|vision|visual|audio|patch")
# What a model can work out for itself, and older programs saved nevertheless.
_BUFFER = re.compile(
    r"(^|\.)(rotary_emb\.(inv_freq|cos_cached|sin_cached)|masked_bias|attn\.bias|attention\.bias|position_ids)$"
)


def head_of(names: Iterable[str]) -> str | None:
    """The name of a language model's head, or None."""
    return _only(names, _HEADS)


def embedding_of(names: Iterable[str]) -> str | None:
    """The name of a language model's token embedding, or None, also where there are several."""
    return _only(names, _EMBEDDINGS)


def vocabulary_of(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, int] | None:
    """All tensors with a row for every token, the embedding first, with their numbers of rows; None without one.

    Those are embeddings and heads, also where layers have some of their own, and whatever else outside the layers is as
    long, as a head's bias. A tensor of one row, as long as that, counts as rows of one element.
    """
    tables = {
        name: _rows(shape) for name, shape in shapes.items()
        if shape and (layer_of(name) is None or _OF_TOKENS.search(name)) and _NOT_OF_TOKENS.search(name) is None
    }  # fmt: skip
    outside = [name for name in tables if layer_of(name) is None]
    embedding = embedding_of(outside)
    if embedding is None:
        front = [name for name in outside if len(shapes[name]) == 2 and is_front(name)]
        embedding = max(front, key=lambda name: tables[name], default=None)
    if embedding is None:
        return None
    lengths = {tables[name] for name in (embedding, head_of(outside)) if name is not None}
    found = [
        name for name, rows in tables.items()
        if _OF_TOKENS.search(name) or (rows in lengths and layer_of(name) is None)
    ]  # fmt: skip
    return {name: tables[name] for name in dict.fromkeys((embedding, *found))}


def _rows(shape: tuple[int, ...]) -> int:
    return shape[-1] if shape[0] == 1 else shape[0]


def is_buffer(name: str) -> bool:
    """Whether a tensor is nothing that was learned."""
    return _BUFFER.search(name) is not None


def _only(names: Iterable[str], known: tuple[str, ...]) -> str | None:
    ends = tuple(f".{each}" for each in known)
    found = [name for name in names if name in known or name.endswith(ends)]
    return found[0] if len(found) == 1 else None


# What mergekit calls the parts of models with several, by words in tensor names.
_MODULE_WORDS = {
    "text_decoder": ("language_model", "text_model", "decoder"),
    "vision_tower": ("vision_tower", "vision_model", "visual"),
    "multi_modal_projector": ("multi_modal_projector", "connector", "merger"),
    "audio_tower": ("audio_tower", "audio_model"),
}


def modules_of(modules: Iterable[str], names: Iterable[str]) -> dict[str, str | None]:
    """For every tensor the one of `modules` it belongs to, or None.

    A module is a stack of layers (`model.layers`), a part of names (`encoder`, `vision_tower`), or one of mergekit's
    words for such; `default`, and `text_decoder` where nothing else answers to it, are what is left.
    """
    wanted = list(modules)
    words = {module: _MODULE_WORDS.get(module, (module,)) for module in wanted}
    owner: dict[str, str | None] = {}
    all_names = list(names)
    for name in all_names:
        padded = f".{name}."
        found = {
            module: max((len(word) for word in words[module] if f".{word}." in padded), default=0) for module in wanted
        }
        # The longest word is the most particular: `vision_tower.encoder` is of the tower.
        best = max(wanted, key=lambda module: found[module], default=None)
        owner[name] = best if best is not None and found[best] else None
    if "text_decoder" in owner.values():
        owner = {name: "text_decoder" if each is None and "lm_head" in name else each for name, each in owner.items()}
    rest = "default" if "default" in wanted else "text_decoder"
    if rest in wanted and rest not in owner.values():
        owner = {name: rest if module is None else module for name, module in owner.items()}
    return owner


def listing(names: Sequence[str]) -> str:
    """The first three names, and how many more there are."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
