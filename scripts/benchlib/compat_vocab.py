"""Models of different vocabularies through both tools, token by token: mergekit's ids change from run to run."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

from benchlib.standins import CONFIGS, HIDDEN, make_family
from streammerge.api import merge

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
# Words and marks of each model's tokenizer.
_TEXTS = {
    "base": ("the quick brown fox jumps over the lazy dog", ["<|end|>"]),
    "one": ("hello world, this is a text of many words, the quick one", ["<|im|>", "<|end|>"]),
    "two": ("completely different things happen in the world of foxes", ["<|im|>"]),
}
_LINEAR: dict[str, Any] = {
    "merge_method": "linear", "models": [{"model": name} for name in _TEXTS], "parameters": {"weight": 1.0},
}  # fmt: skip


def _deltas(method: str, **parameters: float) -> dict[str, Any]:
    listed = [{"model": name} for name in list(_TEXTS)[1:]]
    return {"merge_method": method, "base_model": "base", "models": listed, "parameters": parameters}


_RULES = {
    "<|im|>": {"source": "two", "force": True},
    "<|new|>": {"source": {"kind": "model_token", "model": "one", "token": "<s>"}},
    "<|row|>": {"source": {"kind": "model_token", "model": "one", "token_id": 5}},
    "<|zero|>": {"source": {"kind": "zero"}},
}
# At density 1, as a cut depends on how many rows there are and on ties.
RECIPES: dict[str, dict[str, Any]] = {
    "linear, union": {**_LINEAR, "tokenizer": {"source": "union"}},
    "linear, union, rules": {**_LINEAR, "tokenizer": {"source": "union", "tokens": _RULES}},
    "linear, union, padded": {**_LINEAR, "tokenizer": {"source": "union", "pad_to_multiple_of": 64}},
    "linear, tokenizer_source": {**_LINEAR, "tokenizer_source": "union"},
    "task_arithmetic, base": {**_deltas("task_arithmetic", weight=0.7), "tokenizer": {"source": "base"}},
    "task_arithmetic, two": {**_deltas("task_arithmetic", weight=0.7), "tokenizer": {"source": "two"}},
    "ties, union": {**_deltas("ties", weight=0.7, density=1.0), "tokenizer": {"source": "union"}},
}


def compare_vocabularies(environment: Path, folder: Path) -> tuple[list[list[str]], list[str]]:
    """A row for every recipe, and what is unexplained."""
    rows, unexplained = [], []
    for dtype in ("float32", "bfloat16"):
        _make(folder / dtype, getattr(torch, dtype))
        for label, recipe in RECIPES.items():
            home = folder / dtype / label.replace(", ", "-")
            try:
                row, good = _compare(environment, home, folder / dtype, recipe, dtype)
            except subprocess.CalledProcessError as error:
                unexplained.append(f"{label} ({dtype}): mergekit fails: {error.stderr[-300:]}")
                continue
            rows.append([label, dtype, *row])
            if not good:
                unexplained.append(f"{label} ({dtype}): {row}")
    return rows, unexplained


def _compare(environment: Path, home: Path, among: Path, recipe: Mapping[str, Any],
             dtype: str) -> tuple[list[str], bool]:  # fmt: skip
    home.mkdir()
    ours, theirs, exact = home / "ours", home / "theirs", home / "exact"
    for name, stored in (("recipe", dtype), ("exact", "float64")):
        text = json.dumps({**recipe, "dtype": stored})
        for model in _TEXTS:
            text = text.replace(json.dumps(model), json.dumps(str(among / model)))
        # `base` also names the base's tokenizer.
        text = text.replace(f'"source": {json.dumps(str(among / "base"))}', '"source": "base"')
        (home / f"{name}.yaml").write_text(yaml.safe_dump(json.loads(text)))
    variables = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    subprocess.run([environment / "bin" / "mergekit-yaml", home / "recipe.yaml", theirs], env=variables, check=True,
                   capture_output=True, text=True)  # fmt: skip
    merge(home / "recipe.yaml", ours, threads=1, compile="off")
    merge(home / "exact.yaml", exact, threads=1, compile="off")
    ids, others = _ids(ours), _ids(theirs)
    if set(ids) != set(others) or _rows(ours) != _rows(theirs):
        return [f"{len(ids)} and {len(others)} tokens, {_rows(ours)} and {_rows(theirs)} rows", "", ""], False
    largest = mine = their = 0.0
    for one, other, right in _by_token(ours, theirs, exact):
        largest = max(largest, float((one - other).abs().max() / other.abs().max()))
        mine += float((one - right).abs().sum())
        their += float((other - right).abs().sum())
    good = mine <= their * (1 + 1e-6) if dtype == "bfloat16" else largest <= 1e-6
    ratio = f"{their / mine:.2f}" if dtype == "bfloat16" else ""
    return [f"{len(ids)}", f"{largest:.1e}", ratio], good


def _by_token(ours: Path, theirs: Path, exact: Path) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Both tables with the rows in the order of our tokens, as both tools have them and in float64."""
    ids, others = _ids(ours), _ids(theirs)
    loaded = [load_file(out / "model.safetensors") for out in (ours, theirs, exact)]
    orders = [list(ids.values()), [others[token] for token in ids], list(ids.values())]
    for name in TABLES:
        one, other, right = (
            tensors[name][order].double() for tensors, order in zip(loaded, orders, strict=True)
        )  # fmt: skip
        yield one, other, right


def _ids(out: Path) -> dict[str, int]:
    return dict(Tokenizer.from_file(str(out / "tokenizer.json")).get_vocab(with_added_tokens=True))


def _rows(out: Path) -> tuple[int, Any]:
    config = json.loads((out / "config.json").read_text())
    return len(load_file(out / "model.safetensors")[TABLES[0]]), config["vocab_size"]


def _make(folder: Path, dtype: torch.dtype) -> None:
    """The Llama stand-ins, with tokenizers and tables of their own."""
    make_family(folder, "llama", dtype)
    for seed, (name, (text, marks)) in enumerate(_TEXTS.items()):
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"])
        tokenizer.train_from_iterator([text] * 5, trainer)
        tokenizer.add_tokens([AddedToken(mark, special=True) for mark in marks])
        path = folder / name
        tokenizer.save(str(path / "tokenizer.json"))
        special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
        (path / "tokenizer_config.json").write_text(json.dumps(special))
        count = tokenizer.get_vocab_size()
        generator = torch.Generator().manual_seed(seed)
        tables = {table: (torch.randn(count, HIDDEN, generator=generator) * 0.02).to(dtype) for table in TABLES}
        tensors = load_file(path / "model.safetensors") | tables
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        config = CONFIGS["llama"] | {"vocab_size": count, "torch_dtype": str(dtype).removeprefix("torch.")}
        (path / "config.json").write_text(json.dumps(config))
