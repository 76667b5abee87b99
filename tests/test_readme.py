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
    assert "the capital of the country of France" in shown and "Paris" in shown and "Bag" in shown
    assert names["logits"].shape == (1, 4, 262144) and len(names["texts"]) == 2
    assert names["again"].generate("Hello", 4) and (tmp_path / "classifier.onnx").stat().st_size > 10_000


def test_the_readme_is_short_and_its_commands_are_marked():
    assert len(README.splitlines()) <= 180
    assert "<!-- test command -->\n```bash\n" in README
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert max(len(block.splitlines()) for block in blocks) <= 10
