"""`dsmoe train`: a run folder with log and checkpoints that becomes a model folder at the end."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..command_line import console
from ..command_line.steps import save_measured
from ..command_line.text import mixed_windows
from ..errors import UserError
from ..files import (
    MODEL_FILES,
    OWN_TEXT,
    RUN_FILES,
    atomic_file,
    check_output,
    check_space,
    filled_directory,
    held,
    made_directory,
    remove_owned,
)
from ..layers import find_ffns
from ..models.options import options_of
from .callbacks import read_log
from .checkpoint import find_checkpoints, remove_checkpoint
from .controller import thresholds_suffice
from .data import TextWindows
from .fine_tune import TrainSettings, computes_in_bf16, fine_tune, run_checks
from .record import check_same
from .sources import BUILTIN, SELF, Source, read_windows

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Of the teacher's own text, where nothing is said: more than most runs use once.
OWN_TOKENS = 131072


def run_training(
    model: str,
    out: Path,
    settings: TrainSettings,
    *,
    data: list[str] | None,
    window: int,
    tokens: int | None = None,
    teacher: str | None = None,
    ste: str | None = None,
    sparsity_weight: float | None = None,
    device: str = "cpu",
    checkpoint_every: int = 20,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Trains `model` on `data` into `out`; what it leaves after a kill is whole and resumable.

    data: as for --data; None: the teacher's own text, or the built-in text without a teacher.
    tokens: about so many training tokens of it; None: all, and OWN_TOKENS of the teacher's own.
    """
    sources = [Source.parse(text) for text in data or ([SELF] if teacher else [BUILTIN])]
    if any(source.name == SELF for source in sources) and not teacher:
        raise UserError("--data self is drawn from the dense model: name it with --teacher")
    _check_run(out.expanduser(), settings, resume, overwrite)
    files = [source.name for source in sources if source.is_path]
    place = check_output(out, overwrite or resume, model, teacher, *files)
    with made_directory(place), held(place, out):
        if _train_into(
            place,
            model,
            settings,
            sources=sources,
            tokens=tokens,
            window=window,
            teacher=teacher,
            ste=ste,
            sparsity_weight=sparsity_weight,
            device=device,
            checkpoint_every=checkpoint_every,
            resume=resume,
        ):
            print(f"wrote {out}")
        else:
            console.say(f"{out} is finished ({settings.steps} steps); nothing to do")


def _train_into(
    place: Path,
    model: str,
    settings: TrainSettings,
    *,
    sources: list[Source],
    tokens: int | None,
    window: int,
    teacher: str | None,
    ste: str | None,
    sparsity_weight: float | None,
    device: str,
    checkpoint_every: int,
    resume: bool,
) -> bool:
    """The run in a folder that is held; False if it was finished before."""
    from ..loading import load_model, model_bytes, need_tokenizer, save_model

    with console.stage("Loading"):
        loaded, tokenizer = load_model(model, dtype="fp32", device=device)
        need_tokenizer(tokenizer, model)
        teaching = None
        if teacher:
            quick = "bf16" if computes_in_bf16(loaded, settings) else "fp32"
            teaching = load_model(teacher, dtype=quick, only="dense", device=device)[0].eval()
    if teaching is not None and teaching.config.vocab_size != loaded.config.vocab_size:
        raise UserError(f"{teacher} and {model} have different vocabularies")
    settings = _adapt(loaded, model, settings, ste, sparsity_weight)
    kept = place / OWN_TEXT if resume else None
    windows = _windows(loaded, teaching, tokenizer, sources, tokens, window, settings.seed, kept)
    identity = {"model": str(model), "teacher": str(teacher), "window": window}
    identity |= {"ste": ste, "sparsity_weight": sparsity_weight}
    checks = run_checks(loaded, windows, settings, identity)
    if resume and _is_finished(place):
        check_same(place, checks)
        return False
    # Weights and AdamW's two moments in fp32, once more while a checkpoint replaces the one before.
    check_space(place, model_bytes(loaded) * (7 if checkpoint_every else 1))
    if not resume:  # all that could be refused has been read: an overwritten run goes
        remove_owned(place, (*RUN_FILES, *MODEL_FILES))
    first = find_checkpoints(place)[-1][0] if resume and find_checkpoints(place) else 0
    if first:
        console.say(f"resuming after step {first}")
    if any(source.name == SELF for source in sources):  # drawing it anew takes minutes
        with atomic_file(place / OWN_TEXT) as partial:
            torch.save(vars(windows), partial)
    try:
        with console.progress("Training", settings.steps - first, "steps") as advance:
            fine_tune(
                loaded,
                windows,
                settings,
                teacher=teaching,
                run_dir=place,
                checkpoint_every=checkpoint_every,
                resume=resume,
                identity=identity,
                on_step=lambda row: advance(1, note=describe(row)),
            )
    except KeyboardInterrupt:
        found = find_checkpoints(place)
        if found:
            console.say(
                f"stopped; the same command with --resume goes on after step {found[-1][0]}"
            )
        raise
    # A model that came into a new run's folder meanwhile is somebody else's and stays.
    with filled_directory(place, overwrite=resume) as folder:
        if find_ffns(loaded):
            save_measured(loaded, tokenizer, folder, windows, sources)
        else:
            save_model(loaded, tokenizer, folder)
    for _, folder in find_checkpoints(place):
        remove_checkpoint(folder)
    return True


def _windows(
    loaded: "PreTrainedModel",
    teacher: "PreTrainedModel | None",
    tokenizer: "PreTrainedTokenizerBase",
    sources: list[Source],
    tokens: int | None,
    window: int,
    seed: int,
    kept: Path | None,
) -> TextWindows:
    """The text of the run; `kept` holds that of the run to resume, if the teacher said it."""
    if all(source.name != SELF for source in sources):
        return read_windows(tokenizer, sources, window, tokens, model=loaded)
    if kept and kept.is_file():
        return TextWindows(**torch.load(kept, weights_only=True))
    tokens = tokens or OWN_TOKENS
    return mixed_windows(
        teacher, tokenizer, "the model", sources, tokens=tokens, window=window, seed=seed
    )


def _adapt(
    loaded: "PreTrainedModel",
    name: str,
    settings: TrainSettings,
    ste: str | None,
    sparsity_weight: float | None,
) -> TrainSettings:
    """Gives a converted model what the options say, and takes from it the target it has."""
    layers = find_ffns(loaded)
    if not layers:
        chosen = (settings.target_active, ste, sparsity_weight)
        if any(value is not None for value in chosen):
            raise UserError(
                f"{name} is dense; --target-active, --ste, --sparsity-weight need a converted one"
            )
        return settings
    options = options_of(loaded)
    if ste is not None:
        options["ste"] = ste
        for layer in layers:
            layer.ste = ste
    if settings.target_active is not None:
        options["target_active"] = settings.target_active
    if sparsity_weight is not None:
        options["sparsity_weight"] = sparsity_weight
    elif options["target_active"] is not None and thresholds_suffice(options):
        options["sparsity_weight"] = 0.0
    return dataclasses.replace(settings, target_active=options["target_active"])


def describe(row: dict[str, Any]) -> str:
    """The few numbers of a step that stand beside the bar."""
    active = f", {row['active']:.3f} active" if "active" in row else ""
    return f"loss {row['loss']:.3f}{active}"


def _is_finished(place: Path) -> bool:
    has_model = (place / "config.json").is_file()
    return has_model and bool(read_log(place / "train.jsonl")) and not find_checkpoints(place)


def _check_run(out: Path, settings: TrainSettings, resume: bool, overwrite: bool) -> None:
    """What is wrong with the run in OUT, as far as that is seen before anything is loaded."""
    found, rows = find_checkpoints(out), read_log(out / "train.jsonl")
    if found and not overwrite and not resume:
        raise UserError(
            f"{out} holds an unfinished run (step {found[-1][0]}); "
            "add --resume to go on, or --overwrite to start again"
        )
    if not resume:
        return
    if out.is_dir() and any(out.iterdir()) and not found and not (out / "train.jsonl").exists():
        raise UserError(f"{out} holds no training run to resume")
    if _is_finished(out) and rows[-1]["step"] != settings.steps:
        raise UserError(
            f"{out} is a finished run of {rows[-1]['step']} steps; train it further as the "
            "model of another run, or give --overwrite instead of --resume to start again"
        )
