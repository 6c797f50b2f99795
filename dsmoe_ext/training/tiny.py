"""A random LLaMA of a few hundred kilobytes with a byte tokenizer: for trying things out."""

from pathlib import Path
from typing import Any


def tiny_llama(seed: int = 0, **fields: Any) -> Any:
    """A LlamaForCausalLM with random weights; `fields` are those of LlamaConfig."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    defaults = {
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": True,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**(defaults | fields)))


def byte_tokenizer(add_bos: bool = False) -> Any:
    """One token per byte, 256 = <s>, 257 = </s>; with add_bos every text starts with <s>."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate(alphabet)}
    vocabulary |= {"<s>": 256, "</s>": 257}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if add_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", 256)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def save_tiny_llama(folder: str | Path, seed: int = 0, **fields: Any) -> Path:
    """Model and tokenizer as a folder that every command opens."""
    folder = Path(folder)
    tiny_llama(seed, **fields).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder
