"""The steps that the commands and the demo share: calibrate, evaluate over thresholds, generate."""

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.table import Table

from ..errors import UserError
from ..layers import find_ffns
from ..loading import save_model
from ..models.card import write_card
from ..training.data import TextWindows, check_tokens
from ..training.evaluate import Evaluation, evaluate
from ..training.measure import (
    active_parameters,
    generate,
    num_parameters,
    ready_for_inference,
    threshold,
)
from ..training.sources import BUILTIN, Source, read_windows
from ..training.usage import watch_usage
from . import console
from .text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

CARD_WINDOWS = 4  # of a text, measured for a model's card: a first idea of it, in seconds
_DECODER_CONTEXT = 8  # tokens of the prompt that are decoded with the new ones


def calibrate_on(
    model: "PreTrainedModel", windows: TextWindows, *, tokens: int, **options: Any
) -> "PreTrainedModel":
    """calibrate() on training windows spread evenly through the text, about `tokens` of them."""
    from ..calibration import calibrate

    return calibrate(model, spread_windows(windows, tokens), **options)


def spread_windows(windows: TextWindows, tokens: int) -> torch.Tensor:
    """About `tokens` tokens of training windows [N,L], spread evenly through the text."""
    wanted = max(1, min(len(windows.train), -(-tokens // windows.length)))
    rows = torch.linspace(0, len(windows.train) - 1, wanted).round().long()
    return windows.train[rows]


def evaluate_with_bar(
    model: "PreTrainedModel", ids: torch.Tensor, label: str, *, context: int = 0, **options: Any
) -> Evaluation:
    """evaluate() over windows ids [N,L] with a progress bar counting tokens."""
    with console.progress(label, ids.numel(), "tokens") as advance:
        return evaluate(
            model,
            ids,
            num_context=context,
            advance=lambda done: advance(done * ids.shape[1]),
            **options,
        )


def _check_thresholds(model: "PreTrainedModel", values: list[float], option: str) -> None:
    """Thresholds that a model cannot have are refused before the first of them is used."""
    if values and not find_ffns(model):
        raise UserError(f"{option} needs a converted model; this one is dense")
    with console.expect(ValueError):
        for value in values:
            with threshold(model, value):
                pass


def evaluation_rows(
    model: "PreTrainedModel",
    texts: list[Text],
    thresholds: list[float],
    *,
    batch_size: int = 1,
    teacher: "PreTrainedModel | None" = None,
) -> list[dict[str, Any]]:
    """For every text one row as the model is, then one per threshold; ready for JSON."""
    _check_thresholds(model, thresholds, "--thresholds")
    ready_for_inference(model)
    rows = []
    for text in texts:
        for value in [None, *thresholds]:
            label = f"Evaluating {text.name}" + ("" if value is None else f" at {value:g}")
            with nullcontext() if value is None else threshold(model, value):
                rows.append(_row(model, text, value, label, batch_size, teacher))
    return rows


def save_measured(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    folder: Path,
    windows: TextWindows,
    sources: list[Source],
) -> None:
    """Saves a sparse model, then measures it for its card: on a little text that was held out of
    the sources, or on the built-in one where all was learned from.

    In this order, since measuring may pack weights and let go of what is saved.
    """
    save_model(model, tokenizer, folder)
    name = "held out of " + " + ".join(Path(source.name).name for source in sources)
    if not len(windows.held_out):
        name = "built-in text"
        wanted = 10 * CARD_WINDOWS * windows.length
        windows = read_windows(tokenizer, [Source(BUILTIN)], windows.length, wanted, model)
    text = Text(name, windows.held_out[:CARD_WINDOWS], windows.num_context)
    write_card(model, folder, evaluation_rows(model, [text], []))


def _row(
    model: "PreTrainedModel",
    text: Text,
    value: float | None,
    label: str,
    batch_size: int,
    teacher: "PreTrainedModel | None",
) -> dict[str, Any]:
    with watch_usage(model) as usage:
        result = evaluate_with_bar(
            model, text.ids, label, context=text.context, batch_size=batch_size, teacher=teacher
        )
    layers = result.active_per_layer
    row = {
        "text": text.name,
        "window": text.ids.shape[1],
        "threshold": value,
        "perplexity": result.perplexity,
        "loss": result.loss,
        "predicted_tokens": result.num_tokens,
        "active_ffn": result.active,
        "active_parameters": active_parameters(model, layers),
        "parameters": num_parameters(model),
        "tokens_per_second": result.tokens_per_second,
        "active_per_layer": layers,
    }
    if teacher is not None:
        row["divergence"] = result.divergence
    if layers:
        edges, shares = usage.histogram()
        row["experts_per_token"] = {"edges": edges, "shares": shares}
    return row


def print_evaluations(rows: list[dict[str, Any]], per_layer: bool = False) -> None:
    """The rows of evaluation_rows as a table on stdout."""
    first = rows[0]
    has_teacher = "divergence" in first
    tokens = sum(row["predicted_tokens"] for row in rows if row["threshold"] is None)
    table = Table(
        title=f"{first['parameters'] / 1e6:.1f} M parameters, {tokens:,} predicted tokens"
    )
    table.add_column("text")
    table.add_column("threshold")
    for name in ("perplexity", "KL", "FFN active", "parameters active", "tokens/s"):
        if has_teacher or name != "KL":
            table.add_column(name, justify="right")
    for row in rows:
        divergence = [f"{row['divergence']:.4f}"] if has_teacher else []
        table.add_row(
            row["text"],
            _threshold_name(row),
            f"{row['perplexity']:.3f}",
            *divergence,
            f"{row['active_ffn']:.1%}",
            f"{row['active_parameters']:.1%}",
            f"{row['tokens_per_second']:,.0f}",
        )
    console.out.print(table)
    if per_layer and first["active_per_layer"]:
        _print_layers(rows)
        _print_histogram(rows)


def _threshold_name(row: dict[str, Any]) -> str:
    return "as saved" if row["threshold"] is None else f"{row['threshold']:g}"


def _print_layers(rows: list[dict[str, Any]]) -> None:
    layers = Table(title="FFN active by layer")
    layers.add_column("layer", justify="right")
    for row in rows:
        layers.add_column(f"{row['text']}, {_threshold_name(row)}", justify="right")
    for layer in range(len(rows[0]["active_per_layer"])):
        layers.add_row(str(layer), *(f"{row['active_per_layer'][layer]:.1%}" for row in rows))
    console.out.print(layers)


def _print_histogram(rows: list[dict[str, Any]]) -> None:
    """How many routed experts a token uses in a layer: the share of each tenth of the range."""
    table = Table(title="Routed experts per token and layer: share of tokens by number of experts")
    table.add_column("text")
    for row in rows:
        histogram = row["experts_per_token"]
        ranges = zip(histogram["edges"], histogram["edges"][1:], strict=False)
        shown = (
            f"{low:.0f}-{high:.0f}: {share:.0%}"
            for (low, high), share in zip(ranges, histogram["shares"], strict=True)
        )
        table.add_row(f"{row['text']}, {_threshold_name(row)}", "  ".join(shown))
    console.out.print(table)


def prompt_ids(tokenizer: "PreTrainedTokenizerBase", text: str, chat: bool) -> torch.Tensor:
    """Token ids [1,L] of a prompt, inside the chat template if it is a question."""
    if chat:
        if not tokenizer.chat_template:
            raise UserError("--chat needs a model with a chat template; this one has none")
        try:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # what a template raises is up to it
            raise UserError(f"the model's chat template could not be applied: {error}") from error
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not chat:
        ids = _with_front(tokenizer(text)["input_ids"], ids, tokenizer.eos_token_id)
    if not ids:
        raise UserError("the prompt is empty")
    return torch.tensor([ids])


def _with_front(whole: list[int], plain: list[int], eos: int | None) -> list[int]:
    """The tokens of a text with those that its tokenizer puts in front, without those behind:
    a prompt that ends with EOS has nothing to go on from."""
    for first in range(len(whole) - len(plain) + 1):
        if plain and whole[first : first + len(plain)] == plain:
            return whole[: first + len(plain)]
    return whole[:-1] if not plain and whole and whole[-1] == eos else whole


def text_after(
    tokenizer: "PreTrainedTokenizerBase", prompt: torch.Tensor | None, new: list[int]
) -> str:
    """What token ids say behind a prompt, ids [1,L], or, without one, as a text of their own.

    Decoders drop the space before the first word of a text: they need some tokens of the prompt.
    """
    before = [] if prompt is None else prompt[0, -_DECODER_CONTEXT:].tolist()
    start = tokenizer.decode(before, skip_special_tokens=True)
    whole = tokenizer.decode(before + list(new), skip_special_tokens=True)
    if whole.startswith(start):
        return whole[len(start) :]
    return tokenizer.decode(new, skip_special_tokens=True)


def generate_text(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    text: str,
    max_new_tokens: int,
    *,
    chat: bool = False,
    threshold_value: float | None = None,
    **sampling: Any,
) -> None:
    """Prints prompt and continuation as they come, and the speed on stderr."""
    ids = prompt_ids(tokenizer, text, chat)
    check_tokens(model, tokenizer, ids)
    _check_thresholds(model, [] if threshold_value is None else [threshold_value], "--threshold")
    ready_for_inference(model)
    before, new, shown = None if chat else ids, [], ""

    def show(token: int) -> None:
        """Prints what is certain: a token may end within a character, shown as U+FFFD."""
        nonlocal shown
        new.append(token)
        whole = text_after(tokenizer, before, new)
        if not whole.endswith("\ufffd"):
            print(whole[len(shown) :], end="", flush=True)
            shown = whole

    if not chat:
        print(text, end="", flush=True)
    with nullcontext() if threshold_value is None else threshold(model, threshold_value):
        result = generate(model, ids, max_new_tokens, on_token=show, **sampling)
    print(text_after(tokenizer, before, new)[len(shown) :], flush=True)
    console.say(
        f"{len(result.ids)} tokens, {result.tokens_per_second:.1f} tokens/s "
        f"(prompt of {ids.shape[1]} in {result.prefill_seconds:.2f} s)"
    )
