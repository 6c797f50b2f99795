"""What the counters say of a tile, by hand; and the table that the model of GPU time reads."""

import json

import count_work
import pytest
import torch
from interpreted import Interpreter
from ops_under_test import interpreter_only

from dsmoe_ext.benchmarks.gpu_backward import cut
from dsmoe_ext.benchmarks.gpu_load import Load, draw

pytestmark = interpreter_only


def test_table_is_up_to_date():
    """One kernel stands for all; the instructions may change with a new nvcc."""
    table = json.loads(count_work.TABLE.read_text())
    for rows in (32, 128):
        few, many = (count_work.run("gate_up<64>", steps, rows) for steps in (2, 6))
        step = {k: (many[k] - few[k]) / 4 for k in few}
        assert step == table["gate_up<64>"]["rows"][str(rows)]["step"]


@pytest.mark.parametrize("tokens", [1, 16])
def test_decode_moves_nothing_but_weights_and_x(tokens):
    """8 neurons, 512 terms: 16 rows of weights, 1 KiB each, and a row of x for each token."""
    table = json.loads(count_work.TABLE.read_text())
    step = table["neurons"]["rows"][str(tokens)]["step"]
    assert step["load_bytes"] == 16 * 1024 + tokens * 1024


def test_down_reads_the_strip_and_writes_it():
    """Per tile of 128 rows: the fp32 sums are zeroed, read, written and read, then y is written.
    Which tokens the rows are is read by several threads, 32 bytes a row at most."""
    table = json.loads(count_work.TABLE.read_text())
    tile, sums = table["down"]["rows"]["128"]["tile"], 128 * 128 * 4
    assert tile["store_bytes"] == 2 * sums + sums // 2
    assert 2 * sums <= tile["load_bytes"] <= 2 * sums + 128 * 32


@pytest.mark.parametrize("kernel, neurons, columns", [("weights", 128, 128),
                                                      ("sm90a weights", 256, 192)])  # fmt: skip
def test_weight_gradients_are_stored_once_in_whole_sectors(kernel, neurons, columns):
    """In bf16."""
    counts = json.loads(count_work.TABLE.read_text())[kernel]["rows"][str(neurons)]
    assert counts["tile"]["store_bytes"] == neurons * columns * 2
    assert counts["step"]["store_bytes"] == 0


def test_saved_activations_are_written_and_read_once():
    """128 pairs, g and u of 64 neurons, bf16; sm_90a: 256 pairs."""
    table = json.loads(count_work.TABLE.read_text())
    tile = {kernel: entry["rows"] for kernel, entry in table.items()}
    for kernel, rows in (("gate_up<64>", 128), ("sm90a gate_up<64>", 256)):
        plain, saving = (tile[kernel + how][str(rows)]["tile"] for how in ("", ", saving"))
        assert saving["store_bytes"] - plain["store_bytes"] == 2 * rows * 64 * 2
        assert tile[f"{kernel}, saving"][str(rows)]["step"]["store_bytes"] == 0
    for neurons in (64, 128):
        counts = tile[f"neurons<{neurons}>, saved"]["128"]["tile"]
        assert 2 * 128 * neurons * 2 <= counts["load_bytes"] <= 1.2 * 2 * 128 * neurons * 2


@pytest.mark.parametrize("tokens", [8192, 4096])
def test_the_model_cuts_passes_as_the_workspace_is_cut(tokens):
    """Three matrices in bf16, parts of dgates, fp32 sums of dx; the rest are lists and tables."""
    load = Load(4096, (1376,) * 8, draw(tokens, 8, 0.5), is_backward=True)
    tokens_of_a_pass, columns, _ = cut(load)
    assert tokens_of_a_pass == tokens
    held = tokens * (columns * (3 * 2 + 4 / 16) + 4096 * 4)
    bytes_asked = Interpreter().backward_workspace(tokens, 4096, 11008, 8, torch.bfloat16, False)
    assert 0 <= bytes_asked - held <= 1 << 20
