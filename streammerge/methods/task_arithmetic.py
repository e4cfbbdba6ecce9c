"""Base plus the weighted sum of the models' deltas: y = b + λ Σ w_i (x_i − b), divided by Σ w_i when normalised.

Ilharco et al., "Editing models with task arithmetic" (2023). `density` and `rescale` are accepted and have no
effect, as in mergekit: nothing is sparsified.
"""

from __future__ import annotations

from streammerge.kernels.taskvector import task_vector_method

TASK_ARITHMETIC = task_vector_method(
    "task_arithmetic",
    __doc__,
    sparsifier="none",
    election=False,
    normalize=False,
    rescale=False,
    density_meaning="accepted for mergekit's sake; has no effect here",
)
