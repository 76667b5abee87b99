"""Beam search with the bookkeeping of transformers, so that the same model gives the same beams.

The device ranks continuations; which sequences live, end and win is decided here in numpy, on a few numbers per step.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from modelhub.core.backends.base import Array, Backend
from modelhub.generation.sampling import not_finite

_NEVER = np.float32(-1.0e9)


@dataclass(frozen=True)
class BeamOptions:
    """length_penalty: a sequence's score is its log-probability over length ** length_penalty.

    early_stopping: True stops once there are num_beams finished sequences; False also where the best open beam, at its
    present length, cannot beat the worst finished one; "never" only where it cannot at any length.
    """

    num_beams: int
    max_new_tokens: int
    stop_ids: frozenset[int]
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    stopped: Callable[[list[int]], bool] | None = None  # whether a sequence ends with these tokens, other than by an id

    @property
    def candidates(self) -> int:
        """Continuations ranked per step: enough that num_beams stay open even if all others end."""
        return max(2, 1 + len(self.stop_ids)) * self.num_beams


def rank(
    xp: Backend, logits: Array, scores: Array, *, prompts: int, candidates: int, normalised: bool = False
) -> tuple[Array, Array, Array]:
    """The best continuations of all beams of each prompt.

    logits (prompts * beams, V); scores (prompts, beams) of the beams so far; normalised: the logits are
    log-probabilities already. Returns summed log-probabilities and indices into beams * V, both (prompts, candidates),
    and (prompts, beams): NaN for beams whose logits are not finite, else 0 (who normalised them has looked).
    """
    alarms = xp.zeros((prompts, 1)) if normalised else xp.reshape(not_finite(xp, logits), (prompts, -1))
    log_probs = (logits if normalised else xp.log_softmax(logits)) + xp.reshape(scores, (-1, 1))
    return *xp.top_k(xp.reshape(log_probs, (prompts, -1)), candidates), alarms


@dataclass
class Beams:
    """The open and the finished sequences of one prompt. Scores of open ones are sums, of finished ones penalised."""

    options: BeamOptions
    open: list[list[int]] = field(default_factory=list)
    open_scores: np.ndarray = field(init=False)
    finished: list[list[int]] = field(init=False)
    finished_scores: np.ndarray = field(init=False)
    is_finished: np.ndarray = field(init=False)
    can_improve: bool = True
    done: bool = False

    def __post_init__(self) -> None:
        n = self.options.num_beams
        self.open = [[] for _ in range(n)]
        # All beams start alike: only the first may be continued, or they would all stay the same.
        self.open_scores = np.where(np.arange(n) == 0, np.float32(0), _NEVER).astype(np.float32)
        self.finished = [[] for _ in range(n)]
        self.finished_scores = np.full(n, _NEVER, np.float32)
        self.is_finished = np.zeros(n, bool)

    def advance(self, scores: np.ndarray, indices: np.ndarray, vocabulary: int) -> tuple[list[int], list[int]]:
        """Take the ranked continuations (candidates,) of one step.

        Returns for each open beam which beam it continues, and its newest token.
        """
        options = self.options
        parents, tokens = indices // vocabulary, indices % vocabulary
        sequences = [self.open[parent] + [int(token)] for parent, token in zip(parents, tokens, strict=True)]
        length = len(sequences[0])
        ends = np.array([int(token) in options.stop_ids for token in tokens]) | (length >= options.max_new_tokens)
        if options.stopped is not None:
            ends |= np.array([options.stopped(sequence) for sequence in sequences])

        self._finish(scores, sequences, ends, length)
        order = _best(scores + np.where(ends, _NEVER, np.float32(0)), options.num_beams)
        self.open = [sequences[i] for i in order]
        self.open_scores = (scores + np.where(ends, _NEVER, np.float32(0)))[order].astype(np.float32)
        self._decide(ends, length)
        return [int(parents[i]) for i in order], [int(tokens[i]) for i in order]

    def _finish(self, scores: np.ndarray, sequences: list[list[int]], ends: np.ndarray, length: int) -> None:
        n = self.options.num_beams
        eligible = ends & (np.arange(len(ends)) < n)  # candidates beyond num_beams are only a reserve of open beams
        penalised = scores / np.float32(length**self.options.length_penalty)
        closed = not self.can_improve or (self.is_finished.all() and self.options.early_stopping is True)
        penalised = np.where(eligible, penalised, penalised + _NEVER) + (_NEVER if closed else np.float32(0))
        merged = np.concatenate([self.finished_scores, penalised]).astype(np.float32)
        order = _best(merged, n)
        everything = self.finished + sequences
        self.finished = [everything[i] for i in order]
        self.finished_scores = merged[order]
        self.is_finished = np.concatenate([self.is_finished, eligible])[order]

    def _decide(self, ends: np.ndarray, length: int) -> None:
        options = self.options
        longest = options.max_new_tokens if options.early_stopping == "never" and options.length_penalty > 0 else length
        best_possible = self.open_scores[0] / np.float32(longest**options.length_penalty)
        worst = np.where(self.is_finished, self.finished_scores.min(), _NEVER)
        self.can_improve = self.can_improve and bool((best_possible > worst).any())
        full = options.early_stopping is True and bool(self.is_finished.all())
        self.done = not self.can_improve or full or bool(ends.all())


def _best(scores: np.ndarray, n: int) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:n]
