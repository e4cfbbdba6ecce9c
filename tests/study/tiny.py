"""Tiny random models of real architectures, with a tokenizer beside them, and tasks for them to fail at.

A word is one letter or two, a token is a word; every text begins with `<s>`. What the tokenizer does not know is one
`<unk>`. So a token is counted at a glance: "a b ca" is `<s> a b ca`.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from streammerge.plan.plan import Plan
from streammerge.plan.recipe import load_recipe, parse_recipe
from streammerge.run.merge import Options, plan_recipe
from streammerge.study.tasks import Example, Split, Task
from streammerge.study.variants import Variant, variant_of
from streammerge.study.workbench import StudyOptions, Workbench, open_workbench

VOCABULARY = 300
LAYERS = 3
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = [*_LETTERS, *(a + b for a in "abcdefghij" for b in _LETTERS)]
SPECIALS = ["<s>", "<unk>", "<user>", "<assistant>"]
TOKENS = {word: number for number, word in enumerate([*SPECIALS, *WORDS])}

_CHAT = "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"  # noqa: E501
_COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "max_position_embeddings": 128, "intermediate_size": 64, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip
_GROUPED: dict[str, Any] = {**_COMMON, "num_key_value_heads": 2}
_HEADS: dict[str, Any] = {**_GROUPED, "head_dim": 8}
_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}

# By the `model_type` of transformers.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {**_GROUPED, "tie_word_embeddings": False},
    "qwen2": {**_GROUPED, "tie_word_embeddings": True},
    "qwen3": _HEADS,
    "mistral": {**_HEADS, "sliding_window": 64},
    "gemma2": {**_HEADS, "sliding_window": 64},
    "gemma3_text": {**_HEADS, "sliding_window": 64},
    "gpt2": {
        "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 128, "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "gpt_neox": _COMMON,
    "phi3": _GROUPED,
    "mixtral": {**_HEADS, **_EXPERTS, "num_local_experts": 4},
    "qwen3_moe": {**_HEADS, **_EXPERTS, "num_experts": 4, "moe_intermediate_size": 16},
}  # fmt: skip
_COUNTS = {"vocab_size": VOCABULARY, "n_layers": LAYERS, "n_heads": 4}
# Those that do something in a way of their own: blocks that return tuples, positions that are no argument, windows
# that count columns, attention through narrow matrices, chunks.
PECULIAR: dict[str, dict[str, Any]] = {
    "falcon": {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4},
    "bloom": {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": LAYERS, "n_head": 4},
    "mpt": {**_COUNTS, "d_model": 32, "max_seq_len": 128},
    "gpt_neo": {
        "vocab_size": VOCABULARY, "hidden_size": 32, "num_layers": LAYERS, "num_heads": 4, "window_size": 8,
        "attention_types": [[["global", "local", "global"], 1]], "max_position_embeddings": 128,
    },
    "opt": {**_COMMON, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "deepseek_v3": {
        **_COMMON, "num_key_value_heads": 4, "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "head_dim": 8, "n_routed_experts": 8, "n_group": 2, "topk_group": 1,
        "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    },
    "llama4_text": {
        **_HEADS, "num_local_experts": 2, "intermediate_size_mlp": 64, "attention_chunk_size": 8,
    },
}  # fmt: skip


def encode(text: str) -> list[int]:
    """What the tokenizer makes of a text, special token included."""
    return [0, *(TOKENS.get(word, 1) for word in text.split())]


def make_tokenizer(*, begins: bool = True, chats: bool = True) -> Any:
    """The tokenizer; `begins` says whether it puts `<s>` before a text."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel(dict(TOKENS), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", unk_token="<unk>")
    made.chat_template = _CHAT if chats else None
    return made


def make_model(path: Path, architecture: str = "llama", *, seed: int = 0, dtype: torch.dtype = torch.float32,
               **changes: Any) -> Path:  # fmt: skip
    """A checkpoint directory of a random model, and its tokenizer. `changes` are keys of the configuration."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(architecture, **{**{**ARCHITECTURES, **PECULIAR}[architecture], **changes})
    # The seed of this model alone: other tests may draw from torch's generator, too.
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(dtype).save_pretrained(path)
    make_tokenizer().save_pretrained(path)
    return path


def make_specialist(path: Path, base: Path, *, seed: int, noise: float = 0.05) -> Path:
    """A model near `base`: every weight with a little noise, everything else as it is there."""
    generator = torch.Generator().manual_seed(seed)
    shutil.copytree(base, path)
    tensors = {
        name: (tensor.float() + noise * torch.randn(tensor.shape, generator=generator)).to(tensor.dtype)
        for name, tensor in read_weights(base).items()
    }
    write_weights(path, tensors)
    return path


def read_weights(model: Path) -> dict[str, Tensor]:
    return load_file(model / "model.safetensors")


def write_weights(model: Path, tensors: Mapping[str, Tensor]) -> None:
    save_file(dict(tensors), model / "model.safetensors", metadata={"format": "pt"})


def plain_model(path: Path) -> Any:
    """The model of a checkpoint directory as transformers loads it, in float32."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


# --- tasks -----------------------------------------------------------------------------------------------------------


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choices(WORDS, k=words))


def make_examples(count: int, *, seed: int = 0, choices: int = 3) -> tuple[Example, ...]:
    """Questions of prompts and choices of different lengths; with 1 choice completions, with 0 bare prompts."""
    generator = random.Random(seed)
    examples = []
    for line in range(1, count + 1):
        texts: dict[str, None] = {}
        while len(texts) < choices:
            texts[" " + sentence(generator, generator.randint(1, 4))] = None
        answer = generator.randrange(choices) if choices else None
        examples.append(Example(sentence(generator, generator.randint(2, 9)), tuple(texts), answer, line))
    return tuple(examples)


def make_task(name: str, examples: Sequence[Example], *, model: str | None = None, metric: str | None = None,
              length_normalised: bool = False) -> Task:  # fmt: skip
    """A task whose dev split are these examples."""
    return Task(name, model, Split(Path(f"{name}.dev.jsonl"), tuple(examples)), None, metric, length_normalised)


def write_lines(path: Path, *lines: Any) -> Path:
    """A file of JSON lines; text is written as it stands."""
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


# --- sweeps ----------------------------------------------------------------------------------------------------------


def plan_of(recipe: Path, *, seed: int = 0) -> Plan:
    """The plan of a recipe, or of a checkpoint directory as it is."""
    options = Options(seed=seed)
    if recipe.is_dir():
        text = f"merge_method: passthrough\nmodels:\n  - model: {json.dumps(str(recipe))}\n"
        return plan_recipe(parse_recipe(text, recipe / "recipe"), options)
    return plan_recipe(load_recipe(recipe), options)


def variant_on(bench: Workbench, recipe: Path) -> Variant:
    """The model that a recipe would write, for the sweeps of a workbench."""
    plan = plan_of(recipe)
    units = bench.network.units_of(tensor.name for tensor in plan.tensors)
    return variant_of(plan, bench.shelf, units, bench.network.num_units)


@dataclass
class Stops:
    """Says when to stop: after `after` questions, or never. Counts them."""

    after: int | None = None
    asked: int = field(default=0)

    def __call__(self) -> bool:
        self.asked += 1
        return self.after is not None and self.asked > self.after


@contextmanager
def workbench(model: Path, *, book: Path | None = None, room_bytes: int | None = None, spill: Path | None = None,
              threads: int = 1, stops: Stops | None = None) -> Iterator[Workbench]:  # fmt: skip
    """A workbench for models like `model`; `room_bytes` is what its sweeps may take, if it is to be little."""
    options = StudyOptions(device="cpu", threads=threads, compile="off", spill=spill)
    with open_workbench(model, options, book=book, stopping=stops or Stops(), progress=lambda done, total: None,
                        note=lambda text: None, plans=(), versions=0) as bench:  # fmt: skip
        if room_bytes is not None:
            bench.sweeper.room_bytes = room_bytes
        yield bench
