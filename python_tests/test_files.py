"""dsmoe_ext/files.py: results are whole or absent, and what others put in a folder stays."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsmoe_ext.errors import UserError
from dsmoe_ext.files import (
    DEMO_FILES,
    atomic_directory,
    atomic_file,
    check_file,
    check_output,
    held,
    is_out_of_space,
    remove_owned,
)

pytestmark = pytest.mark.quick


def write(folder, **contents):
    """Files of a folder by name (a double underscore stands for the dot)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in contents.items():
        (folder / name.replace("__", ".")).write_text(text)


def contents(folder) -> dict:
    """{path: text} of every file in a folder and below."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def make(target, **options):
    """A little model in `target`."""
    with atomic_directory(target, **options) as folder:
        write(folder, config__json="new", model__safetensors="new")


def test_a_new_folder_is_whole_or_absent(tmp_path):
    target = tmp_path / "a" / "out"
    with pytest.raises(RuntimeError), atomic_directory(target) as folder:
        write(folder, half="x")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []
    with atomic_directory(target) as folder:
        write(folder, whole="x")
        assert not target.exists()
    assert contents(tmp_path) == {"a/out/whole": "x"}
    assert target.stat().st_mode & 0o777 == (tmp_path / "a").stat().st_mode & 0o777


def test_overwrite_replaces_a_model_and_nothing_else(tmp_path):
    old = {"config__json": "old", "model-00001-of-00002__safetensors": "old"}
    write(tmp_path, **old, tokenizer__model="old", thesis__txt="mine")
    write(tmp_path / "checkpoint-3", state__json="mine")
    before = contents(tmp_path)
    with pytest.raises(UserError, match=r"not empty.*--overwrite"):
        make(tmp_path)
    with pytest.raises(RuntimeError), atomic_directory(tmp_path, overwrite=True) as folder:
        write(folder, config__json="half")
        raise RuntimeError
    assert contents(tmp_path) == before
    make(tmp_path, overwrite=True)
    mine = {"thesis.txt": "mine", "checkpoint-3/state.json": "mine"}
    assert contents(tmp_path) == {"config.json": "new", "model.safetensors": "new"} | mine
    assert sorted(os.listdir(tmp_path)) == sorted(
        ["config.json", "model.safetensors", "thesis.txt", "checkpoint-3"]
    )


def test_a_failing_exchange_is_undone(tmp_path, monkeypatch):
    write(tmp_path, config__json="old", tokenizer__json="old", mine="mine")
    before, replace = contents(tmp_path), os.replace

    def fails_at_the_end(source, destination):
        if str(destination) == str(tmp_path / "config.json") and "replaced" not in str(source):
            raise KeyboardInterrupt
        replace(source, destination)

    monkeypatch.setattr(os, "replace", fails_at_the_end)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path, overwrite=True)
    assert contents(tmp_path) == before


def test_links_are_followed_and_stay(tmp_path):
    write(tmp_path / "big")
    (tmp_path / "out").symlink_to(tmp_path / "big")
    (tmp_path / "dangling").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    make(tmp_path / "out")
    make(tmp_path / "dangling")
    assert (tmp_path / "out").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "big/config.json").exists() and (tmp_path / "nowhere/config.json").exists()
    with pytest.raises((UserError, OSError)):
        make(tmp_path / "loop")
    (tmp_path / "file").write_text("old")
    (tmp_path / "name").symlink_to("file")
    with atomic_file(tmp_path / "name") as partial:
        partial.write_text("new")
    assert (tmp_path / "name").is_symlink() and (tmp_path / "file").read_text() == "new"


def test_links_below_out_lead_nowhere(tmp_path):
    """A file that is a link is replaced, not written through; a folder that is one is refused."""
    write(tmp_path / "foreign", config__json="mine")
    write(tmp_path / "out")
    (tmp_path / "out/config.json").symlink_to(tmp_path / "foreign/config.json")
    make(tmp_path / "out", overwrite=True)
    assert not (tmp_path / "out/config.json").is_symlink()
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/model").symlink_to(tmp_path / "foreign")
    with (
        pytest.raises(UserError, match="is a link"),
        atomic_directory(tmp_path / "demo", overwrite=True, owns=DEMO_FILES) as folder,
    ):
        write(folder / "model", config__json="new")
    remove_owned(tmp_path / "demo", DEMO_FILES)
    assert contents(tmp_path / "foreign") == {"config.json": "mine"}


def test_a_folder_that_cannot_be_renamed(tmp_path, monkeypatch):
    """A mount point, or one whose parent may not be written: only its inside is touched."""
    rename = os.rename

    def busy(source, destination):
        if str(destination) == str(tmp_path / "out"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        rename(source, destination)

    monkeypatch.setattr(os, "rename", busy)
    monkeypatch.setattr(os, "replace", busy)
    (tmp_path / "out").mkdir()
    (tmp_path / "out/lost+found").mkdir()  # every new ext4 file system has it
    make(tmp_path / "out")
    assert contents(tmp_path) == {"out/config.json": "new", "out/model.safetensors": "new"}


def test_what_appears_meanwhile_stays(tmp_path):
    for there_before in (False, True):
        late = tmp_path / f"late-{there_before}"
        if there_before:
            late.mkdir()
        with (
            pytest.raises(UserError, match="the result is in") as error,
            atomic_directory(late) as f,
        ):
            write(f, config__json="new")
            write(late, config__json="precious")
        assert (late / "config.json").read_text() == "precious"
        kept = str(error.value).rpartition(" ")[2]
        assert contents(Path(kept))["config.json"] == "new"


def test_one_writer(tmp_path):
    code = (
        "import sys, pathlib; from dsmoe_ext.files import atomic_directory\n"
        "with atomic_directory(sys.argv[1], overwrite=True) as folder:\n"
        "    (folder / 'config.json').write_text('x'); print('ready', flush=True); sys.stdin.read()"
    )
    (tmp_path / "there").mkdir()
    for name in ("new", "there"):
        target = tmp_path / name
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        other = subprocess.Popen([sys.executable, "-c", code, target], cwd=tmp_path, **pipes)
        other.stdout.readline()
        with pytest.raises(UserError, match="another run is writing"):
            make(target)
        other.kill()  # what it leaves is nobody's and goes
        other.communicate()
        make(target)
        assert contents(target) == {"config.json": "new", "model.safetensors": "new"}
    assert sorted(os.listdir(tmp_path)) == ["new", "there"]
    with held(tmp_path), pytest.raises(UserError, match="another run"), held(tmp_path):
        pass


def test_inputs_lie_apart(tmp_path):
    write(tmp_path / "run", corpus__txt="x", model__gguf="x")
    write(tmp_path / "run/model", config__json="x")
    write(tmp_path / "snapshot")
    (tmp_path / "snapshot/model.safetensors").symlink_to(tmp_path / "run/corpus.txt")
    (tmp_path / "same").symlink_to("run")
    reads = ("run", "run/corpus.txt", "run/model", "run/model.gguf", "snapshot", "same/model")
    for source in reads:
        for out in ("run", "same"):
            with pytest.raises(UserError, match="which is read"):
                check_output(tmp_path / out, True, None, tmp_path / source)
    for out in ("run/model/out", "same/model/out"):
        with pytest.raises(UserError, match="lies in"):
            check_output(tmp_path / out, True, tmp_path / "run/model")
    check_output(tmp_path / "run/out", False, "smollm2", tmp_path / "run/model", tmp_path / "none")


def test_names_up_to_the_longest(tmp_path):
    for name in ("a" * 255, "ü" * 127, "out[1]*?", "-x", " "):
        make(tmp_path / name)
        make(tmp_path / name, overwrite=True)
    assert len(os.listdir(tmp_path)) == 5


def test_outputs_that_cannot_be(tmp_path):
    write(tmp_path, file="x")
    os.mkfifo(tmp_path / "pipe")
    for name, message in (
        ("file", "is a file"),
        ("file/below", "not a directory"),
        ("pipe", "file"),
    ):
        with pytest.raises(UserError, match=message):
            check_output(tmp_path / name)
    with pytest.raises(UserError, match="is a directory"), atomic_file(tmp_path):
        pass


def test_a_file_of_others_is_not_replaced(tmp_path):
    write(tmp_path, file="mine")
    (tmp_path / "dangling").symlink_to("nowhere")
    for name, message in ((".", "is a directory"), ("file", "exists"), ("dangling", "exists")):
        with pytest.raises(UserError, match=message):
            check_file(tmp_path / name)
    check_file(tmp_path / "new")
    check_file(tmp_path / "file", mark="min")
    with pytest.raises(UserError, match="exists"):
        check_file(tmp_path / "file", mark="ours")


def test_a_file_is_whole_or_as_it_was(tmp_path):
    write(tmp_path, file="old")
    with pytest.raises(RuntimeError), atomic_file(tmp_path / "file") as partial:
        partial.write_text("half")
        raise RuntimeError
    assert contents(tmp_path) == {"file": "old"}


def test_full_disks_are_recognised():
    assert is_out_of_space(OSError(errno.ENOSPC, "No space left on device"))
    text = "I/O error: No space left on device (os error 28)"
    assert is_out_of_space(RuntimeError(text))
    assert not is_out_of_space(OSError(errno.EACCES, "Permission denied"))
