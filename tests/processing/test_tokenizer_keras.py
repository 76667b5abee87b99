"""KerasHub's tokenizer files from strangers: sizes are checked before anything is read. Ids: tests/hub/test_kerashub.py."""

import json
import os
import tracemalloc

import pytest

from modelhub.errors import TokenizerError
from modelhub.processing.tokenizer import Tokenizer

CLASSES = {"vocabulary.spm": "Gemma3Tokenizer", "vocabulary.json": "Llama3Tokenizer", "merges.txt": "Llama3Tokenizer"}


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("tokenizer.json", 10_000_000), ("preprocessor.json", 10_000_000), ("assets/tokenizer/vocabulary.json", 10_000_000),
        ("assets/tokenizer/vocabulary.spm", 64_000_000), ("assets/tokenizer/merges.txt", 64_000_000),
    ],
)  # fmt: skip
def test_large_files_are_refused(tmp_path, name, limit):
    (tmp_path / "assets" / "tokenizer").mkdir(parents=True)
    kind = CLASSES.get(os.path.basename(name), "Llama3Tokenizer")
    (tmp_path / "tokenizer.json").write_text(json.dumps({"registered_name": f"keras_hub>{kind}", "config": {}}))
    for other in ("vocabulary.json", "merges.txt"):
        (tmp_path / "assets" / "tokenizer" / other).write_text("{}")
    with open(tmp_path / name, "wb") as file:
        file.truncate(limit + 1)  # takes no room on the disk
    tracemalloc.start()
    try:
        with pytest.raises(TokenizerError, match=f"{os.path.basename(name)} has {limit + 1} bytes; .* {limit} at most"):
            Tokenizer.from_folder(tmp_path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()
