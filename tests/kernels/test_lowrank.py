"""The sketch finds what the whole singular value decomposition finds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from streammerge.kernels.lowrank import STRIP, add_strip, leading, orthonormal, random_signs, rank_for, split

PASSES = 3


def _matrix(singular: Tensor, rows: int, columns: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    left, right = (
        torch.linalg.qr(torch.randn(size, len(singular), generator=generator, dtype=torch.float64))[0]
        for size in (rows, columns)
    )
    return (left * singular) @ right.t()


def _image(matrix: Tensor, basis: Tensor, height: int = 100) -> Tensor:
    image = torch.zeros_like(basis)
    for panel in matrix.split(height):
        product = panel @ basis
        for strip in range(-(-matrix.shape[1] // STRIP)):
            add_strip(image, panel, product, strip)
    return image


def _leading(matrix: Tensor, width: int) -> tuple[Tensor, Tensor]:
    basis = random_signs(7, matrix.shape[1], width)
    for _ in range(PASSES - 1):
        basis = orthonormal(_image(matrix, basis))
    return leading(basis, _image(matrix, basis))


CASES = {
    "low rank": (torch.linspace(3, 1, 8).double(), 8, 1 - 1e-12),
    "steep": (0.5 ** torch.arange(200).double(), 16, 1 - 1e-9),
    "1/i": (1 / torch.arange(1, 401).double(), 16, 0.99999),
    "1/sqrt(i)": (torch.arange(1, 401).double().rsqrt(), 64, 0.997),
    "a few above noise": (torch.cat([torch.full((8,), 3.0), torch.full((392,), 1.0)]).double(), 8, 0.999),
    "tiny": (1e-20 * torch.linspace(3, 1, 8).double(), 8, 1 - 1e-12),
}


@pytest.mark.parametrize("case", CASES)
def test_the_vectors_hold_nearly_what_the_best_ones_hold(case: str) -> None:
    singular, rank, share = CASES[case]
    matrix = _matrix(singular, 700, 1300)
    vectors, squares = _leading(matrix, rank + max(16, rank // 2))
    own = vectors[:, :rank]
    held = float((matrix @ own).square().sum())
    assert held >= share * float(singular[:rank].square().sum())
    assert held <= float(singular[:rank].square().sum()) * (1 + 1e-12)
    assert float(squares[:rank].sum()) <= held * (1 + 1e-9)
    assert torch.allclose(own.t() @ own, torch.eye(own.shape[1], dtype=torch.float64), atol=1e-12)


def test_a_sketch_as_wide_as_the_matrix_is_all_of_it() -> None:
    for rows, columns in ((40, 25), (25, 40), (1, 30), (30, 1)):
        generator = torch.Generator().manual_seed(2)
        matrix = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        _, squares = _leading(matrix, min(rows, columns))
        assert torch.allclose(squares.sqrt(), torch.linalg.svdvals(matrix), rtol=1e-6)


def test_signs_are_signs_and_do_not_depend_on_the_width() -> None:
    wide = random_signs(3, 70_000, 20)
    assert torch.equal(wide.abs(), torch.ones_like(wide))
    assert wide.mean().abs() < 0.01
    assert torch.equal(random_signs(3, 70_000, 5), wide[:, :5])
    assert not torch.equal(random_signs(4, 70_000, 5), wide[:, :5])


def test_the_fewest_vectors_that_hold_a_share() -> None:
    squares = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert [rank_for(squares, 10.0, share, 4) for share in (0.1, 0.4, 0.41, 0.7, 0.95, 1.0)] == [1, 1, 2, 2, 4, 4]
    assert rank_for(squares, 10.0, 0.95, 2) == 2
    assert rank_for(squares, 20.0, 0.95, 9) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_missed_is_that_of_the_stored_factors(dtype: torch.dtype) -> None:
    matrix = _matrix(torch.linspace(3, 1, 20).double(), 60, 90)
    _, singular, right = torch.linalg.svd(matrix, full_matrices=False)
    vectors, singular = right[:5].t(), singular[:5]
    stored = (vectors * singular.sqrt()).t().to(dtype)
    part = split(matrix.clone(), vectors / singular.sqrt(), singular, stored.double(), dtype)
    assert part.left.dtype == dtype
    assert part.kept == pytest.approx(float(singular.square().sum()), rel=1e-12)
    assert part.missed == pytest.approx(
        float((matrix - part.left.double() @ stored.double()).square().sum()), rel=1e-12
    )
