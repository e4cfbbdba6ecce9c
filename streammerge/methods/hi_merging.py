"""Hi-Merging: base plus the weighted sum of pruned and scaled deltas, with densities and scales that differ by layer.

    y = b + λ Σ w_i s_i Top_p_i(x_i − b)

Top_p keeps exactly max(1, int(p · n)) entries of largest magnitude of each tensor of two or more dimensions; vectors
are scaled and never pruned. With `tasks:` in the recipe, p, s and w are found on data before the merge (study/); the
result is a recipe of this method that names them layer by layer. `sign_consensus` sums only the entries that agree
with the elected sign, as the authors' own runs did. Fu et al., "Training-free LLM Merging for Multi-task Learning"
(ACL 2025).
"""

from __future__ import annotations

from streammerge.kernels.taskvector import task_vector_method

HI_MERGING = task_vector_method(
    "hi_merging",
    __doc__,
    sparsifier="magnitude",
    election="optional",
    normalize=False,
    rescale=False,
    density_meaning="the share of the delta's entries that stay, the largest ones; vectors keep all",
    scales=True,
    prunes_vectors=False,
)
