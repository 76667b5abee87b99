"""What the class that tokenizer_config.json names makes of tokenizer.json, beside what stands in that file.

transformers' classes build their own normalizer, words and decoder from a few keys of the config. The general classes
(PreTrainedTokenizerFast, TokenizersBackend) take the file as it is.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, pre_tokenizers

from modelhub.errors import TokenizerError
from modelhub.processing import spm

GENERAL = {"", "PreTrainedTokenizer", "TokenizersBackend"}
LLAMA = {"LlamaTokenizer", "CodeLlamaTokenizer"}
# Written in Python, or over SentencePiece with steps of their own, or for words with boxes and frames of sound: what
# they do is in no file.
CODE = {
    f"{name}Tokenizer" for name in (
        "Bartpho", "BertGeneration", "BertJapanese", "Bertweet", "BioGpt", "BlenderbotSmall", "ByT5", "Canine", "Clvp",
        "Cpm", "CpmAnt", "CTRL", "Dia", "Esm", "Esmc", "FSMT", "Flaubert", "GPTNeoXJapanese", "GPTSw3", "Lasr",
        "LayoutLMv2", "LayoutLMv3", "LayoutXLM", "Luke", "M2M100", "Marian", "MarkupLM", "Mgpstr", "MyT5", "PLBart",
        "Parakeet", "Perceiver", "Phobert", "ProphetNet", "Rag", "RoCBert", "RoFormer", "Siglip", "Speech2Text",
        "SpeechT5", "Tapas", "Tipsv2", "Vits", "Wav2Vec2CTC", "Wav2Vec2PhonemeCTC", "XLM",
    )
}  # fmt: skip
# Which classes read which keys; others are built the same whatever these say.
_METASPACE = {"Albert", "Barthez", "BigBird", "Camembert", "RemBert", "XGLM", "XLMRoberta"}  # add_prefix_space
_NOT_BYTE_LEVEL = {"Nougat"}  # has no add_prefix_space, where all others of its kind do
_BERT = {"Bert", "DPRQuestionEncoder", "DistilBert", "Electra", "Funnel", "Lxmert", "MobileBert", "MPNet", "Splinter"}
_BERT_KEYS = {
    "do_lower_case": "lowercase", "strip_accents": "strip_accents", "tokenize_chinese_chars": "handle_chinese_chars",
}  # fmt: skip
_STEPS = {  # of a normalizer, there where the key has that value
    "do_lower_case": ("Lowercase", True, {"Albert", "DebertaV2", "RemBert", "XLNet"}),
    "keep_accents": ("StripAccents", False, {"Albert", "XLNet"}),
}


def class_of(config: Mapping[str, Any]) -> str:
    """The class that the config names; "Fast" at its end is an older spelling."""
    return str(config.get("tokenizer_class") or "").removesuffix("Fast")


def check_class(config: Mapping[str, Any], where: Any) -> None:
    """Raises TokenizerError for a class whose code no file tells of."""
    if (name := class_of(config)) in CODE:
        raise TokenizerError(
            f"{where}: tokenizer_config.json names {name}, which modelhub does not have: what it does with a text is "
            "in its code, not in its files. Use transformers' AutoTokenizer for this model, and give token ids"
        )


def apply_class(backend: HFTokenizer, config: Mapping[str, Any], where: Any) -> None:
    """Change the tokenizer as transformers' class does that the config names. Raises TokenizerError; see `check_class`.

    Whatever the class, split_special_tokens=True cuts special tokens in a text as any other text.
    """
    if config.get("split_special_tokens") is True:
        backend.encode_special_tokens = True
    name, prefix = class_of(config), config.get("add_prefix_space")
    if name in GENERAL:
        return
    kind = name.removesuffix("Tokenizer")
    if name in LLAMA and getattr(backend.model, "byte_fallback", False):
        _as_llama(backend, True if prefix is None else bool(prefix), name, bool(config.get("legacy")))
    elif isinstance(prefix, bool):
        if kind not in _NOT_BYTE_LEVEL:
            _change(backend, "pre_tokenizer", "ByteLevel", add_prefix_space=prefix)
        if kind in _METASPACE and not prefix:
            for place in ("pre_tokenizer", "decoder"):
                _change(backend, place, "Metaspace", prepend_scheme="never")
    if kind in _BERT:
        given = {theirs: config[key] for key, theirs in _BERT_KEYS.items() if isinstance(config.get(key), bool)}
        if kind == "DPRQuestionEncoder":  # always in lower case
            given.pop("lowercase", None)
        _change(backend, "normalizer", "BertNormalizer", **given)
    for key, (step, on, kinds) in _STEPS.items():
        there = f'"{step}"' in json.dumps(_state(backend.normalizer))
        if kind in kinds and isinstance(config.get(key), bool) and (config[key] is on) != there:
            raise TokenizerError(
                f"{where}: tokenizer_config.json says {key}={config[key]} of {name}, and the normalizer of "
                "tokenizer.json does otherwise. Correct one of them"
            )


def _as_llama(backend: HFTokenizer, prefix: bool, name: str, legacy: bool) -> None:
    """A space before the text, or in older versions before each stretch of it, unless it begins with one."""
    code = name == "CodeLlamaTokenizer"
    scheme = ("always" if legacy and not code else "first") if prefix else "never"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace(spm.SPACE, prepend_scheme=scheme, split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace(spm.SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        + ([decoders.Strip(" ", 1, 0)] if prefix or code else [])
    )


def clean_up(text: str) -> str:
    """Decoded text of word pieces without the spaces before punctuation, as clean_up_tokenization_spaces asks."""
    for spaced, joined in (
        (" .", "."), (" ?", "?"), (" !", "!"), (" ,", ","), (" ' ", "'"), (" n't", "n't"), (" 'm", "'m"), (" 's", "'s"),
        (" 've", "'ve"), (" 're", "'re"),
    ):  # fmt: skip
        text = text.replace(spaced, joined)
    return text


def _changed(state: Any, kind: str, **values: Any) -> Any:
    """The state with these values in each part of that kind."""
    if isinstance(state, list):
        return [_changed(part, kind, **values) for part in state]
    if not isinstance(state, dict):
        return state
    changed = {key: _changed(value, kind, **values) for key, value in state.items()}
    return changed | values if changed.get("type") == kind else changed


def _state(part: Any) -> dict[str, Any] | None:
    return None if part is None else json.loads(part.__getstate__())


def _change(backend: HFTokenizer, place: str, kind: str, **values: Any) -> None:
    """Set these values in each part of that kind, where they are others."""
    state = _state(getattr(backend, place))
    if (changed := _changed(state, kind, **values)) != state:
        empty = {"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}, "added_tokens": []}
        setattr(backend, place, getattr(HFTokenizer.from_str(json.dumps(empty | {place: changed})), place))
