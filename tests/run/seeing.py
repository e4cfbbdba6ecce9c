"""Tiny random models that see, text models of the kind their language part is of, and something for them to look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.study.tiny import write_weights

VOCABULARY, LAYERS = 128, 3
IMAGE = 5
_TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# As many layers as the language part: nothing may take one for the other by their number.
_TOWER: dict[str, Any] = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip
_QWEN: dict[str, Any] = {
    "image_token_id": IMAGE, "video_token_id": 6, "vision_start_token_id": 7, "vision_end_token_id": 8,
    "tie_word_embeddings": False,
}  # fmt: skip
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
_SQUARE = {"pixel_values": (1, 3, 16, 16)}
_PATCHES = {"pixel_values": (16, 96), "image_grid_thw": [[1, 4, 4]]}


@dataclass(frozen=True)
class Kind:
    """A kind of model that sees: configuration, its text models, their names in it, how many tokens a picture is.

    `begins` is how the names of its tower begin.
    """

    config: dict[str, Any]
    text: str
    names: dict[str, str]
    begins: str
    tokens: int
    picture: dict[str, Any]


KINDS = {
    "llava": Kind(
        {"text_config": {"model_type": "llama", **_TEXT}, "image_token_id": IMAGE, "image_token_index": IMAGE,
         "vision_config": {"model_type": "clip_vision_model", "projection_dim": 16, **_TOWER},
         "tie_word_embeddings": False},
        "llama", {"": "language_model."}, "vision_tower.", 4, _SQUARE,
    ),
    "mistral3": Kind(
        {"text_config": {"model_type": "mistral", **_TEXT}, "image_token_id": IMAGE, "image_token_index": IMAGE,
         "vision_config": {"model_type": "pixtral", **_TOWER, "head_dim": 8, "image_size": 32},
         "tie_word_embeddings": False},
        "mistral", {"": "language_model."}, "vision_tower.", 2,
        {"pixel_values": (1, 3, 16, 32), "image_sizes": [[16, 32]]},
    ),
    "gemma3": Kind(
        {"text_config": {**_TEXT, "sliding_window": 16}, "image_token_id": IMAGE, "image_token_index": IMAGE,
         "vision_config": _TOWER, "mm_tokens_per_image": 4, "boi_token_index": 7, "eoi_token_index": 8},
        "gemma3_text", {"": "language_model."}, "vision_tower.", 4, _SQUARE,
    ),
    "qwen2_vl": Kind(
        {"text_config": {**_TEXT, **_ROPE}, **_QWEN,
         "vision_config": {"depth": LAYERS, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2,
                           "patch_size": 4}},
        "qwen2", {"model.": "model."}, "visual.", 4, _PATCHES,
    ),
    "qwen2_5_vl": Kind(
        {"text_config": {**_TEXT, **_ROPE}, **_QWEN,
         "vision_config": {"depth": LAYERS, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24,
                           "num_heads": 2, "patch_size": 4, "fullatt_block_indexes": [1], "window_size": 16}},
        "qwen2", {"model.": "model."}, "visual.", 4, _PATCHES,
    ),
    "qwen3_vl": Kind(
        {"text_config": {**_TEXT, **_ROPE}, **_QWEN,
         "vision_config": {"depth": LAYERS, "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 24,
                           "num_heads": 2, "patch_size": 4, "num_position_embeddings": 16,
                           "deepstack_visual_indexes": [0]}},
        "qwen3", {"model.": "model.language_model."}, "model.visual.", 4, _PATCHES,
    ),
}  # fmt: skip


def _save(make: Callable[[], Any], path: Path, seed: int) -> Path:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(path)
    return path


def make_seeing(path: Path, kind: str, *, seed: int = 0, **changes: Any) -> Path:
    """A model that sees; `changes` are keys of its text_config."""
    from transformers import AutoConfig, AutoModelForImageTextToText

    given = KINDS[kind].config
    config = AutoConfig.for_model(kind, **{**given, "text_config": {**given["text_config"], **changes}})
    return _save(lambda: AutoModelForImageTextToText.from_config(config, dtype=torch.float32), path, seed)


def make_text(path: Path, kind: str, *, seed: int = 0, **changes: Any) -> Path:
    """A text model as the language part of a kind is; `changes` are keys of its configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    tied = {"tie_word_embeddings": kind == "gemma3"}
    config = AutoConfig.for_model(KINDS[kind].text, **{**_TEXT, **tied, **changes})
    return _save(lambda: AutoModelForCausalLM.from_config(config, dtype=torch.float32), path, seed)


def weights(path: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint of one file."""
    return load_file(path / "model.safetensors")


def put(path: Path, tensors: dict[str, Tensor]) -> Path:
    """Give a checkpoint these tensors in place of its own."""
    write_weights(path, tensors)
    return path


def loaded(path: Path) -> Any:
    """A model that sees as transformers loads it; every parameter must be in the file, and nothing else."""
    from transformers import AutoModelForImageTextToText

    model, told = AutoModelForImageTextToText.from_pretrained(path, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


def look(model: Any, kind: str, *, picture: bool = True) -> Tensor:
    """The logits of a text, and of a picture in the midst of it."""
    own = KINDS[kind]
    generator = torch.Generator().manual_seed(1)
    given: dict[str, Any] = {}
    words = torch.randint(10, VOCABULARY, (1, 9), generator=generator)
    if picture:
        seen = torch.full((1, own.tokens), IMAGE)
        words = torch.cat([words[:, :4], seen, words[:, 4:]], 1)
        pixels = torch.randn(own.picture["pixel_values"], generator=generator)
        rest = {key: torch.tensor(value) for key, value in own.picture.items() if key != "pixel_values"}
        kinds = (words == IMAGE).long()
        given = {"pixel_values": pixels, **rest, "mm_token_type_ids": kinds}
        if kind == "gemma3":
            given["token_type_ids"] = given.pop("mm_token_type_ids")
        elif not kind.startswith("qwen"):
            del given["mm_token_type_ids"]
    with torch.inference_mode():
        logits: Tensor = model(input_ids=words, attention_mask=torch.ones_like(words), **given).logits
    return logits
