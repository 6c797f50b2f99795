"""Output that is either whole or absent: written beside its place, then renamed into it."""

import contextlib
import errno
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


def _marker(kind: str) -> str:
    return f"{kind}-{socket.gethostname()}-"


def remove_leftovers(target: Path) -> None:
    """Deletes what a killed run of this machine left beside `target`; live runs keep theirs."""
    for kind in ("partial", "replaced"):
        prefix = f".{target.name}.{_marker(kind)}"
        for path in target.parent.glob(f"{prefix}*"):
            pid = path.name[len(prefix) :]
            if not pid.isdigit() or _is_running(int(pid)):
                continue
            if kind == "replaced" and not target.exists():
                os.replace(path, target)  # killed between the two renames: the old one comes back
            elif path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def check_output(target: Path, overwrite: bool = False, *sources: str | Path | None) -> None:
    """Refuses, before any work is done, an output that could not be written at the end, or in which
    one of the `sources` that the work reads would be lost."""
    target = Path(target)
    if target.is_file():
        raise UserError(f"{target} is a file; give a directory to write to")
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        raise UserError(f"{target} exists and is not empty; choose another or add --overwrite")
    for source in sources:
        if source and target.resolve() in Path(source).resolve().parents:
            raise UserError(f"{target} holds {source}, which is read; choose another output")
    parent = target.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise UserError(f"{parent} is not a directory")
    if not os.access(parent, os.W_OK):
        raise UserError(f"no permission to write in {parent}")


def check_space(target: Path, num_bytes: int) -> None:
    """Says that the disk is too small before the work, not after it."""
    parent = Path(target).absolute().parent
    while not parent.exists():
        parent = parent.parent
    free = shutil.disk_usage(parent).free
    if free < num_bytes:
        raise UserError(
            f"no space left on the device for {target}: "
            f"needs about {num_bytes / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
        )


@contextlib.contextmanager
def atomic_directory(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yields an empty directory beside `target` that takes its name if the block succeeds."""
    target = Path(target).absolute()
    check_output(target, overwrite)
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    partial = target.with_name(f".{target.name}.{_marker('partial')}{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if target.exists():
            replaced = target.with_name(f".{target.name}.{_marker('replaced')}{os.getpid()}")
            os.replace(target, replaced)
            try:
                os.replace(partial, target)
            except OSError:
                os.replace(replaced, target)
                raise
            shutil.rmtree(replaced, ignore_errors=True)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextlib.contextmanager
def atomic_file(target: Path) -> Iterator[Path]:
    """Yields a path beside `target` that takes its name if the block succeeds."""
    target = Path(target).absolute()
    if target.is_dir():
        raise UserError(f"{target} is a directory; give a file to write to")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    partial = target.with_name(f".{target.name}.{_marker('partial')}{os.getpid()}")
    try:
        yield partial
        os.replace(partial, target)
    finally:
        partial.unlink(missing_ok=True)


def is_out_of_space(error: BaseException) -> bool:
    """True for a full disk or quota, also when it comes as safetensors' text of an OS error."""
    numbers = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in numbers:
        return True
    return any(f"(os error {number})" in str(error) for number in numbers)


def directory_size(path: Path) -> int:
    """Bytes of the files in a directory and below."""
    return sum(file.stat().st_size for file in Path(path).rglob("*") if file.is_file())
