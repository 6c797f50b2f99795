"""The model of GPU time: what can be worked out by hand, and the command. No GPU is needed."""

import json
import math
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

from dsmoe_ext.benchmarks import gpu_model as model
from dsmoe_ext.benchmarks.gpu_backward import cut, neurons, passes
from dsmoe_ext.benchmarks.gpu_load import DTYPES, Load, draw, read_trace
from dsmoe_ext.benchmarks.gpu_specs import GPUS, read_calibration, sustained
from dsmoe_ext.command_line import app as cli

pytestmark = pytest.mark.quick
A100 = GPUS["a100"]


def load(tokens, hidden, sizes, active=1.0, **options):
    return Load(hidden, tuple(sizes), draw(tokens, len(sizes), active), **options)


def test_datasheet_rates_agree_with_cycles_per_mma():
    """4 quarters per SM, 2 x 16 x 8 x 16 operations an mma."""
    for name, share in {"a100": 1.0, "h100": 0.63, "h200": 0.63, "l40s": 1.0, "5090": 1.0}.items():
        gpu = GPUS[name]
        rate = gpu.sms * 4 * 4096 / gpu.mma_cycles * gpu.hertz
        assert rate == pytest.approx(share * gpu.flops, rel=0.02)
    h100 = GPUS["h100"]
    rate = h100.sms * 4 * 4096 / h100.wgmma_cycles * h100.hertz
    assert rate == pytest.approx(h100.flops, rel=0.01)


def test_flops_bytes_and_roofline_by_hand():
    active = torch.tensor([[True, False], [True, True], [False, False]])
    case = Load(100, (8, 24), active)
    assert case.flops() == 6 * 100 * (2 * 8 + 24)
    assert case.weight_bytes() == 3 * 2 * 100 * 32
    assert case.roofline(A100) == (3 * 2 * 100 * 32 + 3 * 100 * 4) / 2.0e12


def test_fp32_tf32_and_saved_activations_by_hand():
    """Datasheet of A100: 19.5 TFLOP/s in fp32, 156 in TF32."""
    assert A100.peak("fp32") == pytest.approx(19.5e12, rel=0.01)
    assert A100.peak("tf32") == 156e12
    active = torch.tensor([[True, False], [True, True], [False, False]])
    case = Load(100, (8, 24), active, dtype="fp32", is_saved=True)
    assert case.saved_bytes() == 2 * 4 * (2 * 8 + 24)
    assert case.weight_bytes() == 3 * 4 * 100 * 32
    assert replace(case, is_backward=True).products == 6
    # a step of 64 x 64 x 16 terms, two products: 64 x 64 x 16 x 2 / 32 lanes; of 128 x 64 x 16 in
    # mma.m16n8k8
    assert model.counted("fp32 gate_up<64>", 64, "step", "fma") == 64 * 64 * 16 * 2 / 32
    assert model.counted("tf32 gate_up<64>", 128, "step", "mma") == 8 * 8 * 2 * 2
    # 128 + 128 rows of 64 bytes; 64 neurons of 96 pairs, three products of five matrices
    assert model.counted("tf32 weights", 128, "step", "load_bytes") >= 256 * 64
    assert model.counted("tf32 neurons<64>", 96, "step", "mma") == 6 * 8 * 3 * 2
    # g and u of 128 pairs x 64 neurons besides the activations, in bf16
    plain, saving = (f"gate_up<64>{how}" for how in ("", ", saving"))
    more = (model.counted(name, 128, "tile", "store_bytes") for name in (saving, plain))
    assert next(more) - next(more) == 2 * 128 * 64 * 2


def test_counts_are_those_of_a_full_tile():
    """A step of 128 x 64 x 2 columns: 8 x 8 x 2 x 2 mma, 128 + 128 rows of 64 bytes."""
    assert model.counted("gate_up<64>", 128, "step", "mma") == 8 * 8 * 2 * 2
    assert model.counted("gate_up<64>", 128, "step", "load_bytes") == 256 * 64
    assert model.counted("down", 128, "step", "mma") == 8 * 16 * 2
    # 256 rows of 64 bytes written; 4 warps x (8 fragments of x, 8 of the weights), 4 cycles each
    assert model.counted("gate_up<64>", 128, "step", "shared_cycles") == 128 + 4 * 16 * 4


def test_counts_of_wgmma_by_hand():
    """A step of 256 rows, 2 x 96 columns, 64 terms: lines of 128 bytes, written once; 4 blocks of
    rows x 4 wgmmas read 64 + 192 lines of 32 bytes."""
    kernel = "sm90a gate_up<96>"
    assert model.counted(kernel, 256, "step", "mma") == 16 * 24 * 4
    assert model.counted(kernel, 256, "step", "load_bytes") == (256 + 192) * 128
    assert model.counted(kernel, 256, "step", "shared_cycles") == 448 + 4 * 4 * 256 * 32 // 128
    # 256 neurons of 64 tokens by 192 columns, both with lines across the sum
    kernel = "sm90a weights"
    assert model.counted(kernel, 256, "step", "mma") == 16 * 24 * 4
    assert model.counted(kernel, 256, "step", "shared_cycles") == 448 + 4 * 4 * 256 * 32 // 128
    # a unit of 512 tokens: sums zeroed and read, y written
    sums = 512 * 192 * 4
    assert model.counted("sm90a down<192>", 512, "unit", "store_bytes") == sums + sums // 2


def test_tiles_of_wgmma_are_those_of_its_schedulers():
    """Rows of 256, here 128, 128 and 44; 64 columns up to size 128, 96 beyond."""
    h100 = GPUS["h100"]
    case = load(300, 64, [16, 40, 128, 200, 0])
    assert [p.tiles for p in model.gate_up(h100, case)] == [3, 0, 3 * (1 + 2), 3 * 3]
    assert model.down(h100, load(300, 200, [16, 72])).tiles == 2 * (1 + 1) * 4  # of 64 columns
    assert model.down(h100, load(512, 132 * 128, [72])).tiles == 132 * 2


def test_tiles_that_make_no_round_are_halved():
    """Three more than 132: rows of the first three go to six. 67 for 132: all stay whole."""
    h100 = GPUS["h100"]
    tiles = [(256, 7), (130, 7), (100, 7), *[(256, 7)] * 132]
    dealt = model.deal_evenly(h100, tiles)
    assert [[rows for rows, _ in cta] for cta in dealt[:7]] == [
        [256, 128], [256, 128], [256, 128], [256, 2], [256, 100], [256], [256]
    ]  # fmt: skip
    assert model.deal_evenly(h100, tiles[:67]) == model.deal(h100, tiles[:67])
    assert model.deal_evenly(A100, tiles) == model.deal(A100, tiles)


def test_strips_of_wgmma_by_hand():
    """What an SM gets at most, times its lines of L2 a step: 96 rows of 256 tokens, and columns. T
    2048 makes 128 strips of 128 columns by 512 tokens (320 lines), or 88 of 192 columns (384)."""
    chosen = {256: (64, 256), 512: (64, 256), 1024: (128, 256), 2048: (128, 512), 8192: (192, 512)}
    for tokens, strip in chosen.items():
        assert model.strip(GPUS["h100"], load(tokens, 4096, [72])) == strip
    assert model.strip(A100, load(8192, 4096, [72])) == (128, 256)


def test_rows_are_moved_one_by_one_and_multiplied_in_blocks():
    """130 rows are three blocks; 64 terms of bf16 are 128 bytes. 130 stands between counts of 64
    and 256 rows; with 64, the scheduler's loads vary by up to a sector a step."""
    kernel, h100 = "sm90a gate_up<96>", GPUS["h100"]
    assert model.counted(kernel, 256, "step", "load_bytes") == (256 + 192) * 128
    assert abs(model.counted(kernel, 130, "step", "load_bytes") - (130 + 192) * 128) < 32
    assert model.pipes(h100, kernel, 130)["tensor cores"] == 3 * 64 * 192 // 32
    _, few_slots, few = model.aside(h100, kernel, 130, "tile")
    _, more_slots, more = model.aside(h100, kernel, 192, "tile")
    assert few_slots == more_slots and few < more


def test_tiles_of_the_backward_by_wgmma():
    """Rows of 256, here 128, 128 and 44; 32, 64 or 96 gates and ups, 32, 128 or 160 of the rest.
    Gradients of 256 by 192; both sources of dx in one sum."""
    h100, case = GPUS["h100"], load(300, 200, [16, 40, 300])
    tiles = [p.tiles for p in model.predict(h100, replace(case, is_backward=True))]
    assert tiles[:6] == [3, 3, 3 * 4, 3, 3, 3 * 2]
    assert tiles[6:8] == [model.down(h100, case).tiles, 3 * 2 * (1 + 1 + 2)]


def test_pipes_follow_the_busiest_warp():
    """Rows are dealt to two warps in blocks of 16: with 80 rows one warp has 3 of the 5 blocks."""
    assert model.pipes(A100, "gate_up<64>", 128)["tensor cores"] == 64 * 8
    assert model.pipes(A100, "gate_up<64>", 80)["tensor cores"] == 64 * 8 * 3 / 4


def test_tiles_of_gate_up_are_those_of_the_scheduler():
    case = load(300, 64, [16, 40, 136, 0])
    assert [p.tiles for p in model.gate_up(A100, case)] == [3, 0, 3 * (1 + 3)]


def test_small_experts_go_through_down_as_one():
    """300 tokens: chunks of 256 and 44, two strips of 128 columns; 3 x 16 terms, then 72."""
    prediction = model.down(A100, load(300, 200, [16, 16, 16, 72]))
    assert prediction.tiles == 2 * (2 + 2) + 2 * (1 + 1)


def test_time_is_never_below_any_resource():
    for gpu in GPUS.values():
        for tokens in (1, 16, 17, 700):
            case = load(tokens, 1024, [512] * 4, 0.5)
            for p in model.predict(gpu, case):
                assert p.seconds > max(p.parts.values())
            assert sum(p.seconds for p in model.predict(gpu, case)) > case.roofline(gpu)


@pytest.mark.parametrize(
    "gpu, tokens, least",
    [("a100", 8192, 0.70), ("h100", 8192, 0.65), ("h100-mma", 8192, 0.45), ("a100", 1, 0.80)],
)
def test_llama_2_7b_reaches_its_share_of_the_roofline(gpu, tokens, least):
    case = load(tokens, 4096, [1376] * 8, 3 / 8)
    seconds = sum(p.seconds for p in model.predict(GPUS[gpu], case))
    assert case.roofline(GPUS[gpu]) / seconds >= least


@pytest.mark.parametrize("gpu, least", [("a100", 0.70), ("h100", 0.60)])
def test_llama_2_7bs_backward_reaches_its_share_of_the_roofline(gpu, least):
    case = load(8192, 4096, [1376] * 8, 3 / 8, is_backward=True)
    seconds = sum(p.seconds for p in model.predict(GPUS[gpu], case))
    assert case.roofline(GPUS[gpu]) / seconds >= least


def test_passes_of_the_backward_by_hand():
    """256 MiB less 8192 x 4096 sums: room for three matrices of some 2600 columns; five passes of
    35 x 64."""
    case = load(8192, 4096, [1376] * 8, 3 / 8)
    (over_columns,) = passes(case)
    sizes = [p.sizes for p in over_columns]
    assert sizes[:2] == [(1376, 864), (1376 - 864, 1376, 352)] and len(sizes) == 5
    assert [sum(s) for s in sizes] == [2240] * 4 + [8 * 1376 - 4 * 2240]
    assert sum(p.neurons() for p in over_columns) == case.neurons()
    assert [len(p) for p in passes(load(700, 1024, [512] * 4))] == [1]


def test_passes_over_fine_experts_by_hand():
    """Experts of 16 and 17 take 16 and 32 columns, 15984 in all: nine passes of 28 x 64, three of
    which are 112 of either. With 15 columns more for every expert there would be two passes more,
    which are empty."""
    case = load(8192, 4096, [16, 17] * 333, 0.1)
    assert cut(case) == (8192, 1920, 11)
    (over_columns,) = passes(case)
    assert over_columns[0].sizes == (16, 17) * 37 + (16,)
    assert over_columns[1].sizes == (17, *(16, 17) * 36, 16, 16)
    neurons_of = [sum(p.sizes) for p in over_columns]
    assert neurons_of[:6] == [37 * 33 + 16, 37 * 33 + 16, 37 * 33 + 1] * 2
    assert sum(neurons_of) == 333 * 33 and neurons_of[9:] == [0, 0]


def test_tokens_beyond_one_pass_by_hand():
    """dx and dgates first, the weight gradients later: the neurons are made twice."""
    case = load(9985, 4096, [1376] * 8, 3 / 8, is_backward=True)
    assert [part.num_tokens for part, *_ in passes(case)] == [5120, 4865]
    assert sum(p.neurons() for part in passes(case) for p in part) == case.neurons()
    tiles = sum(p.tiles for p in model.predict(A100, case) if p.kernel.startswith("neurons"))
    once = sum(p.tiles for part in passes(case) for q in part for p in neurons(A100, q))
    assert tiles == 2 * once


@pytest.mark.parametrize("kernel", ["gate_up<64>", "down", "neurons<64>",
                                    "neurons<128>, saved", "weights"])  # fmt: skip
@pytest.mark.parametrize("gpu", ["a100", "h100-mma"])
def test_tensor_cores_have_60_percent_of_what_a_full_tile_takes(gpu, kernel):
    """Of the cycles that the busiest pipe of an SM, issue among them, allows."""
    step = model.pipes(GPUS[gpu], kernel, max(map(int, model.counts()[kernel]["rows"])))
    assert step["tensor cores"] >= 0.6 * max(step.values())


def test_weights_of_small_experts_by_hand():
    """A tile of 16 neurons goes through the loop for 32: 32 terms of 32 and 128 columns written, 64
    bytes a term and 256; read by 4 warps, 2 x (1 + 4) fragments of 512 bytes."""
    step = model.pipes(A100, "weights", 16)
    assert step["shared memory"] == (32 * (64 + 256) + 4 * 2 * 5 * 512) / 128
    assert step["tensor cores"] == 2 * 16 * 2 / 4 * 8  # mma of 16 x 8 x 16 by 4 warps
    assert step["issue"] < 0.7 * model.counts()["weights"]["sass"]["80"]


def test_experts_share_rows_that_fit_in_l2():
    """1024 pairs of experts that a quarter of the tokens use are of 4096 tokens: 16 MiB of x at H
    2048, and 64 at H 8192."""
    for hidden, shared in ((2048, True), (8192, False)):
        case = load(8192, hidden, [32] * 64, 0.25)
        (kernel,) = (p for p in model.predict(A100, case) if p.tiles and "gate_up" in p.kernel)
        pairs = int(case.active.sum())
        groups = sum(math.ceil(n / 1024) for n in case.active.sum(0).tolist())
        numbers = (8192 if shared else pairs) * hidden + groups * 2 * 32 * hidden + pairs * 32
        assert kernel.parts["DRAM"] == pytest.approx(2 * numbers / A100.bandwidth)


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("dtype", ["bf16", "tf32"])
@pytest.mark.parametrize("gpu", GPUS)
def test_tensor_cores_are_busy_60_percent_of_the_predicted_time(gpu, dtype, backward, saved):
    """Llama-2-7B's layer, L2, DRAM, the last wave and launches counted in."""
    options = dict(dtype=dtype, is_backward=backward, is_saved=saved)
    for p in model.predict(GPUS[gpu], load(8192, 4096, [1376] * 8, 3 / 8, **options)):
        if p.tiles:
            assert p.parts["tensor cores"] >= 0.6 * p.seconds, p


@pytest.mark.parametrize(
    "kernel", ["gate_up<96>", "gate_up<64>", "down<192>", "recompute<96>", "neurons<80>", "weights"]
)
def test_wgmma_has_60_percent_of_what_a_full_tile_takes(kernel):
    step = model.pipes(GPUS["h100"], f"sm90a {kernel}", 256)
    assert step["tensor cores"] >= 0.6 * max(step.values())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", GPUS)
def test_every_mode_is_slower_than_its_roofline(gpu, dtype, saved, backward):
    options = dict(dtype=dtype, is_saved=saved, is_backward=backward)
    case = load(700, 1024, [512] * 4, 0.5, **options)
    kernels = model.predict(GPUS[gpu], case)
    assert all(p.seconds > max(p.parts.values()) for p in kernels)
    assert sum(p.seconds for p in kernels) > case.roofline(GPUS[gpu])


@pytest.mark.parametrize("gpu", GPUS)
def test_saving_pays_in_the_backward_and_costs_in_the_forward(gpu):
    case = load(8192, 4096, [1376] * 8, 3 / 8)

    def seconds(**how):
        return sum(p.seconds for p in model.predict(GPUS[gpu], replace(case, **how)))

    assert seconds(is_saved=True) > seconds()
    assert seconds(is_saved=True, is_backward=True) < 0.9 * seconds(is_backward=True)


def test_backward_does_eight_products_and_takes_longer_than_any_resource():
    case = replace(load(700, 1024, [512] * 4, 0.5), is_backward=True)
    assert case.flops() == 8 / 3 * replace(case, is_backward=False).flops()
    for gpu in GPUS.values():
        kernels = model.predict(gpu, case)
        named = dict.fromkeys(p.kernel.rpartition(" ")[2].partition("<")[0] for p in kernels)
        recomputed = ["recompute"] if gpu.loop is model.WGMMA else []
        assert list(named) == [*recomputed, "neurons", "down", "weights", "permute"]
        assert all(p.seconds > max(p.parts.values()) for p in kernels)
        assert sum(p.seconds for p in kernels) > case.roofline(gpu)


def test_command_reads_a_trace(tmp_path):
    trace = tmp_path / "routing.json"
    trace.write_text(json.dumps({"active": [[0], [0, 2], [], [1]]}))
    assert read_trace(trace, 3).int().tolist() == [[1, 0, 0], [1, 0, 1], [0, 0, 0], [0, 1, 0]]
    arguments = ["bench", "gpu-model", "--gpu", "h100", "--shape", "64,96", "--experts", "3"]
    result = CliRunner().invoke(cli.app, [*arguments, "--trace", str(trace)])
    assert result.exit_code == 0, result.output
    assert "T 4" in result.output and "roofline" in result.output


def test_unknown_gpu():
    result = CliRunner().invoke(cli.app, ["bench", "gpu-model", "--gpu", "tpu"])
    assert result.exit_code == 1
    assert "--gpu must be of a100, h100, h200, l40s, 5090, h100-mma, but is 'tpu'" in result.output


def test_command_in_other_modes():
    arguments = ["--shape", "64,96", "--experts", "3", "--tokens", "40", "--saved", "--backward"]
    for dtype, unit in (("tf32", "tensor"), ("fp32", "fp32")):
        command = ["bench", "gpu-model", *arguments, "--dtype", dtype]
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 0, result.output
        assert f"{dtype}, activations saved" in result.output and unit in result.output


@pytest.mark.parametrize("gpu", GPUS)
def test_what_a_chip_holds_is_less_than_its_datasheet_says(gpu):
    case = load(8192, 4096, [1376] * 8, 3 / 8)
    printed, held = (
        sum(p.seconds for p in model.predict(chip, case))
        for chip in (GPUS[gpu], sustained(GPUS[gpu]))
    )
    assert 1.1 < held / printed < 2


def calibration(tmp_path, **changes):
    ceilings = {"matmul_flops": 790e12, "dram_bytes_per_second": 4.3e12,
                "l2_bytes_per_second": 5.8e12, "launch_seconds": 2e-6}  # fmt: skip
    device = {"name": "NVIDIA H200", "sms": 132} | changes
    path = tmp_path / "gpu.json"
    path.write_text(json.dumps({"device": device, "ceilings": ceilings}))
    return path


def test_a_calibration_replaces_the_datasheet(tmp_path):
    chip = read_calibration(GPUS["h200"], calibration(tmp_path))
    assert (chip.flops, chip.bandwidth, chip.launch_seconds) == (790e12, 4.3e12, 2e-6)
    assert chip.hertz == pytest.approx(1.83e9 * 790 / 989)
    assert chip.l2_bandwidth == pytest.approx(5.8e12)


def test_a_calibration_of_another_chip_is_refused(tmp_path):
    arguments = ["bench", "gpu-model", "--gpu", "a100", "--calibrated"]
    result = CliRunner().invoke(cli.app, [*arguments, str(calibration(tmp_path))])
    assert result.exit_code == 1
    assert "is of NVIDIA H200 with 132 SMs, not 108" in result.output


def test_the_device_benchmark_checks_on_the_cpu(tmp_path):
    """All but the clock of `dsmoe bench gpu` runs without a GPU, on a tiny layer."""
    out = tmp_path / "gpu.json"
    arguments = ["bench", "gpu", "--only", "check", "--device", "cpu", "--small", "--out", str(out)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    checked = json.loads(out.read_text())["check"]
    assert [row["saved"] for row in checked] == [True, False]
    assert set(checked[0]["errors"]) >= {"y", "dx", "dgates", "ddown_proj_t", "y, inference"}


def test_the_device_benchmark_times_gpus_only():
    result = CliRunner().invoke(cli.app, ["bench", "gpu", "--device", "cpu"])
    assert result.exit_code == 1
    assert "add --only check" in result.output
