"""Code that the pages show runs, from top to bottom of each page."""

from pathlib import Path

import pytest
from pages import ROOT, blocks, text_of

DOCS = ROOT / "docs"
# Page -> how many of its first blocks are left out: the quick start's first one takes MiniLM through the whole way, in minutes.
RUNNABLE = {"index.md": 1, "how-it-works.md": 0, "kernels.md": 0, "faq.md": 0, "large-models.md": 0}


@pytest.mark.parametrize("name", RUNNABLE)
def test_the_code_of_a_page_runs(name: str, tmp_path: Path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page: dict = {}
    for block in blocks(text_of(DOCS / name), "python")[RUNNABLE[name] :]:
        exec(compile(block, name, "exec"), page)
    assert "hp" in page
