"""CausalLM: text in, text out. One of the few objects with state; everything below it is functions."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np

from modelhub.core.backends import get_backend
from modelhub.core.tree import Params
from modelhub.errors import InputError
from modelhub.generation.decode import Engine
from modelhub.generation.sampling import Sampler
from modelhub.generation.text import TextRow
from modelhub.hub.preset import resolve
from modelhub.processing.tokenizer import Tokenizer
from modelhub.tasks.backbone import Backbone
from modelhub.tasks.loading import open_preset


@dataclass(frozen=True)
class RunStats:
    """What the last call of generate did. Seconds are wall time from the call on.

    tokens_per_second: all rows together, from the second step on: what comes before is reading the prompt and, on
    backends that compile, compiling. 0 if there were no more than two steps.
    """

    prompt_tokens: int
    new_tokens: int
    seconds_to_first_token: float
    seconds: float
    tokens_per_second: float


class CausalLM:
    """A decoder language model with its tokenizer, on one backend.

    Made by `from_preset`. Attributes: config (the family's), tokenizer, backbone, backend and device and dtype (names),
    preset (where it came from), last_run (RunStats of the last `generate`).
    """

    def __init__(
        self, backbone: Backbone, tokenizer: Tokenizer | None, generation_config: dict[str, Any], preset: str = ""
    ):
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.preset = preset
        self.last_run: RunStats | None = None
        self._engine = Engine(backbone.xp, backbone.model, backbone.dtype)

    @classmethod
    def from_preset(
        cls,
        preset: str,
        *,
        backend: str | None = None,
        device: str | None = None,
        dtype: str | None = None,
        revision: str | None = None,
        offline: bool = False,
        token: str | None = None,
        cache_dir: str | None = None,
        load_weights: bool = True,
        seed: int = 0,
    ) -> Self:
        """Load a model.

        preset: a registry name, a Hugging Face folder, a .gguf file, or hf://org/repo[@revision].
        backend: "jax", "torch", "tensorflow" or "numpy"; None: set_backend(), else $MODELHUB_BACKEND, else an installed
            one that sees an accelerator, else the first installed of these.
        device: "cpu", "gpu", "gpu:1", "tpu", "mps"; None: the best present.
        dtype: "float32", "bfloat16" or "float16"; None: float32 on CPU, the checkpoint's own elsewhere.
        load_weights: False gives random weights drawn from `seed`, equal on all backends.

        Raises PresetNotFound, CheckpointError, ConfigError, TokenizerError, BackendNotInstalled, DeviceError,
        DownloadError; whatever fails, nothing half-loaded is left.
        """
        xp = get_backend(backend, device)
        source = open_preset(
            resolve(
                preset, revision=revision, offline=offline, token=token, cache_dir=cache_dir, weights=load_weights
            )
        )  # fmt: skip
        try:
            tokenizer = source.tokenizer()
            backbone = Backbone.from_source(source, xp, dtype, load_weights, seed)
        finally:
            source.close()
        return cls(backbone, tokenizer, source.generation_config, preset)

    @property
    def config(self) -> Any:
        return self.backbone.config

    @property
    def backend(self) -> str:
        return self.backbone.xp.name

    @property
    def device(self) -> str:
        return self.backbone.xp.device

    @property
    def dtype(self) -> str:
        return self.backbone.dtype

    @property
    def params(self) -> Params:
        """{Hugging Face name: array of the backend}. Replace the dict to change weights; never change it in place."""
        return self.backbone.params

    @params.setter
    def params(self, params: Params) -> None:
        self.backbone.params = params

    def __repr__(self) -> str:
        return f"CausalLM({self.preset!r}, backend={self.backend!r}, device={self.device!r}, dtype={self.dtype!r})"

    def summary(self) -> None:
        """Print what the model is made of: parts, parameters, memory."""
        self.backbone.summary(title=repr(self))

    def logits(self, token_ids: Any) -> np.ndarray:
        """float32 logits (batch, time, vocabulary) of token ids (batch, time): lists, or an array of any framework."""
        return self._engine.logits(self.params, self.backbone.check_ids(token_ids))

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: str | Sequence[str] | None = None,
        seed: int = 0,
        stream: bool = False,
        echo: bool = False,
    ) -> Any:
        """Continue a prompt (returns a string), or each of a list of prompts in one batch (returns a list).

        Greedy, unless the preset's generation_config or an argument here asks for sampling: giving temperature, top_k,
        top_p or min_p does. The same seed gives the same text on every backend (float32), alone or in a batch.
        stop: string(s) that end the text and are not part of it. stream: return an iterator over pieces of text (one
        prompt only). echo: the result begins with the prompt.

        Ends at the model's end-of-sequence tokens, after max_new_tokens, or where the model's context is full.
        Raises InputError for prompts that are empty or too long, and for values that make no sense.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        if stream and not isinstance(prompt, str):
            raise InputError(f"stream=True takes one prompt, got a list of {len(prompts)}")
        sampler = self._sampler(temperature, top_k, top_p, min_p)
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        ids = self._encode(prompts)
        rows = [TextRow(self._tokenizer.stream(), self._stop_ids, stops) for _ in prompts]
        pieces = self._run(ids, rows, self._room(ids, max_new_tokens), sampler, seed)
        if stream:
            return itertools.chain(prompts if echo else [], pieces)
        for _ in pieces:
            pass
        texts = [(text if echo else "") + row.text for text, row in zip(prompts, rows, strict=True)]
        return texts[0] if isinstance(prompt, str) else texts

    def _run(
        self, ids: list[list[int]], rows: list[TextRow], max_new_tokens: int, sampler: Sampler, seed: int
    ) -> Iterator[str]:
        """Drive the engine until every row is done; yields the first row's text piece by piece."""
        begun = time.perf_counter()
        arrived: list[float] = []  # when the first tokens and the second came, and how many there were by then
        counted = 0
        steps = self._engine.run(self.params, ids, max_new_tokens, sampler, seed)
        for tokens in steps:
            if len(arrived) < 2:
                arrived.append(time.perf_counter() - begun)
                counted += len(rows)
            shown = [row.push(int(token)) for row, token in zip(rows, tokens, strict=True)]
            if shown[0]:
                yield shown[0]
            if all(row.done for row in rows):
                break
        steps.close()
        rest = [row.flush() for row in rows if not row.done or row is rows[0]]
        if rest and rest[0]:
            yield rest[0]
        seconds, new_tokens = time.perf_counter() - begun, sum(len(row.tokens) for row in rows)
        speed = max(new_tokens - counted, 0) / (seconds - arrived[-1])
        self.last_run = RunStats(sum(map(len, ids)), new_tokens, arrived[0], seconds, speed)

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer; use logits(token_ids), or set lm.tokenizer")
        return self.tokenizer

    @property
    def _stop_ids(self) -> frozenset[int]:
        """generation_config's end tokens (a list in instruct presets), else the config's, else the tokenizer's."""
        for found in (
            self.generation_config.get("eos_token_id"),
            self.config.extra.get("eos_token_id"),
            self._tokenizer.eos_token_id,
        ):
            if found is not None:
                return frozenset(found if isinstance(found, list) else [found])
        return frozenset()

    def _sampler(
        self, temperature: float | None, top_k: int | None, top_p: float | None, min_p: float | None
    ) -> Sampler:
        asked = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}
        defaults = self.generation_config if self.generation_config.get("do_sample") else {}
        chosen: dict[str, Any] = {k: defaults.get(k) if value is None else value for k, value in asked.items()}
        return Sampler(**chosen)

    def _encode(self, prompts: list[str]) -> list[list[int]]:
        if not prompts:
            raise InputError("the list of prompts is empty; give at least one")
        for index, text in enumerate(prompts):
            if not isinstance(text, str):
                raise InputError(
                    f"prompt {index} is a {type(text).__name__}; generate takes a string or a list of strings"
                )
            if not text:
                raise InputError(f"prompt {index} is empty; give at least one character")
        return [self._tokenizer.encode(text) for text in prompts]

    def _room(self, ids: list[list[int]], max_new_tokens: int) -> int:
        if max_new_tokens < 1:
            raise InputError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
        context = self.config.max_position_embeddings
        for index, prompt in enumerate(ids):
            if len(prompt) >= context:
                raise InputError(
                    f"prompt {index} has {len(prompt)} tokens and the model's context holds {context}: "
                    f"shorten it so that room is left for an answer"
                )
        return min(max_new_tokens, context - max(map(len, ids)))
