"""The merge methods, by name. A method is one file and one line here."""

from __future__ import annotations

from streammerge.kernels.contract import Method
from streammerge.methods.dare_linear import DARE_LINEAR
from streammerge.methods.dare_ties import DARE_TIES
from streammerge.methods.hi_merging import HI_MERGING
from streammerge.methods.linear import LINEAR
from streammerge.methods.metagpt import METAGPT
from streammerge.methods.passthrough import PASSTHROUGH
from streammerge.methods.slerp import SLERP
from streammerge.methods.task_arithmetic import TASK_ARITHMETIC
from streammerge.methods.ties import TIES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (LINEAR, TASK_ARITHMETIC, PASSTHROUGH, SLERP, TIES, DARE_LINEAR, DARE_TIES, HI_MERGING, METAGPT)
}
