"""One tokenizer for every model, from a folder or a GGUF file, with the ids that transformers gives."""

from __future__ import annotations

import codecs
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any, Literal, Self

from modelhub.errors import TokenizerError
from modelhub.habits import Habits
from modelhub.processing import spm
from modelhub.processing.guards import guarded
from modelhub.processing.tokenizer_classes import clean_up
from modelhub.processing.tokenizer_files import (
    TokenizerParts,
    TokenizersEngine,
    read_folder,
    sentencepiece_decoder,
    write_folder,
)
from modelhub.processing.tokenizer_gguf import read_gguf, write_gguf
from modelhub.processing.tokenizer_keras import is_kerashub, read_kerashub

Around = bool | Literal["once"]


class Tokenizer(Habits):
    """Text to token ids and back. Made by `from_folder` or `from_gguf`; safe to share between threads.

    vocab_size: number of ids, added tokens included (transformers' `len(tokenizer)`).
    bos_token_id, eos_token_id, pad_token_id, unk_token_id: int or None; the same without `_id`: str or None.
    add_bos, add_eos: whether `encode` puts special tokens before and after a text.
    special_ids: the ids that `decode` leaves out. chat_template: a Jinja template, or None.
    """

    def __init__(self, parts: TokenizerParts) -> None:
        self._parts = parts
        self._engine = parts.engine
        self._prefix_ids, self._suffix_ids = parts.prefix_ids, parts.suffix_ids
        self._to_bytes, self._strips_space = _piece_decoder(parts.decoder)
        self._cleans = parts.cleans_up
        if self._cleans:  # what goes depends on what is before it
            self._to_bytes = None
        self._bytes: dict[int, bytes] = {}  # of the ids decoded so far
        self.vocab_size = parts.engine.size
        self.special_ids = parts.special_ids
        self.chat_template = parts.chat_template
        self.add_bos, self.add_eos = bool(parts.prefix_ids), bool(parts.suffix_ids)
        self.bos_token, self.bos_token_id = self._named(parts.named["bos"])
        self.eos_token, self.eos_token_id = self._named(parts.named["eos"])
        self.pad_token, self.pad_token_id = self._named(parts.named["pad"])
        self.unk_token, self.unk_token_id = self._named(parts.named["unk"])

    @classmethod
    def from_folder(cls, folder: str | Path) -> Self:
        """Loads a Hugging Face folder: tokenizer.json and/or tokenizer.model, and the config files beside them.

        Or a KerasHub preset's: tokenizer.json and assets/tokenizer.
        """
        folder = Path(folder)
        with guarded(f"The tokenizer files in {folder} hold something unexpected"):
            return cls(read_kerashub(folder) if is_kerashub(folder) else read_folder(folder))

    @classmethod
    def from_gguf(cls, metadata: Mapping[str, Any]) -> Self:
        """Builds the tokenizer that a GGUF file's metadata holds.

        metadata: the keys as GGUF names them, `tokenizer.ggml.tokens` a list of str, `tokenizer.ggml.scores` a float32
        and `tokenizer.ggml.token_type` an int32 array.
        """
        with guarded("The tokenizer in this GGUF file holds something unexpected"):
            return cls(read_gguf(metadata))

    def save(self, folder: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, for `from_folder` and for transformers' AutoTokenizer.

        The folder is made if it is missing. Tokenizer files in it are replaced, once all of the new ones are complete.
        The special tokens and the chat template are those that this object has now. The ids are the same, except
        where the `tokenizers` library differs from SentencePiece: among cuts of equal score in unigram models, and on
        combining characters in models with Unicode normalization.

        Raises TokenizerError for a SentencePiece model that tokenizer.json cannot express: types "word" and "char", and
        spaces behind words.
        """
        named = {name: getattr(self, f"{name}_token") for name in self._parts.named}
        write_folder(Path(folder), replace(self._parts, named=named, chat_template=self.chat_template))

    def to_gguf(self, vocab_size: int) -> dict[str, Any]:
        """The metadata of a GGUF file from which `from_gguf` and llama.cpp build this tokenizer.

        vocab_size: rows of the model's embedding, which become the number of tokens. Raises TokenizerError for a
        tokenizer that llama.cpp cannot follow.
        """
        named = {name: getattr(self, f"{name}_token") for name in self._parts.named}
        return write_gguf(replace(self._parts, named=named, chat_template=self.chat_template), vocab_size)

    def __call__(self, text: str | Sequence[str], add_special_tokens: Around = True) -> dict[str, Any]:
        """{"input_ids", "attention_mask"} of one text, or of each of a list, as lists; nothing is padded."""
        if isinstance(text, str):
            ids = self.encode(text, add_special_tokens)
            return {"input_ids": ids, "attention_mask": [1] * len(ids)}
        rows = self.encode_batch(text, add_special_tokens)
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}

    def encode(self, text: str, add_special_tokens: Around = True) -> list[int]:
        """Token ids of one text. Special tokens spelled inside the text become their ids, as in transformers.

        add_special_tokens: whether the tokenizer's own go before and after it. "once": not before a text that spells
        the first of them itself, as models are trained to read it.
        """
        return self._around(_checked(self._engine.encode, text), add_special_tokens)

    def encode_batch(self, texts: Sequence[str], add_special_tokens: Around = True) -> list[list[int]]:
        """Token ids of each text."""
        return [self._around(ids, add_special_tokens) for ids in _checked(self._engine.encode_batch, list(texts))]

    def encode_offsets(self, text: str, add_special_tokens: Around = True) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of one text, as `encode` gives them, and the range [start, end) of `text` that each stands for.

        Ranges count the characters of the str. Tokens that share a character (bytes) all have its range; special tokens
        put before the text have (0, 0), those after it (len(text), len(text)). Where a tokenizer keeps the text as it
        is, the ranges cover all of it; what a normalizer removes may be in none.
        """
        return self.encode_offsets_batch([text], add_special_tokens)[0]

    def encode_offsets_batch(
        self, texts: Sequence[str], add_special_tokens: Around = True
    ) -> list[tuple[list[int], list[tuple[int, int]]]]:
        """Token ids and character ranges of each text."""
        texts = list(texts)
        encoded = _checked(self._engine.encode_offsets_batch, texts)
        found = []
        for text, (ids, offsets) in zip(texts, encoded, strict=True):
            before, after = self._sides(ids, add_special_tokens)
            ranges = [(0, 0)] * len(before) + offsets + [(len(text), len(text))] * len(after)
            found.append((before + ids + after, ranges))
        return found

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids. Bytes that are not UTF-8 become U+FFFD; their valid neighbours stay.

        Ids beyond the vocabulary are nothing: models whose embedding has more rows than their tokenizer has tokens can
        answer with them. Raises TokenizerError for negative ones.
        """
        if self._to_bytes is None:
            assert isinstance(self._engine, TokenizersEngine)
            known = [i for i in map(int, ids) if self._token(i)]
            with guarded("This tokenizer cannot decode these ids"):
                text = self._engine.decode(known, skip_special_tokens)
                return clean_up(text) if self._cleans else text
        text = b"".join([self._token_bytes(i, skip_special_tokens) for i in ids]).decode("utf-8", "replace")
        return text.removeprefix(" ") if self._strips_space else text

    def stream(self, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> DecodeStream:
        """Decodes ids as they come; all that it returns, joined, is what `decode` returns.

        after: the ids before them. All that it returns then goes on where the text of these ends: with the space
        before its first word, which some tokenizers leave out at the beginning of a text.
        """
        return DecodeStream(self, skip_special_tokens, after)

    def token_to_id(self, token: str) -> int | None:
        """The id of a token as the vocabulary spells it, or None."""
        return self._engine.token_to_id(token)

    def id_to_token(self, token_id: int) -> str:
        """The token of an id as the vocabulary spells it."""
        token = self._token(token_id)
        if token is None:
            raise self._no_such_id(token_id)
        return token

    def _token(self, token_id: int) -> str | None:
        """None for ids beyond the vocabulary, and for gaps in it. Raises TokenizerError for negative ones."""
        token_id = int(token_id)
        if token_id < 0:
            raise self._no_such_id(token_id)
        return self._engine.id_to_token(token_id) if token_id < self.vocab_size else None

    def _no_such_id(self, token_id: int) -> TokenizerError:
        return TokenizerError(
            f"No token has the id {token_id}: this vocabulary has the ids 0 to {self.vocab_size - 1}. "
            "Ids beyond it come from a model whose embedding is larger than its tokenizer, or from labels (-100)."
        )

    def _around(self, ids: list[int], add_special_tokens: Around) -> list[int]:
        before, after = self._sides(ids, add_special_tokens)
        return before + ids + after

    def _sides(self, ids: list[int], add_special_tokens: Around) -> tuple[list[int], list[int]]:
        """What goes before and after the ids of a text."""
        if not add_special_tokens:
            return [], []
        spelled = add_special_tokens == "once" and ids[:1] == self._prefix_ids[:1]
        return [] if spelled else self._prefix_ids, self._suffix_ids

    def _token_bytes(self, token_id: int, skip_special_tokens: bool) -> bytes:
        token_id = int(token_id)
        if skip_special_tokens and token_id in self.special_ids:
            return b""
        data = self._bytes.get(token_id)
        if data is None:
            assert self._to_bytes is not None
            token = self._token(token_id)
            if token is None:
                return b""  # not kept: there is no end of such ids
            data = self._bytes[token_id] = self._to_bytes(token)
        return data

    def _named(self, token: str | None) -> tuple[str | None, int | None]:
        token_id = None if token is None else self._engine.token_to_id(token)
        return (None, None) if token_id is None else (token, token_id)

    def __len__(self) -> int:
        return self.vocab_size

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, bos={self.bos_token!r}, eos={self.eos_token!r})"


class DecodeStream:
    """Text from ids that come one at a time, in constant time for each; never shows half a character."""

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> None:
        if tokenizer._to_bytes is None:
            raise TokenizerError(
                "This tokenizer's decoder cannot stream: only byte-level and SentencePiece decoders work token by "
                "token. Collect the ids and call decode()."
            )
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = not any(tokenizer._token_bytes(i, skip_special_tokens) for i in after)

    def push(self, token_id: int) -> str:
        """The text that this id completes: "" for special tokens and in the middle of a character."""
        return self._emit(self._decoder.decode(self._tokenizer._token_bytes(token_id, self._skip)))

    def flush(self) -> str:
        """What is left at the end, U+FFFD for a character that was never completed; the stream starts anew."""
        text = self._emit(self._decoder.decode(b"", final=True))
        self._decoder.reset()
        self._at_start = True
        return text

    def _emit(self, text: str) -> str:
        if text and self._at_start:
            self._at_start = False
            if self._tokenizer._strips_space:
                return text.removeprefix(" ")
        return text


def _checked(encode: Callable[[Any], Any], texts: Any) -> Any:
    """Runs an encoder; says what was wrong with the text where the library only says "must be str"."""
    try:
        with guarded("This tokenizer cannot encode the text"):
            return encode(texts)
    except TokenizerError:
        for text in texts if isinstance(texts, list) else [texts]:
            if not isinstance(text, str):
                raise TokenizerError(
                    f"A text to encode must be a str, found {type(text).__name__}: {text!r:.80}"
                ) from None
            broken = re.search("[\ud800-\udfff]", text)
            if broken:
                raise TokenizerError(
                    f"The text is not valid Unicode: a lone surrogate {broken[0]!r} at position {broken.start()}. "
                    "Mend it with text.encode('utf-16', 'surrogatepass').decode('utf-16', 'replace')."
                ) from None
        raise


def _piece_decoder(decoder: Mapping[str, Any] | None) -> tuple[Callable[[str], bytes] | None, bool]:
    """How a token becomes bytes, and whether the text loses its first space; (None, False): not token by token."""
    if decoder is None:  # tokens joined by spaces
        return _spaced_bytes, True
    if decoder["type"] == "ByteLevel":
        return _byte_level_bytes, False
    for strips_space in (False, True):
        if decoder == sentencepiece_decoder(strips_space):
            return _sentencepiece_bytes, strips_space
    return None, False


def _spaced_bytes(token: str) -> bytes:
    return b" " + token.encode()


def _sentencepiece_bytes(token: str) -> bytes:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", token):
        return bytes([int(token[3:5], 16)])
    return token.replace(spm.SPACE, " ").encode()


def _byte_level_bytes(token: str) -> bytes:
    alphabet = _byte_alphabet()
    try:
        return bytes([alphabet[character] for character in token])
    except KeyError:  # an added token, spelled as it reads
        return token.encode()


@cache
def _byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's `bytes_to_unicode`)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
