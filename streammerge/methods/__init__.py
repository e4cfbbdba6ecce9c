"""The merge methods, by name. A method is one file and one line here."""

from __future__ import annotations

from streammerge.kernels.contract import Method
from streammerge.methods.arcee_fusion import ARCEE_FUSION
from streammerge.methods.average import AVERAGE
from streammerge.methods.breadcrumbs import BREADCRUMBS
from streammerge.methods.breadcrumbs_ties import BREADCRUMBS_TIES
from streammerge.methods.consensus import CONSENSUS
from streammerge.methods.dare_linear import DARE_LINEAR
from streammerge.methods.dare_ties import DARE_TIES
from streammerge.methods.della import DELLA
from streammerge.methods.della_linear import DELLA_LINEAR
from streammerge.methods.hi_merging import HI_MERGING
from streammerge.methods.karcher import KARCHER
from streammerge.methods.linear import LINEAR
from streammerge.methods.localize_and_stitch import LOCALIZE_AND_STITCH
from streammerge.methods.metagpt import METAGPT
from streammerge.methods.model_stock import MODEL_STOCK
from streammerge.methods.multislerp import MULTISLERP
from streammerge.methods.nearswap import NEARSWAP
from streammerge.methods.nuslerp import NUSLERP
from streammerge.methods.passthrough import PASSTHROUGH
from streammerge.methods.ram import RAM
from streammerge.methods.ramplus_tl import RAMPLUS_TL
from streammerge.methods.sce import SCE
from streammerge.methods.slerp import SLERP
from streammerge.methods.task_arithmetic import TASK_ARITHMETIC
from streammerge.methods.ties import TIES

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        LINEAR,
        SLERP,
        NUSLERP,
        MULTISLERP,
        KARCHER,
        PASSTHROUGH,
        MODEL_STOCK,
        NEARSWAP,
        ARCEE_FUSION,
        SCE,
        RAM,
        RAMPLUS_TL,
        TASK_ARITHMETIC,
        TIES,
        DARE_LINEAR,
        DARE_TIES,
        BREADCRUMBS,
        BREADCRUMBS_TIES,
        DELLA,
        DELLA_LINEAR,
        HI_MERGING,
        METAGPT,
        LOCALIZE_AND_STITCH,
        CONSENSUS,
        AVERAGE,
    )
}
