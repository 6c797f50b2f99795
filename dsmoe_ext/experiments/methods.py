"""The methods of docs/methods.md, each as its paper would start from a dense model."""

from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any, ClassVar

from ..calibration.orders import neuron_orders
from ..convert import sparsify
from ..layout import parse_sizes
from ..training.measure import threshold

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .bench import Bench
    from .rows import Rows

SHARE = 0.5  # of the loss that is the KL divergence to the dense model; the rest is the text's


@dataclass(frozen=True)
class Method:
    """options: of sparsify; `sizes`: expert_sizes as the command line writes them.

    at: where the trained model's knob is turned to (tau, p, k, how many); empty: it stays as the
    controller of the active share left it.
    """

    options: dict[str, Any] = field(default_factory=dict)
    sizes: str | None = None
    partition: str = "contiguous"
    at: tuple[float, ...] = ()

    def start(self, bench: "Bench", target: float) -> "PreTrainedModel":
        """The model before training, with weights of its own."""
        layout: dict[str, Any] = {}
        if self.sizes:
            neurons = bench.dense.config.get_text_config().intermediate_size
            layout["expert_sizes"] = parse_sizes(self.sizes, neurons)
        else:
            layout["num_experts"] = self.options.get("num_experts", 8)
        text = bench.own_text
        orders = neuron_orders(bench.dense, self.partition, ids=text, seed=bench.seed, **layout)
        held = {} if self.at else {"target_active": target}
        chosen = self.options | layout | held | {"seed": bench.seed}
        return sparsify(bench.dense_copy(), permutations=orders, **chosen)


class Trained:
    """A method's model behind `steps` of training, which the first question starts.

    Routers that begin at random or all alike have far to go: their rate is high, ten times that of
    a cut model's weights, and thresholds follow fast.
    """

    settings: ClassVar[dict[str, Any]] = {"router_lr": 1e-3, "controller_rate": 0.5}

    def __init__(
        self, method: Method, bench: "Bench", target: float, steps: int, distill: float = SHARE
    ):
        self.method, self.bench, self.target, self.steps = method, bench, target, steps
        self.distill = distill
        recorded = asdict(method) | {"at": list(method.at)}  # as JSON gives it back
        self.what = {"method": recorded, "distill": distill, **self.settings}  # names a row

    @cached_property
    def model(self) -> "PreTrainedModel":
        model = self.method.start(self.bench, self.target)
        self.bench.tune(model, self.steps, self.distill, **self.settings)
        return model

    def losses(self, knob: float | None) -> dict[str, Any]:
        """Bench.losses with the knob turned to a number, or left alone."""
        with nullcontext() if knob is None else threshold(self.model, knob):
            return self.bench.losses(self.model)

    def add_rows(self, table: "Rows", name: str, **what: Any) -> None:
        """A row for every place of the knob."""
        for knob in self.method.at or (None,):
            row = name if knob is None else f"{name} @ {knob:g}"
            table.add(self.bench, row, partial(self.losses, knob), **what, **self.what)


_PAIRS = "pairs:4.5,0.5;4,1;3,2;2.5,2.5"
_TOP_4 = {"num_experts": 8, "top_k": 4, "router_init": "paper"}
_XMOE = {"method": "top_p", "threshold": 1.0, "balance": "switch"}

METHODS = {
    "DSMoE 8 experts": Method(),
    "DSMoE 8, paper's start": Method({"router_init": "paper"}),
    "DSMoE 16 clustered": Method({"num_experts": 16}, partition="coactivation"),
    "XMoE 8 experts": Method(_XMOE | {"num_experts": 8}, at=(0.25, 0.5, 0.75)),
    "XMoE 64 experts": Method(_XMOE | {"num_experts": 64}, at=(0.25, 0.5, 0.75)),
    "XMoE 512 experts": Method(_XMOE | {"num_experts": 512}, at=(0.25, 0.5, 0.75)),
    "top-k 8 experts": Method(_TOP_4 | {"method": "top_k", "balance": "cv"}, at=(2, 4, 6)),
    "LLaMA-MoE 8 random": Method(
        _TOP_4 | {"method": "top_k", "balance": "cv"}, partition="random", at=(4,)
    ),
    "MoDSE 8 equal": Method(_TOP_4 | {"method": "modse"}, at=(2, 4, 6)),
    "MoDSE 4 pairs": Method(_TOP_4 | {"method": "modse"}, sizes=_PAIRS, at=(2, 4, 6)),
    "RMoE 8 experts": Method(_TOP_4 | {"method": "recurrent"}, at=(2, 4, 6)),
    "ReMoE 8 experts": Method({"method": "relu", "balance": "load_l1", "sparsity_weight": 1e-3}),
    "MatFormer 4 nested": Method({"method": "prefix"}, sizes="nested", at=(2, 3)),
    "EMoE 64 by gate rows": Method(
        {"method": "mean_score", "num_experts": 64, "top_k": 32},
        partition="gate_rows",
        at=(16, 32, 48),
    ),
}
