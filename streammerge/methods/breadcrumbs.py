"""Model Breadcrumbs: drop the very largest and the small entries of each delta, and sum what is left.

    y = b + λ Σ w_i S_i, divided by Σ w_i when normalised

Of the n entries of a tensor's delta, in order of magnitude, int(gamma · n) are dropped as outliers and the
int(density · n) that follow stay; if there are not so many, fewer outliers are dropped. A density of 1 or more keeps
everything, outliers too, as in mergekit. Among equal magnitudes the lower index counts as larger.
Davari, Belilovsky, "Model Breadcrumbs" (2024).
"""

from __future__ import annotations

from streammerge.kernels.taskvector import task_vector_method

BREADCRUMBS = task_vector_method(
    "breadcrumbs",
    __doc__,
    sparsifier="outliers",
    election=False,
    normalize=False,
    rescale=False,
    density_meaning="the share of the delta's entries that stay, the largest ones after the outliers",
)
