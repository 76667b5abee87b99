"""CausalLM: text in, text out. One of the few objects with state; everything below it is functions."""

import itertools
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Self, Unpack

import numpy as np

from modelhub.core import custom
from modelhub.errors import InputError, ModelhubError
from modelhub.generation.beam import BeamOptions
from modelhub.generation.decode import Engine
from modelhub.generation.sampling import Sampler
from modelhub.generation.text import TextRow
from modelhub.kinds import CAUSAL_LM, IMAGES
from modelhub.model.backbone import Backbone
from modelhub.model.loading import open_source
from modelhub.model.options import LoadOptions, choose_backend, takes
from modelhub.model.saving import write_json
from modelhub.processing.chat_template import ChatTemplate
from modelhub.processing.tokenizer import Tokenizer
from modelhub.tasks.answers import Generation, RunStats, Score
from modelhub.tasks.finetuning import FineTuning, Preprocessor


class _Rendered(str):
    """Text out of a chat template."""


class CausalLM(FineTuning):
    """A decoder language model with its tokenizer, on one backend.

    Made by `from_preset`. Attributes: config (the family's), tokenizer, backbone, backend and device and dtype (names),
    preset (where it came from), last_run (RunStats of the last `generate`).
    """

    kind = CAUSAL_LM
    task = kind.name

    def __init__(
        self, backbone: Backbone, tokenizer: Tokenizer | None, generation_config: dict[str, Any], preset: str = ""
    ):
        self.backbone = backbone
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self.preset = preset
        self.preprocessor = Preprocessor(min(1024, backbone.config.max_position_embeddings))
        self.last_run: RunStats | None = None
        self._generator: Engine | None = None

    @classmethod
    @takes(LoadOptions)
    def from_preset(cls, preset: str | os.PathLike[str], **options: Unpack[LoadOptions]) -> Self:
        """Load a model.

        preset: a registry name, a Hugging Face folder, a .gguf file, or hf://org/repo[@revision]. options: backend,
        device, dtype, revision, offline, token, cache_dir, load_weights, attention, layers and seed; see
        modelhub.model.options.LoadOptions.

        Raises PresetNotFound, CheckpointError, ConfigError, TokenizerError, BackendNotInstalled, DeviceError,
        DownloadError; whatever fails, nothing half-loaded is left.
        """
        xp = choose_backend(preset, cls.task, options)
        with open_source(preset, options) as source:
            if source.model.reads == IMAGES:
                raise InputError(
                    f"{preset} is a {source.config.model_type}, which reads images; load it as ImageClassifier, or as "
                    "Backbone for its features"
                )
            tokenizer = source.tokenizer()
            backbone = Backbone.from_source(source, xp, options)
        return cls(backbone, tokenizer, source.generation_config, os.fspath(preset))

    @property
    def _engine(self) -> Engine:
        """Another skeleton, with or without an adapter, needs other programs, and so does another backend."""
        xp, model, dtype = self.backbone.xp, self.backbone.model, self.backbone.dtype
        kept = self._generator
        if kept is None or kept.xp is not xp or kept.skeleton is not model or kept.cache_dtype != dtype:
            kept = self._generator = Engine(xp, model, dtype)
        if self.backbone.shared:
            kept.forget()
        return kept

    def _forget(self) -> None:
        self._generator = None

    def __repr__(self) -> str:
        return f"CausalLM({self._described()})"

    def logits(self, token_ids: Any) -> np.ndarray:
        """float32 logits (batch, time, vocabulary) of token ids (batch, time): lists, or an array of any framework."""
        return self._engine.logits(self.params, self.backbone.check_ids(token_ids))

    def generate(
        self,
        prompt: str | Sequence[str],
        max_new_tokens: int = 64,
        *,
        sampler: Callable | str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        presence_penalty: float | None = None,
        frequency_penalty: float | None = None,
        logit_bias: Mapping[int, float] | None = None,
        num_beams: int = 1,
        num_return_sequences: int = 1,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
        seed: int = 0,
        stream: bool = False,
        echo: bool = False,
    ) -> Any:
        """Continue a prompt (returns a string), or each of a list of prompts in one batch (returns a list).

        Greedy, unless the preset's generation_config or an argument here asks for sampling: giving temperature, top_k,
        top_p or min_p does. In float32 the same seed gives the same text on every backend. The penalties and
        logit_bias are those of modelhub.generation.sampling.Sampler, which names their sources.

        sampler: the user's own choice of tokens, function(logits) -> token ids on the arrays of the model's backend,
            logits (rows, vocabulary) float32, ids (rows,); or function(xp, logits, uniform), written once for all; or
            the name of a registered one.
        num_beams: beam search as in transformers, without sampling.
        num_return_sequences: that many answers per prompt, in a list.
        stop: string(s) that end the text and are not part of it.
        logprobs: return Generation objects (text, token_ids, logprobs, score) in place of strings.
        stream: return an iterator over pieces of text (one prompt, one answer). echo: begin with the prompt.

        Ends at the model's end-of-sequence tokens, after max_new_tokens, or where the model's context is full.
        Raises InputError for prompts that are empty or too long, and for values that make no sense.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        # A rendered chat spells its special tokens itself.
        ids = [self._tokenizer.encode(text, not isinstance(text, _Rendered)) for text in _checked(prompts)]
        if stream and not isinstance(prompt, str):
            raise InputError(f"stream=True takes one prompt, got a list of {len(prompts)}")
        if stream and (num_beams, num_return_sequences, logprobs) != (1, 1, False):
            raise InputError(
                "stream=True gives one answer as it comes: it cannot be combined with num_beams, "
                "num_return_sequences or logprobs"
            )
        settings = self._sampler(
            temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty,
            presence_penalty=presence_penalty, frequency_penalty=frequency_penalty, logit_bias=logit_bias,
        )  # fmt: skip
        own = None if sampler is None else custom.given("sampler", sampler, self.backend)
        stops = [stop] if isinstance(stop, str) else list(stop or ())
        room = self._room(ids, max_new_tokens)
        if num_return_sequences < 1:
            raise InputError(f"num_return_sequences must be 1 or more, got {num_return_sequences}")
        if num_beams != 1:
            if own or stops or settings.features:
                raise InputError("num_beams cannot be combined with sampling, penalties, logit_bias, sampler or stop")
            answers = self._beam_search(ids, room, num_beams, num_return_sequences)
        else:
            rows = [
                TextRow(self._tokenizer.stream(), self.stop_ids, stops)
                for _ in range(len(prompts) * num_return_sequences)
            ]
            pieces = self._run(
                ids, rows, room, settings, seed, copies=num_return_sequences, logprobs=logprobs, custom=own
            )
            if stream:
                return itertools.chain(prompts if echo else [], pieces)
            for _ in pieces:
                pass
            answers = [Generation(row.text, row.tokens, row.logprobs, float(sum(row.logprobs))) for row in rows]
        if echo:
            repeated = [text for text in prompts for _ in range(num_return_sequences)]
            answers = [replace(a, text=text + a.text) for text, a in zip(repeated, answers, strict=True)]
        results: list[Any] = list(answers) if logprobs else [answer.text for answer in answers]
        if num_return_sequences > 1:
            results = [results[i : i + num_return_sequences] for i in range(0, len(results), num_return_sequences)]
        return results[0] if isinstance(prompt, str) else results

    def chat(self, messages: Sequence[Mapping[str, Any]], max_new_tokens: int = 512, **options: Any) -> Any:
        """The assistant's answer to a conversation, through the preset's own chat template.

        messages: [{"role": "user", "content": "..."}, ...] with roles system, user and assistant (tool, developer where
        the template has them). options: those of `generate`. The template's end of a turn ends the answer. In a growing
        conversation only the new tokens are computed.

        Raises InputError if the preset has no chat template, ChatTemplateError for what the template refuses.
        """
        text = self.chat_template.render(messages, add_generation_prompt=True)
        return self.generate(_Rendered(text), max_new_tokens, **options)

    def score(self, texts: str | Sequence[str]) -> Any:
        """How likely the model finds a text (returns a Score), or each of a list of texts (returns a list).

        The first token is given, not predicted: with a tokenizer that begins texts with a special token, all of the
        text is scored. Raises InputError for empty and too long texts.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        scores = []
        for text in _checked(listed):
            ids = self._tokenizer.encode(text)
            if len(ids) < 2:
                raise InputError(f"{text!r} is a single token and nothing comes before it; give a longer text")
            row = self.backbone.check_ids([ids])
            scores.append(Score(text, ids, self._engine.token_logprobs(self.params, row)[0].tolist()))
        return scores[0] if isinstance(texts, str) else scores

    def _run(
        self, ids: list[list[int]], rows: list[TextRow], max_new_tokens: int, sampler: Sampler, seed: int,
        *, copies: int, logprobs: bool, custom: Callable | None,
    ) -> Iterator[str]:  # fmt: skip
        """Drive the engine until every row is done; yields the first row's text piece by piece."""
        begun = time.perf_counter()
        arrived: list[float] = []  # when the first tokens and the second came, and how many there were by then
        counted = 0
        steps = self._engine.run(
            self.params, ids, max_new_tokens, sampler, seed, copies=copies, logprobs=logprobs, custom=custom
        )
        for tokens, scores in steps:
            if len(arrived) < 2:
                arrived.append(time.perf_counter() - begun)
                counted += len(rows)
            shown = [row.push(int(token), float(score)) for row, token, score in zip(rows, tokens, scores, strict=True)]
            if shown[0]:
                yield shown[0]
            if all(row.done for row in rows):
                break
        steps.close()
        rest = [row.flush() for row in rows]
        if rest[0]:
            yield rest[0]
        seconds, new_tokens = time.perf_counter() - begun, sum(len(row.tokens) for row in rows)
        speed = max(new_tokens - counted, 0) / (seconds - arrived[-1])
        self.last_run = RunStats(sum(map(len, ids)), self._engine.reused, new_tokens, arrived[0], seconds, speed)

    def _beam_search(self, ids: list[list[int]], room: int, num_beams: int, wanted: int) -> list["Generation"]:
        if num_beams < 1 or wanted > num_beams:
            raise InputError(
                f"num_beams={num_beams} with num_return_sequences={wanted}: there must be at least one beam, and as "
                f"many beams as answers"
            )
        options = BeamOptions(
            num_beams, room, self.stop_ids, float(self.generation_config.get("length_penalty") or 1.0),
            self.generation_config.get("early_stopping") or False,
        )  # fmt: skip
        answers = []
        for beams in self._engine.beam_search(self.params, ids, options):
            for tokens, score in zip(beams.finished[:wanted], beams.finished_scores[:wanted], strict=True):
                kept = [token for token in tokens if token not in self.stop_ids]
                answers.append(Generation(self._tokenizer.decode(kept), kept, None, float(score)))
        return answers

    def _write_processors(self, folder: Path) -> None:
        if self.generation_config:
            write_json(folder / "generation_config.json", self.generation_config)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def _probe(self) -> np.ndarray:
        size = self.config.vocab_size
        return self.logits([[(7919 * i + 1) % size for i in range(min(16, self.config.max_position_embeddings))]])

    def _chats(self) -> bool:
        return self.tokenizer is not None and self.tokenizer.chat_template is not None

    @property
    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InputError("this model has no tokenizer; use logits(token_ids), or set lm.tokenizer")
        return self.tokenizer

    @cached_property
    def chat_template(self) -> ChatTemplate:
        """The preset's template; raises InputError if it has none."""
        tokenizer = self._tokenizer
        if tokenizer.chat_template is None:
            raise InputError(
                f"{self.preset or 'this model'} has no chat template. If it was not trained to chat, use generate(), "
                f"or load an instruct preset. KerasHub's presets have none even where the model was: set "
                f"lm.tokenizer.chat_template to the model's own, or load its Hugging Face repository"
            )
        named = {f"{name}_token": getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "pad", "unk")}
        return ChatTemplate(
            tokenizer.chat_template, special_tokens={name: token for name, token in named.items() if token is not None}
        )

    @cached_property
    def _end_of_turn(self) -> frozenset[int]:
        """The special token that the chat template puts after an answer; config files do not always list it."""
        mark = "answer"
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": mark}]
        try:
            rendered = self.chat_template.render(turns, add_generation_prompt=False)
        except ModelhubError:  # no template, or one that wants other turns
            return frozenset()
        after = self._tokenizer.encode(rendered.rpartition(mark)[2], add_special_tokens=False)
        return frozenset([token for token in after if token in self._tokenizer.special_ids][:1])

    @property
    def stop_ids(self) -> frozenset[int]:
        """generation_config's end tokens (a list in instruct presets), else the config's, else the tokenizer's.

        And in presets that chat, the end of a turn.
        """
        for found in (
            self.generation_config.get("eos_token_id"),
            self.config.extra.get("eos_token_id"),
            self._tokenizer.eos_token_id,
        ):
            if found is not None:
                return self._end_of_turn.union(found if isinstance(found, list) else [found])
        return self._end_of_turn

    def _sampler(self, **asked: Any) -> Sampler:
        """What the call asks for, and for the rest what generation_config.json says."""
        defaults = {key: self.generation_config.get(key) for key in asked}
        if not self.generation_config.get("do_sample"):  # then transformers ignores these too
            defaults |= {"temperature": None, "top_k": None, "top_p": None, "min_p": None}
        chosen = {key: defaults[key] if value is None else value for key, value in asked.items()}
        return Sampler(**chosen | {"logit_bias": asked["logit_bias"] or {}})

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
            self.backbone.check_ids([prompt])  # a tokenizer may have more ids than the embedding has rows
        return min(max_new_tokens, context - max(map(len, ids)))


def _checked(texts: list[str]) -> list[str]:
    if not texts:
        raise InputError("the list of prompts is empty; give at least one")
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise InputError(f"prompt {index} is a {type(text).__name__}; give a string or a list of strings")
        if not text:
            raise InputError(f"prompt {index} is empty; give at least one character")
    return texts
