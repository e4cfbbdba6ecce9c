"""Synthetic checkpoints: what they hold, and making them once.

The bytes are written by writer.py in a process of its own, since that needs torch.
"""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchlib.errors import BenchError
from benchlib.project import helper_environment

WEIGHTS_NAME = "model.safetensors"
SPEC_NAME = "bench.json"
BYTES_PER_ELEMENT = 2  # everything here is bfloat16


@dataclass(frozen=True)
class CheckpointSpec:
    """Some checkpoints of one layout: the first is drawn from a seed, each further one is the first plus noise."""

    models: tuple[str, ...]  # directory names
    tensors: Mapping[str, tuple[int, ...]]  # name: shape
    config: Mapping[str, Any]  # config.json
    repeat_noise: bool = False  # write one tile over and over: quick to make, but each value occurs many times
    seed: int = 20240501
    shards: int = 1  # files, with an index where there are several

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all tensors of one checkpoint."""
        return BYTES_PER_ELEMENT * sum(math.prod(shape) for shape in self.tensors.values())


@dataclass(frozen=True)
class LlamaShape:
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocab: int

    @property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        kv_width = self.hidden // self.heads * self.kv_heads
        shapes: dict[str, tuple[int, ...]] = {
            "lm_head.weight": (self.vocab, self.hidden),
            "model.embed_tokens.weight": (self.vocab, self.hidden),
            "model.norm.weight": (self.hidden,),
        }
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            shapes |= {
                f"{prefix}.input_layernorm.weight": (self.hidden,),
                f"{prefix}.mlp.down_proj.weight": (self.hidden, self.intermediate),
                f"{prefix}.mlp.gate_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.mlp.up_proj.weight": (self.intermediate, self.hidden),
                f"{prefix}.post_attention_layernorm.weight": (self.hidden,),
                f"{prefix}.self_attn.k_proj.weight": (kv_width, self.hidden),
                f"{prefix}.self_attn.o_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.self_attn.q_proj.weight": (self.hidden, self.hidden),
                f"{prefix}.self_attn.v_proj.weight": (kv_width, self.hidden),
            }
        return dict(sorted(shapes.items()))  # the order in which the safetensors library writes tensors of one dtype

    @property
    def config(self) -> dict[str, Any]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "bos_token_id": 1,
            "eos_token_id": 2,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.intermediate,
            "max_position_embeddings": 2048,
            "num_attention_heads": self.heads,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.kv_heads,
            "rms_norm_eps": 1e-05,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            "vocab_size": self.vocab,
        }


TINYLLAMA = LlamaShape(layers=22, hidden=2048, intermediate=5632, heads=32, kv_heads=4, vocab=32000)
QUICK = LlamaShape(layers=6, hidden=1024, intermediate=2816, heads=16, kv_heads=4, vocab=32000)


def prepare_checkpoints(directory: Path, spec: CheckpointSpec) -> dict[str, Path]:
    """Make the checkpoints under `directory`, unless they are there already; returns model name: its directory."""
    wanted = json.dumps(asdict(spec), indent=1)
    marker = directory / SPEC_NAME
    if not marker.exists() or marker.read_text() != wanted:
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        unfinished = directory / (SPEC_NAME + ".partial")
        unfinished.write_text(wanted)
        size = len(spec.models) * spec.tensor_bytes / 1e9
        print(f"making {len(spec.models)} checkpoints, {size:.1f} GB in all, in {directory}", file=sys.stderr)
        writer = [sys.executable, "-m", "benchlib.writer", str(unfinished)]
        if subprocess.run(writer, env=helper_environment(), check=False).returncode != 0:
            raise BenchError("the checkpoints could not be made (see above).")
        unfinished.rename(marker)
    return {model: directory / model for model in spec.models}


def shard_name(number: int, count: int) -> str:
    return WEIGHTS_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def weights_of(checkpoints: Sequence[Path]) -> list[Path]:
    return [checkpoint / WEIGHTS_NAME for checkpoint in checkpoints]


def read_tensor_bytes(checkpoint: Path) -> int:
    """Bytes of tensor data in all the safetensors files of a directory; 0 where there are none."""
    total = 0
    for path in sorted(checkpoint.glob("*.safetensors")):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        header.pop("__metadata__", None)
        total += sum(end - start for start, end in (entry["data_offsets"] for entry in header.values()))
    return total
