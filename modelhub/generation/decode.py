"""The decode loop: prefill in buckets, then one token per step for all rows, over a cache that is never copied."""

import functools
from collections.abc import Generator
from typing import Any

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Module, Params, bind, flatten
from modelhub.generation.sampling import Sampler, draw, greedy, sample

CHUNK = 512  # longest piece of a prompt that is computed at once: bounds the memory of scores and masks
_SMALLEST = 16


def bucket(n: int) -> int:
    """The next power of two, 16 at least: few sizes, so few compilations."""
    return max(_SMALLEST, 1 << (n - 1).bit_length())


class Engine:
    """The compiled programs of one model on one backend; keeps nothing between calls but the programs."""

    def __init__(self, xp: Backend, skeleton: Module, cache_dtype: str):
        self.xp = xp
        self.skeleton: Any = skeleton
        self.cache_dtype = cache_dtype
        step = functools.partial(_step, xp)
        self._prefill_step = xp.compile(step, skeleton, donate=(4,), hot=False)
        self._decode_step = xp.compile(step, skeleton, donate=(4,))
        self._logits = xp.compile(functools.partial(_all_logits, xp), skeleton, hot=False)
        self._greedy = xp.compile(functools.partial(greedy, xp), hot=False)
        self._samplers: dict[tuple[str, ...], Any] = {}

    def _sampled(self, truncations: tuple[str, ...]) -> Any:
        if truncations not in self._samplers:
            self._samplers[truncations] = self.xp.compile(functools.partial(sample, self.xp, truncations=truncations))
        return self._samplers[truncations]

    def logits(self, params: Params, ids: np.ndarray) -> np.ndarray:
        """float32 logits (B, T, V) of int32 ids (B, T), without a cache."""
        time = ids.shape[1]
        if not self.xp.eager:  # later tokens do not change earlier logits, so padding on the right is free
            ids = np.pad(ids, ((0, 0), (0, bucket(time) - time)))
        return self.xp.get(self._logits(params, self.xp.array(ids, "int32")))[:, :time]

    def run(
        self, params: Params, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler, seed: int
    ) -> Generator[np.ndarray, None, None]:
        """Yield int32 arrays (B,), the next token of every row, max_new_tokens times. Close it to stop earlier."""
        xp, rows = self.xp, len(prompts)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        # One generator a row: a prompt gets the same numbers alone and in a batch.
        generators = [np.random.default_rng([seed, row]) for row in range(rows)]
        values = xp.array(sampler.values())

        def choose(logits: Array) -> Array:
            if sampler.greedy:
                return self._greedy(logits)
            return self._sampled(sampler.truncations)(logits, xp.array(draw(generators)), values)

        cache = self._new_cache(rows, self._slots(int(lengths.max()), max_new_tokens))
        logits, cache = self._prefill(params, prompts, lengths, cache)
        token = choose(logits)
        yield xp.get(token)
        last = xp.zeros((rows,), "int32")
        ahead = None  # on asynchronous backends a token is computed while the caller handles the one before
        for index in range(max_new_tokens - 1):
            start = xp.array(lengths + index, "int32")
            logits, cache = self._decode_step(params, xp.expand_dims(token, 1), start, last, cache)
            token = choose(logits)
            if not xp.asynchronous:
                yield xp.get(token)
                continue
            if ahead is not None:
                yield xp.get(ahead)
            ahead = token
        if ahead is not None:
            yield xp.get(ahead)

    def _slots(self, longest: int, max_new_tokens: int) -> int:
        chunks, rest = divmod(longest, CHUNK)
        padded = longest if self.xp.eager else chunks * CHUNK + (bucket(rest) if rest else 0)
        # Steps of 64 or of a quarter power of two: attention reads the whole buffer, so it must not be much too long.
        needed = max(longest + max_new_tokens, padded)
        step = max(64, bucket(needed) // 4)
        return -(-needed // step) * step

    def _new_cache(self, rows: int, slots: int) -> Params:
        specs = flatten(self.skeleton.new_cache(rows, slots))
        return {name: self.xp.zeros(spec.shape, self.cache_dtype) for name, spec in specs.items()}

    def _prefill(
        self, params: Params, prompts: list[list[int]], lengths: np.ndarray, cache: Params
    ) -> tuple[Array, Params]:
        """Logits (B, V) after each prompt's last token."""
        xp = self.xp
        longest = int(lengths.max())
        result = None
        for first in range(0, longest, CHUNK):
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


def _step(xp: Backend, model: Any, ids: Array, start: Array, last: Array, cache: Params) -> tuple[Array, Params]:
    """Run ids (B, T) from slots start (B,); logits (B, V) at index last (B,) of each row, and the new cache."""
    buffers = bind(model.new_cache(1, 1), cache)
    hidden = model.model(xp, ids, start, buffers)
    if ids.shape[1] > 1:
        index = xp.broadcast_to(xp.reshape(last, (-1, 1, 1)), (ids.shape[0], 1, hidden.shape[-1]))
        hidden = xp.take_along_axis(hidden, index, 1)
    return model.logits(xp, hidden[:, 0]), flatten(buffers)


def _all_logits(xp: Backend, model: Any, ids: Array) -> Array:
    return model.logits(xp, model.model(xp, ids))
