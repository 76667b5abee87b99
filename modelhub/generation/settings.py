"""How one call generates: what it asks for, and for the rest what the preset's generation_config.json says.

The keys are those of transformers' GenerationConfig. Each is done here, changes nothing in what is said, or is named
in a warning, once.
"""

import functools
import logging
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from modelhub.errors import ConfigError, InputError
from modelhub.generation.constraints import Constraints
from modelhub.generation.sampling import Sampler, is_number, is_whole

log = logging.getLogger("modelhub")

_CUTS = ("temperature", "top_k", "top_p", "min_p")  # giving one of them in a call means sampling
_RARE_CUTS = ("top_h", "typical_p", "epsilon_cutoff", "eta_cutoff")
_PENALTIES = ("repetition_penalty", "presence_penalty", "frequency_penalty")

# The samplers that KerasHub knows by name, with its own defaults.
NAMED: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "random": {"temperature": 1.0},
    "top_k": {"temperature": 1.0, "top_k": 5},
    "top_p": {"temperature": 1.0, "top_p": 0.1},
    "beam": {"num_beams": 5},
}
_ABSENT = {
    "contrastive": "compares candidates by their hidden states",
    "speculative": "lets a smaller model guess ahead",
}


def _is_flag(x: Any) -> bool:
    return isinstance(x, bool)


def _is_count(x: Any) -> bool:
    return is_whole(x) and 0 <= x < 2**31


def _is_length(x: Any) -> bool:
    return is_whole(x) and 1 <= x < 2**31


def _is_positive(x: Any) -> bool:
    return is_number(x) and 0 < x < math.inf


def _is_ids(x: Any) -> bool:
    return isinstance(x, list) and all(map(is_whole, x))


def _is_words(x: Any) -> bool:
    return isinstance(x, list) and all(_is_ids(word) and word for word in x)


def _is_biases(x: Any) -> bool:
    return isinstance(x, list) and all(
        isinstance(pair, list) and len(pair) == 2 and _is_words(pair[:1]) and is_number(pair[1]) and pair[1] == pair[1]
        for pair in x
    )


def _is_decay(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and is_whole(x[0]) and _is_positive(x[1])


_TOKEN = ("a token id", _is_count)
_TOKENS = ("a list of token ids", _is_ids)
_COUNT = ("a whole number, 0 or more", _is_count)
_LENGTH = ("a whole number, 1 or more", _is_length)
# Each beam holds a cache of its own.
_BEAMS = ("a whole number from 1 to 1000", lambda x: _is_length(x) and x <= 1000)
_FLAG = ("true or false", _is_flag)
_NUMBER = ("a number", is_number)

# What is done, and what its values must be.
DONE: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "max_length": _LENGTH, "max_new_tokens": _LENGTH, "min_length": _COUNT, "min_new_tokens": _COUNT,
    "stop_strings": (
        "text, or a list of texts",
        lambda x: isinstance(x, str) or (isinstance(x, list) and all(isinstance(s, str) for s in x)),
    ),
    "do_sample": _FLAG, "num_beams": _BEAMS,
    "early_stopping": ('true, false or "never"', lambda x: _is_flag(x) or x == "never"),
    # Scores are divided by length ** length_penalty.
    "length_penalty": ("a number from -50 to 50", lambda x: is_number(x) and -50 <= x <= 50),
    **dict.fromkeys((*_CUTS, *_RARE_CUTS, *_PENALTIES), _NUMBER),
    "encoder_repetition_penalty": ("a number above 0", _is_positive),
    "no_repeat_ngram_size": _COUNT, "encoder_no_repeat_ngram_size": _COUNT,
    "bad_words_ids": ("a list of lists of token ids", _is_words),
    "sequence_bias": ("a list of pairs, token ids and an amount: [[[1, 2], -5.0], ...]", _is_biases),
    "suppress_tokens": _TOKENS, "begin_suppress_tokens": _TOKENS, "forced_bos_token_id": _TOKEN,
    "forced_eos_token_id": ("a token id, or a list of them", lambda x: is_whole(x) or _is_ids(x)),
    "exponential_decay_length_penalty": ("[number of tokens, factor above 0]", _is_decay),
    "remove_invalid_values": _FLAG, "renormalize_logits": _FLAG,
    "eos_token_id": ("a token id, or a list of them", lambda x: is_whole(x) or _is_ids(x)),
}  # fmt: skip

# What changes nothing in what a decoder says: how it is computed, what else is returned, what other kinds of model do.
HARMLESS = {
    "use_cache", "max_cache_len", "cache_config", "compile_config", "disable_compile", "continuous_batching_config",
    "prefill_chunk_size", "low_memory",
    # A draft that the model itself checks: the same answers, sooner.
    "use_mtp", "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit",
    "assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    # Prompts are not padded, and what begins a text is the tokenizer's to say.
    "pad_token_id", "bos_token_id", "decoder_start_token_id",
    "transformers_version",
}  # fmt: skip

# What is not done, and the values that ask for nothing.
ASKS_NOTHING: dict[str, tuple[Any, ...]] = {
    "num_return_sequences": (1,), "guidance_scale": (1, 1.0), "diversity_penalty": (0, 0.0), "num_beam_groups": (1,),
    "penalty_alpha": (0, 0.0), "cache_implementation": (
        "dynamic", "static", "offloaded", "offloaded_static", "dynamic_full", "hybrid", "hybrid_chunked",
        "sliding_window", "paged",
    ),
}  # fmt: skip
_INSTEAD = {"num_return_sequences": "give it to generate()"}


@dataclass(frozen=True)
class Settings:
    """num_beams 1: no beams. max_length: of prompt and answer; None where max_new_tokens decides."""

    sampler: Sampler
    constraints: Constraints
    stop: tuple[str, ...]
    max_new_tokens: int
    max_length: int | None
    num_beams: int
    length_penalty: float
    early_stopping: bool | str

    def room(self, prompt: int) -> int:
        """How many tokens an answer to a prompt of that many tokens may have, by its settings alone; 1 at least."""
        return self.max_new_tokens if self.max_length is None else max(1, self.max_length - prompt)


def settings(
    config: Mapping[str, Any], asked: Mapping[str, Any], *, stop_ids: frozenset[int], vocabulary: int,
    max_new_tokens: int, one_answer: bool = False, where: str = "this model",
) -> Settings:  # fmt: skip
    """What holds in one call.

    config: generation_config.json. asked: the arguments of the call, None where it gives none: those of Sampler,
    max_new_tokens, num_beams, stop, and sampler, a name in NAMED. max_new_tokens: where neither says how many.
    one_answer: the call wants tokens one after the other, from a sampler of its own or to show them as they come, so
    that beams that only the preset asks for are not searched.

    Raises InputError for arguments, ConfigError for keys of the config, that make no sense.
    """
    check(config)
    given = {key: value for key, value in asked.items() if value is not None}
    if (name := given.pop("sampler", None)) is not None:
        given = _named(name, given)
    _check_arguments(given)
    samples = any(key in given for key in _CUTS)
    if given.get("num_beams", 1) != 1 and samples:
        raise InputError(
            "num_beams cannot be combined with sampling: leave out "
            f"{', '.join(key for key in _CUTS if key in given)}; beams are what is likeliest"
        )
    num_beams = given.get("num_beams")
    if num_beams is None:
        num_beams = 1 if samples or name is not None or one_answer else config.get("num_beams") or 1
    _warn(where, config, num_beams)
    sampler = _sampler(config, given, num_beams, named=name is not None, stop_ids=stop_ids, vocabulary=vocabulary)
    length = given.get("max_new_tokens") or config.get("max_new_tokens")
    stop = given.get("stop", config.get("stop_strings") or ())
    return Settings(
        sampler, _constraints(config, stop_ids, vocabulary), (stop,) if isinstance(stop, str) else tuple(stop),
        length or max_new_tokens, None if length else config.get("max_length"), num_beams,
        float(1.0 if (penalty := config.get("length_penalty")) is None else penalty),
        config.get("early_stopping") or False,
    )  # fmt: skip


def check(config: Mapping[str, Any]) -> None:
    """Raise one ConfigError for all values that are of another kind than their keys say."""
    if bad := [
        f"{key} must be {words}, found {reprlib.repr(config[key])}"
        for key, (words, fits) in DONE.items()
        if config.get(key) is not None and not fits(config[key])
    ]:
        raise ConfigError(f"generation_config.json: {'; '.join(bad)}. Correct it, or download it again")


def _named(name: str, given: dict[str, Any]) -> dict[str, Any]:
    if name in _ABSENT:
        raise InputError(
            f"sampler={name!r}, which {_ABSENT[name]}, is not there; there are {', '.join(map(repr, NAMED))}, and "
            "functions of your own"
        )
    if name not in NAMED:
        raise ConfigError(
            f"there is no sampler {name!r}; there are {', '.join(map(repr, NAMED))}, functions of your own, and those "
            'that code with @modelhub.register("sampler", name) above a function has made known'
        )
    if name == "greedy" and (extra := [key for key in _CUTS if given.get(key)]):
        raise InputError(f"sampler='greedy' takes what is likeliest; leave out {', '.join(extra)}, or the sampler")
    if name != "beam" and given.get("num_beams", 1) != 1:
        raise InputError(f"sampler={name!r} has no beams; leave out num_beams, or take sampler='beam'")
    return NAMED[name] | given


def _check_arguments(given: Mapping[str, Any]) -> None:
    if not _is_length(given.get("max_new_tokens", 1)):
        raise InputError(f"max_new_tokens must be 1 or more, a whole number; got {given['max_new_tokens']!r}")
    if not _BEAMS[1](given.get("num_beams", 1)):
        raise InputError(f"num_beams must be {_BEAMS[0]}, got {given['num_beams']!r}")
    stop = given.get("stop", ())
    if not isinstance(stop, str) and not (isinstance(stop, Sequence) and all(isinstance(s, str) for s in stop)):
        raise InputError(f"stop must be a text, or a list of texts, got {reprlib.repr(stop)}")


def _sampler(
    config: Mapping[str, Any], given: Mapping[str, Any], num_beams: int, *, named: bool, stop_ids: frozenset[int],
    vocabulary: int,
) -> Sampler:  # fmt: skip
    """named: the call named a sampler, which decides alone how tokens are drawn."""
    chosen = {key: given.get(key) for key in _CUTS}
    chosen |= {key: given.get(key, config.get(key)) for key in _PENALTIES}
    if config.get("do_sample") and not named and num_beams == 1:
        chosen |= {key: config.get(key) for key in (*_CUTS, *_RARE_CUTS) if given.get(key) is None}
        if chosen["temperature"] is None:  # sampling may be all that is asked for
            chosen["temperature"] = 1.0
    bias: dict[int, float] = {}
    for word, amount in config.get("sequence_bias") or ():
        if len(word) == 1:
            bias[_inside(word[0], vocabulary, "sequence_bias")] = amount
    own = given.get("logit_bias") or {}
    never = [token for token in config.get("suppress_tokens") or () if 0 <= token < vocabulary]
    words = [word[0] for word in config.get("bad_words_ids") or () if len(word) == 1]
    never += [_inside(token, vocabulary, "bad_words_ids") for token in words if token not in stop_ids]
    bias |= dict.fromkeys(never, -math.inf)
    merged = bias | dict(own) if isinstance(own, Mapping) else own  # for Sampler to refuse
    return Sampler(**chosen, logit_bias=merged)


def _constraints(config: Mapping[str, Any], stop_ids: frozenset[int], vocabulary: int) -> Constraints:
    def several(key: str) -> Iterator[tuple[int, ...]]:
        for entry in config.get(key) or ():
            word = entry[0] if key == "sequence_bias" else entry
            if len(word) > 1:
                yield tuple(_inside(token, vocabulary, key) for token in word)

    biases = dict(zip(several("sequence_bias"), _amounts(config), strict=True))
    forced = config.get("forced_eos_token_id")
    decay = config.get("exponential_decay_length_penalty")
    counts = ("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens")
    first = config.get("forced_bos_token_id")
    return Constraints(
        frozenset(token for token in stop_ids if 0 <= token < vocabulary),
        tuple(biases.items()),
        tuple(several("bad_words_ids")),
        float(config.get("encoder_repetition_penalty") or 1.0),
        **{key: int(config.get(key) or 0) for key in counts},
        forced_bos_token_id=None if first is None else _inside(first, vocabulary, "forced_bos_token_id"),
        forced_eos_token_id=tuple(
            _inside(token, vocabulary, "forced_eos_token_id")
            for token in (forced if isinstance(forced, list) else [] if forced is None else [forced])
        ),
        remove_invalid_values=bool(config.get("remove_invalid_values")),
        exponential_decay_length_penalty=None if decay is None else (int(decay[0]), float(decay[1])),
        begin_suppress_tokens=tuple(t for t in config.get("begin_suppress_tokens") or () if 0 <= t < vocabulary),
        renormalize_logits=bool(config.get("renormalize_logits")),
    )


def _amounts(config: Mapping[str, Any]) -> list[float]:
    return [float(amount) for word, amount in config.get("sequence_bias") or () if len(word) > 1]


def _inside(token: int, vocabulary: int, key: str) -> int:
    if not 0 <= token < vocabulary:
        raise ConfigError(
            f"generation_config.json: {key} has the token id {token}; the vocabulary goes from 0 to {vocabulary - 1}. "
            "Correct it, or download it again"
        )
    return token


def _warn(where: str, config: Mapping[str, Any], num_beams: int) -> None:
    if ignored := list(ignored_keys(config, num_beams)):
        _say(
            f"{where}: generation_config.json asks for what modelhub does not do, so answers may differ from "
            f"transformers': {', '.join(ignored)}"
        )


def ignored_keys(config: Mapping[str, Any], num_beams: int = 1) -> Iterator[str]:
    """The keys that may change what is said and that are not done, with their values."""
    for key, value in config.items():
        if value is None or value is False or key in DONE or key in HARMLESS or key.startswith("_"):
            continue
        if value not in ASKS_NOTHING.get(key, ()):
            instead = f" ({_INSTEAD[key]})" if key in _INSTEAD else ""
            yield f"{key}={reprlib.repr(value)}{instead}"
    if num_beams > 1 and config.get("num_beams") and config.get("do_sample"):
        yield "do_sample=True with num_beams (beams are searched, not drawn)"


@functools.cache
def _say(message: str) -> None:
    log.warning("%s", message)
