"""Plans without files: checkpoints from nothing but names, dtypes and shapes, as opening their headers would give."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import xxhash

from streammerge.plan.layout import DEFAULT_SHARD_BYTES
from streammerge.plan.plan import Plan, build_plan
from streammerge.plan.recipe import parse_recipe
from streammerge.plan.view import Model
from streammerge.storage.checkpoint import Checkpoint, FileFingerprint, TensorSpec
from streammerge.storage.header import make_header

Specs = Mapping[str, tuple[str, tuple[int, ...]]]

# Two layers, tensors before and after them, and a norm between.
SPECS: dict[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("BF16", (100, 8)),
    "model.layers.0.mlp.up_proj.weight": ("BF16", (16, 8)),
    "model.layers.0.self_attn.q_proj.weight": ("BF16", (8, 8)),
    "model.layers.1.mlp.up_proj.weight": ("BF16", (16, 8)),
    "model.layers.1.self_attn.q_proj.weight": ("BF16", (8, 8)),
    "model.layers.2.mlp.up_proj.weight": ("BF16", (16, 8)),
    "model.layers.2.self_attn.q_proj.weight": ("BF16", (8, 8)),
    "model.norm.weight": ("BF16", (8,)),
    "lm_head.weight": ("BF16", (100, 8)),
}


def make_checkpoint(specs: Specs = SPECS, *, time: int = 0) -> Checkpoint:
    """The checkpoint that a file of these tensors would be. No file is made."""
    header, entries = make_header((name, dtype, shape) for name, (dtype, shape) in specs.items())
    tensors = {
        entry.name: TensorSpec(entry.name, entry.dtype, entry.shape, 0, entry.start, entry.nbytes) for entry in entries
    }
    file = FileFingerprint("model.safetensors", entries[-1].stop, time, xxhash.xxh3_128_hexdigest(header))
    return Checkpoint(Path("model"), (file,), tensors)


def make_plan(text: str, *checkpoints: Checkpoint, seed: int = 0, shard_bytes: int = DEFAULT_SHARD_BYTES) -> Plan:
    """The plan of a recipe over these checkpoints, or over as many equal ones as it has inputs."""
    recipe = parse_recipe(text, Path("recipe.yaml"))
    found = checkpoints or (make_checkpoint(),) * len(recipe.inputs)
    models = [Model(model, i) for i, model in enumerate(recipe.inputs)]
    return build_plan(recipe, models, found, seed=seed, shard_bytes=shard_bytes)


def alter(specs: Specs, **changes: tuple[str, tuple[int, ...]] | None) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Specs with changes to lm_head (`lm_head=…`) and the like; None takes the tensor out."""
    altered = dict(specs)
    for word, spec in changes.items():
        name = next((name for name in specs if word in name), word)
        altered.pop(name, None)
        if spec is not None:
            altered[name] = spec
    return altered
