"""Small merges worked out by hand: where the code and its oracle could be wrong together."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.kernels.contract import Problem, Settings, Tile, grain_of
from streammerge.kernels.whole import merge_whole, padded
from streammerge.methods import METHODS
from streammerge.methods.arcee_fusion import ARCEE_FUSION, divergence, wide_divergence
from tests.kernels.looking import Memory
from tests.methods.cases import Case, make, merge


def merged(tmp_path: Path, name: str, base: list[Any] | None, *models: list[Any], **parameters: Any) -> list[Any]:
    """The float32 result of merging a few numbers, or rows of numbers."""
    case = Case(
        "by hand", None if base is None else torch.tensor(base), tuple(torch.tensor(x) for x in models), parameters
    )
    _, tensors = merge(make(tmp_path, METHODS[name], [case]), tmp_path / "out")
    (tensor,) = tensors.values()
    values: list[Any] = tensor.tolist()
    return values


def test_linear(tmp_path: Path) -> None:
    assert merged(tmp_path, "linear", None, [1.0, 2.0], [5.0, 6.0], weight=(1.0, 3.0)) == [4.0, 5.0]


def test_linear_not_normalised(tmp_path: Path) -> None:
    assert merged(tmp_path, "linear", None, [1.0], [5.0], weight=(1.0, 3.0), normalize=False) == [16.0]


def test_passthrough(tmp_path: Path) -> None:
    assert merged(tmp_path, "passthrough", None, [1.0, -3.0], scale=(0.5,)) == [0.5, -1.5]


def test_task_arithmetic(tmp_path: Path) -> None:
    found = merged(tmp_path, "task_arithmetic", [1.0, 1.0], [2.0, 1.0], [1.0, -1.0], weight=(0.5, 2.0))
    assert found == [1.5, -3.0]


def test_task_arithmetic_normalised_with_lambda(tmp_path: Path) -> None:
    found = merged(tmp_path, "task_arithmetic", [1.0], [2.0], [4.0], weight=(1.0, 3.0), normalize=True, **{"lambda": 2})
    # Δ = 1 and 3, their weighted mean 2.5.
    assert found == [6.0]


def test_task_arithmetic_does_not_divide_by_a_sum_of_weights_below_1e_8(tmp_path: Path) -> None:
    weights = (1.0, -1.0 + 2.0**-27)
    assert merged(tmp_path, "task_arithmetic", [0.0], [3.0], [0.0], weight=weights, normalize=True) == [3.0]


def test_slerp_between_orthogonal_vectors(tmp_path: Path) -> None:
    found = merged(tmp_path, "slerp", [2.0, 0.0], [0.0, 3.0], t=1 / 3)
    # sin 60° and sin 30°, on the vectors as they are.
    assert found == pytest.approx([3**0.5, 1.5])


def test_slerp_between_parallel_vectors_is_linear(tmp_path: Path) -> None:
    assert merged(tmp_path, "slerp", [1.0, 2.0], [3.0, 6.0], t=0.5) == [2.0, 4.0]


def test_slerp_between_opposite_vectors_is_linear(tmp_path: Path) -> None:
    assert merged(tmp_path, "slerp", [1.0, 2.0], [-1.0, -2.0], t=0.25) == [0.5, 1.0]


def test_ties(tmp_path: Path) -> None:
    found = merged(tmp_path, "ties", [0.0] * 4, [3.0, -2.0, 1.0, 0.0], [-1.0, -4.0, 2.0, 5.0],
                   weight=(1.0, 1.0), density=0.5)  # fmt: skip
    # Trimmed: [3, -2, 0, 0] and [0, -4, 0, 5].
    assert found == [3.0, -3.0, 0.0, 5.0]


def test_ties_elects_by_weight_and_averages_who_agrees(tmp_path: Path) -> None:
    found = merged(tmp_path, "ties", [1.0, 1.0], [4.0, 2.0], [-1.0, -2.0], weight=(2.0, 1.0))
    # Votes 6 - 2 and 2 - 3: the first model wins one, the second the other.
    assert found == [4.0, -2.0]


def test_ties_takes_an_even_vote_for_positive(tmp_path: Path) -> None:
    assert merged(tmp_path, "ties", [0.0], [1.0], [-2.0], weight=(2.0, 1.0)) == [1.0]


def test_ties_keeps_the_first_of_equal_magnitudes(tmp_path: Path) -> None:
    found = merged(tmp_path, "ties", [0.0] * 6, [-1.0, 2.0, 1.0, 1.0, -2.0, 1.0], weight=(1.0,), density=0.7)
    # int(0.7 · 6) = 4: both twos, and the first two of the ones.
    assert found == [-1.0, 2.0, 1.0, 0.0, -2.0, 0.0]


def test_ties_not_normalised_adds_up_who_agrees(tmp_path: Path) -> None:
    found = merged(
        tmp_path, "ties", [0.0], [1.0], [3.0], [-1.0], weight=(1.0, 0.5, 1.0), normalize=False, **{"lambda": 2}
    )
    assert found == [5.0]


def test_ties_rescaled_keeps_the_sum_of_magnitudes(tmp_path: Path) -> None:
    found = merged(tmp_path, "ties", [0.0] * 4, [3.0, 1.0, 0.5, -0.5], weight=(1.0,), density=0.25, rescale=True)
    assert found == pytest.approx([5.0, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_changes_some_elements_and_keeps_the_sum_of_magnitudes(tmp_path: Path, name: str) -> None:
    found = merged(tmp_path, name, [1.0] * 1000, [1.5] * 1000, weight=(1.0,), density=0.4)
    changed = [value for value in found if value != 1.0]
    assert 320 < len(changed) < 480
    assert len(set(changed)) == 1
    assert changed[0] - 1 == pytest.approx(0.5 * 1000 / len(changed))


@pytest.mark.parametrize("name", ["dare_linear", "dare_ties"])
def test_dare_without_rescale_only_drops(tmp_path: Path, name: str) -> None:
    found = merged(tmp_path, name, [1.0] * 1000, [1.5] * 1000, weight=(1.0,), density=0.4, rescale=False)
    assert set(found) == {1.0, 1.5}


def test_nuslerp_between_orthogonal_vectors(tmp_path: Path) -> None:
    found = merged(tmp_path, "nuslerp", None, [2.0, 0.0], [0.0, 3.0], weight=(2.0, 1.0))
    # sin 60° and sin 30°.
    assert found == pytest.approx([3**0.5, 1.5])


def test_nuslerp_between_deltas(tmp_path: Path) -> None:
    found = merged(tmp_path, "nuslerp", [1.0, 1.0], [3.0, 1.0], [1.0, 4.0], weight=(2.0, 1.0))
    assert found == pytest.approx([1 + 3**0.5, 2.5])


def test_nuslerp_of_weights_that_cancel_is_half_way(tmp_path: Path) -> None:
    assert merged(tmp_path, "nuslerp", None, [1.0, 2.0], [3.0, 6.0], weight=(1.0, -1.0)) == [2.0, 4.0]


def test_nuslerp_between_opposite_vectors_is_linear(tmp_path: Path) -> None:
    assert merged(tmp_path, "nuslerp", None, [1.0, 3.0], [-1.0, -3.0], weight=(3.0, 1.0)) == [0.5, 1.5]


ROWS = [[2.0, 0.0], [0.0, 1.0]], [[0.0, 2.0], [0.0, 3.0]]


def test_nuslerp_by_rows(tmp_path: Path) -> None:
    first, second = merged(tmp_path, "nuslerp", None, *ROWS, weight=1.0, nuslerp_flatten=False)
    # One row of orthogonal vectors, one of parallel ones.
    assert first == pytest.approx([2**0.5, 2**0.5])
    assert second == pytest.approx([0.0, 2.0])


def test_nuslerp_row_wise_is_by_columns(tmp_path: Path) -> None:
    found = merged(tmp_path, "nuslerp", None, *ROWS, weight=1.0, nuslerp_flatten=False, nuslerp_row_wise=True)
    # (2, 0) with nothing counts as orthogonal; (0, 1) and (2, 3) are 33.69° apart: factors of 1 / (2 cos 16.845°).
    assert found[0] == pytest.approx([2**0.5, 1.044832], rel=1e-5)
    assert found[1] == pytest.approx([0.0, 2.089663], rel=1e-5)


def test_multislerp_is_the_mean_direction_at_the_mean_length(tmp_path: Path) -> None:
    found = merged(tmp_path, "multislerp", None, [2.0, 0.0], [0.0, 4.0], weight=(1.0, 1.0))
    assert found == pytest.approx([3 / 2**0.5, 3 / 2**0.5])


def test_multislerp_with_a_log_map_divides_the_angle(tmp_path: Path) -> None:
    found = merged(tmp_path, "multislerp", [1.0, 0.0], [2.0, 0.0], [1.0, 1.0], weight=(3.0, 1.0), log_map=True)
    # A quarter of 90°; the mean direction is at 18.43°.
    assert found == pytest.approx([1.9238795, 0.3826834])


def test_multislerp_without_a_direction_is_the_weighted_sum(tmp_path: Path) -> None:
    models = [1.0, 0.0], [-3.0, 0.0], [0.0, 2.0], [0.0, -2.0]
    assert merged(tmp_path, "multislerp", None, *models, weight=1.0) == [-0.5, 0.0]


def test_multislerp_of_models_that_are_the_base_is_the_base(tmp_path: Path) -> None:
    assert merged(tmp_path, "multislerp", [1.0, 2.0], *[[1.0, 2.0]] * 3, weight=1.0) == [1.0, 2.0]


def test_multislerp_of_one_model_is_that_model(tmp_path: Path) -> None:
    assert merged(tmp_path, "multislerp", [1.0, 2.0], [4.0, -8.0], weight=0.25) == [4.0, -8.0]


def test_karcher_halves_the_angle(tmp_path: Path) -> None:
    found = merged(tmp_path, "karcher", None, [2.0, 0.0], [0.0, 4.0])
    assert found == pytest.approx([3 / 2**0.5, 3 / 2**0.5])


def test_karcher_averages_angles(tmp_path: Path) -> None:
    found = merged(tmp_path, "karcher", None, [1.0, 0.0], [1.0, 0.0], [0.0, 1.0])
    # 0°, 0° and 90°.
    assert found == pytest.approx([3**0.5 / 2, 0.5])


def test_karcher_of_opposite_vectors_has_the_direction_of_the_first(tmp_path: Path) -> None:
    assert merged(tmp_path, "karcher", None, [2.0, 0.0], [-4.0, 0.0]) == [3.0, 0.0]


def test_karcher_counts_the_length_of_a_zero_vector(tmp_path: Path) -> None:
    assert merged(tmp_path, "karcher", None, [0.0, 0.0], [2.0, 0.0]) == [1.0, 0.0]


def test_model_stock(tmp_path: Path) -> None:
    found = merged(tmp_path, "model_stock", [0.0, 0.0], [1.0, 0.0], [0.5, 0.75**0.5])
    # 60° apart: t = 2/3.
    assert found == pytest.approx([0.5, 3**0.5 / 6])


def test_model_stock_filter_wise(tmp_path: Path) -> None:
    models = [[2.0, 0.0], [2.0, 0.0]], [[0.0, 2.0], [2.0, 0.0]]
    found = merged(tmp_path, "model_stock", [[0.0, 0.0]] * 2, *models, filter_wise=True)
    # Orthogonal deltas say nothing, equal ones all.
    assert found == [[0.0, 0.0], [2.0, 0.0]]


def test_model_stock_shrinks_what_short_deltas_say(tmp_path: Path) -> None:
    # c = 1e-8 / 1e-6.
    found = merged(tmp_path, "model_stock", [0.0], [1e-4], [1e-4])
    assert found == pytest.approx([1e-4 * 0.02 / 1.01])


def test_nearswap(tmp_path: Path) -> None:
    assert merged(tmp_path, "nearswap", [1.0] * 4, [1.25, 3.0, -1.0, 1.0], t=0.5) == [1.25, 1.5, 0.5, 1.0]


def test_ram(tmp_path: Path) -> None:
    found = merged(tmp_path, "ram", [1.0] * 4, [2.0, 3.0, 1.0, 1.0 + 2**-20], [1.0, 5.0, 1.0, 9.0])
    assert found == [2.0, 4.0, 1.0, 9.0]


def test_ramplus_tl(tmp_path: Path) -> None:
    models = [1.0, 2.0, 0.0, 0.0], [0.0, 4.0, 0.0, 8.0]
    # Both share one change and have one of their own: ρ = 1.
    assert merged(tmp_path, "ramplus_tl", [0.0] * 4, *models, r=0.5, alpha=4.0) == [1.5, 3.0, 0.0, 12.0]


def test_ramplus_tl_clips_the_ratio(tmp_path: Path) -> None:
    models = [1.0, 2.0, 0.0, 0.0], [0.0, 4.0, 0.0, 8.0]
    assert merged(tmp_path, "ramplus_tl", [0.0] * 4, *models) == pytest.approx([1.02, 3.0, 0.0, 8.16])


def test_consensus(tmp_path: Path) -> None:
    models = [1.0, 1.0, 1.0], [1.0, -0.125, 0.0]
    # τ = 2, 0.875, 1; the second model wants the first entry only: 0.125 < 0.4 · 1.
    assert merged(tmp_path, "consensus", [0.0] * 3, *models, weight=1.0) == [2.0, 0.0, 0.0]


def test_consensus_of_one(tmp_path: Path) -> None:
    models = [1.0, 1.0], [1.0, -0.125]
    found = merged(tmp_path, "consensus", [1.0] * 2, *models, weight=1.0, consensus=1, mask_lambda=(0.4, 9.0))
    # Δ = 0, 0 and 0, -1.125: all of it is the second model's, and wanted by it.
    assert found == [1.0, -0.125]


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({}, [2.0, 2.0]),
        ({"schedule": "wma"}, [0.8, 3.2]),
        # Halved three times; and the newest one's half.
        ({"schedule": "ema", "decay": 0.5}, [1.0, 4.0]),
        ({"schedule": "wsd"}, [2.0, 2.0]),
        ({"schedule": "wsd", "decay_shape": "sqrt"}, [4.0, 8 - 48**0.5]),
        # (1 + cos 45°) / 2 of the updates after the first.
        ({"schedule": "wsd", "decay_shape": "cosine"}, [4 - 8**0.5, 4 - 8**0.5]),
    ],
)
def test_average(tmp_path: Path, parameters: dict[str, Any], expected: list[float]) -> None:
    models = [8.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 8.0]
    assert merged(tmp_path, "average", None, *models, **parameters) == pytest.approx(expected)


def test_breadcrumbs_drops_the_largest_and_the_small(tmp_path: Path) -> None:
    delta = [5.0, -4.0, 3.0, 2.0, 1.0, 0.0, -6.0, 7.0, 8.0, -9.0]
    found = merged(tmp_path, "breadcrumbs", [0.0] * 10, delta, weight=(2.0,), density=0.3, gamma=0.2)
    # The two largest go, the next three stay.
    assert found == [10.0, 0.0, 0.0, 0.0, 0.0, 0.0, -12.0, 14.0, 0.0, 0.0]


def test_breadcrumbs_drops_fewer_outliers_where_the_density_asks_for_them(tmp_path: Path) -> None:
    found = merged(tmp_path, "breadcrumbs", [0.0] * 4, [4.0, 3.0, 2.0, 1.0], weight=(1.0,), density=0.75, gamma=0.9)
    assert found == [0.0, 3.0, 2.0, 1.0]


def test_breadcrumbs_takes_the_first_of_equal_magnitudes_for_the_larger(tmp_path: Path) -> None:
    found = merged(tmp_path, "breadcrumbs", [0.0] * 4, [1.0, -1.0, 1.0, 1.0], weight=(1.0,), density=0.5, gamma=0.25)
    assert found == [0.0, -1.0, 1.0, 0.0]


def test_breadcrumbs_ties(tmp_path: Path) -> None:
    found = merged(tmp_path, "breadcrumbs_ties", [0.0] * 4, [9.0, 3.0, 2.0, 1.0], [-1.0, -4.0, 8.0, -0.5],
                   weight=(1.0, 1.0), density=0.5, gamma=0.25)  # fmt: skip
    # [0, 3, 2, 0] and [-1, -4, 0, 0]; not normalised.
    assert found == [-1.0, -4.0, 2.0, 0.0]


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_della_keeps_large_entries_more_often(tmp_path: Path, name: str) -> None:
    found = merged(tmp_path, name, [0.0] * 4000, [float(i) for i in range(1, 4001)],
                   weight=(1.0,), density=0.5, epsilon=0.4, rescale=False)  # fmt: skip
    small, large = (sum(value != 0 for value in half) for half in (found[:2000], found[2000:]))
    # Of 2000 each with mean probabilities of 0.3 and 0.7.
    assert small == pytest.approx(600, abs=100)
    assert large == pytest.approx(1400, abs=100)


@pytest.mark.parametrize("name", ["della_linear", "dare_linear"])
def test_rescaled_by_density_every_entry_that_stays_is_divided_by_it(tmp_path: Path, name: str) -> None:
    found = merged(tmp_path, name, [0.0] * 1000, [3.0] * 1000, weight=(1.0,), density=0.75, rescale_by="density")
    assert set(found) == {0.0, 4.0}


def test_localize_and_stitch_averages_overlaps(tmp_path: Path) -> None:
    found = merged(tmp_path, "localize_and_stitch", [1.0] * 4, [5.0, 1.5, 4.0, 1.0], [2.0, 1.25, 9.0, -5.0],
                   weight=(1.0, 3.0), density=0.5)  # fmt: skip
    # Grafts of 4 and 3, and of 8 and -6; where both lie (3 + 3 · 8) / 4.
    assert found == [5.0, 1.0, 7.75, -5.0]


def test_lines_scales_deltas(tmp_path: Path) -> None:
    assert merged(tmp_path, "task_arithmetic", [1.0], [3.0], weight=(0.5,), lines_alpha=0.25) == [1.25]


def test_sce_weighs_by_squares_and_erases_minorities(tmp_path: Path) -> None:
    found = merged(tmp_path, "sce", [0.0] * 3, [1.0, 1.0, 0.0], [3.0, -3.0, 0.0])
    # Mean squares 2/3 and 6: weights 0.1 and 0.9.
    assert found == pytest.approx([2.8, -3.0, 0.0])


def test_sce_selects_where_the_models_differ_most(tmp_path: Path) -> None:
    found = merged(tmp_path, "sce", [0.0] * 5, [1.0, 5.0, 2.0, 3.0, 0.0], [1.0, 4.0, 4.0, -3.0, 4.0], select_topk=0.5)
    # Four entries differ and two stay: by 6 and by 4. Mean squares 9 and 9 + 16.
    assert found == pytest.approx([0.0, 0.0, 0.0, 3.0, 4.0])


def test_sce_merges_small_deltas_with_equal_weights_unless_told_otherwise(tmp_path: Path) -> None:
    found = merged(tmp_path, "sce", [0.0], [2.0**-12], [3 * 2.0**-12])
    assert found == pytest.approx([2 * 2.0**-12])
    (tmp_path / "paper").mkdir()
    found = merged(tmp_path / "paper", "sce", [0.0], [2.0**-12], [3 * 2.0**-12], equal_below=0.0)
    assert found == pytest.approx([2.8 * 2.0**-12])


def test_arcee_fusion_takes_over_what_is_far_above_the_median(tmp_path: Path) -> None:
    found = merged(tmp_path, "arcee_fusion", [0.0] * 12, [float(i) for i in range(12)])
    # One row, so all depends on |Δ| = 0 … 11: quartiles 2, 5, 8, threshold 14.
    assert found == [0.0] * 12
    (tmp_path / "far").mkdir()
    assert merged(tmp_path / "far", "arcee_fusion", [0.0] * 12, [*map(float, range(11)), 14.0]) == [0.0] * 11 + [14.0]


def test_arcee_fusion_of_wide_rows_is_that_of_others() -> None:
    """Where both ways to a divergence can be taken they agree; a row is wide for its deltas, or for its base."""
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(1, 40, 300, generator=generator) * torch.logspace(-3, 0, 40)[None, :, None]
    model = base + torch.randn(1, 40, 300, generator=generator) * torch.logspace(-5, -2, 40).flip(0)[None, :, None]
    base[0, 0, 0], model[0, 1, 7], base[0, 2, 3], model[0, 3, 3] = -9.0, 1.0, float("nan"), float("inf")
    tile = Tile(base, [model], None, None)
    found, wide = divergence(tile, {})[0], wide_divergence(tile, {})[0]
    assert found.isnan().nonzero()[:, 0].tolist() == [0, 1, 2, 3]
    assert found[4:].tolist() == pytest.approx(wide[4:].tolist(), rel=1e-10, abs=0)
    assert wide.isnan().nonzero()[:, 0].tolist() == [2, 3]
    p, q = (torch.softmax(x[0, :2].to(torch.float64), -1) + 1e-8 for x in (model, base))
    assert wide[:2].tolist() == pytest.approx((p * (p / q).log()).sum(-1).tolist(), rel=1e-6)


@pytest.mark.parametrize("wide", [[], [7], [0, 99, 640], range(641)])
def test_arcee_fusion_finds_wide_rows_wherever_they_are(wide: Sequence[int]) -> None:
    generator = torch.Generator().manual_seed(1)
    base = torch.randn(641, 1000, generator=generator) * 0.02
    model = base + torch.randn(641, 1000, generator=generator) * 0.002
    for row in wide:
        model[row, row % 1000] += 0.5
    grain = grain_of(base.shape, by_rows=True)
    memory = Memory([base, model], grain=grain)
    problem = Problem(base.numel(), 1, Settings({}, {}), torch.float32, grain)
    found = memory.solve(ARCEE_FUSION.measure(problem))["divergence"]
    tile = Tile(base[None], [model[None]], None, None)
    expected = torch.where(torch.isin(torch.arange(641), torch.tensor([*wide])), wide_divergence(tile, {})[0],
                           divergence(tile, {})[0])  # fmt: skip
    assert torch.equal(found, expected.to(torch.float32))


def test_arcee_fusion_reads_wide_rows_again_from_files_and_from_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(2)
    base = torch.randn(1300, 1000, generator=generator) * 0.02
    model = base + torch.randn(1300, 1000, generator=generator) * 0.002
    model[[3, 640, 1299], [5, 6, 7]] += 0.5
    made = make(tmp_path, ARCEE_FUSION, [Case("wide", base, (model,))])
    inputs = [padded(values.reshape(-1)) for values in (base, model)]
    expected = merge_whole(ARCEE_FUSION, Settings({}, {}), inputs, base.shape, has_base=True, work=torch.float32,
                           out=torch.float32, stream_keys=(), find=lambda program, signature: None)  # fmt: skip
    for kept in (True, False):
        if not kept:
            monkeypatch.setattr("streammerge.plan.budget._TILE_BLOCKS", 1)
            monkeypatch.setattr("streammerge.plan.budget._SLOTS", 3)
            monkeypatch.setattr("streammerge.plan.budget._DEFAULT_ARENA", 0)
        _, tensors = merge(made, tmp_path / f"out {kept}", threads=2)
        (tensor,) = tensors.values()
        assert torch.equal(tensor.reshape(-1), expected)
    assert 0 < int((tensor != base).sum()) < base.numel()


@pytest.mark.parametrize(("dtype", "bit"), [("bfloat16", 8), ("float16", 11)])
def test_a_float64_is_rounded_once(tmp_path: Path, dtype: str, bit: int) -> None:
    # Just above the middle between 1 and the next number, by less than a float32 can tell.
    value = torch.tensor([1 + 2.0**-bit + 2.0**-40], dtype=torch.float64)
    made = make(tmp_path, METHODS["passthrough"], [Case("middle", None, (value,))], dtype=dtype)
    _, tensors = merge(made, tmp_path / "out")
    assert [tensor.item() for tensor in tensors.values()] == [1 + 2.0 ** (1 - bit)]
