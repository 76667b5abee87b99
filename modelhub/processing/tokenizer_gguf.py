"""Builds a tokenizer from the metadata of a GGUF file (keys `tokenizer.*`), and the metadata from a tokenizer.

"llama" is SentencePiece BPE: the model is put together again and loaded by SentencePiece. "gpt2" is byte-level BPE, for
the `tokenizers` library. What is written is what llama.cpp (src/llama-vocab.cpp) tokenizes alike.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HFTokenizer

from modelhub.errors import TokenizerError
from modelhub.processing import spm
from modelhub.processing.tokenizer_files import (
    TokenizerParts,
    TokenizersEngine,
    add_tokens,
    ids_around,
    make_parts,
    sentencepiece_decoder,
    tokens_to_add,
)

log = logging.getLogger("modelhub")

NEEDED = {"llama": ("tokens", "scores", "token_type"), "gpt2": ("tokens", "token_type", "merges")}

# How text is cut into words before byte-level BPE, under llama.cpp's names (tokenizer.ggml.pre).
GPT2 = {"gpt-2"}
GPT2_SINGLE_DIGITS = {"smollm", "starcoder", "refact", "codeshell"}
LLAMA3 = {"llama-bpe", "llama3", "llama-v3"}
QWEN2 = {"qwen2", "deepseek-r1-qwen"}
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_WORDS = LLAMA3_WORDS.replace("{1,3}", "")


def read_gguf(metadata: Mapping[str, Any]) -> TokenizerParts:
    """Reads tokenizer.ggml.* and tokenizer.chat_template."""
    kind = metadata.get("tokenizer.ggml.model")
    missing = [key for key in NEEDED.get(str(kind), ()) if metadata.get(f"tokenizer.ggml.{key}") is None]
    if kind not in NEEDED or missing:
        found = sorted(key for key in metadata if key.startswith("tokenizer."))
        raise TokenizerError(
            f"No tokenizer can be built from this GGUF file: tokenizer.ggml.model is {kind!r} (supported: "
            f"{', '.join(NEEDED)}), missing are {missing}, found {found}. Use the model's Hugging Face folder."
        )
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = np.array(metadata["tokenizer.ggml.token_type"], np.int32)
    if len(tokens) != len(types):
        raise TokenizerError(f"The GGUF file holds {len(tokens)} tokens but {len(types)} token types: it is damaged.")
    config: dict[str, Any] = {}  # as tokenizer_config.json would say it
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        index = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if index is not None and not 0 <= index < len(tokens):
            raise TokenizerError(
                f"tokenizer.ggml.{key}_token_id is {index}, but the GGUF file holds {len(tokens)} tokens."
            )
        config[f"{name}_token"] = None if index is None else tokens[index]
    # llama.cpp's defaults, for files without the flags
    pre = metadata.get("tokenizer.ggml.pre")
    add_bos = bool(metadata.get("tokenizer.ggml.add_bos_token", kind == "llama" or pre in LLAMA3))
    add_eos = bool(metadata.get("tokenizer.ggml.add_eos_token", False))
    added = {
        int(i): AddedToken(tokens[i], normalized=False, special=types[i] == spm.CONTROL)
        for i in np.flatnonzero((types == spm.CONTROL) | (types == spm.USER_DEFINED))
        if tokens[i].strip(" ")  # runs of spaces are merged, not matched
    }
    if kind == "llama":
        parts = _sentencepiece(metadata, tokens, types, added, config)
    else:
        parts = _byte_level(metadata, tokens, added, config)
    parts.prefix_ids, parts.suffix_ids = ids_around(parts.engine, config, add_bos, add_eos)
    parts.chat_template = metadata.get("tokenizer.chat_template")
    return parts


def _sentencepiece(
    metadata: Mapping[str, Any],
    tokens: list[str],
    types: np.ndarray,
    added: dict[int, AddedToken],
    config: Mapping[str, Any],
) -> TokenizerParts:
    scores = np.asarray(metadata["tokenizer.ggml.scores"], np.float32)
    unknown = metadata.get("tokenizer.ggml.unknown_token_id", next(iter(np.flatnonzero(types == spm.UNKNOWN)), None))
    if len(scores) != len(tokens) or unknown is None or not np.isin(types, range(1, 7)).all():
        raise TokenizerError(
            f"The GGUF file is damaged: {len(tokens)} tokens, {len(scores)} scores, the unknown token is {unknown}, "
            f"token types {np.unique(types)} (1 to 6 exist)."
        )
    types[types == spm.UNKNOWN] = spm.NORMAL  # SentencePiece wants exactly one, and Gemma's files call it CONTROL
    types[unknown] = spm.UNKNOWN
    sp = spm.load_model(spm.merge_space_runs(spm.build_model(tokens, scores, types)))
    config = {**config, "unk_token": tokens[unknown]}
    add_tokens(added, sp, tokens_to_add(config, added))
    prefix_space = bool(metadata.get("tokenizer.ggml.add_space_prefix", True))
    engine = spm.SentencePieceEngine(sp, added, prefix_space)
    return make_parts(engine, added, config, sentencepiece_decoder(prefix_space), ([], []))


def _words(pre: str | None) -> pre_tokenizers.PreTokenizer | None:
    """How llama.cpp cuts text under that name; None for a name that is not known here."""
    plain: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=pre in GPT2 | GPT2_SINGLE_DIGITS
    )
    if pre in GPT2_SINGLE_DIGITS:
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), plain])
    if pre in LLAMA3 | QWEN2:
        words = Regex(LLAMA3_WORDS if pre in LLAMA3 else QWEN2_WORDS)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), plain])
    return plain if pre in GPT2 else None


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], added: dict[int, AddedToken], config: Mapping[str, Any]
) -> TokenizerParts:
    pre = metadata.get("tokenizer.ggml.pre")
    cut = _words(pre)
    if cut is None:
        known = sorted(GPT2 | GPT2_SINGLE_DIGITS | LLAMA3 | QWEN2)
        raise TokenizerError(
            f"tokenizer.ggml.pre is {pre!r}, which is not supported yet (supported: {', '.join(known)}). "
            "Use the model's Hugging Face folder."
        )
    try:
        merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
        vocabulary = {token: i for i, token in enumerate(tokens)}
        backend = HFTokenizer(models.BPE(vocabulary, merges, ignore_merges=pre in LLAMA3))
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(f"The GGUF file's merges do not fit its tokens: {error}. The file is damaged.") from error
    backend.normalizer = normalizers.NFC() if pre in QWEN2 else None
    backend.pre_tokenizer = cut
    backend.add_tokens([token for _, token in sorted(added.items())])
    backend.add_tokens(tokens_to_add(config, added))
    decoder = {"type": "ByteLevel"}
    backend.decoder = decoders.ByteLevel()
    return make_parts(TokenizersEngine(backend), backend.get_added_tokens_decoder(), config, decoder, ([], []))


# Writing


def write_gguf(parts: TokenizerParts, size: int) -> dict[str, Any]:
    """The metadata from which `read_gguf` and llama.cpp build this tokenizer.

    size: rows of the model's embedding; llama.cpp wants as many tokens. Ids that the tokenizer lacks are filled with
    unused tokens, added tokens beyond are left out.

    llama.cpp has one rule for tokenizers that put a space before a text (Llama 2's, Mistral's): before a space too, and
    again behind each added token. transformers has that rule in its older versions of them; in the newer, the ids of
    such texts differ by a space.

    Raises TokenizerError for a tokenizer that llama.cpp cannot follow.
    """
    engine, unk = parts.engine, parts.named["unk"]
    count = max(size, engine.size)
    if isinstance(engine, spm.SentencePieceEngine):
        added = engine.added_tokens
        found = _sentencepiece_metadata(engine, count)
    else:
        assert isinstance(engine, TokenizersEngine)
        added = engine.backend.get_added_tokens_decoder()
        found = _tokenizers_metadata(engine.backend, count, added, unk)
    tokens = [engine.id_to_token(i) if i < engine.size else None for i in range(count)]
    if lost := [token for i, token in enumerate(tokens) if i >= size and token is not None and i not in added]:
        raise _refused(f"the model's embedding has {size} rows, too few for {len(lost)} tokens, such as {lost[0]!r}")
    types = found["token_type"]
    types[[i for i, token in enumerate(tokens) if token is None]] = spm.UNUSED
    for i, token in added.items():
        if token.lstrip or token.rstrip or token.single_word:
            raise _refused(f"the added token {token.content!r} takes the spaces around it, or stands alone")
        if types[i] != spm.UNKNOWN and token.content.strip(spm.SPACE):  # runs of spaces are merged, not matched
            types[i] = spm.CONTROL if token.special else spm.USER_DEFINED
    for i in np.flatnonzero(types == spm.USER_DEFINED).tolist():
        tokens[i] = (tokens[i] or "").replace(spm.SPACE, " ")  # llama.cpp looks for them in the text as it is
    found["tokens"] = [f"[PAD{i}]" if token is None else token for i, token in enumerate(tokens[:size])]
    found |= {key: found[key][:size] for key in ("token_type", "scores") if key in found}

    ids = {name: None if token is None else engine.token_to_id(token) for name, token in parts.named.items()}
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (index := ids[name]) is not None and index < size:
            found.setdefault(f"{key}_token_id", index)
    for name, around in (("bos", parts.prefix_ids), ("eos", parts.suffix_ids)):
        if around not in ([], [ids[name]]):
            raise _refused(f"it puts the ids {around} around a text, where llama.cpp can put its {name} token only")
        found[f"add_{name}_token"] = bool(around)
    metadata = {f"tokenizer.ggml.{key}": value for key, value in found.items()}
    if parts.chat_template is not None:
        metadata["tokenizer.chat_template"] = parts.chat_template
    return metadata


def _refused(reason: str) -> TokenizerError:
    return TokenizerError(
        f"This tokenizer cannot be written into a GGUF file, since llama.cpp would give other ids: {reason}. Save the "
        "model as a Hugging Face folder instead."
    )


def _sentencepiece_metadata(engine: spm.SentencePieceEngine, count: int) -> dict[str, Any]:
    sp = engine.sp
    spec = spm.read_spec(sp.serialized_model_proto())
    if spec.model_type != spm.BPE or not spec.keeps_text or not spec.usual_spaces:
        raise _refused("its SentencePiece model is not BPE, normalizes the text, or has spaces behind words")
    types, scores = np.full(count, spm.NORMAL, np.int32), np.full(count, -1000, np.float32)
    scores[: len(sp)] = sp.get_score(list(range(len(sp))))
    for i, token in spec.added.items():
        types[i] = spm.CONTROL if token.special else spm.USER_DEFINED
    for i in range(len(sp)):
        if sp.is_byte(i):
            types[i] = spm.BYTE
        elif sp.is_unused(i):
            types[i] = spm.UNUSED
    return _llama(types, scores, sp.unk_id(), engine.prefix_space or spec.add_dummy_prefix)


def _llama(types: np.ndarray, scores: np.ndarray, unknown: int, prefix_space: bool) -> dict[str, Any]:
    if np.count_nonzero(types == spm.BYTE) != 256:
        raise _refused("its vocabulary lacks the 256 bytes, which llama.cpp writes unknown characters with")
    types[unknown] = spm.UNKNOWN
    return {
        "model": "llama", "pre": "default", "token_type": types, "scores": scores, "unknown_token_id": unknown,
        "add_space_prefix": prefix_space,
    }  # fmt: skip


def _tokenizers_metadata(
    backend: HFTokenizer, count: int, added: Mapping[int, AddedToken], unk_token: str | None
) -> dict[str, Any]:
    model = json.loads(backend.model.__getstate__())
    options = ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model[key] for key in options):
        raise _refused(f"its model is {model['type']} with options that only the tokenizers library knows")
    merges = [merge.split(" ", 1) if isinstance(merge, str) else merge for merge in model["merges"]]
    normalizer, cut = _state(backend.normalizer), _state(backend.pre_tokenizer)
    types, scores = np.full(count, spm.NORMAL, np.int32), np.full(count, -1000, np.float32)
    if not model["byte_fallback"]:
        if not merges:
            raise _refused("it merges nothing, and llama.cpp loads no such tokenizer without merges")
        pre = _pre(normalizer, cut, model["ignore_merges"])
        return {"model": "gpt2", "pre": pre, "token_type": types, "merges": [" ".join(merge) for merge in merges]}
    unknown = model["vocab"].get(model["unk_token"] or unk_token)
    prefix_space = _prefix_space(normalizer, cut)
    if unknown is None or prefix_space is None or model["ignore_merges"]:
        raise _refused(f"it has the normalizer {normalizer}, cuts words by {cut}, or knows no unknown token")
    for byte in range(256):
        if (index := model["vocab"].get(f"<0x{byte:02X}>")) is not None:
            types[index] = spm.BYTE
    normal = {
        token: i
        for token, i in model["vocab"].items()
        if types[i] == spm.NORMAL and (i not in added or not token.strip(spm.SPACE))
    }
    for piece, rank in _ranks(merges, normal).items():
        scores[normal[piece]] = -rank
    return _llama(types, scores, unknown, prefix_space)


def _state(part: Any) -> dict[str, Any] | None:
    """A part of a tokenizer as tokenizer.json spells it, without what concerns offsets only."""
    without = functools.partial(filter, lambda item: item[0] != "trim_offsets")
    return part and json.loads(part.__getstate__(), object_hook=lambda found: dict(without(found.items())))


def _pre(normalizer: dict[str, Any] | None, cut: dict[str, Any] | None, ignore_merges: bool) -> str:
    """llama.cpp's name for this way to cut text into words."""
    for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2"):
        if (cut, ignore_merges) != (_state(_words(pre)), pre in LLAMA3):
            continue
        if normalizer is None:
            return pre
        if normalizer["type"] == "NFC" and pre in QWEN2:  # as llama.cpp's own converter writes Qwen's
            log.warning(
                "the tokenizer composes characters (NFC) before it cuts a text, which llama.cpp does not do: "
                "decomposed text, such as an e and its accent apart, gets other ids there"
            )
            return pre
    raise _refused(f"it cuts text into words by {cut}, after the normalizer {normalizer}")


def _prefix_space(normalizer: dict[str, Any] | None, cut: dict[str, Any] | None) -> bool | None:
    """Whether a text gets a space in front; None: spaces are not handled as SentencePiece does."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": spm.SPACE}
    prepend = {"type": "Prepend", "prepend": spm.SPACE}
    cut = cut or {}
    if cut.get("type") == "Metaspace" and normalizer in (None, replace):
        usual = not cut["split"] and cut["replacement"] == spm.SPACE
        return cut["prepend_scheme"] != "never" if usual else None
    if cut and cut.get("pattern") != {"String": " "}:  # which finds nothing after the normalizer
        return None
    if normalizer == {"type": "Sequence", "normalizers": [prepend, replace]}:
        return True
    return False if normalizer == replace else None


def _ranks(merges: Iterable[Sequence[str]], vocabulary: Mapping[str, int]) -> dict[str, float]:
    """Piece -> how early it is merged, as SentencePiece's scores say it.

    SentencePiece merges any two neighbours that make a piece, the best piece first; refused are merges that depend on
    where a piece is cut.
    """
    ranks: dict[str, float] = {}
    seen: set[tuple[str, str]] = set()
    runs_differ = False
    for left, right in merges:
        piece = left + right
        if left not in vocabulary or right not in vocabulary or piece not in vocabulary:
            continue  # a piece that is matched as an added token
        seen.add((left, right))
        if ranks.setdefault(piece, len(ranks)) != len(ranks) - 1:
            if piece.strip(spm.SPACE):
                raise _refused(f"it merges {piece!r} early or late, depending on where it is cut")
            runs_differ = True
    if runs_differ:  # Gemma's, which all have one score: see spm.merge_space_runs
        ranks |= {piece: len(piece) - 1e6 for piece in ranks if not piece.strip(spm.SPACE)}
    cuts = ((piece[:cut], piece[cut:]) for piece in vocabulary for cut in range(1, len(piece)))
    if missing := next(
        (cut for cut in cuts if cut[0] in vocabulary and cut[1] in vocabulary and cut not in seen), None
    ):
        raise _refused(f"it does not merge {missing[0]!r} and {missing[1]!r}, though they make a piece")
    return ranks
