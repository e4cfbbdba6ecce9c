"""DELLA: drop entries of each delta by chance, small ones more often, and merge what is left by elected signs.

An entry whose magnitude has rank r among the m of its row (1 the smallest) stays with probability

    density − epsilon + 2 epsilon (r − 1) / (m − 1)

Rows run along the last dimension; a row of one entry has the probability `density`, and equal magnitudes have the mean
of the probabilities of their ranks. A density of 1 or more keeps everything. What stays is scaled back up by the ratio
of the sums of magnitudes, over the whole tensor, as in mergekit, or with `rescale_by: density` by 1/density; the paper
divides each entry by its own probability. mergekit ranks tensors of three dimensions along the second one, and fails on
rows of one entry; neither is kept. The random bits are a function of seed, tensor, model and element, so results
repeat. Deep et al., "DELLA-Merging" (2024).
"""

from __future__ import annotations

from streammerge.kernels.taskvector import task_vector_method

DELLA = task_vector_method(
    "della",
    __doc__,
    sparsifier="ranked",
    election=True,
    normalize=True,
    rescale=True,
    density_meaning="the mean probability with which an entry of the delta stays",
)
