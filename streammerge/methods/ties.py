"""TIES: trim each delta to its largest entries, elect a sign per element, average what agrees with it.

Exactly max(1, int(density · n)) entries of each tensor's delta stay; among equal magnitudes the lower index stays
(mergekit leaves that to chance, and in bf16 a fifth of a tensor can be equal). An exact tie of signs counts as
positive. Yadav et al., "TIES-Merging" (2023). Weights of opposite sign can nearly cancel in the normalisation, here
as in mergekit.
"""

from __future__ import annotations

from streammerge.kernels.taskvector import task_vector_method

TIES = task_vector_method(
    "ties",
    __doc__,
    sparsifier="magnitude",
    election=True,
    normalize=True,
    rescale=False,
    density_meaning="the share of the delta's entries that stay, the largest ones",
)
