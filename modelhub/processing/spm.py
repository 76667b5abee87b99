"""SentencePiece models (a `tokenizer.model`, or the vocabulary inside a GGUF file) with the ids transformers gives.

SentencePiece loads the 262144 pieces of Gemma in 0.05 s; the `tokenizers` library takes 0.7 s for the same vocabulary
as JSON, and transformers 1.6 s. Two things differ, and both are settled here in favour of transformers: added tokens
(`<bos>`, `<start_of_turn>`) typed inside a text, and long runs of spaces.

Format: https://github.com/google/sentencepiece/blob/master/src/sentencepiece_model.proto
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from modelhub.errors import TokenizerError

SPACE = "\u2581"  # how SentencePiece writes a space inside a piece
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # piece types, and GGUF's token types
UNIGRAM, BPE = 1, 2  # trainer_spec.model_type

# A protobuf field that comes again overrides the first one: appended to a model, this turns its dummy prefix off.
NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


def load_model(model: bytes) -> SentencePieceProcessor:
    """A processor over a serialized ModelProto."""
    sp = SentencePieceProcessor()
    try:
        sp.LoadFromSerializedProto(model)
        return sp
    except RuntimeError as error:
        raise TokenizerError(
            f"SentencePiece cannot read this model ({len(model)} bytes, starting with {model[:16]!r}): {error}. "
            "Download it again; a file that starts with b'version https' is a Git LFS pointer, not the model."
        ) from error


class SentencePieceEngine:
    """Text to ids and back over one SentencePiece model plus added tokens.

    added: id -> token, matched in the raw text before SentencePiece sees it.
    prefix_space: put a space before a text that has none, as LlamaTokenizer does (the model's own must then be off).
    """

    def __init__(self, sp: SentencePieceProcessor, added: Mapping[int, AddedToken], prefix_space: bool = False) -> None:
        self.sp = sp
        self.prefix_space = prefix_space
        self.added_tokens = {i: token for i, token in added.items() if token.content}
        self.added = {i: token.content for i, token in self.added_tokens.items()}
        self.added_ids = {content: i for i, content in self.added.items()}
        self.size = max([len(sp), *(i + 1 for i in self.added)])
        # The library of transformers itself finds the added tokens, so that lstrip, rstrip, single_word and overlaps
        # come out the same: a vocabulary of one word, which stands for every stretch of text between added tokens.
        self._splitter = HFTokenizer(models.WordLevel({"<text>": 0}, unk_token="<text>"))
        self._splitter.add_tokens(list(added.values()))
        self._real_ids = {self._splitter.token_to_id(content): i for content, i in self.added_ids.items()}

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for added_id, start, end in self._split(text):
            if added_id is not None:
                ids.append(added_id)
            else:
                ids += self.sp.encode(self._needed_space(text, start) + text[start:end])
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [self.encode(text) for text in texts]

    def encode_offsets_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        return [self._encode_offsets(text) for text in texts]

    def _encode_offsets(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        ids: list[int] = []
        offsets: list[tuple[int, int]] = []
        for added_id, start, end in self._split(text):
            if added_id is not None:
                ids.append(added_id)
                offsets.append((start, end))
                continue
            space = self._needed_space(text, start)
            found: Any = self.sp.encode(space + text[start:end], out_type="offset_mapping")
            ids += found["ids"]
            shift = len(space)  # the first character of the text takes the space as well, as in transformers
            ranges = [(max(low - shift, 0), max(high - shift, shift)) for low, high in found["offsets"]]
            # SentencePiece gives a character that took several pieces to the last of them
            for i in reversed(range(len(ranges) - 1)):
                if ranges[i][0] == ranges[i][1]:
                    ranges[i] = ranges[i + 1]
            offsets += [(start + low, start + high) for low, high in ranges]
        return ids, offsets

    def to_tokenizers(self, strips_space: bool) -> HFTokenizer:
        """The same tokenizer for the `tokenizers` library; strips_space: decoding drops the first space."""
        spec, sp = read_spec(self.sp.serialized_model_proto()), self.sp
        if spec.model_type not in (UNIGRAM, BPE) or not spec.usual_spaces:
            raise TokenizerError(
                f"This SentencePiece model (type {spec.model_type}) cannot be written as tokenizer.json, only BPE (2) "
                "and unigram (1) models with spaces in front of the words. Copy its tokenizer.model instead."
            )
        pieces = [sp.id_to_piece(i) for i in range(len(sp))]
        scores = [sp.get_score(i) for i in range(len(sp))]
        in_text = [
            not (sp.is_control(i) or sp.is_unknown(i) or sp.is_byte(i) or sp.is_unused(i)) for i in range(len(sp))
        ]
        has_bytes = sp.is_byte(sp.piece_to_id("<0x00>"))
        model: models.Model
        if spec.model_type == BPE:
            ids = {piece: i for i, piece in enumerate(pieces)}
            for i, token in spec.added.items():
                if not token.special:  # user-defined: never cut, so merged before all others
                    scores[i] = 1e6 - i
            merges = []
            for i, piece in enumerate(pieces):
                for cut in range(1, len(piece)) if in_text[i] else ():
                    left, right = ids.get(piece[:cut]), ids.get(piece[cut:])
                    if left is not None and right is not None and in_text[left] and in_text[right]:
                        merges.append((-scores[i], i, left, right))
            pairs = [(pieces[left], pieces[right]) for *_, left, right in sorted(merges)]
            unknown = pieces[sp.unk_id()]
            model = models.BPE(ids, pairs, unk_token=unknown, fuse_unk=True, byte_fallback=has_bytes)
        else:
            # the library has no piece types: what is never found in a text gets a score that never wins
            entries = [(piece, score if ok else -1e9) for piece, score, ok in zip(pieces, scores, in_text, strict=True)]
            model = models.Unigram(entries, sp.unk_id(), has_bytes)
        backend = HFTokenizer(model)
        steps: list[Any] = [normalizers.Precompiled(spec.charsmap)] if spec.charsmap else []
        if spec.removes_spaces:
            steps += [normalizers.Replace(Regex(r"\A +| +\z"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
        if spec.add_dummy_prefix:
            steps.append(normalizers.Prepend(SPACE))
        steps.append(normalizers.Replace(" ", SPACE))
        if spec.removes_spaces:
            steps.append(normalizers.Replace(Regex(SPACE + r"+\z"), ""))
        backend.normalizer = normalizers.Sequence(steps) if len(steps) > 1 else steps[0]
        if self.prefix_space:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
        backend.decoder = decoders.Sequence(
            [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
            + ([decoders.Strip(" ", 1, 0)] if strips_space else [])
        )
        backend.add_tokens([token for _, token in sorted(self.added_tokens.items())])
        return backend

    def _split(self, text: str) -> Iterator[tuple[int | None, int, int]]:
        """The id of an added token, or None for the text between them, and its range."""
        split = self._splitter.encode(text, add_special_tokens=False)
        for index, (start, end) in zip(split.ids, split.offsets, strict=True):
            yield self._real_ids[index] if index else None, start, end

    def _needed_space(self, text: str, start: int) -> str:
        return " " if self.prefix_space and start == 0 and not text.startswith((" ", SPACE)) else ""

    def id_to_token(self, token_id: int) -> str | None:
        if token_id in self.added:
            return self.added[token_id]
        return self.sp.id_to_piece(token_id) if 0 <= token_id < len(self.sp) else None

    def token_to_id(self, token: str) -> int | None:
        if token in self.added_ids:
            return self.added_ids[token]
        return piece_id(self.sp, token)


def piece_id(sp: SentencePieceProcessor, piece: str) -> int | None:
    """The id of a piece, or None where SentencePiece itself would answer with the unknown id."""
    index = sp.piece_to_id(piece)
    return index if sp.id_to_piece(index) == piece else None


def merge_space_runs(model: bytes) -> bytes:
    """Returns the model with its user-defined runs of spaces as ordinary pieces that merge first, shortest first.

    SentencePiece cuts the longest user-defined run it can (40 spaces: 31 + 9). transformers' conversion has no such
    rule, it merges pairs in the order of the vocabulary (40 spaces: 16 + 24). Runs of up to 31 come out the same.
    """
    data = bytearray(model)
    for length in range(2, 40):
        run = SPACE.encode() * length
        start = model.find(b"\x0a" + bytes([len(run)]) + run + b"\x15")
        if start < 0:
            break
        score = start + 2 + len(run) + 1
        if model[score + 4 : score + 6] == bytes([0x18, USER_DEFINED]):
            data[score : score + 4] = struct.pack("<f", 1e6 - length)
            data[score + 5] = NORMAL
    return bytes(data)


@dataclass(frozen=True)
class ModelSpec:
    """What a ModelProto says beside its vocabulary."""

    added: dict[int, AddedToken]  # control and user-defined pieces
    model_type: int
    charsmap: bytes  # of its Unicode normalization; empty: none
    removes_spaces: bool  # around the text, and of several all but one
    add_dummy_prefix: bool
    usual_spaces: bool  # are written as "\u2581", and the one that is added comes first

    @property
    def keeps_text(self) -> bool:
        return not self.charsmap and not self.removes_spaces


def read_spec(model: bytes) -> ModelSpec:
    """Reads what SentencePiece's Python interface does not tell: the user-defined pieces and the two specs."""
    added: dict[int, AddedToken] = {}
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        position = index = 0
        while position < len(model) and model[position] == 0x0A:  # a piece
            size, position = _varint(model, position + 1)
            end = position + size
            # "\n" size piece, "\x15" score of 4 bytes, "\x18" type: other shapes have no type, which means NORMAL
            if size == model[position + 1] + 9 and model[end - 2] == 0x18 and model[end - 1] in (CONTROL, USER_DEFINED):
                piece = model[position + 2 : end - 7].decode()
                added[index] = AddedToken(piece, normalized=False, special=model[end - 1] == CONTROL)
            position, index = end, index + 1
        for field, value in _fields(model[position:]):
            if field == 2:
                trainer.update(_fields(value))
            elif field == 3:
                normalizer.update(_fields(value))
    except (IndexError, KeyError, UnicodeDecodeError, TypeError) as error:
        raise TokenizerError(
            f"The SentencePiece model ({len(model)} bytes) is damaged: {error}. Download it again."
        ) from error
    return ModelSpec(
        added=added,
        model_type=trainer.get(3, UNIGRAM),
        charsmap=normalizer.get(2, b""),
        removes_spaces=bool(normalizer.get(4, True)),
        add_dummy_prefix=bool(normalizer.get(3, True)),
        usual_spaces=bool(normalizer.get(5, True)) and not trainer.get(24),
    )


def build_model(tokens: Sequence[str], scores: np.ndarray, types: np.ndarray) -> bytes:
    """Serializes a BPE ModelProto without normalization and without dummy prefix.

    tokens: N strings; scores: (N,) float32; types: (N,) int32, piece types. The wire format is simple enough to write
    by hand, which spares the protobuf library.
    """
    packed = np.asarray(scores, "<f4").tobytes()
    parts: list[bytes] = []
    for index, (token, kind) in enumerate(zip(tokens, np.asarray(types).tolist(), strict=True)):
        piece = token.replace(" ", SPACE).encode()
        score = packed[4 * index : 4 * index + 4]
        if len(piece) < 118:  # both lengths fit one byte: nearly every piece, and the fast way
            parts.append(b"\x0a%c\x0a%c%b\x15%b\x18%c" % (len(piece) + 9, len(piece), piece, score, kind))
        else:
            parts.append(_bytes_field(1, _bytes_field(1, piece) + b"\x15%b\x18%c" % (score, kind)))
    byte_fallback = int(np.count_nonzero(np.asarray(types) == BYTE) == 256)
    trainer = b"\x18%c\x98\x02%c" % (BPE, byte_fallback)  # 3: model_type, 35: byte_fallback
    # 1: name, 3: add_dummy_prefix, 4: remove_extra_whitespaces, 5: escape_whitespaces
    normalizer = _bytes_field(1, b"identity") + b"\x18\x00\x20\x00\x28\x01"
    return b"".join([*parts, _bytes_field(2, trainer), _bytes_field(3, normalizer)])


def _bytes_field(field: int, value: bytes) -> bytes:
    size, length = len(value), b""
    while size > 127:
        length += bytes([size & 127 | 128])
        size >>= 7
    return bytes([field << 3 | 2]) + length + bytes([size]) + value


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """The number at `position`, and the position after it."""
    value = shift = 0
    while data[position] & 128:
        value |= (data[position] & 127) << shift
        shift += 7
        position += 1
    return value | data[position] << shift, position + 1


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Field number and value (int or bytes) of each field of a protobuf message."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        kind = key & 7
        if kind == 0:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        size, position = _varint(data, position) if kind == 2 else ({1: 8, 5: 4}[kind], position)
        yield key >> 3, data[position : position + size]
        position += size
