"""The names and settings of a LoRA adapter as PEFT reads them (0.21), and our own reader in adapter.py.

A module's change is scale · B·A. Ours is spread over both factors, and so every alpha is its rank: the scale is 1.

Experts are one parameter per layer in transformers 5, and PEFT puts the factors of them all together: so they must all
be there and of one rank, which is the adapter's usual one, and so must those of their routers. What has fewer vectors
is filled up with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

_PREFIX = "base_model.model."
_EXPERT = re.compile(r"(.+)\.experts\.\d+\.")


def factor_names(module: str, *, embedding: bool) -> tuple[str, str]:
    """The keys of A and B in the file."""
    if embedding:
        return f"{_PREFIX}{module}.lora_embedding_A", f"{_PREFIX}{module}.lora_embedding_B"
    return f"{_PREFIX}{module}.lora_A.weight", f"{_PREFIX}{module}.lora_B.weight"


def whole_name(tensor: str, targets: set[str]) -> str:
    """The key of a tensor that goes along whole. A layer that has factors keeps what else it has in its base layer."""
    module, _, last = tensor.rpartition(".")
    return f"{_PREFIX}{module}.base_layer.{last}" if module in targets else f"{_PREFIX}{tensor}"


def alike(modules: Sequence[str], differing: set[str]) -> list[str]:
    """Of `modules` those whose factors must be there and of one rank, as some of them differ: experts, and routers."""
    experts = [module for module in modules if _EXPERT.match(module)]
    homes = {match[1] for module in experts if (match := _EXPERT.match(module))}
    routers = [module for module in modules if module.endswith(".gate") and module.removesuffix(".gate") in homes]
    return [module for group in (experts, routers) if not differing.isdisjoint(group) for module in group]


def taken_for_experts(modules: Sequence[str]) -> list[str]:
    """Those of `modules` that PEFT takes for experts, by the last words of their names, and that are none."""
    words = {module.rpartition(".")[2] for module in modules if _EXPERT.match(module)}
    return [module for module in modules if not _EXPERT.match(module) and module.rpartition(".")[2] in words]


def usual_rank(ranks: Mapping[str, int], together: Sequence[str]) -> int:
    """The rank that is not named for each module: that of modules that must be `alike`, or else the most frequent."""
    if together:
        return ranks[together[0]]
    counts = list(ranks.values())
    return max(sorted(set(counts), reverse=True), key=counts.count)


def configuration(*, base: str, ranks: Mapping[str, int], usual: int, modules: Sequence[str], whole: Sequence[str],
                  transposes: bool, task: str | None) -> dict[str, Any]:  # fmt: skip
    """adapter_config.json. `ranks` has every module with factors, as they are stored, and `usual` needs no naming;
    `modules` are all there are; `whole` the tensors that go along as they are. `transposes` says that there are layers
    that store (in, out)."""
    odd = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != usual}
    saved = saved_modules(whole)
    return {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": usual,
        "lora_alpha": usual,
        "rank_pattern": odd,
        "alpha_pattern": dict(odd),
        "target_modules": target_modules(list(ranks), modules),
        "modules_to_save": saved or None,
        "bias": "all" if any(name.endswith(".bias") for name in whole) else "none",
        "fan_in_fan_out": transposes,
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def saved_modules(whole: Sequence[str]) -> list[str]:
    """The modules that PEFT is to replace: those whose weight goes along. Biases alone need no replacement."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in whole if name.endswith(".weight")))


def target_modules(targets: Sequence[str], modules: Sequence[str]) -> list[str] | str:
    """How PEFT is told which modules have factors, and no others.

    The shortest endings of names that only targets have; and where a whole name is the ending of another module's, a
    regular expression.
    """
    own = set(targets)
    foreign = {ending for module in modules if module not in own for ending in _endings(module)}
    found: dict[str, None] = {}
    for module in targets:
        ending = next((ending for ending in _endings(module) if ending not in foreign), None)
        if ending is None:
            return "|".join(re.escape(each) for each in targets)
        found[ending] = None
    return list(found)


def _endings(module: str) -> list[str]:
    """The last word of a name, the last two, and so on."""
    words = module.split(".")
    return [".".join(words[i:]) for i in range(len(words) - 1, -1, -1)]
