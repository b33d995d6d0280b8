"""The classic table, sizes as people write them, cards."""

from __future__ import annotations

import pytest

from decal.errors import ConfigError
from decal.planning import cards, classic, sizes


def test_the_classic_table_is_the_published_shapes_arithmetic() -> None:
    found = {(line.model, line.method): line.gb for line in classic.lines()}
    assert [m.parameters for m in classic.MODELS] == [6_738_415_616, 13_015_864_320, 68_976_648_192]
    assert found["7B", "full"] == pytest.approx(107.8, abs=0.05)
    assert found["13B", "full"] == pytest.approx(208.3, abs=0.05)
    assert found["70B", "full"] == pytest.approx(1103.6, abs=0.05)
    assert found["7B", "LoRA"] == pytest.approx(13.5 + 0.64, abs=0.05)
    assert found["7B", "QLoRA"] == pytest.approx(3.87 + 0.64, abs=0.01)
    assert found["13B", "QLoRA"] == pytest.approx(7.20 + 1.00, abs=0.01)
    assert found["70B", "QLoRA"] == pytest.approx(36.4 + 3.3, abs=0.05)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GiB", 24 * 2**30),
        ("24 Gib", 24 * 2**30),
        ("24", 24 * 2**30),
        ("80GB", 80 * 10**9),
        ("0.5gib", 2**29),
        ("512 MiB", 2**29),
        ("1,5 GiB", 3 * 2**29),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    assert sizes.read(text) == size


@pytest.mark.parametrize("text", ["", "GiB", "24 gigs", "-3GiB", "0", "24GiB24"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--gpu is not a size of memory") as raised:
        sizes.read(text)
    assert "24GiB" in raised.value.fix


def test_an_unknown_card_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match=r"no card 'h10' is known; nearest is 'h100'"):
        cards.find("h10")
    assert cards.find("H100").tflops > 500
