"""CausalLM: text in, text out. One of the few objects with state; everything below it is functions."""

import inspect
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core import custom
from modelhub.core.tree import Params
from modelhub.errors import ConfigError, InputError, ModelhubError
from modelhub.generation.answers import Answers, RunStats, Score, as_prompts
from modelhub.generation.decode import GenerationEngine
from modelhub.generation.sampling import is_whole
from modelhub.generation.settings import Settings, settings
from modelhub.hub.files import write_json
from modelhub.kinds import CAUSAL_LM
from modelhub.model.source import Source
from modelhub.processing.chat_template import ChatTemplate
from modelhub.processing.tokenizer import Tokenizer
from modelhub.progress import bar
from modelhub.tasks.backbone import Backbone
from modelhub.tasks.task import Task
from modelhub.training import text_fit
from modelhub.training.objectives import Objective, TextObjective
from modelhub.training.text_fit import Preprocessor


class _Rendered(str):
    """Text out of a chat template."""


class CausalLM(Task):
    """A decoder language model with its tokenizer, on one backend.

    Made by `from_preset`. Attributes: config (the family's), tokenizer, backbone, backend and device and dtype (names),
    preset (where it came from), last_run (RunStats of the last `generate`).
    """

    kind = CAUSAL_LM
    task = kind.name

    def __init__(
        self, backbone: Backbone, tokenizer: Tokenizer | None, generation_config: dict[str, Any], preset: str = ""
    ):
        super().__init__(backbone, preset)
        self.tokenizer = tokenizer
        self.generation_config = generation_config
        self._preprocessor = Preprocessor(min(1024, backbone.config.max_position_embeddings))
        self.last_run: RunStats | None = None

    @classmethod
    def processors(cls, source: Source) -> tuple[Any, ...]:
        return source.tokenizer(), source.generation_config

    def write_processors(self, folder: Path) -> None:
        if self.generation_config:
            write_json(folder / "generation_config.json", self.generation_config)
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    @property
    def preprocessor(self) -> Preprocessor:
        """How texts become rows to train on; its sequence_length can be set."""
        return self._preprocessor

    @preprocessor.setter
    def preprocessor(self, preprocessor: Preprocessor) -> None:
        if not isinstance(preprocessor, Preprocessor):
            raise InputError(
                f"lm.preprocessor says how long the rows are that fit trains on, and cannot be {preprocessor!r}: set "
                "lm.preprocessor.sequence_length. Token ids need nothing switched off: generate, score and logits take "
                "them as they are, fit as batches with input_ids and labels"
            )
        self._preprocessor = preprocessor

    fit = text_fit.fit
    evaluate = text_fit.evaluate

    def objective(
        self, metrics: Sequence[str] = ("accuracy",), objective: Objective | str | None = None
    ) -> Objective:  # fmt: skip
        if isinstance(objective, Objective):
            return objective
        if objective is not None:
            raise ConfigError(
                f"there is no objective {objective!r}: none has a name so far. Leave objective out for the next token, "
                "or give an object of a class that inherits from modelhub.training.objectives.Objective"
            )
        if unknown := set(metrics) - {"accuracy"}:
            raise ConfigError(f'metrics can only be "accuracy", got {", ".join(map(repr, sorted(unknown)))}')
        return TextObjective(self.config)

    @property
    def _engine(self) -> GenerationEngine:
        return self._now()[0]

    def _now(self) -> tuple[GenerationEngine, Params]:
        """The engine and the parameters that go together: what one call begins with it ends with."""
        weights = self.backbone.weights
        now = weights.snapshot()
        engine = now.program("generate", lambda now: GenerationEngine(now.xp, now.skeleton, now.dtype))
        if weights.shared:
            engine.forget()
        return engine, now.params

    def logits(self, token_ids: Any) -> np.ndarray:
        """float32 logits (batch, time, vocabulary) of token ids (batch, time): lists, or an array of any framework."""
        engine, params = self._now()
        return engine.logits(params, self.backbone.check_ids(token_ids))

    def generate(
        self,
        prompt: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int | None = None,
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
        num_beams: int | None = None,
        num_return_sequences: int = 1,
        stop: str | Sequence[str] | None = None,
        logprobs: bool = False,
        seed: int = 0,
        stream: bool = False,
        echo: bool = False,
    ) -> Any:
        """Continue a prompt (returns a string), or each of a list of prompts in one batch (returns a list).

        A prompt is a text, which gets the tokenizer's start token unless it spells it itself, or a list of token ids,
        in a list of such, which is taken as it is.

        What is not given here is as the preset's generation_config says, whose keys are those of transformers (change
        lm.generation_config for what has no argument here, such as no_repeat_ngram_size); else greedy, 64 tokens at
        most. Giving temperature, top_k, top_p or min_p means sampling. In float32 the same seed gives the same text on
        every backend. The penalties and logit_bias are those of modelhub.generation.sampling.Sampler, which names their
        sources.

        sampler: "greedy", "random", "top_k" (5 unless top_k says more), "top_p" (0.1) or "beam" (num_beams 5), as in
            KerasHub; or the user's own choice of tokens, function(logits) -> token ids on the arrays of the model's
            backend, logits (rows, vocabulary) float32, ids (rows,); or function(xp, logits, uniform), written once for
            all; or the name of a registered one.
        num_beams: beam search as in transformers, without sampling.
        num_return_sequences: that many answers per prompt, in a list.
        stop: string(s) that end the text and are not part of it; they may be, or hold, special tokens.
        logprobs: return Generation objects (text, token_ids, logprobs, score) in place of strings.
        stream: return an iterator over pieces of text (one prompt, one answer). echo: begin with the prompt.

        The text goes on where the prompt ends, with the space before a new word: prompt + answer is the whole. It ends
        at the model's end-of-sequence tokens, after max_new_tokens, or where the model's context is full.
        Raises InputError for prompts that are empty or too long, and for values that make no sense; NotFinite for a
        model whose logits are NaN or infinite.
        """
        alone = isinstance(prompt, str)
        prompts = as_prompts(prompt)
        if stream and not alone:
            raise InputError(f"stream=True takes one prompt, got a list of {len(prompts)}")
        _check_flags(stream=stream, echo=echo, logprobs=logprobs)
        if not is_whole(num_return_sequences) or num_return_sequences < 1:
            raise InputError(f"num_return_sequences must be 1 or more, a whole number; got {num_return_sequences!r}")
        if not is_whole(seed) or seed < 0:
            raise InputError(f"seed must be a whole number, 0 or more, got {seed!r}")
        if stream and (num_beams not in (None, 1) or sampler == "beam" or num_return_sequences != 1 or logprobs):
            raise InputError(
                "stream=True gives one answer as it comes: it cannot be combined with num_beams, "
                "num_return_sequences or logprobs"
            )
        named = sampler if isinstance(sampler, str) and sampler not in custom.names("sampler") else None
        own = None if sampler is None or named else custom.given("sampler", sampler, self.backend)
        asked = dict(
            sampler=named, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, repetition_penalty=repetition_penalty, presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty, logit_bias=logit_bias, num_beams=num_beams, stop=stop,
        )  # fmt: skip
        how = settings(
            self.generation_config, asked, stop_ids=self.stop_ids, vocabulary=self.config.vocab_size,
            max_new_tokens=512 if isinstance(prompt, _Rendered) else 64, one_answer=stream or own is not None,
            where=self.preset or "this model",
        )  # fmt: skip
        answers = self._answers(prompts, how, num_return_sequences)
        if how.num_beams > 1:
            if own is not None:
                raise InputError("num_beams cannot be combined with a sampler of your own")
            found = answers.beams()
        else:
            pieces = self._told(answers, answers.pieces(seed, logprobs, own, shows=not stream))
            if stream:
                return itertools.chain(prompts if echo else [], pieces)
            for _ in pieces:
                pass
            found = answers.found
        if echo:
            spelled = [text if isinstance(text, str) else self._tokenizer.decode(text) for text in prompts]
            repeated = [text for text in spelled for _ in range(num_return_sequences)]
            found = [replace(a, text=text + a.text) for text, a in zip(repeated, found, strict=True)]
        results: list[Any] = list(found) if logprobs else [answer.text for answer in found]
        if num_return_sequences > 1:
            results = [results[i : i + num_return_sequences] for i in range(0, len(results), num_return_sequences)]
        return results[0] if alone else results

    def _answers(self, prompts: list[str | list[int]], how: Settings, copies: int) -> Answers:
        tokenizer, ids = self._tokenizer, [self._prompt_ids(text) for text in prompts]
        streams = [
            # An answer in a chat is a text of its own.
            partial(tokenizer.stream, after=() if isinstance(prompt, _Rendered) else before)
            for prompt, before in zip(prompts, ids, strict=True)
        ]
        answers = Answers(
            *self._now(), ids, how, copies, context=self.config.max_position_embeddings, stop_ids=self.stop_ids,
            streams=streams,
            special={i: tokenizer.id_to_token(i) for i in tokenizer.special_ids} if how.stop else {},
        )  # fmt: skip
        for prompt in ids:
            self.backbone.check_ids([prompt])  # a tokenizer may have more ids than the embedding has rows
        return answers

    def _told(self, answers: Answers, pieces: Iterator[str]) -> Iterator[str]:
        yield from pieces
        self.last_run = answers.stats

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        max_new_tokens: int | None = None,
        *,
        tools: Sequence[Mapping[str, Any] | Callable[..., Any]] | None = None,
        template_options: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """The assistant's answer to a conversation, through the preset's own chat template.

        messages: [{"role": "user", "content": "..."}, ...] with roles system, user and assistant (tool, developer where
        the template has them). max_new_tokens: 512, unless generation_config says otherwise. tools: what the model may
        call: JSON schemas, or functions with type hints and a docstring that describes each argument under Args:, as
        for transformers' apply_chat_template. template_options: keyword arguments of the template itself, such as
        {"enable_thinking": False}. options: those of `generate`. The template's end of a turn ends the answer. In a
        growing conversation only the new tokens are computed.

        Raises InputError if the preset has no chat template, ChatTemplateError for what the template refuses, or does
        not read.
        """
        template = self.chat_template
        if own := [key for key in options if key not in _OPTIONS and key in template.options]:
            given = ", ".join(f"{key!r}: {options[key]!r}" for key in own)
            raise InputError(
                f"{', '.join(own)} belongs to the preset's chat template: write template_options={{{given}}}"
            )
        if tools and "tools" not in template.variables:
            raise InputError("the preset's chat template has no place for tools: the model was not trained to call any")
        text = template.render(messages, add_generation_prompt=True, tools=tools, options=template_options)
        return self.generate(_Rendered(text), max_new_tokens, **options)

    def calibration_rows(self, calibration: Any) -> list[np.ndarray]:
        length = self.preprocessor.sequence_length
        return [np.array(self._prompt_ids(text)[:length], np.int32) for text in as_prompts(calibration, "text")]

    def score(self, texts: str | Sequence[str] | Sequence[Sequence[int]]) -> Any:
        """How likely the model finds a text (returns a Score), or each of a list of texts (returns a list).

        Texts, or lists of token ids in a list, are read as `generate` reads its prompts. The first token is given, not
        predicted: with a tokenizer that begins texts with a special token, all of the text is scored.
        Raises InputError for empty and too long texts; NotFinite for a model whose logits are NaN or infinite.
        """
        scores, (engine, params) = [], self._now()
        for text in bar(as_prompts(texts, "text"), desc="scoring", unit="text"):
            ids = self._prompt_ids(text)
            spelled = text if isinstance(text, str) else self._tokenizer.decode(ids)
            if len(ids) < 2:
                raise InputError(f"{spelled!r} is a single token and nothing comes before it; give a longer text")
            row = self.backbone.check_ids([ids])
            scores.append(Score(spelled, ids, engine.token_logprobs(params, row)[0].tolist()))
        return scores[0] if isinstance(texts, str) else scores

    def _prompt_ids(self, text: str | list[int]) -> list[int]:
        """Texts that spell the start token themselves get no second one; a rendered chat spells all there is."""
        if isinstance(text, list):
            return text
        return self._tokenizer.encode(text, False if isinstance(text, _Rendered) else "once")

    @property
    def chats(self) -> bool:
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


_OPTIONS = frozenset(inspect.signature(CausalLM.generate).parameters)


def _check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool | np.bool_):
            more = ": of each token that was chosen; there are none of others" if name == "logprobs" else ""
            raise InputError(f"{name} must be True or False, got {value!r}{more}")
