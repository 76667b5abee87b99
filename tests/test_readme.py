"""What the README shows is run, word for word."""

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


@pytest.mark.real
@pytest.mark.slow
def test_the_python_of_the_readme(gemma3_gguf, tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names: dict = {}
    for folder in ("finetune", "examples"):
        (tmp_path / folder).symlink_to(Path(__file__).parents[1] / folder)
    monkeypatch.chdir(tmp_path)  # the README saves an adapter
    for block in blocks:
        exec(block, names)
    shown = capsys.readouterr().out
    assert "the capital of the country of France" in shown and "Paris" in shown
    assert names["logits"].shape == (1, 4, 262144) and len(names["texts"]) == 2


def test_every_command_of_the_readme_exists():
    from modelhub.cli.commands import app

    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.name or group.typer_instance.info.name for group in app.registered_groups}
    used = set(re.findall(r"^(?:\.venv/bin/)?modelhub (\w+)", README, re.MULTILINE))
    assert used and used <= known
