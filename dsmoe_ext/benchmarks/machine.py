"""What the machine is, and the roofline: the time that nothing on it can beat."""

import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from dsmoe_ext import _C

# Two threads that start on one core stay there for the length of a measurement: half the peak.
REPEATS = 3


@dataclass(frozen=True)
class Machine:
    """The processor and its peaks on `threads` threads (a GPU: 0), in operations and bytes a
    second."""

    processor: str
    isa: str
    threads: int
    torch: str
    fp32_flops: float
    bf16_flops: float  # 0 where the instruction is missing
    read_bytes: float

    def roofline(self, flops: float, read: float, dtype: object) -> float:
        """Seconds below which no kernel can come: max(bytes / bandwidth, operations / peak).

        float16 is computed in float32, and so is bfloat16 where the dot product is missing.
        """
        has_dot = dtype == torch.bfloat16 and self.bf16_flops > 0 and "bf16" in self.isa
        return max(
            flops / (self.bf16_flops if has_dot else self.fp32_flops), read / self.read_bytes
        )

    def describe(self) -> str:
        """One line for the head of a table."""
        threads = f"{self.threads} thread(s), " if self.threads else ""
        bf16 = f"bf16 {self.bf16_flops / 1e9:.0f} GFLOP/s, " if self.bf16_flops else ""
        return (
            f"{self.processor}, {threads}{self.isa}, torch {self.torch}; measured "
            f"peaks: fp32 {self.fp32_flops / 1e9:.0f} GFLOP/s, {bf16}"
            f"read {self.read_bytes / 1e9:.1f} GB/s"
        )


def processor_name() -> str:
    """The name the processor gives itself, where the system tells."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def measure_machine(device: str = "cpu") -> Machine:
    """Peaks on torch's number of threads, each the best of REPEATS; takes a few seconds. Of a GPU:
    what cuBLAS and a copy reach."""
    if device.startswith("cuda"):
        from dsmoe_ext.benchmarks import gpu

        found, peaks = gpu.device(), gpu.ceilings()
        return Machine(
            found["name"],
            f"compute capability {found['capability']}, bf16",
            0,
            torch.__version__,
            peaks["fp32_matmul_flops"],
            peaks["matmul_flops"],
            peaks["dram_bytes_per_second"],
        )
    threads = torch.get_num_threads()
    measured = [_C.measure_peaks(threads) for _ in range(REPEATS)]
    peaks = {name: max(peaks[name] for peaks in measured) for name in measured[0]}
    return Machine(processor_name(), _C.isa(), threads, torch.__version__, **peaks)
