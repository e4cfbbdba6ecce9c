"""Tiny models with tokenizers of their own, and what their merges should be: worked out row by row, in plain Python."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from torch import Tensor

# Wide enough that a table has several blocks, and no divisor of one: rows begin and end in the midst of tiles.
WIDTH = 1500
EMBED, HEAD, BIAS = "model.embed_tokens.weight", "lm_head.weight", "lm_head.bias"


@dataclass(frozen=True)
class Model:
    """A model on disk: its tokens by id, and its tensors."""

    path: Path
    tokens: dict[str, int]
    tensors: dict[str, Tensor]


def write_tokenizer(path: Path, ordinary: Sequence[str], added: Sequence[str] = (), **config: Any) -> dict[str, int]:
    """A tokenizer of whole words, with tokens that are matched before any other; returns its ids."""
    path.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(ordinary)}, unk_token=ordinary[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_tokens([AddedToken(token, special=token.startswith("<|"), normalized=False) for token in added])
    tokenizer.save(str(path / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": ordinary[0], **config}
    (path / "tokenizer_config.json").write_text(json.dumps(content))
    return dict(tokenizer.get_vocab(with_added_tokens=True))


def make_model(path: Path, ordinary: Sequence[str], added: Sequence[str] = (), *, seed: int, rows: int | None = None,
               dtype: torch.dtype = torch.bfloat16, config: Mapping[str, Any] | None = None,
               names: Sequence[str] = (EMBED, HEAD, BIAS),
               extra: Mapping[str, tuple[int, ...]] | None = None) -> Model:  # fmt: skip
    """A model whose tables have as many rows as there are tokens, or `rows`; `extra` are more tensors."""
    tokens = write_tokenizer(path, ordinary, added)
    count = rows if rows is not None else len(tokens)
    generator = torch.Generator().manual_seed(seed)
    usual = {EMBED: (count, WIDTH), HEAD: (count, WIDTH), BIAS: (count,)}
    shapes = {name: usual[name] for name in names} | dict(extra or {})
    tensors = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    tensors["model.layers.0.mlp.up_proj.weight"] = torch.randn(8, WIDTH, generator=generator).to(dtype)
    tensors["model.norm.weight"] = torch.randn(WIDTH, generator=generator).to(dtype)
    (path / "config.json").write_text(json.dumps({"vocab_size": count, "torch_dtype": "bfloat16", **(config or {})}))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return Model(path, tokens, tensors)


def own_row(model: Model, name: str, token: str) -> Tensor | None:
    """The row that a model has for a token, in float64."""
    number = model.tokens.get(token)
    table = model.tensors.get(name)
    return None if table is None or number is None or number >= len(table) else table[number].double()


def usual_row(having: Sequence[Model], base: Model | None, name: str, token: str) -> Tensor:
    """The row of a token for models that lack it."""
    rows = {id(model): row for model in having if (row := own_row(model, name, token)) is not None}
    if len(rows) == 1:
        return next(iter(rows.values()))
    if base is not None and id(base) in rows:
        return rows[id(base)]
    if not rows:
        example = having[0].tensors[name][0].double()
        return torch.zeros_like(example)
    # A mean is rounded once, to what holds it.
    return torch.stack(list(rows.values())).mean(0).float().double()


def expected_mean(all_models: Sequence[Model], base: Model | None, name: str, ids: Mapping[str, int],
                  rules: Mapping[str, tuple[Tensor | None, bool]] | None = None) -> dict[int, Tensor]:  # fmt: skip
    """The rows of a merge with equal weights, for every token, in float64.

    A rule is a row, and whether it is forced.
    """
    having = [model for model in all_models if name in model.tensors]
    rows = {}
    for token, place in ids.items():
        usual, forced = (rules or {}).get(token, (None, False))
        usual = usual_row(having, base, name, token) if usual is None else usual
        own = [usual if forced or (row := own_row(model, name, token)) is None else row for model in having]
        rows[place] = torch.stack(own).mean(0)
    return rows
