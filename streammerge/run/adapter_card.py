"""What lies beside an adapter that was extracted: a card for people and the Hub, and the same facts for programs.

Neither says anything of memory, threads or time: the files are the same however the adapter was made.
"""

from __future__ import annotations

import math
from typing import Any

import yaml

from streammerge import __version__
from streammerge.plan.extraction import DTYPE_NAMES
from streammerge.run.extracted import Extracted
from streammerge.run.hub import HUB_NAME

CARD_NAME = "README.md"
FACTS_NAME = "streammerge.extraction.json"
_METHOD = "https://arxiv.org/abs/0909.4061"


def facts_of(extracted: Extracted) -> dict[str, Any]:
    """Every number there is of an adapter. Norms are of the difference D between model and base."""
    wanted = extracted.wanted
    return {
        "streammerge": __version__,
        "model": extracted.model,
        "base": extracted.base,
        "rank": None if wanted.energy is not None else wanted.most,
        "energy": wanted.energy,
        "max_rank": None if wanted.energy is None else wanted.most,
        "dtype": next(name for name, stored in DTYPE_NAMES.items() if stored == wanted.dtype),
        "seed": wanted.seed,
        "delta_norm": math.sqrt(extracted.squares),
        "share_in_adapter": extracted.kept,
        "tensors": {
            each.name: {
                "shape": list(each.shape),
                "rank": each.rank,
                "energy_kept": each.kept,
                "relative_error": each.error,
                "delta_norm": math.sqrt(each.squares),
            }
            for each in extracted.factored
        },
        "left_out": {
            each.name: _left_facts(each.shape, each.why, each.squares) for each in extracted.left if not each.whole
        },
        "whole": {each.name: _left_facts(each.shape, each.why, each.squares) for each in extracted.left if each.whole},
        "equal": extracted.equal,
        "not_looked_at": list(extracted.unseen),
        "notes": list(extracted.notes),
    }


def _left_facts(shape: tuple[int, ...], why: str, squares: float | None) -> dict[str, Any]:
    return {"shape": list(shape), "why": why, "delta_norm": None if squares is None else math.sqrt(squares)}


def adapter_card(extracted: Extracted) -> str:
    """README.md, as the Hub understands it."""
    front: dict[str, object] = {"library_name": "peft", "tags": ["lora", "streammerge"]}
    # The Hub knows names, not somebody's folders.
    if HUB_NAME.fullmatch(name := extracted.base.partition("@")[0]):
        front["base_model"] = name
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"
        f"# A LoRA of the difference between two models\n\n"
        f"Made with StreamMerge: what {_cell(extracted.model)} changed in {_cell(extracted.base)}, by randomised SVD "
        f"([Halko, Martinsson, Tropp 2011]({_METHOD})), {_asked(extracted)}. The licences of both models apply.\n\n"
        f"Of the squared difference between the two, {_share(extracted.kept)} is in this adapter.\n\n"
        f"{_notes(extracted)}{_table(extracted)}{_left(extracted)}"
        f"`energy kept` is the share of a tensor's squared difference that its singular vectors hold, `error` is "
        f"|D - BA| / |D| of the factors as they are stored. All numbers are in `{FACTS_NAME}`.\n"
    )


def _asked(extracted: Extracted) -> str:
    wanted = extracted.wanted
    if wanted.energy is None:
        return f"rank {wanted.most}"
    return f"the smallest ranks that hold {_share(wanted.energy)} of each tensor's squares, {wanted.most} at most"


def _notes(extracted: Extracted) -> str:
    return "".join(f"Note: {_cell(note)}.\n\n" for note in extracted.notes)


def _table(extracted: Extracted) -> str:
    rows = [
        f"| {_cell(each.name)} | {' × '.join(map(str, each.shape))} | {each.rank} | {_share(each.kept)} | "
        f"{each.error:.3g} |"
        for each in extracted.factored
    ]
    return "| tensor | shape | rank | energy kept | error |\n|---|---|---|---|---|\n" + "\n".join(rows) + "\n\n"


def _left(extracted: Extracted) -> str:
    text = ""
    for heading, whole in (("Not in the adapter, though they differ", False), ("In the adapter whole", True)):
        own = [each for each in extracted.left if each.whole == whole]
        if own:
            rows = [
                f"| {_cell(each.name)} | {each.why} | {_part(each.squares, extracted.squares)} |" for each in own
            ]  # fmt: skip
            text += f"## {heading}\n\n| tensor | why | share of the squared difference |\n|---|---|---|\n"
            text += "\n".join(rows) + "\n\n"
    if extracted.unseen:
        text += f"Not looked at, as asked: {len(extracted.unseen)} tensors.\n\n"
    return text


def _part(squares: float | None, total: float) -> str:
    return "no floats" if squares is None else _share(squares / total)


def _share(share: float) -> str:
    # Not 100 % where something is missing.
    text = f"{100 * share:.4g}"
    return f"{'99.99…' if text == '100' and share < 1 - 1e-9 else text} %"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
