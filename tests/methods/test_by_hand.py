"""Small merges worked out by hand: where the code and its oracle could be wrong together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from streammerge.methods import METHODS
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


@pytest.mark.parametrize(("dtype", "bit"), [("bfloat16", 8), ("float16", 11)])
def test_a_float64_is_rounded_once(tmp_path: Path, dtype: str, bit: int) -> None:
    # Just above the middle between 1 and the next number, by less than a float32 can tell.
    value = torch.tensor([1 + 2.0**-bit + 2.0**-40], dtype=torch.float64)
    made = make(tmp_path, METHODS["passthrough"], [Case("middle", None, (value,))], dtype=dtype)
    _, tensors = merge(made, tmp_path / "out")
    assert [tensor.item() for tensor in tensors.values()] == [1 + 2.0 ** (1 - bit)]
