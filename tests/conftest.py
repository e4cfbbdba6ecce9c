"""Tests that run only when asked for: `pytest -m nightly`, `pytest -m cluster`, or the scripts of these names."""

from __future__ import annotations

import os

import pytest

# Before anything imports the Hub's client: a name that is no path here must not make a test ask the network.
os.environ["HF_HUB_OFFLINE"] = "1"

MARKS = {"nightly": "takes minutes (scripts/nightly)", "cluster": "needs Slurm or Dask (scripts/test-cluster)"}


def pytest_configure(config: pytest.Config) -> None:
    for name, why in MARKS.items():
        config.addinivalue_line("markers", f"{name}: {why}; runs only when asked for by -m")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    asked = config.getoption("markexpr")
    left_out = [item for item in items if any(name not in asked and item.get_closest_marker(name) for name in MARKS)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
