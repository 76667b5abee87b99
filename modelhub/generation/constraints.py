"""What generation_config.json asks of the next token that depends on the tokens before it, in numpy, for all backends.

The maths and its order are those of transformers (generation/logits_process.py). Presets that ask for none of it never
come here: their logits stay on the device.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelhub.generation.sampling import LOWEST, Sampler

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Constraints:
    """Names and meanings are those of transformers' GenerationConfig. Lengths count tokens.

    sequence_bias: what is added to the last token of a sequence of several where the others were said; bad_words: what
    is never said, of several tokens. Those of one token are the Sampler's logit_bias. stop_ids: the tokens that end an
    answer. exponential_decay_length_penalty: from how many new tokens on, and the factor for each further one.
    """

    stop_ids: frozenset[int] = frozenset()
    sequence_bias: tuple[tuple[Tokens, float], ...] = ()
    bad_words: tuple[Tokens, ...] = ()
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    min_length: int = 0
    min_new_tokens: int = 0
    forced_bos_token_id: int | None = None
    forced_eos_token_id: Tokens = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    begin_suppress_tokens: Tokens = ()
    renormalize_logits: bool = False

    @property
    def active(self) -> bool:
        # Of one answer the order of the tokens is the same after normalization; only sums over beams change.
        return self != Constraints(self.stop_ids, renormalize_logits=self.renormalize_logits)


@dataclass(frozen=True)
class Guide:
    """Logits as sampler and constraints change them, before anything is drawn.

    prompts: the ids of each prompt, which has `copies` rows, side by side; rooms: how long its answers may get.
    """

    sampler: Sampler
    constraints: Constraints
    prompts: Sequence[Sequence[int]]
    rooms: Sequence[int]
    copies: int = 1

    def __call__(self, logits: np.ndarray, answers: Sequence[Sequence[int]]) -> np.ndarray:
        """float32 (B, V), changed, of float32 (B, V), which stay; answers: the new tokens of each row so far."""
        x = logits + self.sampler.bias(logits.shape[1]) if self.sampler.logit_bias else logits.copy()
        with np.errstate(over="ignore"):  # penalties may push what is never said beyond float32
            for row, answer in enumerate(answers):
                self._change(x[row], self.prompts[row // self.copies], answer, self.rooms[row // self.copies])
        return np.maximum(x, np.float32(LOWEST))

    def _change(self, x: np.ndarray, prompt: Sequence[int], answer: Sequence[int], room: int) -> None:
        """x (V,) is written to."""
        c, sampler = self.constraints, self.sampler
        said = [*prompt, *answer]
        for sequence, amount in c.sequence_bias:
            if _ends_with(said, sequence[:-1]):
                x[sequence[-1]] += max(amount, LOWEST)
        if c.encoder_repetition_penalty != 1.0:
            _penalise(x, prompt, 1.0 / c.encoder_repetition_penalty)
        if sampler.repetition_penalty is not None:
            _penalise(x, said, sampler.repetition_penalty)
        if sampler.presence_penalty or sampler.frequency_penalty:
            tokens, counts = np.unique(np.asarray(answer, np.int64), return_counts=True)
            x[tokens] -= (sampler.presence_penalty or 0.0) + (sampler.frequency_penalty or 0.0) * counts
        x[_completions(said, said, c.no_repeat_ngram_size)] = LOWEST
        x[_completions(prompt, said, c.encoder_no_repeat_ngram_size)] = LOWEST
        x[[word[-1] for word in c.bad_words if _ends_with(said, word[:-1])]] = LOWEST
        ends = sorted(c.stop_ids)
        if len(said) < c.min_length or len(answer) < c.min_new_tokens:
            x[ends] = LOWEST
        if c.forced_bos_token_id is not None and len(said) == 1:
            _force(x, [c.forced_bos_token_id])
        if c.forced_eos_token_id and len(answer) == room - 1:
            _force(x, c.forced_eos_token_id)
        if c.remove_invalid_values:
            np.nan_to_num(x, copy=False, nan=0.0)
        if c.exponential_decay_length_penalty is not None:
            start, factor = c.exponential_decay_length_penalty
            if (over := len(answer) - start) > 0:
                finite = np.where(x[ends] > LOWEST, x[ends], 0)
                x[ends] += np.abs(finite) * np.float32(factor**over - 1)
        begin = int(len(prompt) <= 1 and c.forced_bos_token_id is not None)
        if c.begin_suppress_tokens and len(answer) == begin:
            x[list(c.begin_suppress_tokens)] = LOWEST


def _ends_with(said: Sequence[int], ending: Sequence[int]) -> bool:
    return len(said) >= len(ending) and tuple(said[len(said) - len(ending) :]) == tuple(ending)


def _penalise(x: np.ndarray, tokens: Sequence[int], penalty: float) -> None:
    """Keskar et al. 2019, arXiv:1909.05858."""
    ids = np.unique(np.asarray(tokens, np.int64))
    x[ids] = np.where(x[ids] < 0, x[ids] * np.float32(penalty), x[ids] / np.float32(penalty))


def _completions(of: Sequence[int], said: Sequence[int], size: int) -> np.ndarray:
    """The tokens that would end an n-gram of `size` tokens which is in `of` already."""
    if size <= 0 or len(said) < size or len(of) < size:
        return np.zeros(0, np.int64)
    windows = np.lib.stride_tricks.sliding_window_view(np.asarray(of, np.int64), size)
    begun = np.asarray(said[len(said) - size + 1 :], np.int64)
    return windows[(windows[:, :-1] == begun).all(axis=1), -1]


def _force(x: np.ndarray, tokens: Sequence[int]) -> None:
    x[:] = LOWEST
    x[list(tokens)] = 0.0
