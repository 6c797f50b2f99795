"""DSMoELlamaConfig: LlamaConfig plus how its FFNs are cut and routed."""

import inspect

from transformers import LlamaConfig

from dsmoe_ext.ffn import GATES, METHODS, ROUTER_INITS, STE_MODES, check_choice
from dsmoe_ext.layout import expert_layout
from dsmoe_ext.models.auto import MODEL_TYPE
from dsmoe_ext.routers import ROUTERS

_FFN_FIELDS = (
    *("hidden_size", "intermediate_size", "num_experts", "expert_sizes", "shared_size"),
    *("threshold", "method", "gates", "rescale", "gate_scale"),
    *("router", "router_bias", "router_init", "ste", "sample_prob"),
)


class DSMoELlamaConfig(LlamaConfig):
    """The fields of LlamaConfig, and those of DSMoEFFN (see there), the same for all layers:

    num_experts, expert_sizes (list of ints; None: equal), shared_size, threshold (where tau starts;
    each layer's own is in the weights), method, top_k, gates, rescale, router, router_bias,
    router_init, gate_scale, ste, sample_prob, seed.

    sparsity_weight   lambda: out.loss = out.lm_loss + lambda * out.sparsity_loss in training
    target_active     the share of the FFN that training should hold (ThresholdController), or None
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference = ["cache", "lm_loss", "sparsity_loss"]  # noqa: RUF012
    # Experts are not split over devices (yet): tensor parallelism covers attention only.
    base_model_tp_plan = {  # noqa: RUF012 (transformers' own form)
        name: plan for name, plan in LlamaConfig.base_model_tp_plan.items() if ".mlp." not in name
    }

    def __init__(
        self,
        num_experts: int = 8,
        expert_sizes: list | None = None,
        shared_size: int = 0,
        threshold: float = 0.5,
        method: str = "threshold",
        top_k: int | None = None,
        num_experts_per_tok: int = 2,
        gates: str = "scores",
        rescale: bool | None = None,
        router: str = "linear",
        router_bias: bool | None = None,
        router_init: str = "dense",
        gate_scale: float | None = None,
        ste: str = "active",
        sample_prob: float = 0.25,
        seed: int = 0,
        sparsity_weight: float = 1.0,
        target_active: float | None = None,
        **kwargs,
    ):
        check_choice("method", method, METHODS)
        check_choice("gates", gates, GATES)
        check_choice("router", router, ROUTERS)
        check_choice("router_init", router_init, ROUTER_INITS)
        check_choice("ste", ste, STE_MODES)
        super().__init__(**kwargs)
        sizes = expert_layout(self.intermediate_size, num_experts, expert_sizes, shared_size)
        routed = sizes[1:] if shared_size else sizes
        self.num_experts = len(routed)
        self.expert_sizes = None if expert_sizes is None else routed
        self.shared_size = shared_size
        self.threshold = threshold
        self.method = method
        # Stored under transformers' name for it: a field top_k would be one of generate()'s
        # parameters.
        self.num_experts_per_tok = num_experts_per_tok if top_k is None else top_k
        self.gates = gates
        self.rescale = gates == "scores" if rescale is None else rescale
        self.router = router
        self.router_bias = router_bias
        self.router_init = router_init
        self.gate_scale = gate_scale
        self.ste = ste
        self.sample_prob = sample_prob
        self.seed = seed
        self.sparsity_weight = sparsity_weight
        self.target_active = target_active
        if self.hidden_act not in ("silu", "swish"):
            raise ValueError(
                f"hidden_act is {self.hidden_act!r}; the sparse FFN supports only SiLU"
            )
        if self.mlp_bias:
            raise ValueError("mlp_bias=True: the sparse FFN does not support biases")

    @classmethod
    def own_fields(cls) -> set[str]:
        """The names of the fields that LlamaConfig does not have."""
        return set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}

    def ffn_options(self) -> dict:
        """The keyword arguments of DSMoEFFN, but for device, dtype and seed."""
        return {name: getattr(self, name) for name in _FFN_FIELDS} | {
            "top_k": self.num_experts_per_tok
        }
