"""Which processors numpy is told to leave AVX-512 alone on."""

from __future__ import annotations

import pytest

from streammerge.base.processor import is_zen4

_CPUINFO = "processor\t: 0\nvendor_id\t: {}\ncpu family\t: {}\nflags\t\t: fpu avx2 {}\n\nprocessor\t: 1\n"


@pytest.mark.parametrize(
    ("vendor", "family", "flag", "expected"),
    [
        ("AuthenticAMD", 25, "avx512f", True),
        ("AuthenticAMD", 25, "sha_ni", False),
        ("AuthenticAMD", 26, "avx512f", False),
        ("GenuineIntel", 6, "avx512f", False),
    ],
)
def test_zen_4(vendor: str, family: int, flag: str, expected: bool) -> None:
    assert is_zen4(_CPUINFO.format(vendor, family, flag)) is expected


def test_no_processor_at_all() -> None:
    assert not is_zen4("")
