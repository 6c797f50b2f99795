"""What the model of GPU time knows beforehand: datasheets, and how the kernels cut their work."""

import json
import math
from dataclasses import dataclass, replace
from pathlib import Path

ANY = 2**31


@dataclass(frozen=True)
class Loop:
    """How the kernels of one main loop cut their work."""

    prefix: str  # of the kernels' names
    tile_rows: int
    block_rows: int  # that are multiplied together
    step_terms: int
    # of y, what a CTA of `down` may own: columns, tokens
    strips: tuple[tuple[int, int], ...]
    # columns of a gate_up tile, up to which size of expert; the same where g and u are saved
    widths: tuple[tuple[int, int], ...]
    saving_widths: tuple[tuple[int, int], ...]
    # rows and columns of the backward's tiles per neuron, up to which size of expert, where g and u
    # are products too and where they were saved; None: gpu_backward.py
    neurons: tuple[tuple[int, int, int], ...] | None
    saved_neurons: tuple[tuple[int, int, int], ...] | None
    weights: tuple[int, int]  # rows and columns of a gradient's tile
    ctas_per_sm: int
    # of a step, that nothing of the same CTA fills: barrier, first ldmatrix, last mma
    sync_cycles: float
    unit: str = "tensor cores"  # what multiplies

    def blocks(self, rows: int) -> int:
        """Rows, up to whole blocks."""
        return math.ceil(rows / self.block_rows) * self.block_rows


SMALL = ((16, 16), (32, 32))
MMA = Loop(
    prefix="",
    tile_rows=128,
    block_rows=16,
    step_terms=32,
    strips=((128, 256),),
    widths=(*SMALL, (64, ANY)),
    saving_widths=(*SMALL, (64, ANY)),
    neurons=((128, 32, 32), (96, 64, ANY)),
    saved_neurons=((128, 64, 64), (128, 128, ANY)),
    weights=(128, 128),
    ctas_per_sm=2,
    sync_cycles=100.0,
)
TF32 = replace(MMA, prefix="tf32 ", step_terms=16)
WGMMA = Loop(
    prefix="sm90a ",
    tile_rows=256,
    block_rows=64,
    step_terms=64,
    strips=((64, 256), (128, 256), (128, 512), (192, 512)),
    widths=(*SMALL, (64, 128), (96, ANY)),
    saving_widths=(*SMALL, (64, ANY)),
    neurons=None,
    saved_neurons=None,
    weights=(256, 192),
    ctas_per_sm=1,
    sync_cycles=0.0,
)
# whole tiles, whatever is in them; CTAs are the most: gate_up has room for 3, neurons for 2
FP32 = Loop(
    prefix="fp32 ",
    tile_rows=64,
    block_rows=64,
    step_terms=16,
    strips=((64, 256),),
    widths=((64, ANY),),
    saving_widths=((64, ANY),),
    neurons=((64, 64, ANY),),
    saved_neurons=((64, 64, ANY),),
    weights=(64, 64),
    ctas_per_sm=4,
    sync_cycles=100.0,
    unit="fp32 units",
)


@dataclass(frozen=True)
class Gpu:
    """Datasheet numbers, dense; `sustained` and `read_calibration` turn them into what holds."""

    name: str
    sms: int
    hertz: float
    flops: float  # bf16 tensor cores; tf32 has half of it
    bandwidth: float  # of DRAM, bytes a second
    mma_cycles: float  # an mma.m16n8k16 on an SM quarter's tensor unit; as many in tf32 for half
    fma_cycles: float  # a warp's fused multiply-add in fp32 on an SM quarter
    l2_bytes: float
    l2_bytes_per_cycle: float  # of A100's datasheet; assumed for others, whose do not say
    arch: str
    loop: Loop = MMA
    wgmma_cycles: float = 0.0  # for as much as an mma.m16n8k16
    # what long products keep of the boost clock: 790 of 989 TFLOP/s by cuBLAS on an H200. Assumed
    # to be as much on chips that are as hot
    held_clock: float = 0.8
    l2_held: float = 0.6  # of L2 that one matrix can stay in: its two halves keep some lines twice
    launch_seconds: float = 1.5e-6  # between kernels of one stream, in a graph

    @property
    def l2_bandwidth(self) -> float:
        return self.l2_bytes_per_cycle * self.hertz

    def peak(self, dtype: str) -> float:
        """Operations a second; fp32 at the clock of the tensor cores' datasheet number."""
        if dtype == "fp32":
            return self.sms * 4 * 32 / self.fma_cycles * 2 * self.hertz
        return self.flops / (2 if dtype == "tf32" else 1)

    def for_dtype(self, dtype: str) -> "Gpu":
        """With the main loop that multiplies this dtype."""
        loops = {"bf16": self.loop, "tf32": TF32, "fp32": FP32}
        return replace(self, loop=loops[dtype])


# mma.sync reaches 63 % of the wgmma rate on H100; decode uses it there too
H100 = Gpu("H100 SXM", 132, 1.83e9, 989e12, 3.35e12, 4.0 / 0.63, 1.0, 50e6, 5120, "90", WGMMA, 4.0)
GPUS = {
    "a100": Gpu("A100 SXM", 108, 1.41e9, 312e12, 2.0e12, 8.0, 2.0, 40e6, 5120, "80"),
    "h100": H100,
    "h200": replace(H100, name="H200 SXM", bandwidth=4.8e12),
    "l40s": Gpu("L40S", 142, 2.52e9, 362e12, 0.864e12, 16.0, 1.0, 96e6, 2048, "89"),
    "5090": Gpu("RTX 5090", 170, 2.407e9, 209.5e12, 1.792e12, 32.0, 1.0, 96e6, 2048, "120"),
    "h100-mma": replace(H100, name="H100 SXM, mma.sync", loop=MMA),
}

HELD_BANDWIDTH = 0.9  # of DRAM's datasheet rate: 4.3 of 4.8 TB/s by a copy on an H200
LAUNCH_SECONDS = 3e-6  # from the end of a kernel to the first loads of the next one


def sustained(gpu: Gpu) -> Gpu:
    """What the chip holds instead of what its datasheet says: clock, DRAM, L2, launches."""
    return replace(
        gpu,
        hertz=gpu.hertz * gpu.held_clock,
        flops=gpu.flops * gpu.held_clock,
        bandwidth=gpu.bandwidth * HELD_BANDWIDTH,
        l2_bytes=gpu.l2_bytes * gpu.l2_held,
        launch_seconds=LAUNCH_SECONDS,
    )


def read_calibration(gpu: Gpu, path: Path) -> Gpu:
    """The rates that `dsmoe bench gpu --out` measured on a chip of this kind.

    Raises KeyError if the file lacks a ceiling, ValueError if it is of a chip with other SMs.
    """
    measured = json.loads(path.read_text())
    sms, ceilings = measured["device"]["sms"], measured["ceilings"]
    if sms != gpu.sms:
        raise ValueError(f"{path} is of {measured['device']['name']} with {sms} SMs, not {gpu.sms}")
    hertz = gpu.hertz * ceilings["matmul_flops"] / gpu.flops
    return replace(
        gpu,
        name=f"{measured['device']['name']}, as measured",
        hertz=hertz,
        flops=ceilings["matmul_flops"],
        bandwidth=ceilings["dram_bytes_per_second"],
        l2_bytes=gpu.l2_bytes * gpu.l2_held,
        l2_bytes_per_cycle=ceilings["l2_bytes_per_second"] / hertz,
        launch_seconds=ceilings["launch_seconds"],
    )
