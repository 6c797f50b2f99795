"""`python -m dsmoe_ext`: a diagnosis to paste into a bug report; exit code 1 if something fails."""

import importlib.metadata
import os
import platform
import sys

PACKAGES = ("torch", "transformers", "safetensors", "numpy", "typer", "rich", "gguf", "matplotlib")
VARIABLES = (
    *("DSMOE_ISA", "DSMOE_KEPT_BYTES", "DSMOE_CUDA", "DSMOE_TORCH_DIR"),
    *("DSMOE_CUDA_WORKSPACE_MIB", "DSMOE_CUDA_GROUP", "DSMOE_CUDA_SMS", "DSMOE_CUDA_PATH"),
    *("DSMOE_CUDA_PARTS", "DSMOE_CUDA_ROUTER_TILES"),
    *("OMP_NUM_THREADS", "MKL_NUM_THREADS"),
)


def diagnosis() -> str:
    """Versions, machine, how the extension was built, and whether it computes."""
    lines = [
        f"dsmoe_ext     {_version('dsmoe_ext')}",
        f"python        {platform.python_version()} ({sys.executable})",
        f"system        {platform.platform()}",
        f"processor     {_processor()}, {os.cpu_count()} CPUs",
    ]
    lines += [f"{name:<13} {_version(name)}" for name in PACKAGES]
    lines += [f"{name}={os.environ[name]}" for name in VARIABLES if name in os.environ]
    try:
        import dsmoe_ext

        lines.append(f"location      {os.path.dirname(dsmoe_ext.__file__)}")
        info = dsmoe_ext.build_info()
        entries = info.items() if isinstance(info, dict) else [("build", info)]
        lines += [f"{name:<13} {value}" for name, value in entries]
        lines.append(f"self-test     {_self_test()}")
    except Exception as error:  # the point of a diagnosis is to say what fails
        lines.append(f"FAILS         {type(error).__name__}: {error}")
    return "\n".join(lines)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _self_test() -> str:
    """One small sparse FFN against the same formula in plain PyTorch."""
    import torch

    from dsmoe_ext import ops, reference

    generator = torch.Generator().manual_seed(0)
    x, gate, up, down = (torch.randn(rows, 32, generator=generator) for rows in (5, 48, 48, 48))
    offsets = torch.tensor([0, 16, 48], dtype=torch.int32)
    gates = torch.tensor([[1.0, 0.0], [0.5, 2.0], [0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    ours = ops.sparse_ffn(x, gates, gate, up, down, offsets)
    wanted = reference.sparse_ffn(x, gates, gate, up, down, offsets)
    error = ((ours - wanted).norm() / wanted.norm()).item()
    return f"{'ok' if error < 1e-5 else 'WRONG'} (relative error {error:.1e})"


if __name__ == "__main__":
    report = diagnosis()
    print(report)
    sys.exit("\nself-test     ok" not in report)
