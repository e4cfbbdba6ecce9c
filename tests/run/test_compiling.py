"""What is compiled, and what a plan thinks of the time."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from streammerge.kernels.compiled import SECONDS_TO_COMPILE, Signature, compiler_missing
from streammerge.kernels.contract import Settings
from streammerge.methods.arcee_fusion import ARCEE_FUSION
from streammerge.run.compiling import Uses, weigh

PLENTY = 1 << 40
WORK = Signature(torch.float32, (torch.bfloat16, torch.bfloat16), True, None)
DIVERGENCE = ARCEE_FUSION.looks(Settings({}, {}), True, 1)[0]


@pytest.fixture(autouse=True)
def _nothing_is_compiled_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.mark.skipif(compiler_missing() is not None, reason="needs a C++ compiler: else nothing would be compiled")
def test_a_width_is_compiled_only_if_it_pays_by_itself() -> None:
    few, many = WORK._replace(width=64), WORK._replace(width=4096)
    uses: Uses = {(DIVERGENCE, few): 10**6, (DIVERGENCE, many): 10**10}
    assert [signature for _, signature in weigh(uses, 2, PLENTY, "auto").missing] == [many]
    assert [signature for _, signature in weigh(uses, 2, PLENTY, "on").missing] == [few, many]
    assert weigh({(DIVERGENCE, few): 10**6}, 2, PLENTY, "auto").missing == ()


def test_the_time_counts_what_is_compiled_and_what_never_is() -> None:
    count = 10**10
    eager, compiled = count * DIVERGENCE.eager_ns * 1e-9, count * DIVERGENCE.compiled_ns * 1e-9
    width = WORK._replace(width=4096)
    assert weigh({(DIVERGENCE, None): count}, 1, PLENTY, "auto").seconds == pytest.approx(eager)
    assert weigh({(DIVERGENCE, width): count}, 1, PLENTY, "off").seconds == pytest.approx(eager)
    both: Uses = {(DIVERGENCE, width): count, (DIVERGENCE, None): count}
    if compiler_missing() is None:
        expected = eager + compiled + SECONDS_TO_COMPILE
        assert weigh(both, 1, PLENTY, "auto").seconds == pytest.approx(expected)
    # No room for a compiler.
    found = weigh(both, 1, 10**9, "auto")
    assert found.missing == ()
    assert found.seconds == pytest.approx(2 * eager)
