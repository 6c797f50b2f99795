"""The settings of the CUDA kernels, which need no GPU to be read and refused."""

import pytest

from dsmoe_ext import cuda_settings
from dsmoe_ext.cuda_settings import CudaSettings, from_environment


def test_defaults():
    assert from_environment({}) == CudaSettings(256, 1024, 0, "best", 8, 1024)


def test_the_environment_is_read():
    given = {"DSMOE_CUDA_WORKSPACE_MIB": "0.5", "DSMOE_CUDA_SMS": "100", "DSMOE_CUDA_PATH": "sm80"}
    assert from_environment(given) == CudaSettings(workspace_mib=0.5, sms=100, path="sm80")


@pytest.mark.parametrize(
    "name, text, says",
    [
        ("WORKSPACE_MIB", "much", "must be a number, but is 'much'"),
        ("WORKSPACE_MIB", "0", "must be 0.25 to 65536"),
        ("WORKSPACE_MIB", "nan", "must be 0.25 to 65536"),
        ("GROUP", "0", "must be 1 or more"),
        ("SMS", "-1", "must be 0"),
        ("PATH", "sm100", "must be one of best, sm80, sm90a"),
    ],
)
def test_what_cannot_be_says_so(name, text, says):
    with pytest.raises(ValueError, match=f"DSMOE_CUDA_{name} {says}"):
        from_environment({f"DSMOE_CUDA_{name}": text})


def test_settings_hold_inside_only():
    before = cuda_settings._current
    with cuda_settings.cuda_settings(group=64) as inside:
        assert inside.group == 64
    assert cuda_settings._current == before


@pytest.mark.parametrize("value", [8.5, "8", True, None])
def test_whole_numbers_are_whole(value):
    before = cuda_settings._current
    with (
        pytest.raises(ValueError, match="DSMOE_CUDA_PARTS must be a whole number"),
        cuda_settings.cuda_settings(parts=value),
    ):
        pass
    assert cuda_settings._current == before
