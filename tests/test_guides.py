"""What the documentation shows is run, word for word: all Python of a page in one namespace, in an empty folder."""

import re
import shlex
from pathlib import Path

import pytest
import typer

from modelhub.cli.commands import app

REPO = Path(__file__).parents[1]
DOCS = REPO / "docs"
# ```python title="Not run by the tests: why": what needs a network, an account or a device. The title is shown.
BLOCK = re.compile(r'^```python(?: title="(Not run by the tests: [^"]+)")?\n(.*?)^```', re.DOTALL | re.MULTILINE)
NOT_RUN = 3  # on all pages together
REAL = re.compile(r"smollm2_135m_instruct_q4|gemma3_270m_q4")  # weights that the package index has


def texts():
    return {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in sorted(DOCS.rglob("*.md"))}


def python(text, path):
    """The page's Python that is run, each block at its own line numbers, for tracebacks that lead there."""
    for match in BLOCK.finditer(text):
        if match[1] is None:
            line = text.count("\n", 0, match.start(2))
            yield compile("\n" * line + match[2], str(path), "exec")


def pages():
    for name, text in texts().items():
        code = [match[2] for match in BLOCK.finditer(text) if match[1] is None]
        if code:
            marks = [pytest.mark.slow, *([pytest.mark.real] if REAL.search("".join(code)) else [])]
            yield pytest.param(name, id=name, marks=marks)


@pytest.mark.parametrize("name", list(pages()))
def test_the_python_of_a_page(name, tmp_path, monkeypatch):
    for folder in ("examples", "finetune"):
        (tmp_path / folder).symlink_to(REPO / folder)
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": f"page_{Path(name).stem.replace('-', '_')}"}
    for block in python((DOCS / name).read_text(encoding="utf-8"), DOCS / name):
        exec(block, names)


def test_every_block_is_run_or_says_why_not():
    for name, text in texts().items():
        fences = re.findall(r"^ *```(?:py|python).*$", text, re.MULTILINE)
        assert len(fences) == len(BLOCK.findall(text)), f"{name}: a block that no test would see: {fences}"
    told = [match[1] for text in texts().values() for match in BLOCK.finditer(text) if match[1]]
    assert len(told) == NOT_RUN, told
    assert len(list(pages())) >= 9


@pytest.mark.parametrize("name", ["README.md", *(f"docs/{name}" for name in texts())])
def test_commands_and_their_options_exist(name):
    commands = typer.main.get_command(app).commands
    shell = "".join(
        re.findall(r"^```bash\n(.*?)^```", (REPO / name).read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    )
    shell = shell.replace("\\\n", " ")
    for line in re.findall(r"^(?:.*&& )?(?:\.venv/bin/)?modelhub .*$", shell, re.MULTILINE):
        words = shlex.split(line[line.index("modelhub ") :], comments=True)
        assert words[1] in commands, line
        known = {
            option for parameter in commands[words[1]].params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        assert {word for word in words[2:] if word.startswith("--")} <= known, line


def test_links_lead_somewhere():
    for path in [REPO / "README.md", *DOCS.rglob("*.md")]:
        prose = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", prose):
            assert (path.parent / target).exists(), f"{path.name} links to {target}"
