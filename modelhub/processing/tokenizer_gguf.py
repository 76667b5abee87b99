"""Builds a tokenizer from the metadata of a GGUF file (keys `tokenizer.*`).

"llama" is SentencePiece BPE: the model is put together again and loaded by SentencePiece. "gpt2" is byte-level BPE, for
the `tokenizers` library.
"""

from __future__ import annotations

from collections.abc import Mapping
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


def _byte_level(
    metadata: Mapping[str, Any], tokens: list[str], added: dict[int, AddedToken], config: Mapping[str, Any]
) -> TokenizerParts:
    pre = metadata.get("tokenizer.ggml.pre")
    cut: pre_tokenizers.PreTokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=pre in GPT2 | GPT2_SINGLE_DIGITS
    )
    if pre in GPT2_SINGLE_DIGITS:
        cut = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), cut])
    elif pre in LLAMA3 | QWEN2:
        words = Regex(LLAMA3_WORDS if pre in LLAMA3 else QWEN2_WORDS)
        cut = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), cut])
    elif pre not in GPT2:
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
