"""Every Python block of README.md and docs/ runs, top to bottom of its page, as a reader runs it.

A page finds a dense model in the folder `model` and a text in `text.txt`. A block that starts with
`# not run: <why>` is left out; why must be said.
"""

import runpy
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def python_blocks(page: Path) -> list[str]:
    tokens = MarkdownIt().parse(page.read_text(encoding="utf-8"))
    return [token.content for token in tokens if token.type == "fence" and token.info == "python"]


def pages_with_code() -> list[Path]:
    return [page for page in PAGES if python_blocks(page)]


def test_pages_have_code():
    assert pages_with_code()


@pytest.mark.parametrize("page", pages_with_code(), ids=lambda page: str(page.relative_to(ROOT)))
def test_python_blocks_run(page, tmp_path, monkeypatch):
    from dsmoe_ext.training.tiny import save_tiny_llama

    save_tiny_llama(tmp_path / "model")
    (tmp_path / "text.txt").write_text("Every token uses only the experts it needs. " * 200)
    monkeypatch.chdir(tmp_path)
    blocks = [block for block in python_blocks(page) if not block.startswith("# not run: ")]
    script = tmp_path / f"{page.stem}.py"
    script.write_text("\n".join(blocks))
    runpy.run_path(str(script), run_name="__main__")
