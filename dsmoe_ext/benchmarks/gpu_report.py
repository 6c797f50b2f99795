"""What `dsmoe bench gpu-model` prints."""

from rich.box import SIMPLE_HEAD
from rich.console import Group
from rich.table import Table

from dsmoe_ext.benchmarks.gpu_load import Load
from dsmoe_ext.benchmarks.gpu_model import Prediction
from dsmoe_ext.benchmarks.gpu_specs import Gpu

COLUMNS = {
    "fp32 units": "fp32",
    "tensor cores": "tensor",
    "issue": "issue",
    "shared memory": "shared",
    "L2": "L2",
    "DRAM": "DRAM",
}


def microseconds(seconds: float) -> str:
    """Three digits or more."""
    return f"{1e6 * seconds:.0f}" if seconds >= 1e-4 else f"{1e6 * seconds:.1f}"


def prediction_table(
    gpu: Gpu, load: Load, layout: str, kernels: list[Prediction], measured: float | None
) -> Group:
    """A line a kernel: what each resource takes alone, the prediction, the bound; then the whole.

    measured: seconds on this machine's GPU, or None.
    """
    total, roofline = sum(k.seconds for k in kernels), load.roofline(gpu)
    share = (
        load.flops()
        / 2
        / load.products
        / load.hidden_size
        / max(load.num_tokens, 1)
        / sum(load.sizes)
    )
    shown = {r: COLUMNS[r] for r in COLUMNS if any(r in k.parts for k in kernels)}
    out = Table(box=SIMPLE_HEAD, pad_edge=False)
    out.add_column("us", no_wrap=True)
    for column in ("tiles", *shown.values(), "predicted"):
        out.add_column(column, justify="right", no_wrap=True)
    out.add_column("bound", no_wrap=True)
    for k in kernels:
        if "<" in k.kernel and not k.tiles:
            continue  # a width of tile that no expert chooses
        alone = [microseconds(k.parts[r]) if r in k.parts else "" for r in shown]
        out.add_row(
            k.kernel.removeprefix(gpu.for_dtype(load.dtype).loop.prefix).partition(",")[0],
            str(k.tiles or ""),
            *alone,
            microseconds(k.seconds),
            COLUMNS[k.bound],
        )
    kind = f"{load.dtype}{', activations saved' * load.is_saved}"
    head = (
        f"{gpu.name}, {kind}, T {load.num_tokens}, H {load.hidden_size}, experts {layout}, "
        f"{share:.3f} of the FFN active"
    )
    bound = max(kernels, key=lambda k: k.seconds).bound
    lines = [
        f"predicted {1e6 * total:.1f} us, {roofline / total:.0%} of the roofline "
        f"({1e6 * roofline:.1f} us), bound by {bound}",
        f"{load.flops() / total / 1e12:.1f} TFLOP/s, weights at "
        f"{load.weight_bytes() / total / 1e9:.0f} GB/s",
    ]
    if measured:
        ratio = f"predicted / measured {total / measured:.2f}"
        lines.append(f"measured {1e6 * measured:.1f} us: {ratio}")
    return Group(head, out, *lines, "")
