"""Units and their order: everybody finds the same bins without asking anybody."""

from __future__ import annotations

import pytest

from streammerge.cluster.units import Unit, order_for


def units(*sizes: int) -> list[Unit]:
    return [Unit(number, f"shard-{number}", (), size, 0) for number, size in enumerate(sizes)]


def numbers(found: list[Unit]) -> list[int]:
    return [unit.number for unit in found]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20])
def test_every_worker_comes_to_every_unit_and_begins_with_its_own(count: int) -> None:
    made = units(5, 3, 8, 1, 9, 2, 7, 4, 6)
    orders = [numbers(order_for(made, index, count)) for index in range(count)]
    assert all(sorted(order) == list(range(len(made))) for order in orders)
    firsts = {order[0] for order in orders[: len(made)]}
    assert len(firsts) == min(count, len(made))


def test_one_worker_begins_with_the_largest() -> None:
    assert numbers(order_for(units(5, 3, 8), 0, 1)) == [2, 0, 1]


def test_the_largest_go_into_the_lightest_bin() -> None:
    made = units(8, 7, 6, 5, 4)
    own = [numbers(order_for(made, index, 2)) for index in (0, 1)]
    # 8 + 5 + 4 and 7 + 6; then the other's, from the end.
    assert own[0] == [0, 3, 4, 2, 1]
    assert own[1] == [1, 2, 4, 3, 0]
