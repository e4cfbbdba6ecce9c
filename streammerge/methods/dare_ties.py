"""DARE with TIES: drop random entries of each delta, scale the rest back up, merge what is left by elected signs.

Each entry stays with probability `density`. The scale is the ratio of the sums of magnitudes before and after, over
the whole tensor, as in mergekit; the paper's is 1/density. The random bits are a function of seed, tensor, model and
element, so results repeat. Yu et al., "Language models are super Mario" (2024).
"""

from __future__ import annotations

from streammerge.kernels.taskvector import task_vector_method

DARE_TIES = task_vector_method(
    "dare_ties",
    __doc__,
    sparsifier="random",
    election=True,
    normalize=False,
    rescale=True,
    density_meaning="the probability with which an entry of the delta stays",
)
