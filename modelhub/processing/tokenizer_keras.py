"""Reads the tokenizer of a KerasHub preset: tokenizer.json says which class, assets/tokenizer holds its vocabulary.

Ids are KerasHub's but in three places, where they are those that the models were trained with, and transformers': a
special token typed in a text becomes its id, as everywhere in modelhub; a run of more than 31 spaces; and Llama 3's
words, which keras-hub 0.32 does not cut (it hands its pattern to the library as plain text).

Format: keras_hub/src/tokenizers of https://github.com/keras-team/keras-hub
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from modelhub.errors import TokenizerError
from modelhub.processing.guards import LARGEST_TOKENIZER, check_size, read_json
from modelhub.processing.tokenizer_files import (
    TokenizerParts,
    TokenizersEngine,
    ids_around,
    make_parts,
    read_tokenizer_model,
)
from modelhub.processing.tokenizer_gguf import LLAMA3_WORDS

_ASSETS = "assets/tokenizer"
_GEMMA = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
_LLAMA = {"bos_token": "<s>", "eos_token": "</s>"}
# The classes have their special tokens in their code.
SENTENCEPIECE = {
    "GemmaTokenizer": _GEMMA, "Gemma3Tokenizer": _GEMMA, "LlamaTokenizer": _LLAMA, "MistralTokenizer": _LLAMA,
}  # fmt: skip
BYTE_LEVEL = {"Llama3Tokenizer": {"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}}


def is_kerashub(folder: Path) -> bool:
    """Whether the folder's tokenizer.json is KerasHub's, and not the `tokenizers` library's."""
    return (folder / _ASSETS).is_dir()


def read_kerashub(folder: Path) -> TokenizerParts:
    """Reads tokenizer.json, preprocessor.json and assets/tokenizer. Raises TokenizerError."""
    data = read_json(folder / "tokenizer.json")
    name = str(data.get("registered_name")).rpartition(">")[2]
    given: Any = data.get("config")
    preprocessor: Any = {}
    if (folder / "preprocessor.json").is_file():
        preprocessor = read_json(folder / "preprocessor.json").get("config")
    if not isinstance(given, dict) or not isinstance(preprocessor, dict):
        raise TokenizerError(f"{folder}: tokenizer.json and preprocessor.json have no config. Download them again.")
    add_bos = preprocessor.get("add_start_token", True) is not False
    if name in SENTENCEPIECE:
        config: dict[str, Any] = SENTENCEPIECE[name] | {"add_bos_token": add_bos}
        return read_tokenizer_model(_asset(folder, "vocabulary.spm"), config, own_prefix=True)
    if name in BYTE_LEVEL:
        return _read_byte_level(folder, BYTE_LEVEL[name], given, add_bos)
    raise TokenizerError(
        f"{folder} holds a KerasHub tokenizer of the class {name[:80]!r}; modelhub reads "
        f"{', '.join([*SENTENCEPIECE, *BYTE_LEVEL])}."
    )


def _read_byte_level(folder: Path, named: dict[str, str], given: dict[str, Any], add_bos: bool) -> TokenizerParts:
    vocabulary, merges = read_json(_asset(folder, "vocabulary.json")), _asset(folder, "merges.txt")
    try:
        lines = merges.read_text(encoding="utf-8").split("\n")
        halves = (line.partition(" ") for line in lines if line and not line.startswith("#version:"))
        pairs = [(left, right) for left, _, right in halves]
        backend = HFTokenizer(models.BPE(vocabulary, pairs, ignore_merges=True))
        special = [*named.values(), *(given.get("unsplittable_tokens") or ())]
        added = [AddedToken(token, normalized=False, special=True) for token in dict.fromkeys(special)]
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(
            f"{merges.parent}: the vocabulary and the merges make no tokenizer: {error}. Download them again."
        ) from error
    if missing := [token.content for token in added if token.content not in vocabulary]:
        raise TokenizerError(f"{merges.parent}: vocabulary.json lacks {', '.join(missing[:10])}. Download it again.")
    words = pre_tokenizers.Split(Regex(LLAMA3_WORDS), "isolated")
    space = given.get("add_prefix_space") is True
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=space, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens(added)
    engine = TokenizersEngine(backend)
    around = ids_around(engine, named, add_bos, add_eos=False)
    return make_parts(engine, backend.get_added_tokens_decoder(), named, {"type": "ByteLevel"}, around)


def _asset(folder: Path, name: str) -> Path:
    path = folder / _ASSETS / name
    if not path.is_file():
        found = ", ".join(sorted(file.name for file in path.parent.iterdir())[:10])
        raise TokenizerError(f"{path} is missing; {_ASSETS} holds {found or 'nothing'}. Download the preset again.")
    check_size(path, LARGEST_TOKENIZER)
    return path
