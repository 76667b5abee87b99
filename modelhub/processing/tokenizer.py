"""One tokenizer for every model: the ids of transformers, with or without tokenizer.json, from a folder or a GGUF file."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from modelhub.errors import TokenizerError
from modelhub.processing.tokenizer_files import TokenizerParts, read_folder
from modelhub.processing.tokenizer_gguf import read_gguf


class Tokenizer:
    """Text to token ids and back. Made by `from_folder` or `from_gguf`; safe to share between threads.

    vocab_size: number of ids, added tokens included (transformers' `len(tokenizer)`).
    bos_token_id, eos_token_id, pad_token_id, unk_token_id: int or None; the same without `_id`: str or None.
    add_bos, add_eos: whether `encode` puts special tokens before and after a text.
    special_ids: the ids that `decode` leaves out. chat_template: a Jinja template, or None.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._engine = parts.engine
        self._prefix_ids, self._suffix_ids = parts.prefix_ids, parts.suffix_ids
        self._decoder = parts.decoder
        self._to_bytes, self._strips_space = _piece_decoder(parts.decoder)
        self._bytes: dict[int, bytes] = {}  # of the ids decoded so far
        self.vocab_size = parts.engine.size
        self.special_ids = parts.special_ids
        self.chat_template = parts.chat_template
        self.add_bos, self.add_eos = bool(parts.prefix_ids), bool(parts.suffix_ids)
        self.bos_token, self.bos_token_id = self._named(parts, "bos")
        self.eos_token, self.eos_token_id = self._named(parts, "eos")
        self.pad_token, self.pad_token_id = self._named(parts, "pad")
        self.unk_token, self.unk_token_id = self._named(parts, "unk")

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Loads a Hugging Face folder: tokenizer.json and/or tokenizer.model, and the config files beside them."""
        return cls(read_folder(Path(folder)))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Tokenizer:
        """Builds the tokenizer that a GGUF file's metadata holds.

        metadata: the keys as GGUF names them, `tokenizer.ggml.tokens` a list of str, `tokenizer.ggml.scores` a float32
        and `tokenizer.ggml.token_type` an int32 array.
        """
        return cls(read_gguf(metadata))

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of one text. Special tokens spelled inside the text become their ids, as in transformers."""
        return self._around(_checked(self._engine.encode, text), add_special_tokens)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: bool = True) -> list[list[int]]:
        """Token ids of each text."""
        return [self._around(ids, add_special_tokens) for ids in _checked(self._engine.encode_batch, list(texts))]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of some ids; bytes that are not UTF-8 become U+FFFD."""
        stream = self.stream(skip_special_tokens)
        return stream._text(b"".join(stream._bytes(i) for i in ids), final=True)

    def stream(self, skip_special_tokens: bool = True) -> DecodeStream:
        """Decodes ids as they come; all that it returns, joined, is what `decode` returns."""
        return DecodeStream(self, skip_special_tokens)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        return self._engine.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        """The token of an id as the vocabulary spells it."""
        token_id = int(token_id)
        token = self._engine.id_to_token(token_id) if 0 <= token_id < self.vocab_size else None
        if token is None:
            raise TokenizerError(
                f"No token has the id {token_id}: this vocabulary has the ids 0 to {self.vocab_size - 1}. "
                "Ids beyond it come from a model whose embedding is larger than its tokenizer, or from labels (-100)."
            )
        return token

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, bos={self.bos_token!r}, eos={self.eos_token!r})"
