"""The command `dsmoe report`."""

from pathlib import Path
from typing import Annotated

import typer

from .options import DeviceOption, Dtype, DtypeOption, ModelArgument, TextsOption, WindowOption


def report(
    model: ModelArgument,
    out: Annotated[Path, typer.Option("--out", help="The HTML file to write.")] = Path(
        "report.html"
    ),
    data: TextsOption = None,
    window: WindowOption = 512,
    limit: Annotated[int, typer.Option(min=1, help="Windows of each text, at most.")] = 8,
    dtype: DtypeOption = Dtype.auto,
    device: DeviceOption = "auto",
) -> None:
    """What a sparse model does with a text, as one HTML page.

    A text coloured by what each token used, the experts of every layer, the active share by layer
    and by position, perplexities, and the training if there was one. The page needs no network.

    Example: `dsmoe report smollm2-half --out half.html`
    """
    from ..errors import UserError
    from ..files import atomic_file, check_file
    from ..layers import find_ffns
    from ..loading import load_model, need_tokenizer
    from ..report.measure import measure
    from ..report.page import TITLE, page
    from . import console
    from .text import texts_to_measure

    if not out.absolute().parent.is_dir():
        raise UserError(f"no such folder: {out.absolute().parent}")
    check_file(out, mark=TITLE)
    with console.stage("Loading"):
        loaded, tokenizer = load_model(model, dtype=dtype.value, device=device)
    if not find_ffns(loaded):
        raise UserError(f"{model} is dense: nothing in it is routed")
    need_tokenizer(tokenizer, model)
    texts = texts_to_measure(loaded, tokenizer, data, None, window=window, limit=limit)
    with console.stage("Measuring"):
        findings = measure(loaded, tokenizer, model, texts)
    with atomic_file(out) as partial:
        partial.write_text(page(findings), encoding="utf-8")
    print(f"wrote {out}")
