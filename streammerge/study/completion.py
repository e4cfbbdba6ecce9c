"""What a checkpoint says: greedy completions of a prompt, with plain transformers."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch


def can_run_models() -> bool:
    """Whether transformers is installed (the extra `eval`)."""
    return importlib.util.find_spec("transformers") is not None


def complete(model: Path, prompts: list[str], *, new_tokens: int = 12) -> list[str]:
    """For each prompt its greedy completion by the causal language model at `model`, up to a line's end."""
    # Imported here: it takes seconds, and only who runs models needs it.
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    network: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.eval()
    completions = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt")
        with torch.inference_mode():
            out = network.generate(**tokens, max_new_tokens=new_tokens, do_sample=False)
        text: str = tokenizer.decode(out[0, tokens["input_ids"].shape[1] :], skip_special_tokens=True)
        completions.append(text.split("\n", 1)[0])
    return completions
