"""The merge methods, by name. A method is one file and one line here."""

from __future__ import annotations

from streammerge.kernels.contract import Method
from streammerge.methods.average import AVERAGE
from streammerge.methods.consensus import CONSENSUS
from streammerge.methods.dare_linear import DARE_LINEAR
from streammerge.methods.dare_ties import DARE_TIES
from streammerge.methods.hi_merging import HI_MERGING
from streammerge.methods.karcher import KARCHER
from streammerge.methods.linear import LINEAR
from streammerge.methods.metagpt import METAGPT
from streammerge.methods.model_stock import MODEL_STOCK
from streammerge.methods.multislerp import MULTISLERP
from streammerge.methods.nearswap import NEARSWAP
from streammerge.methods.nuslerp import NUSLERP
from streammerge.methods.passthrough import PASSTHROUGH
from streammerge.methods.ram import RAM
from streammerge.methods.ramplus_tl import RAMPLUS_TL
from streammerge.methods.slerp import SLERP
from streammerge.methods.task_arithmetic import TASK_ARITHMETIC
from streammerge.methods.ties import TIES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LINEAR,
        TASK_ARITHMETIC,
        PASSTHROUGH,
        SLERP,
        NUSLERP,
        MULTISLERP,
        KARCHER,
        MODEL_STOCK,
        NEARSWAP,
        TIES,
        DARE_LINEAR,
        DARE_TIES,
        RAM,
        RAMPLUS_TL,
        CONSENSUS,
        AVERAGE,
        HI_MERGING,
        METAGPT,
    )
}
