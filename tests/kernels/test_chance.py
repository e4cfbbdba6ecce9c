"""Random bits: good enough for masks, the same wherever they are made, and the same for ever.

The last part pins values. Whoever changes them changes every DARE merge: raise FORMAT in plan/plan.py with it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray

from streammerge.kernels.chance import block_keys, keep_limit, keep_mask, stream_key
from streammerge.kernels.contract import BLOCK
from tests.methods.oracles import drawn_mask

NAME = "model.layers.0.mlp.up_proj.weight"


def masks(density: float, blocks: int, positions: Sequence[int] = (0,), *, seed: int = 0, name: str = NAME,
          first_block: int = 0) -> NDArray[np.bool_]:  # fmt: skip
    """(models, blocks, BLOCK): which elements stay."""
    keys = block_keys([stream_key(seed, name, position) for position in positions], first_block, blocks)
    limit = torch.tensor(keep_limit(density), dtype=torch.int32)
    return np.stack([keep_mask(keys[:, i], limit).numpy() for i in range(len(positions))])


def correlation(one: NDArray[np.bool_], other: NDArray[np.bool_]) -> float:
    """The correlation of two masks in standard deviations from none."""
    return float(np.corrcoef(one.reshape(-1), other.reshape(-1))[0, 1]) * one.size**0.5


# --- statistics ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("density", [0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
def test_the_share_that_stays_is_the_density(density: float) -> None:
    kept = masks(density, 64)
    sigma = (density * (1 - density) / kept.size) ** 0.5
    assert abs(kept.mean() - density) < 5 * sigma


def test_every_block_keeps_its_share() -> None:
    shares = masks(0.3, 200)[0].mean(-1)
    sigma = (0.3 * 0.7 / BLOCK) ** 0.5
    deviations = (shares - 0.3) / sigma
    assert np.abs(deviations).max() < 5
    assert 0.8 < deviations.std() < 1.2


def test_every_index_of_a_block_keeps_its_share() -> None:
    kept = masks(0.5, 256)[0].sum(0)
    # chi² over 65,536 indices: mean 65,536, standard deviation 362.
    chi = ((kept - 128) ** 2 / 64).sum()
    assert abs(chi - BLOCK) < 5 * (2 * BLOCK) ** 0.5


@pytest.mark.parametrize("density", [0.1, 0.5])
def test_models_do_not_know_of_each_other(density: float) -> None:
    kept = masks(density, 16, (0, 1, 2))
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(correlation(kept[one], kept[other])) < 5


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("distance", [1, 2, 3, 64, 4096])
def test_neighbouring_elements_do_not_know_of_each_other(density: float, distance: int) -> None:
    (kept,) = masks(density, 16)
    assert abs(correlation(kept[:, distance:], kept[:, :-distance])) < 5


@pytest.mark.parametrize("density", [0.1, 0.5])
@pytest.mark.parametrize("distance", [1, 2, 8])
def test_neighbouring_blocks_do_not_know_of_each_other(density: float, distance: int) -> None:
    (kept,) = masks(density, 24)
    assert abs(correlation(kept[distance:], kept[:-distance])) < 5


def test_tensors_and_seeds_do_not_know_of_each_other() -> None:
    kept = [masks(0.5, 16), masks(0.5, 16, name=NAME.replace("0", "1")), masks(0.5, 16, seed=1)]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        assert abs(correlation(kept[one], kept[other])) < 5


def test_runs_of_kept_elements_are_as_long_as_chance_makes_them() -> None:
    (kept,) = masks(0.5, 16)
    flat = kept.reshape(-1)
    changes = int((flat[1:] != flat[:-1]).sum())
    assert abs(changes - flat.size / 2) < 5 * (flat.size / 4) ** 0.5


# --- where they are made ---------------------------------------------------------------------------------------------


def test_a_tile_has_the_bits_of_its_place_in_the_tensor() -> None:
    whole = masks(0.4, 9, (0, 1))
    for first, blocks in ((0, 1), (3, 1), (2, 5), (8, 1)):
        assert (masks(0.4, blocks, (0, 1), first_block=first) == whole[:, first : first + blocks]).all()


def test_the_keys_of_a_slice_are_a_slice_of_the_keys() -> None:
    streams = [stream_key(0, NAME, position) for position in range(3)]
    keys = block_keys(streams, 0, 20)
    assert keys.shape == (20, 3, 2)
    assert keys.dtype == torch.int32
    assert torch.equal(block_keys(streams, 7, 4), keys[7:11])
    assert torch.equal(block_keys(streams[1:2], 0, 20), keys[:, 1:2])
    assert len({tuple(key) for key in keys.reshape(-1, 2).tolist()}) == 60


def test_a_larger_density_keeps_what_a_smaller_one_keeps() -> None:
    assert (masks(0.3, 4) <= masks(0.31, 4)).all()


@pytest.mark.parametrize("density", [0.0, 1e-12])
def test_a_density_of_zero_keeps_nothing(density: float) -> None:
    assert not masks(density, 4).any()


def test_a_density_of_one_keeps_everything() -> None:
    assert masks(1.0, 16).all()
    assert masks(1.5, 16).all()


def test_a_density_of_one_keeps_the_largest_bits_too() -> None:
    # The first element of this stream whose 31 bits are all ones; found by running the hash backwards.
    block, index = 195_573, 26_807
    assert masks(1.0, 1, name="w", first_block=block)[0, 0, index]


@pytest.mark.parametrize("density", [0.25, 0.3, 1 / 3])
def test_the_docstring_can_be_implemented_again(density: float) -> None:
    elements = 3 * BLOCK - 11
    for seed, position in ((0, 0), (12345, 2)):
        expected = drawn_mask(seed, NAME, position, elements, density)
        found = masks(density, 3, (position,), seed=seed).reshape(-1)[:elements]
        assert (found == expected).all()


# --- for ever --------------------------------------------------------------------------------------------------------


def test_stream_keys_are_what_they_were_in_format_1() -> None:
    assert stream_key(0, NAME, 0) == 0x54B9986ED79560AB
    assert stream_key(1, NAME, 0) == 0x46EB6B4E05CAD25F
    assert stream_key(0, "w", 1) == 0x84389B5883CE470D


def test_block_keys_are_what_they_were_in_format_1() -> None:
    stream = [stream_key(0, NAME, 0)]
    assert block_keys(stream, 0, 2).tolist() == [[[-1023097814, 180113075]], [[1433322245, -708827435]]]
    assert block_keys(stream, 12345, 1).tolist() == [[[-1231623298, 931015772]]]


def test_masks_are_what_they_were_in_format_1() -> None:
    packed = np.packbits(masks(0.5, 3).reshape(-1)).tobytes()
    assert xxhash.xxh3_64_hexdigest(packed) == "f86b1a1f8ba67fd3"
    assert [keep_limit(density) for density in (0.0, 0.25, 0.3, 1 / 3)] == [-1, 536870911, 644245093, 715827882]
