"""What a CausalLM answers with, besides text."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class RunStats:
    """What the last call of generate did. Seconds are wall time from the call on.

    reused_tokens: how many tokens of the prompt were in the cache of the call before, and not computed again.
    tokens_per_second: all rows together, from the second step on: what comes before is reading the prompt and, on
    backends that compile, compiling. None for fewer than 8 tokens, of which no rate can be told.
    """

    prompt_tokens: int
    reused_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    seconds: float
    tokens_per_second: float | None


@dataclass(frozen=True)
class Generation:
    """One answer with its numbers.

    logprobs: the model's log-probability of each token, before penalties, temperature and truncation; None for beams.
    score: their sum; for beams the sum over length ** length_penalty, the end token included.
    """

    text: str
    token_ids: list[int]
    logprobs: list[float] | None
    score: float


@dataclass(frozen=True)
class Score:
    """logprobs: the log-probability of each token after the first, given those before it."""

    text: str
    token_ids: list[int]
    logprobs: list[float]

    @property
    def total(self) -> float:
        return float(sum(self.logprobs))

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability per token."""
        return math.exp(-self.total / len(self.logprobs))
