"""Model Breadcrumbs with TIES: drop the very largest and the small entries, merge what is left by elected signs.

Of the n entries of a tensor's delta, in order of magnitude, int(gamma · n) are dropped as outliers and the
int(density · n) that follow stay; if there are not so many, fewer outliers are dropped. A density of 1 or more keeps
everything, outliers too, as in mergekit. Among equal magnitudes the lower index counts as larger. Signs are elected as
in ties. Davari, Belilovsky, "Model Breadcrumbs" (2024); Yadav et al., "TIES-Merging" (2023).
"""

from __future__ import annotations

from streammerge.kernels.taskvector import task_vector_method

BREADCRUMBS_TIES = task_vector_method(
    "breadcrumbs_ties",
    __doc__,
    sparsifier="outliers",
    election=True,
    normalize=False,
    rescale=False,
    density_meaning="the share of the delta's entries that stay, the largest ones after the outliers",
)
