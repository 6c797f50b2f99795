"""Where text comes from, and how it is mixed."""

import json

import pytest
import torch

from dsmoe_ext.errors import UserError
from dsmoe_ext.training.sources import Source, read_windows
from dsmoe_ext.training.tiny import byte_tokenizer
from dsmoe_ext.training.wikitext import wikitext_windows

pytestmark = pytest.mark.quick


@pytest.mark.parametrize(
    ("text", "name", "weight"),
    [
        ("notes.txt", "notes.txt", 1),
        ("wiki=3", "wiki", 3),
        ("code/=0.5", "code/", 0.5),
        ("a=b", "a=b", 1),
        ("a=b=2", "a=b", 2),
        ("self", "self", 1),
    ],
)
def test_names_and_weights(text, name, weight):
    assert Source.parse(text) == Source(name, weight)


def test_a_file_with_an_equals_sign(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x=2").write_text("hello")
    assert Source.parse("x=2") == Source("x=2")


def test_weights_must_be_positive():
    for text in ("a=0", "a=-1", "a=inf", "a=nan"):
        with pytest.raises(UserError, match="above 0"):
            Source.parse(text)


def test_jsonl_text_and_folders(tmp_path):
    rows = [{"text": "one"}, {"text": "two", "id": 3}]
    (tmp_path / "b.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    (tmp_path / "a.txt").write_text("zero")
    (tmp_path / "other.bin").write_bytes(b"\xff")
    assert list(Source(str(tmp_path)).documents()) == ["zero", "one", "two"]


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"text": ["one", None, "two"]}), tmp_path / "a.parquet")
    assert list(Source(str(tmp_path / "a.parquet")).documents()) == ["one", "two"]
    parquet.write_table(pyarrow.table({"body": ["one"]}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="no column"):
        list(Source(str(tmp_path / "b.parquet")).documents())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "x"}\n{"body": "y"}\n', "line 2: not a JSON object"),
        ("a.jsonl", "[1]\n", "line 1"),
        ("a.jsonl", '{"text": \n', "line 1"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message):
    content = content.encode() if isinstance(content, str) else content
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        list(Source(str(tmp_path / name)).documents())


def test_missing_and_empty(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(Source(str(tmp_path / "none")).documents())
    with pytest.raises(UserError, match="file in"):
        list(Source(str(tmp_path)).documents())
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(UserError, match="is empty"):
        read_windows(byte_tokenizer(), [Source(str(tmp_path / "a.txt"))], 8)


def test_mixture_by_weight(tmp_path):
    """Tokens are shared out 3 : 1, windows spread through each text, its tenths held out."""
    for name in "ab":
        (tmp_path / name).write_text(name * 8000)
    sources = [Source(str(tmp_path / "a"), 3), Source(str(tmp_path / "b"))]
    windows = read_windows(byte_tokenizer(), sources, 8, most_tokens=1600)
    first = windows.train[:, 0]
    assert torch.bincount(first)[first.unique()].tolist() == [150, 50]
    assert len(windows.held_out) == 200  # of both, whatever is trained on
    everything = read_windows(byte_tokenizer(), sources, 8)
    assert len(everything.train) == 1800


def test_wikitext_by_convention(tmp_path):
    """Rows are lines with their end, or nothing; joined by two line ends; windows of 2048."""
    path = tmp_path / "wiki.test.raw"
    path.write_text(" = A = \n\n" + " word" * 1000 + " \n")
    ids, context = wikitext_windows(byte_tokenizer(), path)
    assert ids.shape == (2, 2048) and context == 0
    assert byte_tokenizer().decode(ids[0][:17]) == " = A = \n\n\n\n\n word"
    path.write_text("short")
    with pytest.raises(UserError, match="less than one window"):
        wikitext_windows(byte_tokenizer(), path)
    with pytest.raises(UserError, match="cannot be read"):
        wikitext_windows(byte_tokenizer(), tmp_path / "none")
