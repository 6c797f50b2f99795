"""Opening and saving models for the commands: every way it can go wrong has its own sentence."""

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .command_line.console import expect, is_out_of_memory, say
from .errors import UserError
from .files import TOKENIZER_FILES, check_space, owned_files
from .models import KEY, OLD_MODEL_TYPE
from .quiet import quiet_transformers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Ends of names that older versions saved and that are computed from the config.
_HARMLESS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "embeddings.position_ids")


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder, with a clear error for everything that is not one."""
    if not folder.exists():
        raise UserError(f"no such model folder: {folder}")
    if not folder.is_dir():
        raise UserError(f"{folder} is not a model folder (nor a .gguf file)")
    path = folder / "config.json"
    if not path.is_file():
        if any(folder.glob("checkpoint-*")) or (folder / "train.jsonl").exists():
            raise UserError(f"{folder} holds an unfinished training run; finish it with --resume")
        raise UserError(f"{folder} has no config.json: it is not a transformers model folder")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return config


def load_model(
    model: str | Path, *, dtype: str = "auto", only: str | None = None, device: str = "cpu"
) -> tuple[Any, Any]:
    """(model, tokenizer or None) from a folder, a .gguf file, a hub id, or the word "smollm2".

    dtype: "auto" (as saved), "fp32", "bf16", "fp16". only: "dense" refuses a converted model,
    "sparse" a dense one. device: "auto", "cpu", "cuda" or "cuda:N".
    """
    from .model_source import resolve_model

    folder = resolve_model(str(model))
    config = read_config(folder)
    if not config.get("model_type"):
        raise UserError(f"{folder} is a model without model_type, which transformers cannot open")
    is_sparse = KEY in config or config["model_type"] == OLD_MODEL_TYPE
    text_config = config.get("text_config")  # of a vision-language model
    is_sparse |= isinstance(text_config, dict) and KEY in text_config
    if only and is_sparse != (only == "sparse"):
        wanted = "a dense model" if only == "dense" else "a converted model (see dsmoe convert)"
        found = "already converted" if is_sparse else "a dense model"
        raise UserError(f"{folder} is {found}; this needs {wanted}")
    import torch
    from transformers import AutoModelForCausalLM

    names = {"auto": "auto", "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    with quiet_transformers():
        try:
            loaded, info = AutoModelForCausalLM.from_pretrained(
                folder,
                dtype=names[dtype],
                local_files_only=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, in one line
            )
        except Exception as error:
            raise _loading_error(folder, error) from error
        wrong = sorted(str(key[0]) for key in info.get("mismatched_keys") or [])
        if wrong:
            raise UserError(
                f"{len(wrong)} tensors in {folder} have another shape than its config.json says, "
                f"{wrong[0]} first"
            )
        missing = sorted(info.get("missing_keys") or [])
        if missing:
            raise UserError(
                f"{folder} lacks {len(missing)} of the model's tensors, {missing[0]} first: "
                "fetch or convert it again"
            )
        unused = sorted(info.get("unexpected_keys") or [])
        if unused := [name for name in unused if not name.endswith(_HARMLESS)]:
            raise UserError(
                f"{folder} holds {len(unused)} tensors that a model of its config.json does not "
                f"use, {unused[0]} first: without them it would compute something else"
            )
        tokenizer = _load_tokenizer(folder)
    place = choose_device(device)
    return (loaded if place == "cpu" else loaded.to(place)), tokenizer


class UnreadableTokenizer:
    """Tokenizer files that nothing here opens, for commands that only have to hand them on."""

    def __init__(self, folder: Path, files: list[Path], reason: str):
        self.folder, self.files, self.reason = folder, files, reason

    def save_pretrained(self, target: str | Path) -> None:
        """Copies the files as they are."""
        say(f"{self.folder}: its tokenizer could not be opened ({self.reason}); copied as it is")
        for file in self.files:
            (Path(target) / file).parent.mkdir(exist_ok=True)
            shutil.copyfile(self.folder / file, Path(target) / file)


def _load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, None if it has none."""
    from transformers import AutoTokenizer

    files = owned_files(folder, TOKENIZER_FILES)
    if not files:
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # a Rust error, a KeyError, a package that it wants: all kinds
        text = " ".join(str(error).split()) or type(error).__name__
        return UnreadableTokenizer(folder, files, text[:200])


def choose_device(device: str) -> str:
    """The device of --device; for "auto" a GPU that both torch and our kernels can use."""
    import torch

    from . import build_info

    if device == "auto":
        return "cuda" if torch.cuda.is_available() and build_info()["cuda"] else "cpu"
    with expect(RuntimeError):
        kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise UserError(f"--device must be auto, cpu or cuda, not {device}")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch finds no CUDA device")
    return device


def _loading_error(folder: Path, error: Exception) -> Exception:
    name = type(error).__name__
    text = " ".join(str(error).split())
    if name == "SafetensorError" or ("invalid" in text and "safetensors" in text):
        return UserError(f"the weights in {folder} are damaged ({text}); fetch or convert it again")
    if (isinstance(error, OSError) and "safetensors" in text) or "no file named" in text:
        return UserError(f"{folder} has no weights (model.safetensors)")
    if isinstance(error, (MemoryError, ModuleNotFoundError)) or is_out_of_memory(error):
        return error
    return UserError(f"{folder} could not be opened: {text[:300] or name}")


def need_tokenizer(tokenizer: "PreTrainedTokenizerBase | None", model: str | Path) -> Any:
    """The tokenizer, or an error that says what is missing."""
    if tokenizer is None:
        raise UserError(f"{model} has no tokenizer (tokenizer.json); copy it into the folder")
    if isinstance(tokenizer, UnreadableTokenizer):
        raise UserError(f"the tokenizer of {model} could not be opened: {tokenizer.reason}")
    return tokenizer


def model_bytes(model: "PreTrainedModel") -> int:
    """Bytes that the weights take on disk, tied ones once."""
    tensors = {t.data_ptr(): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.element_size() for t in tensors.values())


def save_model(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase | None", folder: Path
) -> None:
    """Weights, config and tokenizer into an empty folder, in one with room for them."""
    check_space(folder, model_bytes(model))
    with quiet_transformers():
        model.save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
