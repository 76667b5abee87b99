"""What the guides show is run, word for word: all Python of a page in one namespace, in an empty folder."""

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[1] / "docs"
GUIDES = ["custom-pieces.md", "frameworks.md"]


def blocks(name):
    """The page's Python, each block at its own line numbers, for tracebacks that lead there."""
    text = (DOCS / name).read_text(encoding="utf-8")
    for match in re.finditer(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        line = text.count("\n", 0, match.start(1))
        yield compile("\n" * line + match[1], str(DOCS / name), "exec")


@pytest.mark.slow
@pytest.mark.parametrize("name", GUIDES)
def test_the_python_of_a_guide(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = list(blocks(name))
    assert len(found) >= 2
    names: dict = {"__name__": f"guide_{Path(name).stem}"}
    for block in found:
        exec(block, names)


def test_links_lead_somewhere():
    for path in DOCS.glob("*.md"):
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
