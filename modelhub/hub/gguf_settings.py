"""How a model is meant to write, as GGUF metadata has it and as generation_config.json has it.

The tokens that end an answer, and general.sampling.*: llama.cpp's src/llama-vocab.cpp and common/common.cpp,
https://github.com/ggml-org/llama.cpp
"""

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from modelhub.hub.provenance import is_repo_id

log = logging.getLogger("modelhub")

# Tokens that end an answer wherever they are in a vocabulary: llama.cpp's list, for files that do not say it.
END_TOKENS = (
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<|return|>", "<|call|>", "<|flush|>", "<|calls|>", "<end_of_turn>",
    "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>", "_<EOT>", "[EOT]", "[EOS]", "<|end_of_text|>", "<end_of_utterance>",
    "<eos>", "<turn|>", "<|tool_response>", "<｜end▁of▁sentence｜>", "[e~[",
)  # fmt: skip
_TOKENS, _TYPES, _SUPPRESSED = (f"tokenizer.ggml.{key}" for key in ("tokens", "token_type", "suppress_tokens"))
_CONTROL = 3  # of the types
_ENDS = ("eos", "eot", "eom")
_ALL_ENDS = "modelhub.eos_token_ids"  # where llama.cpp's keys and its list of names give others

# generation_config.json -> general.sampling, and what llama.cpp is told where the former is silent and samples: it has
# other defaults.
_SAMPLING = {"temperature": ("temp", 1.0), "top_k": ("top_k", 0), "top_p": ("top_p", 1.0), "min_p": ("min_p", 0.0)}
_PENALTY, _PENALTY_SPAN = "general.sampling.penalty_repeat", "general.sampling.penalty_last_n"
_WHOLE_TEXT = -1
# Said elsewhere in the file, or of use to transformers alone.
_NOT_LOST = {
    "do_sample", "repetition_penalty", "suppress_tokens", "bos_token_id", "eos_token_id", "pad_token_id",
    "decoder_start_token_id", "transformers_version", "_from_model_config", "use_cache", "cache_implementation",
    "trust_remote_code", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions",
    "output_hidden_states",
}  # fmt: skip
# What a key says when it changes nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,), "num_beam_groups": (1,), "num_return_sequences": (1,), "typical_p": (1.0,),
    "length_penalty": (1.0,), "encoder_repetition_penalty": (1.0,), "presence_penalty": (0.0,),
    "frequency_penalty": (0.0,), "diversity_penalty": (0.0,), "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,), "min_length": (0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "max_length": (20,), "early_stopping": (False,),
}  # fmt: skip


def end_tokens(find: Callable[[str], int | None], stated: Iterable[int | None], special: Collection[int]) -> list[int]:
    """The ids at which an answer ends: those that a file states, then those that llama.cpp knows by name.

    find: the id of a token. special: ids of control tokens. "</s>" ends a text only where it is one: Gemma has it as a
    piece of HTML.
    """
    named = {name: index for name in END_TOKENS if (index := find(name)) is not None}
    if named.get("</s>") not in special:
        named.pop("</s>", None)
    # In gpt-oss and Solar, an answer goes on in another channel after it.
    if {"<|return|>", "<|call|>"} <= named.keys() or {"<|calls|>", "<|flush|>"} <= named.keys():
        named.pop("<|end|>", None)
    return list(dict.fromkeys([*(index for index in stated if index is not None), *named.values()]))


def read_settings(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json would say of a GGUF file; {} where its metadata has no tokens.

    A warning names settings of the file that modelhub does not have.
    """
    tokens, types = metadata.get(_TOKENS), metadata.get(_TYPES)
    if not isinstance(tokens, list):
        return {}
    found: dict[str, Any] = {}
    for ours, theirs in (("bos", "bos"), ("pad", "padding")):
        if (index := _id(metadata, theirs, len(tokens))) is not None:
            found[f"{ours}_token_id"] = index
    if ends := _ids(metadata, _ALL_ENDS, len(tokens)) or _ends(metadata, tokens, types):
        found["eos_token_id"] = ends
    if suppressed := _ids(metadata, _SUPPRESSED, len(tokens)):
        found["suppress_tokens"] = suppressed
    return found | _read_sampling(metadata)


def write_settings(
    generation_config: Mapping[str, Any], metadata: Mapping[str, Any], ends: Sequence[int], end_of_turn: int | None
) -> tuple[dict[str, Any], list[str]]:
    """The metadata that `read_settings` and llama.cpp read, and in words what is lost.

    metadata: what the tokenizer has written. ends: the ids at which an answer ends, the most usual first. end_of_turn:
    the one of them that the chat template writes.
    """
    found: dict[str, Any] = {}
    lost: list[str] = []
    prefix, tokens, types = "tokenizer.ggml", metadata[_TOKENS], metadata[_TYPES]
    eos = metadata.get(f"{prefix}.eos_token_id")
    others = [index for index in ends if index != eos and index < len(tokens)]
    if eos is None and others:
        eos = found[f"{prefix}.eos_token_id"] = others.pop(0)
    if end_of_turn not in others:
        end_of_turn = next((index for index in others if tokens[index] not in END_TOKENS), None)
    if end_of_turn is not None:
        found[f"{prefix}.eot_token_id"] = end_of_turn
    known = _ends({**metadata, **found}, tokens, types)
    if rest := [index for index in others if index not in known]:
        found[f"{prefix}.eom_token_id"] = rest[0]
        known = _ends({**metadata, **found}, tokens, types)
    if {*known} != {*ends} and ends:
        found[_ALL_ENDS] = list(ends)
    if unknown := [repr(tokens[index]) for index in others if index not in known]:
        lost.append(f"that {', '.join(unknown)} ends an answer: llama.cpp has room for three such tokens")
    return found | _write_sampling(generation_config), lost + _lost(generation_config)


_LICENCE, _BASE = "general.license", "general.base_model."
_HUB = "https://huggingface.co/"


def read_origin(metadata: Mapping[str, Any]) -> tuple[str | None, str | None]:
    """The licence's identifier, and the repository on the Hugging Face Hub that the model was made from."""
    licence, base = metadata.get(_LICENCE), metadata.get(f"{_BASE}0.repo_url")
    repo = base.removeprefix(_HUB).rstrip("/") if isinstance(base, str) and base.startswith(_HUB) else ""
    known = is_repo_id(repo) and metadata.get(f"{_BASE}count") == 1
    return licence if isinstance(licence, str) and 0 < len(licence) <= 200 else None, repo if known else None


def write_origin(licence: str | None, base_model: str | None) -> dict[str, Any]:
    """The metadata that `read_origin` and llama.cpp read."""
    found: dict[str, Any] = {_LICENCE: licence} if licence else {}
    if base_model:
        owner, _, name = base_model.rpartition("/")
        found |= {f"{_BASE}count": 1, f"{_BASE}0.name": name, f"{_BASE}0.organization": owner}
        found[f"{_BASE}0.repo_url"] = f"{_HUB}{base_model}"
    return found


def _ends(metadata: Mapping[str, Any], tokens: list[str], types: Any) -> list[int]:
    """As llama.cpp finds them."""
    names = {*END_TOKENS}
    places = {token: index for index, token in enumerate(tokens) if token in names}
    control = [
        index for index in places.values() if types is not None and index < len(types) and types[index] == _CONTROL
    ]
    return end_tokens(places.get, [_id(metadata, kind, len(tokens)) for kind in _ENDS], control)


def _id(metadata: Mapping[str, Any], kind: str, count: int) -> int | None:
    index = metadata.get(f"tokenizer.ggml.{kind}_token_id")
    return index if isinstance(index, int) and 0 <= index < count else None


def _ids(metadata: Mapping[str, Any], key: str, count: int) -> list[int]:
    listed = metadata.get(key)
    numbers = listed.tolist() if isinstance(listed, np.ndarray) else listed if isinstance(listed, list) else []
    return [index for index in numbers if isinstance(index, int) and 0 <= index < count]


def _read_sampling(metadata: Mapping[str, Any]) -> dict[str, Any]:
    sampling = {key: value for key, value in metadata.items() if key.startswith("general.sampling.")}
    found: dict[str, Any] = {}
    for ours, (theirs, off) in _SAMPLING.items():
        value = sampling.pop(f"general.sampling.{theirs}", None)
        if type(value) in (int, float):
            found[ours] = _decimal(value) if value != off or ours == "temperature" else None
    if found:  # a temperature of 0 is greedy, for llama.cpp too
        greedy = found.get("temperature", 1.0) <= 0
        found = {"do_sample": not greedy} | ({} if greedy else found)
    repeat, span = sampling.pop(_PENALTY, None), sampling.pop(_PENALTY_SPAN, None)
    if type(repeat) in (int, float) and repeat not in (0, 1):
        found["repetition_penalty"] = _decimal(repeat)
        if span not in (None, _WHOLE_TEXT):
            sampling[_PENALTY_SPAN] = span
    if sampling:
        listed = ", ".join(f"{key}={value!r:.60}" for key, value in sorted(sampling.items()))
        log.warning("the GGUF file asks for ways to choose tokens that modelhub does not have: %s", listed)
    return {key: value for key, value in found.items() if value is not None}


def _decimal(value: float) -> float:
    """GGUF keeps float32, in which 0.95 is 0.949999988; taken as the decimal it came from."""
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _write_sampling(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if generation_config.get("do_sample"):
        for ours, (theirs, off) in _SAMPLING.items():
            value = generation_config.get(ours)
            found[f"general.sampling.{theirs}"] = off if value is None else type(off)(value)
    if (penalty := generation_config.get("repetition_penalty")) not in (None, 1, 1.0):
        found |= {_PENALTY: float(penalty), _PENALTY_SPAN: _WHOLE_TEXT}
    if suppressed := generation_config.get("suppress_tokens"):
        found[_SUPPRESSED] = list(suppressed)
    return found


def _lost(generation_config: Mapping[str, Any]) -> list[str]:
    """Settings that no GGUF has a key for, and that change what is written."""
    carried = {*_SAMPLING, *_NOT_LOST}
    return [
        f"{key}={value!r:.60}"
        for key, value in sorted(generation_config.items())
        if key not in carried and value not in (None, False, [], {}, "", *_OFF.get(key, ()))
    ]
