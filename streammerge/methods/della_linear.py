"""DELLA without election: drop entries of each delta by chance, small ones more often, and sum what is left.

An entry whose magnitude has rank r among the m of its row (1 the smallest) stays with probability

    density − epsilon + 2 epsilon (r − 1) / (m − 1)

Rows, equal magnitudes, scaling, random bits, and where it differs from mergekit are as in della.
Deep et al., "DELLA-Merging" (2024).
"""

from __future__ import annotations

from streammerge.kernels.taskvector import task_vector_method

DELLA_LINEAR = task_vector_method(
    "della_linear",
    __doc__,
    sparsifier="ranked",
    election=False,
    normalize=False,
    rescale=True,
    density_meaning="the mean probability with which an entry of the delta stays",
)
