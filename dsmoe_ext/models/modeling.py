"""LLaMA with DSMoEFFN in place of its MLPs, for transformers: train, save, load, generate.

On disk the FFNs have plain LLaMA names and shapes, in the order of the neurons here; since a
permuted order leaves the dense function the same, the folder opens as a plain LlamaForCausalLM too.
The router, expert_offsets, permutation, threshold and draw_counter of each layer lie beside them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.cache_utils import Cache, DynamicCache
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter, WeightRenaming
from transformers.generation import GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaPreTrainedModel,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
)
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from dsmoe_ext.ffn import DSMoEFFN, ffn_layers
from dsmoe_ext.lm_loss import IGNORE_INDEX, causal_lm_loss
from dsmoe_ext.losses import layer_sparsity_sum
from dsmoe_ext.models.auto import MODEL_TYPE
from dsmoe_ext.models.configuration import DSMoELlamaConfig
from dsmoe_ext.routers import LinearRouter


@dataclass
class DSMoEModelOutput(BaseModelOutputWithPast):
    """sparsity_sum: 0-d, the sparsity terms of loss_mask's tokens in all layers; or None."""

    sparsity_sum: Tensor | None = None


@dataclass
class DSMoECausalLMOutput(CausalLMOutputWithPast):
    """loss: in training lm_loss + sparsity_weight * sparsity_loss, in evaluation lm_loss."""

    lm_loss: Tensor | None = None
    sparsity_loss: Tensor | None = None


class DSMoELlamaDecoderLayer(GradientCheckpointingLayer):
    """LLaMA's decoder layer; returns what the FFN decided beside the hidden states.

    Both must be real outputs: under gradient checkpointing this forward runs twice, and only
    outputs of the first run carry gradients back into the second.
    """

    def __init__(self, config: DSMoELlamaConfig, layer_idx: int):
        super().__init__()
        self.self_attn = LlamaAttention(config=config, layer_idx=layer_idx)
        self.mlp = DSMoEFFN(**config.ffn_options(), seed=0)
        self.mlp.set_seed(config.seed, layer_idx)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        token_mask: Tensor | None = None,
        loss_mask: Tensor | None = None,
        draw: Tensor | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """hidden_states [B,T,H]; with loss_mask [B·T] also the sparsity sum, gates [B·T,E]."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        x = self.post_attention_layernorm(hidden_states)
        if loss_mask is None:
            return hidden_states + self.mlp(x, token_mask), None, None
        y, routing = self.mlp(x, token_mask, draw, return_routing=True)
        sparsity_sum = layer_sparsity_sum(self.mlp, routing, loss_mask)
        return hidden_states + y, sparsity_sum, routing.gates.detach()


class DSMoELlamaPreTrainedModel(LlamaPreTrainedModel):
    config_class = DSMoELlamaConfig
    config: DSMoELlamaConfig
    _no_split_modules = ["DSMoELlamaDecoderLayer"]  # noqa: RUF012 (transformers' form)
    _can_record_outputs = {  # noqa: RUF012
        "hidden_states": DSMoELlamaDecoderLayer,
        "attentions": LlamaAttention,
    }

    def _init_weights(self, module: nn.Module) -> None:
        # Runs under transformers' guard, which leaves loaded tensors alone.
        if isinstance(module, DSMoEFFN):
            for weight in (module.gate_proj, module.up_proj, module.down_proj_t):
                nn.init.normal_(weight, std=self.config.initializer_range)
        elif isinstance(module, LinearRouter):
            module.reset_parameters()
        else:
            super()._init_weights(module)

    def pack(self):
        """Packs all FFNs for inference on the CPU: faster, for their memory once more."""
        for ffn in ffn_layers(self):
            ffn.pack()
        return self

    @classmethod
    def from_pretrained(cls, *args, output_loading_info: bool = False, **kwargs):
        """As in transformers, from safetensors only, and with an error where weights are missing.

        transformers would fill missing weights with random numbers and a warning.
        """
        kwargs.setdefault("use_safetensors", True)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)
        missing = sorted(info["missing_keys"])
        if missing:
            raise ValueError(
                f"{args[0] if args else 'the checkpoint'} lacks {len(missing)} weights of "
                f"{cls.__name__}, such as {missing[0]}; "
                "a dense LLaMA is converted with dsmoe_ext.convert_llama"
            )
        return (model, info) if output_loading_info else model


class DSMoELlamaModel(DSMoELlamaPreTrainedModel):
    """LlamaModel with DSMoEFFN layers, whose loop also adds up sparsity terms and statistics."""

    def __init__(self, config: DSMoELlamaConfig):
        super().__init__(config)
        self.padding_idx = config.pad_token_id
        self.vocab_size = config.vocab_size
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, self.padding_idx)
        self.layers = nn.ModuleList(
            DSMoELlamaDecoderLayer(config, layer_idx)
            for layer_idx in range(config.num_hidden_layers)
        )
        if config.gate_scale is None:  # from here on a constant, wherever tau moves
            config.gate_scale = self.layers[0].mlp.gate_scale
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config=config)
        self.gradient_checkpointing = False
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        loss_mask: Tensor | None = None,
        **kwargs,
    ) -> DSMoEModelOutput:
        """As LlamaModel's. loss_mask [B,T] (bool): the tokens whose sparsity terms are summed;
        None: no sum, unless in training, where all tokens but padding count.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("specify exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        num_tokens = inputs_embeds.shape[1]
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        if position_ids is None:
            past = cache.get_seq_length() if cache is not None else 0
            position_ids = torch.arange(num_tokens, device=inputs_embeds.device).unsqueeze(0) + past
        causal_mask = create_causal_mask(
            config=self.config,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            cache=cache,
            position_ids=position_ids,
        )
        token_mask = None
        if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            token_mask = attention_mask[:, -num_tokens:].reshape(-1).bool()
        if loss_mask is not None:
            loss_mask = loss_mask.reshape(-1)
        elif self.training:
            everything = inputs_embeds.new_ones(inputs_embeds[..., 0].numel(), dtype=torch.bool)
            loss_mask = everything if token_mask is None else token_mask

        hidden_states, sparsity_sums = inputs_embeds, []
        position_embeddings = self.rotary_emb(hidden_states, position_ids=position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            draw = layer.mlp.next_draw() if self.training and layer.mlp.ste == "sampled" else None
            hidden_states, sparsity_sum, gates = layer(
                hidden_states,
                token_mask=token_mask,
                loss_mask=loss_mask,
                draw=draw,
                attention_mask=causal_mask,
                position_embeddings=position_embeddings,
                position_ids=position_ids,
                cache=cache,
                use_cache=use_cache,
                **kwargs,
            )
            if loss_mask is not None:
                sparsity_sums.append(sparsity_sum)
                layer.mlp.activity.add(gates, token_mask)
        total = None
        if sparsity_sums:
            total = torch.stack([term.to(hidden_states.device) for term in sparsity_sums]).sum()
        return DSMoEModelOutput(
            last_hidden_state=self.norm(hidden_states),
            cache=cache,
            sparsity_sum=total,
        )


class DSMoELlamaForCausalLM(DSMoELlamaPreTrainedModel, GenerationMixin):
    """transformers' LlamaForCausalLM with DSMoEFFN layers and the sparsity loss."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DSMoELlamaConfig):
        super().__init__(config)
        self.model = DSMoELlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.loss_function = causal_lm_loss
        self.post_init()

    @deprecate_kwarg("past_key_values", "5.40.0", new_name="cache")
    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        cache: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> DSMoECausalLMOutput:
        """As LlamaForCausalLM's, plus lm_loss and sparsity_loss, which need labels (in training:
        sparsity_loss always).

        Both are means over the tokens that have a label, that is, that predict one.
        transformers.Trainer passes num_items_in_batch, their number in all accumulated
        micro-batches: then both are sums divided by it, and the micro-batches' losses add up to
        that of one large batch. Trainer's label_smoothing_factor keeps the labels to itself and
        makes the loss of the logits alone: with it, hold the share by a ThresholdController.
        """
        loss_mask = None
        if labels is not None:
            shifted = kwargs.get("shift_labels")
            if shifted is None:
                shifted = F.pad(labels[..., 1:], (0, 1), value=IGNORE_INDEX)
            loss_mask = shifted != IGNORE_INDEX
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            cache=cache,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            loss_mask=loss_mask,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept, :])

        loss = lm_loss = sparsity_loss = None
        if outputs.sparsity_sum is not None:
            num_items = kwargs.get("num_items_in_batch")
            if num_items is None:
                num_items = self._num_items(loss_mask, attention_mask, outputs.last_hidden_state)
            num_items = torch.as_tensor(num_items, device=logits.device)
            sparsity_sum = outputs.sparsity_sum.to(logits.device)
            sparsity_loss = sparsity_sum / num_items / self.config.num_hidden_layers
        if labels is not None:
            vocab_size = self.config.vocab_size
            lm_loss = loss = self.loss_function(
                logits=logits, labels=labels, vocab_size=vocab_size, **kwargs
            )
            if self.training and self.config.sparsity_weight:
                loss = lm_loss + self.config.sparsity_weight * sparsity_loss
        return DSMoECausalLMOutput(
            loss=loss,
            logits=logits,
            cache=outputs.cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            lm_loss=lm_loss,
            sparsity_loss=sparsity_loss,
        )

    @staticmethod
    def _num_items(loss_mask, attention_mask, hidden_states):
        """The number of tokens in the sparsity sum, at least 1."""
        if loss_mask is None and isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
            loss_mask = attention_mask[:, -hidden_states.shape[1] :].bool()
        if loss_mask is None:
            return hidden_states.shape[0] * hidden_states.shape[1]
        return loss_mask.sum().clamp(min=1)


def _register() -> None:
    """Names and shapes on disk, and the Auto classes."""
    # (?!\.) so that saving does not rename what already has LLaMA's name.
    conversions = [
        WeightRenaming("mlp.gate_proj.weight", r"mlp.gate_proj(?!\.)"),
        WeightRenaming("mlp.up_proj.weight", r"mlp.up_proj(?!\.)"),
        WeightConverter(
            "mlp.down_proj.weight", r"mlp.down_proj_t(?!\.)", operations=[Transpose(0, 1)]
        ),
    ]
    # By class, not by model_type: a config.json that says "llama" would otherwise skip the
    # conversion.
    register_checkpoint_conversion_mapping(DSMoELlamaModel.__name__, conversions, overwrite=True)
    AutoConfig.register(DSMoELlamaConfig.model_type, DSMoELlamaConfig, exist_ok=True)
    AutoModel.register(DSMoELlamaConfig, DSMoELlamaModel, exist_ok=True)
    AutoModelForCausalLM.register(DSMoELlamaConfig, DSMoELlamaForCausalLM, exist_ok=True)
    # Trainer's label smoothing and pipeline() look causal models up by class name here.
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[MODEL_TYPE] = DSMoELlamaForCausalLM.__name__


_register()
