"""`streammerge inspect --health`, and what inspect says from headers and config.json."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from streammerge.base.errors import DoesNotFit
from streammerge.run.health import Health, check_health
from streammerge.run.inspection import inspect
from tests.command import streammerge as run
from tests.models import make_tensors, save_model


def health(path: Path, max_memory: int | None = None) -> Health:
    return check_health(inspect(path).checkpoint, max_memory=max_memory, stopping=lambda: False,
                        progress=lambda done, total: None)  # fmt: skip


@pytest.fixture
def odd(tmp_path: Path) -> Path:
    """A model with everything that is odd, in places that pieces do not begin with."""
    tensors = make_tensors(0, shapes={"model.embed_tokens.weight": (2100, 1100), "norm": (3,), "twin": (3, 3)})
    tensors["model.embed_tokens.weight"][2099, 1099] = math.nan
    tensors["model.embed_tokens.weight"][7, 7] = -math.inf
    tensors |= {"copy": tensors["twin"].clone(), "other dtype": tensors["twin"].float(), "zeros": torch.zeros(4, 4),
                "minus zeros": -torch.zeros(2, 2), "scalar": torch.tensor(3.0), "empty": torch.empty(0, 5),
                "counts": torch.arange(5), "no counts": torch.zeros(5, dtype=torch.int64),
                "f8": torch.ones(2, 2).to(torch.float8_e4m3fn)}  # fmt: skip
    return save_model(tmp_path / "odd", tensors)


def test_what_is_odd_is_found_and_nothing_else(odd: Path) -> None:
    found = health(odd)
    assert set(found.zeros) == {"zeros", "no counts", "minus zeros"}
    assert found.nonfinite == {"model.embed_tokens.weight": 2}
    assert [set(names) for names in found.duplicates] == [{"copy", "twin"}]


def test_the_command_shows_it_as_text_and_json(odd: Path, tmp_path: Path) -> None:
    shown = run("inspect", odd, "--health")
    assert shown.code == 0, shown.err
    assert "2 numbers of model.embed_tokens.weight" in shown.out
    assert "2,100 rows" in shown.out
    facts = json.loads(run("inspect", odd, "--health", "--json").out)
    assert facts["health"]["nonfinite"] == {"model.embed_tokens.weight": 2}
    assert "health" not in json.loads(run("inspect", odd, "--json").out)
    sound = save_model(tmp_path / "sound", make_tensors(0, shapes={"w": (3, 3)}))
    assert "every number is finite" in run("inspect", sound, "--health").out


def test_quantised_models_are_called_so(tmp_path: Path) -> None:
    path = save_model(tmp_path, make_tensors(0, shapes={"w": (3, 3)}))
    assert inspect(path).quantised is None
    (path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    assert inspect(path).quantised == "gptq"


def test_too_little_memory_is_refused(odd: Path) -> None:
    with pytest.raises(DoesNotFit, match="too little: reading takes"):
        health(odd, max_memory=50_000_000)
