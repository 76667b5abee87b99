"""The decode loop: prefill in buckets, then one token per step for all rows, over a cache that is never copied."""

import functools
import threading
from collections.abc import Callable, Generator, Sequence
from typing import Any

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.core.custom import takes_xp
from modelhub.core.tree import Module, Params, bind, flatten
from modelhub.errors import InputError, NotFinite
from modelhub.generation.beam import BeamOptions, Beams, rank
from modelhub.generation.constraints import Guide
from modelhub.generation.sampling import Sampler, choose, draw, not_finite
from modelhub.progress import bar

CHUNK = 512  # longest piece of a prompt that is computed at once: bounds the memory of scores and masks
_SMALLEST = 16


def bucket(n: int) -> int:
    """The next power of two, 16 at least: few sizes, so few compilations."""
    return max(_SMALLEST, 1 << (n - 1).bit_length())


class GenerationEngine:
    """The compiled programs of one model on one backend, and the cache of its last single prompt."""

    def __init__(self, xp: Backend, skeleton: Module, cache_dtype: str):
        self.xp = xp
        self.skeleton: Any = skeleton
        self.cache_dtype = cache_dtype
        step = functools.partial(_step, xp)
        self._prefill_step = xp.compile(step, skeleton, donate=(4,), hot=False)
        self._decode_step = xp.compile(step, skeleton, donate=(4,))
        self._logits = xp.compile(functools.partial(_all_logits, xp), skeleton, hot=False)
        self._token_logprobs = xp.compile(functools.partial(_token_logprobs, xp), skeleton, hot=False)
        self._hidden = xp.compile(functools.partial(hidden_states, xp), skeleton, hot=False)
        self._take_rows = xp.compile(functools.partial(_take_rows, xp), hot=False)
        self._programs: dict[Any, Any] = {}
        self._kept: tuple[Params, list[int], Params] | None = None  # params, tokens and cache of the last prompt
        self._lock = threading.Lock()
        self.reused = 0  # tokens of the last prompt that were in that cache already

    def logits(self, params: Params, ids: np.ndarray) -> np.ndarray:
        """float32 logits (B, T, V) of int32 ids (B, T), without a cache."""
        time = ids.shape[1]
        return self.xp.get(self._logits(params, self._padded(ids)))[:, :time]

    def token_logprobs(self, params: Params, ids: np.ndarray) -> np.ndarray:
        """float32 (B, T - 1): log-probability of each token of int32 ids (B, T) after those before it.

        The head runs on pieces of the text, so that the (T, V) logits are never in memory at once.
        """
        time, piece = ids.shape[1], 64
        targets = np.pad(ids[:, 1:], ((0, 0), (0, 1)))
        hidden = self._hidden(params, self._padded(ids))
        found = []
        for first in range(0, time - 1, piece):
            # Always `piece` positions long: the last piece overlaps the one before, or runs into the padding.
            begin = max(0, min(first, hidden.shape[1] - piece))
            part = hidden[:, begin : begin + piece]
            wanted = targets[:, begin : begin + part.shape[1]]
            wanted = np.pad(wanted, ((0, 0), (0, part.shape[1] - wanted.shape[1])))
            scores = self.xp.get(self._token_logprobs(params, part, self.xp.array(wanted, "int32")))
            found.append(scores[:, first - begin :][:, : time - 1 - first])
            self._check_finite(found[-1])
        return np.concatenate(found, axis=1)[:, : time - 1] if found else np.zeros((len(ids), 0), np.float32)

    def run(
        self, params: Params, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler, seed: int = 0,
        *, copies: int = 1, logprobs: bool = False, custom: Callable | None = None, guide: Guide | None = None,
    ) -> Generator[tuple[np.ndarray, np.ndarray], None, None]:  # fmt: skip
        """Yield the next token of every row, max_new_tokens times: int32 tokens (B,), float32 log-probabilities (B,).

        copies: rows per prompt, side by side, each with random numbers of its own. custom: the user's own sampler,
        see `_custom`. guide: changes the logits first, the sampler's penalties among it. Close the generator to stop
        earlier. What a single prompt shares with the beginning of the last one is not computed again.

        Raises NotFinite for logits that are NaN or infinite.
        """
        xp, rows = self.xp, len(prompts) * copies
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        pick, advance = self._picker(params, sampler, prompts, copies, seed, logprobs, custom, guide)
        cache, self.reused = self._cache_for(params, prompts, lengths, max_new_tokens)
        fed: list[Array] = []
        try:
            logits, cache = self._prefill(params, prompts, lengths, cache, self.reused)
            if copies > 1:
                lengths = np.repeat(lengths, copies)
                order = xp.array(np.repeat(np.arange(len(prompts)), copies), "int32")
                cache = self._take_rows({"logits": logits} | cache, order)
                logits = cache.pop("logits")
            result = pick(logits)
            yield self._fetched(result)
            start = xp.array(lengths, "int32")
            ahead = None  # on asynchronous backends a token is computed while the caller handles the one before
            for _ in range(max_new_tokens - 1):
                fed.append(result[0])
                result, start, cache = advance(result[0], start, cache)
                if not xp.asynchronous:
                    yield self._fetched(result)
                    continue
                if ahead is not None:
                    yield self._fetched(ahead)
                ahead = result
            if ahead is not None:
                yield self._fetched(ahead)
        except GeneratorExit:  # the caller has enough; after any other exception the cache may be half-written
            self._keep(params, prompts, rows, fed, cache)
            raise
        self._keep(params, prompts, rows, fed, cache)

    def _fetched(self, result: tuple[Array, Array]) -> tuple[np.ndarray, np.ndarray]:
        """A step's tokens and log-probabilities, in which NaN stands for logits that are not finite."""
        tokens, logprobs = self.xp.get(result[0]), self.xp.get(result[1])
        self._check_finite(logprobs)
        return tokens, logprobs

    def _check_finite(self, alarms: np.ndarray) -> None:
        """Raises NotFinite if there is a NaN or an infinity in alarms (B,) or (B, T)."""
        if np.isfinite(alarms).all():
            return
        row = int(np.argwhere(~np.isfinite(alarms))[0][0])
        narrow = self.cache_dtype == "float16"
        raise NotFinite(
            f"row {row}: the model's logits are not finite (NaN or infinity), so there is nothing to choose from: "
            + ("numbers of this model are too large for float16, or " if narrow else "")
            + "the weights hold such values. "
            + (
                'Load it with dtype="float32" or "bfloat16"; if that changes nothing,'
                if narrow
                else "Is the file damaged?"
            )
            + " load the model anew, or download it again"
        )

    def beam_search(
        self, params: Params, prompts: list[list[int]], options: BeamOptions, guide: Guide | None = None
    ) -> list[Beams]:
        """The finished beams of each prompt. guide: changes the log-probabilities before beams are ranked by them.

        Raises NotFinite for logits that are NaN or infinite.
        """
        xp, n = self.xp, options.num_beams
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        slots = self._slots(int(lengths.max()), options.max_new_tokens)
        logits, cache = self._prefill(params, prompts, lengths, self._new_cache(len(prompts), slots))
        order = xp.array(np.repeat(np.arange(len(prompts)), n), "int32")
        cache = self._take_rows({"logits": logits} | cache, order)
        logits = cache.pop("logits")
        lengths = np.repeat(lengths, n)
        last = xp.zeros((len(lengths),), "int32")
        beams = [Beams(options) for _ in prompts]
        ranked = self._program(
            rank, prompts=len(prompts), candidates=options.candidates, normalised=guide is not None
        )  # fmt: skip
        for index in bar(range(options.max_new_tokens), desc="generating", unit="token"):
            scores = xp.array(np.stack([beam.open_scores for beam in beams]))
            if guide is not None:
                logits = self._guided_beams(guide, logits, beams)
            values, indices, alarms = (xp.get(array) for array in ranked(logits, scores))
            self._check_finite(alarms)
            moves = [
                (list(range(n)), [0] * n) if beam.done else beam.advance(values[i], indices[i], logits.shape[-1])
                for i, beam in enumerate(beams)
            ]
            if all(beam.done for beam in beams):
                break
            order = np.concatenate([np.array(parents) + i * n for i, (parents, _) in enumerate(moves)])
            tokens = np.concatenate([np.array(tokens) for _, tokens in moves])
            cache = self._take_rows(cache, xp.array(order, "int32"))
            start = xp.array(lengths + index, "int32")
            logits, cache = self._decode_step(params, xp.array(tokens[:, None], "int32"), start, last, cache)
        return beams

    def _guided_beams(self, guide: Guide, logits: Array, beams: list[Beams]) -> Array:
        """Log-probabilities (prompts * beams, V), changed by the guide."""
        raw = self._finite(guide, logits)
        changed = guide(_log_softmax(raw), [tokens for beam in beams for tokens in beam.open])
        return self.xp.array(_log_softmax(changed) if guide.constraints.renormalize_logits else changed, "float32")

    def _finite(self, guide: Guide, logits: Array) -> np.ndarray:
        """The logits (B, V) on the host, checked; or mended, where the preset asks for that."""
        raw = self.xp.get(logits)
        if guide.constraints.remove_invalid_values:
            return np.nan_to_num(raw, nan=0.0)
        self._check_finite(raw.sum(axis=-1))
        return raw

    def _picker(
        self, params: Params, sampler: Sampler, prompts: list[list[int]], copies: int, seed: int, logprobs: bool,
        custom: Callable | None, guide: Guide | None,
    ) -> tuple[Callable, Callable]:  # fmt: skip
        """Two functions with the sampler's state inside. Tokens and log-probabilities are (B,).

        pick(logits (B, V)) -> (tokens, log-probabilities), and advance(tokens, start (B,), cache) -> ((tokens,
        log-probabilities), start, cache), which runs the model on the tokens and picks the next ones, in one program
        unless the user's own sampler is called.
        """
        xp, rows, vocabulary = self.xp, len(prompts) * copies, self.skeleton.model.config.vocab_size
        # One generator a row, so that a row does not depend on how many others there are.
        generators = [np.random.default_rng([seed, row]) for row in range(rows)]
        constant = xp.zeros((rows,))
        if custom is not None or guide is not None:
            last = xp.zeros((rows,), "int32")
            own: Callable
            if guide is not None:
                own = self._guided(guide, sampler.sampling, custom, generators, logprobs)
            elif custom is not None:
                own = functools.partial(self._custom, custom, generators, logprobs)

            def advance_own(token: Array, start: Array, cache: Params) -> tuple[Any, Array, Params]:
                logits, cache = self._decode_step(params, xp.expand_dims(token, 1), start, last, cache)
                return own(logits), start + 1, cache

            return own, advance_own
        features = sampler.features
        program = self._program(choose, hot=bool(features), features=features, logprobs=logprobs)
        step = self._program(_next, self.skeleton, donate=(8,), features=features, logprobs=logprobs)
        nothing = xp.zeros((1, 1))
        values = xp.array(sampler.values())
        bias = xp.array(sampler.bias(vocabulary)) if "logit_bias" in features else nothing
        seen = counts = nothing
        if sampler.counts_tokens:
            seen = np.zeros((rows, vocabulary), np.float32)
            for row in range(rows):
                seen[row, prompts[row // copies]] = 1
            seen, counts = xp.array(seen), xp.zeros((rows, vocabulary))

        def uniform() -> Array:
            return xp.array(draw(generators)) if "sample" in features else constant

        def pick(logits: Array) -> tuple[Array, Array]:
            nonlocal counts
            token, logprob, counts = program(logits, uniform(), values, bias, seen, counts)
            return token, logprob

        def advance(token: Array, start: Array, cache: Params) -> tuple[Any, Array, Params]:
            nonlocal counts
            token, logprob, counts, start, cache = step(
                params, token, start, uniform(), values, bias, seen, counts, cache
            )
            return (token, logprob), start, cache

        return pick, advance

    def _guided(
        self, guide: Guide, sampler: Sampler, custom: Callable | None, generators: list[np.random.Generator],
        logprobs: bool,
    ) -> Callable[[Array], tuple[Array, Array]]:  # fmt: skip
        """pick(logits (B, V)) -> (tokens, log-probabilities) for logits that the guide changes on the host."""
        xp, features = self.xp, sampler.features
        answers: list[list[int]] = [[] for _ in generators]
        program = self._program(choose, hot=bool(features), features=features, logprobs=False)
        values, nothing = xp.array(sampler.values()), xp.zeros((1, 1))

        def pick(logits: Array) -> tuple[Array, Array]:
            raw = self._finite(guide, logits)
            changed = xp.array(guide(raw, answers), "float32")
            if custom is not None:
                token, _ = self._custom(custom, generators, False, changed)
            else:
                uniform = draw(generators) if "sample" in features else np.zeros(len(answers), np.float32)
                token, *_ = program(changed, xp.array(uniform), values, nothing, nothing, nothing)
            chosen = xp.get(token)
            for answer, one in zip(answers, chosen.tolist(), strict=True):
                answer.append(one)
            scores = _log_softmax(raw)[np.arange(len(chosen)), chosen] if logprobs else np.zeros(len(chosen))
            return token, xp.array(scores, "float32")

        return pick

    def _custom(
        self, function: Callable, generators: list[np.random.Generator], logprobs: bool, logits: Array
    ) -> tuple[Array, Array]:
        """The user's sampler: function(logits) in one framework, or function(xp, logits, uniform) written once.

        It gets float32 logits (B, V) and returns token ids (B,).
        """
        xp = self.xp
        rows, vocabulary = logits.shape
        found = function(xp, logits, xp.array(draw(generators))) if takes_xp(function) else function(logits)
        tokens = np.asarray(xp.get(found) if xp.owns(found) else found)
        if tokens.shape != (rows,) or tokens.dtype.kind not in "iu":
            raise InputError(
                f"the sampler must return {rows} token ids, an integer array of shape ({rows},); "
                f"it returned {tokens.dtype} of shape {tokens.shape}"
            )
        if ((tokens < 0) | (tokens >= vocabulary)).any():
            raise InputError(f"the sampler returned {tokens.tolist()}; the vocabulary goes from 0 to {vocabulary - 1}")
        chosen, alarm = xp.array(tokens, "int32"), not_finite(xp, logits)
        if not logprobs:
            return chosen, alarm
        return chosen, xp.take_along_axis(xp.log_softmax(logits), xp.expand_dims(chosen, -1), -1)[:, 0] + alarm

    def _program(
        self, function: Callable, skeleton: Any = None, donate: Sequence[int] = (), hot: bool = True, **static: Any
    ) -> Any:
        """`function` compiled with its static arguments, once; the others are those of Backend.compile."""
        key = (function, hot, *static.items())
        if key not in self._programs:
            bound = functools.partial(function, self.xp, **static)
            self._programs[key] = self.xp.compile(bound, skeleton, donate, hot)
        return self._programs[key]

    def _padded(self, ids: np.ndarray) -> Array:
        if not self.xp.eager:  # later tokens change nothing for earlier ones, so padding on the right is free
            ids = np.pad(ids, ((0, 0), (0, bucket(ids.shape[1]) - ids.shape[1])))
        return self.xp.array(ids, "int32")

    def _cache_for(
        self, params: Params, prompts: list[list[int]], lengths: np.ndarray, max_new_tokens: int
    ) -> tuple[Params, int]:
        """A cache with room for the answers, and how many tokens of the prompt it already holds."""
        reused = 0
        with self._lock:  # of several threads one alone gets it: what takes a cache consumes it
            kept, self._kept = self._kept, None
        if kept is not None and len(prompts) == 1 and kept[0] is params:
            # The last token is always computed: its logits are what is asked for.
            reused = min(_common_prefix(kept[1], prompts[0]), len(prompts[0]) - 1)
        slots = self._slots(int(lengths.max()), max_new_tokens, reused)
        if not reused or kept is None:
            return self._new_cache(len(prompts), slots), 0
        buffers = kept[2]
        missing = slots - next(iter(buffers.values())).shape[2]
        if missing > 0:
            room = self._new_cache(1, missing)
            buffers = {name: self.xp.concat([buffer, room[name]], axis=2) for name, buffer in buffers.items()}
        return buffers, reused

    def forget(self) -> None:
        """Drop the last prompt's cache: the weights that it was computed with may have been written to."""
        self._kept = None

    def _keep(self, params: Params, prompts: list[list[int]], rows: int, fed: list[Array], cache: Params) -> None:
        if rows == 1:
            self._kept = (params, prompts[0] + [int(self.xp.get(token)[0]) for token in fed], cache)

    def _slots(self, longest: int, max_new_tokens: int, reused: int = 0) -> int:
        chunks, rest = divmod(longest - reused, CHUNK)
        padded = longest if self.xp.eager else reused + chunks * CHUNK + (bucket(rest) if rest else 0)
        # Steps of 64 or of a quarter power of two: attention reads the whole buffer, so it must not be much too long.
        needed = max(longest + max_new_tokens, padded)
        step = max(64, bucket(needed) // 4)
        return -(-needed // step) * step

    def _new_cache(self, rows: int, slots: int) -> Params:
        specs = flatten(self.skeleton.new_cache(rows, slots))
        return {name: self.xp.zeros(spec.shape, self.cache_dtype) for name, spec in specs.items()}

    def _prefill(
        self, params: Params, prompts: list[list[int]], lengths: np.ndarray, cache: Params, reused: int = 0
    ) -> tuple[Array, Params]:
        """Logits (B, V) after each prompt's last token; the first `reused` tokens are in the cache already."""
        xp = self.xp
        longest = int(lengths.max())
        result = None
        for first in range(reused, longest, CHUNK):
            time = min(CHUNK, longest - first)
            ids = np.zeros((len(prompts), time if xp.eager else bucket(time)), np.int32)
            for row, prompt in enumerate(prompts):
                piece = prompt[first : first + time]
                ids[row, : len(piece)] = piece
            start = np.full(len(prompts), first, np.int32)
            last = np.clip(lengths - 1 - first, 0, time - 1).astype(np.int32)
            logits, cache = self._prefill_step(params, *(xp.array(a, "int32") for a in (ids, start, last)), cache)
            ends_here = (lengths > first) & (lengths <= first + time)
            result = logits if result is None else xp.where(xp.array(ends_here[:, None]), logits, result)
        return result, cache


def _common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    for index, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return index
    return min(len(one), len(other))


def _step(xp: Backend, model: Any, ids: Array, start: Array, last: Array, cache: Params) -> tuple[Array, Params]:
    """Run ids (B, T) from slots start (B,); logits (B, V) at index last (B,) of each row, and the new cache."""
    buffers = bind(model.new_cache(1, 1), cache)
    hidden = model.model(xp, ids, start, buffers)
    if ids.shape[1] > 1:
        index = xp.broadcast_to(xp.reshape(last, (-1, 1, 1)), (ids.shape[0], 1, hidden.shape[-1]))
        hidden = xp.take_along_axis(hidden, index, 1)
    return model.logits(xp, hidden[:, 0]), flatten(buffers)


def _next(
    xp: Backend, model: Any, token: Array, start: Array, uniform: Array, values: Array, bias: Array, seen: Array,
    counts: Array, cache: Params, *, features: frozenset[str], logprobs: bool,
) -> tuple[Array, Array, Array, Array, Params]:  # fmt: skip
    """Run tokens (B,) at slots start (B,) and choose the next ones: what `choose` returns, start + 1, the new cache."""
    logits, cache = _step(xp, model, xp.expand_dims(token, 1), start, start, cache)
    found = choose(xp, logits, uniform, values, bias, seen, counts, features=features, logprobs=logprobs)
    return (*found, start + 1, cache)


def hidden_states(xp: Backend, model: Any, ids: Array) -> Array:
    return model.hidden(xp, ids)


def _all_logits(xp: Backend, model: Any, ids: Array) -> Array:
    return model.logits(xp, model.model(xp, ids))


def _token_logprobs(xp: Backend, model: Any, hidden: Array, targets: Array) -> Array:
    logits = model.logits(xp, hidden)
    picked = xp.take_along_axis(logits, xp.expand_dims(targets, -1), -1)[..., 0]
    return picked - xp.logsumexp(logits, axis=-1)


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def _take_rows(xp: Backend, arrays: Params, order: Array) -> Params:
    return {name: xp.take(array, order, axis=0) for name, array in arrays.items()}
