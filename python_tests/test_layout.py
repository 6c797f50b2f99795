"""How expert sizes are written on the command line, and what they become."""

import pytest

from dsmoe_ext.layout import expert_layout, nested_sizes, parse_sizes

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("512,512,256,256", [512, 512, 256, 256]),
        ("4.0,2,2", [768, 384, 384]),
        ("nested", [192, 192, 384, 768]),
        ("nested:2", [768, 768]),
        ("pairs:4.5,0.5;4,1;3,2;2.5,2.5", [346, 38, 307, 77, 230, 154, 192, 192]),
    ],
)
def test_sizes(text, sizes):
    assert parse_sizes(text, 1536) == sizes
    assert expert_layout(1536, expert_sizes=parse_sizes(text, 1536)) == sizes


def test_pairs_and_nested_sums():
    """Pairs have equal sums, whatever the rounding; prefixes are I/8, I/4, I/2 and I."""
    for intermediate in (768, 1536, 8192, 11008):
        sizes = parse_sizes("pairs:4.5,0.5;4,1;3,2;2.5,2.5", intermediate)
        assert {a + b for a, b in zip(sizes[::2], sizes[1::2], strict=True)} == {intermediate // 4}
        nested = nested_sizes(intermediate)
        assert [sum(nested[:k]) * 8 // intermediate for k in (1, 2, 3, 4)] == [1, 2, 4, 8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pairs:4.5,0.5;4,2", "sum to 5, 6, but must be equal"),
        ("pairs:4.5,0.5,1", "every pair has two ratios"),
        ("pairs:4.5,a", "'a' is no float"),
        ("4,-1", "sizes are positive"),
        ("nan,1.0", "sizes are positive"),
        ("big:3", "start with pairs: or nested:"),
        ("5000.0,0.001", "without a neuron"),
        ("nested:40", "do not fit"),
        ("", "'' is no int"),
    ],
)
def test_bad_sizes(text, message):
    with pytest.raises(ValueError, match=message):
        parse_sizes(text, 1536)
