"""Results on disk: whole or absent, and never at the cost of what somebody else put there.

Every command writes its folder OUT through `atomic_directory`, which keeps five promises:
    links       OUT's links are followed first: a link stays one, the result lies where it leads.
    whole       A new OUT appears by one rename. In a folder that is there already (a mount point,
                say) files move in one by one, the one that makes it a result (`_LAST`) at the end.
    others      Files that no result of ours has (`owns`, patterns below) are never moved or
                deleted, --overwrite or not.
    inputs      OUT neither holds what is read nor lies in it.
    one writer  Two runs cannot write one OUT; what appears there meanwhile stays, and the result
                is kept beside it under a name that the error tells.
"""

import contextlib
import errno
import fcntl
import glob
import json
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

CARD = "README.md"  # of a model; a name that users write too, so that ours carries a mark
CARD_MARK = (
    "<!-- written by dsmoe_ext, which replaces it with the model; yours may take its place -->"
)

# What a result consists of: paths below OUT, with wildcards.
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "spiece.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt"),
    *("sentencepiece.bpe.model", "chat_template.jinja", "additional_chat_templates/*.jinja"),
)
MODEL_FILES = (
    *("config.json", "generation_config.json", "model.safetensors", "model-*-of-*.safetensors"),
    *("model.safetensors.index.json", "*processor_config.json", "dsmoe_auto.py", *TOKENIZER_FILES),
    CARD,
)
CHECKPOINT_FILES = (  # Trainer's
    *("trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt"),
    *("rng_state*.pth", *MODEL_FILES),
)
OWN_TEXT = "own_text.pt"  # what the teacher said, to go on with after a kill
RUN_FILES = (
    *("train.jsonl", "run.json", OWN_TEXT, "tensorboard/events.out.tfevents.*"),
    *(f"checkpoint-*/{name}" for name in CHECKPOINT_FILES),
)
DEMO_FILES = (
    *("report.json", "report.png", "train.jsonl", "tensorboard/events.out.tfevents.*"),
    *(f"model/{name}" for name in MODEL_FILES),
)
# Without one of these a folder is no model, no checkpoint, no report: they move in last, out first.
_LAST = ("config.json", "trainer_state.json", "report.json")
_PARTIAL = ".partial-"


# ------------------------------------------------------------------------------ before the work


def check_output(target: str | Path, overwrite: bool = False, *reads: str | Path | None) -> Path:
    """The folder that `target` stands for, links followed; an error where it could not be written
    at the end, holds something and may not, or overlaps with one of the paths that are read."""
    try:
        place = Path(target).expanduser().resolve()
    except (OSError, RuntimeError) as error:
        raise UserError(f"{target} cannot be followed to a folder ({error})") from None
    for source in reads:
        _check_apart(target, place, source)
    if place.exists() and not place.is_dir():
        raise UserError(f"{target} is a file; give a directory to write to")
    nearest = next(path for path in (place, *place.parents) if path.exists())
    if not nearest.is_dir():
        raise UserError(f"{nearest} is not a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"no permission to write in {nearest}")
    if place.is_dir() and not overwrite and (names := _entries(place)):
        raise UserError(
            f"{target} exists and is not empty (it holds {min(names)}); "
            "choose another or add --overwrite"
        )
    return place


def check_file(target: str | Path, mark: str | None = None) -> None:
    """Refuses, before the work, a file to write that cannot be made, or is there already and does
    not hold the `mark` of ours."""
    place = Path(target).expanduser()
    if place.is_dir():
        raise UserError(f"{target} is a directory; give a file to write to")
    if place.is_file() and mark and mark in place.read_text(encoding="utf-8", errors="replace"):
        return
    if os.path.lexists(place):
        raise UserError(f"{target} exists; choose another name or delete it")
    check_output(place, overwrite=True)


def _entries(folder: Path) -> list[str]:
    """Names in a folder, without what a killed run or a file system's maker left."""
    own = (_partial_prefix(folder, inside=True), "lost+found")
    return [name for name in os.listdir(folder) if not name.startswith(own)]


def _check_apart(target: str | Path, place: Path, source: str | Path | None) -> None:
    if not source or not (read := Path(source).expanduser()).exists():
        return  # the name of a model in a hub, or an error that its reader words
    # The files of a folder may be links to others (a hub's cache is made of them).
    links = [path for path in read.iterdir() if path.is_symlink()] if read.is_dir() else []
    for path in (read, *links):
        if _lies_in(path.resolve(), place):
            raise UserError(f"{target} holds {path}, which is read; choose another output")
    if _lies_in(place, read.resolve()):
        raise UserError(f"{target} lies in {source}, which is read; choose another output")


def _lies_in(path: Path, folder: Path) -> bool:
    """By device and inode, so that a bind mount or a file system without case hides nothing."""
    return folder.exists() and any(
        os.path.samefile(above, folder) for above in (path, *path.parents) if above.exists()
    )


def check_space(target: Path, num_bytes: int) -> None:
    """Says that the disk is too small before the work, not after it."""
    place = Path(target).resolve()
    free = shutil.disk_usage(next(p for p in (place, *place.parents) if p.exists())).free
    if free < num_bytes:
        raise UserError(
            f"no space left on the device for {target}: "
            f"needs about {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


# ------------------------------------------------------------------------------ one writer


@contextlib.contextmanager
def held(folder: Path, name: str | Path | None = None, wait: bool = False) -> Iterator[None]:
    """The folder belongs to this block alone; the system lets go of it when the process dies.

    An error that calls it `name` if another run has it, or with `wait` its end is waited for.
    """
    lock = _lock(folder, wait)
    if lock is None:
        raise UserError(f"another run is writing {name or folder}")
    try:
        yield
    finally:
        os.close(lock)


def _lock(folder: Path, wait: bool = False) -> int | None:
    """A descriptor that holds the folder, or None if another process or thread does."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        os.close(descriptor)
        return None
    except OSError:  # a file system without locks: no protection there, but a result
        pass
    return descriptor


def _partial_prefix(place: Path, inside: bool) -> str:
    name = "dsmoe" if inside else place.name
    if len(name.encode()) > 100:  # a file's name has at most 255 bytes
        name = f"{name[:24]}-{zlib.crc32(name.encode()):08x}"
    return f".{name}{_PARTIAL}"


@contextlib.contextmanager
def _partial_directory(place: Path, inside: bool, name: str | Path) -> Iterator[Path]:
    """An empty directory inside `place`, or beside it, held and in the end removed.

    What a killed run left there goes; if a live one is at work, that is an error.
    """
    folder, prefix = place if inside else place.parent, _partial_prefix(place, inside)
    for left in [folder / entry for entry in os.listdir(folder) if entry.startswith(prefix)]:
        with contextlib.suppress(FileNotFoundError, PermissionError), held(left, name):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder / f"{prefix}{os.getpid()}"
    while True:
        partial.mkdir(exist_ok=True)
        lock = _lock(partial)
        if lock is None:
            raise UserError(f"another run is writing {name}")
        if partial.exists() and os.path.samestat(os.fstat(lock), partial.stat()):
            break  # not taken for a dead run's between the two calls
        os.close(lock)
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        os.close(lock)


@contextlib.contextmanager
def made_directory(folder: Path) -> Iterator[None]:
    """The directory and those above it exist in the block; those left empty go again after it."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty: the result is there
            for path in missing:
                path.rmdir()


# ------------------------------------------------------------------------------ the result


@contextlib.contextmanager
def atomic_directory(
    target: str | Path,
    overwrite: bool = False,
    reads: Iterable[str | Path | None] = (),
    owns: Iterable[str] = MODEL_FILES,
) -> Iterator[Path]:
    """Yields an empty directory whose files are those of `target` once the block succeeds.

    Open it before the work: all that can be refused is refused then, and nobody else writes
    `target` meanwhile. overwrite: files of the patterns `owns` are replaced, all others stay.
    """
    place = check_output(target, overwrite, *reads)
    if place.is_dir():
        with held(place, target), filled_directory(place, overwrite, owns) as partial:
            yield partial
        return
    with made_directory(place.parent), _partial_directory(place, False, target) as partial:
        yield partial
        try:
            os.rename(partial, place)  # never onto a file or a folder that holds something
        except OSError:
            if not place.exists():
                raise
            raise _kept(partial, target) from None


@contextlib.contextmanager
def filled_directory(
    place: Path, overwrite: bool, owns: Iterable[str] = MODEL_FILES
) -> Iterator[Path]:
    """The same for a folder that exists and that the caller holds."""
    with _partial_directory(place, True, place) as partial:
        yield partial
        files = [path.relative_to(partial) for path in partial.rglob("*") if not path.is_dir()]
        files = [file for file in files if is_ours(place / file)]
        taken = {file for file in files if os.path.lexists(place / file)}
        if taken and not overwrite:
            raise _kept(partial, place)
        _exchange(partial, place, files, taken | set(owned_files(place, owns)))


def _exchange(partial: Path, place: Path, files: list[Path], old: set[Path]) -> None:
    """Moves `old` out of `place` and `files` into it, or, where that fails, all of it back."""
    for file in files:
        if (above := place / file.parent).is_symlink():
            raise UserError(f"{above} is a link; nothing is written through it")
    aside, moved = partial / ".replaced", []

    def move(source: Path, destination: Path) -> None:
        destination.parent.mkdir(parents=True, exist_ok=True)
        moved.append((source, destination))
        os.replace(source, destination)

    try:
        for file in sorted(old, key=lambda file: file.name not in _LAST):
            move(place / file, aside / file)
        for file in sorted(files, key=lambda file: file.name in _LAST):
            move(partial / file, place / file)
    except BaseException:
        for source, destination in reversed(moved):
            with contextlib.suppress(FileNotFoundError):  # the one that was not moved any more
                os.replace(destination, source)
        raise
    _remove_empty({place / file.parent for file in old} - {place})


def _kept(partial: Path, target: str | Path) -> UserError:
    """Saves a result whose place was taken while it was made."""
    name = partial.name.removeprefix(".").replace(_PARTIAL, "-")
    partial.rename(kept := partial.with_name(name))
    return UserError(f"{target} was filled by somebody else meanwhile; the result is in {kept}")


def owned_files(folder: Path, owns: Iterable[str]) -> list[Path]:
    """Paths below `folder`, relative to it, of the files of the patterns; none behind a link."""
    found = {Path(name) for pattern in owns for name in glob.glob(pattern, root_dir=folder)}
    return sorted(
        file
        for file in found
        if ((folder / file).is_file() or (folder / file).is_symlink())
        and not any((folder / above).is_symlink() for above in file.parents)
        and is_ours(folder / file)
    )


def is_ours(file: Path) -> bool:
    """Whether a file of a result's name may be replaced: not a card that somebody else wrote."""
    if file.name != CARD or not os.path.lexists(file):
        return True
    return file.is_file() and CARD_MARK in file.read_text(encoding="utf-8", errors="replace")


def remove_owned(folder: Path, owns: Iterable[str]) -> None:
    """Deletes the files of the patterns and the folders that this empties, nothing else."""
    files = owned_files(folder, owns)
    for file in sorted(files, key=lambda file: file.name not in _LAST):
        (folder / file).unlink()
    _remove_empty({folder / file.parent for file in files} - {folder})


def _remove_empty(folders: Iterable[Path]) -> None:
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


@contextlib.contextmanager
def atomic_file(target: str | Path) -> Iterator[Path]:
    """Yields a path beside `target` (beside what it links to) that takes its name in the end."""
    place = Path(target).expanduser().resolve()
    if place.is_dir():
        raise UserError(f"{target} is a directory; give a file to write to")
    place.parent.mkdir(parents=True, exist_ok=True)
    partial = place.with_name(f"{_partial_prefix(place, inside=False)}{os.getpid()}")
    try:
        yield partial
        os.replace(partial, place)
    finally:
        partial.unlink(missing_ok=True)


def json_text(value: Any, indent: int | None = None) -> str:
    """JSON that every reader takes: numbers that are not finite become null."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        if isinstance(value, (list, tuple)):
            return [plain(entry) for entry in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(plain(value), indent=indent, allow_nan=False)


# ------------------------------------------------------------------------------ disks


def is_out_of_space(error: BaseException) -> bool:
    """True for a full disk or quota, also when it comes as safetensors' text of an OS error."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(f"(os error {number})" in str(error) for number in numbers)


def directory_size(path: Path) -> int:
    """Bytes of the files in a directory and below."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
