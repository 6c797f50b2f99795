"""`dsmoe train`: a run folder with log and checkpoints that becomes a model folder at the end."""

import dataclasses
import os
import shutil
from pathlib import Path

from ..command_line import console
from ..errors import UserError
from ..files import atomic_directory, check_output, check_space
from .checkpoint import find_checkpoints
from .data import read_text, windows_of
from .evaluate import ffn_layers
from .log import read_log
from .loop import TrainSettings, fine_tune


def run_training(
    model: str,
    out: Path,
    settings: TrainSettings,
    *,
    data: Path | None,
    window: int,
    teacher: str | None = None,
    ste: str | None = None,
    sparsity_weight: float | None = None,
    device: str = "cpu",
    checkpoint_every: int = 20,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Trains `model` on `data` into `out`; what it leaves after a kill is whole and resumable."""
    from ..loading import load_model, model_bytes, need_tokenizer

    if _is_done(out, settings, resume):
        console.say(f"{out} is finished ({settings.steps} steps); nothing to do")
        return
    _check_run(out, resume, overwrite, (model, teacher, data))
    with console.stage("Loading"):
        loaded, tokenizer = load_model(model, dtype="fp32", device=device)
        need_tokenizer(tokenizer, model)
        teaching = None
        if teacher:
            teaching = load_model(teacher, only="llama", device=device)[0].eval()
    if teaching is not None and teaching.config.vocab_size != loaded.config.vocab_size:
        raise UserError(f"{teacher} and {model} have different vocabularies")
    settings = _adapt(loaded, model, settings, ste, sparsity_weight)
    windows = windows_of(tokenizer, read_text(data), window)
    # Weights and AdamW's two moments in fp32, once more while a checkpoint replaces the one before.
    check_space(out, model_bytes(loaded) * (7 if checkpoint_every else 1))
    if overwrite and not resume and out.is_dir():  # all that could be refused has been read
        _empty(out)
    first = find_checkpoints(out)[-1][0] if resume and find_checkpoints(out) else 0
    if first:
        console.say(f"resuming after step {first}")
    identity = {"model": str(model), "teacher": str(teacher), "window": window}
    identity |= {"ste": ste, "sparsity_weight": sparsity_weight}
    try:
        with console.progress("Training", settings.steps - first, "steps") as advance:
            fine_tune(
                loaded,
                windows,
                settings,
                teacher=teaching,
                run_dir=out,
                checkpoint_every=checkpoint_every,
                resume=resume,
                identity=identity,
                on_step=lambda row: advance(1, note=describe(row)),
            )
    except KeyboardInterrupt:
        found = find_checkpoints(out)
        if found:
            console.say(
                f"stopped; the same command with --resume goes on after step {found[-1][0]}"
            )
        raise
    save_into(loaded, tokenizer, out)
    for _, folder in find_checkpoints(out):
        shutil.rmtree(folder, ignore_errors=True)
    print(f"wrote {out}")


def _adapt(loaded, name: str, settings: TrainSettings, ste, sparsity_weight) -> TrainSettings:
    """Gives a converted model what the options say, and takes from it the target it has."""
    layers, config = ffn_layers(loaded), loaded.config
    if not layers:
        chosen = (settings.target_active, ste, sparsity_weight)
        if any(value is not None for value in chosen):
            raise UserError(
                f"{name} is dense; --target-active, --ste, --sparsity-weight need a converted one"
            )
        return settings
    if ste is not None:
        config.ste = ste
        for layer in layers:
            layer.ste = ste
    if settings.target_active is not None:
        config.target_active = settings.target_active
    if sparsity_weight is not None:
        config.sparsity_weight = sparsity_weight
    elif config.target_active is not None:
        # The thresholds hold the target. A loss that pushes the scores down all the time would only
        # make them follow, and switch experts for nothing.
        config.sparsity_weight = 0.0
    return dataclasses.replace(settings, target_active=config.target_active)


def describe(row: dict) -> str:
    """The few numbers of a step that stand beside the bar."""
    active = f", {row['active']:.3f} active" if "active" in row else ""
    return f"loss {row['loss']:.3f}{active}"


def save_into(model, tokenizer, out: Path) -> None:
    """Saves into an existing run folder: file by file, config.json (what makes it a model) last."""
    from ..loading import quiet_transformers

    with atomic_directory(out / "model") as folder:
        with quiet_transformers():
            model.save_pretrained(folder)
            if tokenizer is not None:
                tokenizer.save_pretrained(folder)
        for path in sorted(folder.iterdir(), key=lambda path: path.name == "config.json"):
            os.replace(path, out / path.name)
    (out / "model").rmdir()


def _is_done(out: Path, settings: TrainSettings, resume: bool) -> bool:
    rows = read_log(out / "train.jsonl") if resume else []
    if not rows or not (out / "config.json").is_file() or find_checkpoints(out):
        return False
    if rows[-1]["step"] != settings.steps:
        raise UserError(
            f"{out} is a finished run of {rows[-1]['step']} steps; train it further as the "
            "model of another run, or give --overwrite instead of --resume to start again"
        )
    return True


def _check_run(out: Path, resume: bool, overwrite: bool, sources: tuple) -> None:
    found = find_checkpoints(out)
    if resume:
        if out.is_dir() and any(out.iterdir()) and not found and not (out / "train.jsonl").exists():
            raise UserError(f"{out} holds no training run to resume")
        check_output(out, overwrite=True)
        return
    if found and not overwrite:
        raise UserError(
            f"{out} holds an unfinished run (step {found[-1][0]}); "
            "add --resume to go on, or --overwrite to start again"
        )
    check_output(out, overwrite, *sources)
    if overwrite and out.resolve() in [Path(source).resolve() for source in sources if source]:
        raise UserError(f"{out} is read for the training; choose another output")


def _empty(folder: Path) -> None:
    """The folder stays: it may be a link."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
