"""A .gguf file as a plain LLaMA folder: all that the file says about the model is taken or refused.

transformers reads the weights, but fills tensors that the file lacks with random numbers, drops
those that it doesn't know (experts, biases) and passes over the scaling of rotary frequencies.
"""

import contextlib
import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError

if TYPE_CHECKING:
    from gguf import GGUFReader

# Without these the model would be built with somebody's defaults.
_NEEDED = (
    *("context_length", "embedding_length", "block_count", "feed_forward_length"),
    *("attention.head_count", "attention.layer_norm_rms_epsilon"),
)
# What other models of this architecture's name compute besides, and the value that means nothing.
_FOREIGN = {
    "expert_count": 0,
    "logit_scale": 1.0,
    "embedding_scale": 1.0,
    "residual_scale": 1.0,
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "attention.sliding_window": 0,
    "attention.causal": True,
    "attn_logit_softcapping": 0.0,
    "final_logit_softcapping": 0.0,
    "use_parallel_residual": False,
}
_LAYER_TENSORS = (
    *("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output"),
    *("ffn_norm", "ffn_gate", "ffn_up", "ffn_down"),
)
_ROPE_FREQS = "rope_freqs.weight"
_ROPE_TABLES = ("attn_rot_embd.weight", "attn_rot_embd")  # frequencies that older files repeat


def gguf_to_llama(path: Path, folder: Path) -> None:
    """Dequantises and saves; rebuilt from config and state, as a GGUF model refuses to be saved."""
    import torch
    from gguf import GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from .quiet import quiet_transformers

    # Reading GGUF draws a bar of its own on stderr that no setting turns off.
    with quiet_transformers(), contextlib.redirect_stderr(io.StringIO()):
        try:
            reader = GGUFReader(path)
        except Exception as error:
            raise _unreadable(path, error) from error
        _check_tensors(path, reader)
        rope = _rope_parameters(path, reader)
        try:
            source = AutoModelForCausalLM.from_pretrained(
                path.parent, gguf_file=path.name, dtype=torch.float32
            )
            tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
        except ModuleNotFoundError:
            raise
        except Exception as error:
            raise _unreadable(path, error) from error
        if not isinstance(source, LlamaForCausalLM):
            raise UserError(f"{path} is a {type(source).__name__}, not a LLaMA")
        settings = source.config.to_dict()
        for name in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            settings.pop(name, None)
        settings["rope_parameters"] = settings["rope_parameters"] | rope
        with torch.device("meta"):
            plain = LlamaForCausalLM(LlamaConfig(**settings))
        plain.load_state_dict(source.state_dict(), assign=True)
        plain.tie_weights()
        plain.generation_config = source.generation_config
        plain.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path} could not be read as GGUF: {' '.join(str(error).split())[:200]}")


def _field(reader: "GGUFReader", key: str, default: Any = None) -> Any:
    field = reader.get_field(key)
    return default if field is None else field.contents()


def _check_tensors(path: Path, reader: "GGUFReader") -> None:
    """The file is one whole dense LLaMA: every tensor of it, and no other."""
    architecture = _field(reader, "general.architecture")
    if architecture != "llama":
        raise UserError(f"{path} is a {architecture} model, not a LLaMA")
    if (parts := _field(reader, "split.count", 1)) > 1:
        raise UserError(
            f"{path} is one of {parts} parts of a model; join them with llama-gguf-split --merge"
        )
    for key in _NEEDED:
        if _field(reader, f"llama.{key}") is None:
            raise UserError(f"{path} lacks the field llama.{key}; fetch it again")
    for key, neutral in _FOREIGN.items():
        if (value := _field(reader, f"llama.{key}", neutral)) != neutral:
            raise UserError(f"{path} is no plain LLaMA: llama.{key} is {value}")
    wanted = {"token_embd.weight", "output_norm.weight"}
    for layer in range(_field(reader, "llama.block_count")):
        wanted |= {f"blk.{layer}.{name}.weight" for name in _LAYER_TENSORS}
    found = {tensor.name for tensor in reader.tensors if not tensor.name.endswith(_ROPE_TABLES)}
    if missing := sorted(wanted - found):
        raise UserError(
            f"{path} lacks {len(missing)} of the model's tensors, {missing[0]} first; "
            "fetch it again"
        )
    # Without an output matrix the embedding is used for it, as in llama.cpp.
    if foreign := sorted(found - wanted - {"output.weight", _ROPE_FREQS}):
        raise UserError(
            f"{path} is no plain LLaMA: it has {len(foreign)} tensors more, {foreign[0]} first"
        )


def _rope_parameters(path: Path, reader: "GGUFReader") -> dict[str, Any]:
    """The scaling of rotary frequencies, as transformers' rope_parameters has it; {} for none."""
    prefix = "llama.rope.scaling."
    fields = {
        key.removeprefix(prefix): _field(reader, key)
        for key in reader.fields
        if key.startswith(prefix)
    }
    linear = _field(reader, "llama.rope.scale_linear")  # the name before rope.scaling
    kind = fields.pop("type", "linear" if linear is not None else "none")
    factor = fields.pop("factor", 1.0 if linear is None else linear)
    original = fields.pop("original_context_length", _field(reader, "llama.context_length"))
    fields.pop("finetuned", None)
    head_dim = _field(reader, "llama.attention.key_length")
    if head_dim is not None and _field(reader, "llama.rope.dimension_count", head_dim) != head_dim:
        raise UserError(f"{path} rotates only part of each head, which is not supported")
    divisors = [tensor for tensor in reader.tensors if tensor.name == _ROPE_FREQS]
    if divisors and kind == "none":
        # A divisor for every frequency: what Llama 3's four numbers come to, whatever they were.
        values = [float(value) for value in divisors[0].data]
        return {
            "rope_type": "longrope",
            "short_factor": values,
            "long_factor": values,
            "factor": 1.0,
            "attention_factor": 1.0,
            "original_max_position_embeddings": original,
        }
    if not divisors and not fields:
        if kind == "none":
            return {}
        if kind == "linear":
            return {"rope_type": "linear", "factor": factor}
        if kind == "yarn":
            scaling = {"rope_type": "yarn", "factor": factor}
            return scaling | {"original_max_position_embeddings": original}
    what = ", ".join([kind, *sorted(fields), *(_ROPE_FREQS for _ in divisors)])
    raise UserError(f"{path} scales its rotary frequencies in a way not supported ({what})")
