"""Records as token ids, and which of them the model is to learn.

The ids are those that generation sees: the prompt is encoded as `generate` and `chat` encode it, the answer follows.
Which tokens are answer is known from character positions in the text that was put together here; markers are never
searched for, neither in the text nor in the ids.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from string import Formatter

import numpy as np

from modelhub.errors import ChatTemplateError, DataError
from modelhub.processing.tokenizer import Tokenizer
from modelhub.progress import bar
from modelhub.training.records import Record

TEMPLATE = "Instruction:\n{instruction}\n\nResponse:\n{response}"
TEMPLATE_WITH_CONTEXT = "Instruction:\n{instruction}\n\nContext:\n{context}\n\nResponse:\n{response}"
CHUNK = 500  # records that are tokenized together

_Encoded = tuple[list[int], np.ndarray]  # ids, and (n, 2) the character range of each
Render = Callable[..., str]  # ChatTemplate.render: render(messages, add_generation_prompt=...) -> text


@dataclass(eq=False)
class Example:
    """ids: (n,) int32. loss: (n,) bool, whether the model learns to predict this token from those before it."""

    ids: np.ndarray
    loss: np.ndarray


@dataclass
class Examples:
    """What became of the records. cut: how many lost their end. dropped, notes: what happened -> how often."""

    examples: list[Example]
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    notes: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class _Text:
    """A text to learn from. answers: character ranges that the model is to write; what is before each is a prompt."""

    text: str
    answers: list[tuple[int, int]]
    rendered: bool  # by a chat template: the special tokens are in it


def make_examples(
    records: Sequence[Record],
    tokenizer: Tokenizer,
    sequence_length: int,
    *,
    render: Render | None = None,
    template: str | None = None,
    loss_on: str = "response",
) -> Examples:
    """Every record as an Example of at most sequence_length tokens, in the same order.

    render: the preset's chat template, `ChatTemplate.render`; None if it has none. template, for records of the kinds
    dolly and alpaca: text with {instruction}, {response} at its end and perhaps {context}; None: TEMPLATE; "chat": the
    chat template, also for prompts. loss_on: "response" (what the assistant says, with the token that ends it) or
    "all". Strings and records of the kind text are learnt whole.

    Raises DataError for a template that does not fit, conversations without a chat template, what the chat template
    refuses, and when no record leaves a token to learn.
    """
    if loss_on not in ("response", "all"):
        raise DataError(f'loss_on must be "response" or "all", got {loss_on!r}')
    if sequence_length < 2:
        raise DataError(f"sequence_length must be 2 or more, got {sequence_length}: each token is learnt from another")
    _check_template(template)
    made = Examples([])
    with bar(total=len(records), desc="tokenizing", unit="row") as progress:
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            texts = [text for record in chunk if (text := _text(record, template, render, made)) is not None]
            for text, (ids, spans) in zip(texts, _tokens(texts, tokenizer), strict=True):
                example = _example(text, ids, spans, tokenizer, loss_on, made)
                if len(example.ids) > sequence_length:
                    example = Example(example.ids[:sequence_length], example.loss[:sequence_length])
                    made.cut += bool(example.loss.any())
                    reason = f"the answer begins after sequence_length={sequence_length}"
                else:
                    reason = "no answer to learn"
                if example.loss.any():
                    made.examples.append(example)
                else:
                    made.dropped[reason] += 1
            progress.update(len(chunk))
    if not made.examples:
        reasons = ", ".join(f"{reason} ({count})" for reason, count in made.dropped.items())
        raise DataError(f"none of the {len(records)} rows has a token to learn: {reasons}")
    return made


def _check_template(template: str | None) -> None:
    if template in (None, "chat"):
        return
    assert template is not None
    try:
        names = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
    except ValueError as error:
        raise DataError(f"the template {template!r:.200} is not a format string: {error}; write {{{{ for {{") from None
    wrong = sorted(set(names) - {"instruction", "context", "response"})
    if wrong or "instruction" not in names or names.count("response") != 1 or not template.endswith("{response}"):
        raise DataError(
            f"the template must have {{instruction}}, may have {{context}}, and must end with its only {{response}}: "
            f"there an answer begins; found {template!r:.200}" + (f" with unknown {', '.join(wrong)}" if wrong else "")
        )


def _text(record: Record, template: str | None, render: Render | None, made: Examples) -> _Text | None:
    """None if there is nothing to learn from, which is counted."""
    fields = record.fields
    if record.kind == "messages":
        if render is not None and fields.get("tools"):
            render = partial(render, tools=fields["tools"])
        return _conversation(fields["messages"], record.where, render, made, fields.get("prompt_messages", 0))
    if record.kind == "text":
        if not fields["text"]:
            made.dropped["empty text"] += 1
            return None
        return _Text(fields["text"], [(0, len(fields["text"]))], rendered=False)
    if not fields["response"].strip():
        made.dropped["empty response"] += 1
        return None
    if template == "chat":
        asked = [fields[name] for name in ("prompt", "instruction", "context") if fields.get(name)]
        messages = [
            {"role": "user", "content": "\n\n".join(asked)},
            {"role": "assistant", "content": fields["response"]},
        ]
        return _conversation(messages, record.where, render, made)
    prompt = fields["prompt"] if record.kind == "prompt" else _instruction(fields, template, record.where)
    text = prompt + fields["response"]
    return _Text(text, [(len(prompt), len(text))], rendered=False)


def _instruction(fields: dict[str, str], template: str | None, where: str) -> str:
    if template is None:
        template = TEMPLATE_WITH_CONTEXT if fields["context"] else TEMPLATE
    elif fields["context"] and "{context}" not in template:
        raise DataError(f"{where} has a context and the template has no {{context}}; add it, or remove the contexts")
    return template.format(**fields | {"response": ""})


def _conversation(
    messages: list[dict], where: str, render: Render | None, made: Examples, prompt_messages: int = 0
) -> _Text | None:
    """An answer reaches from the prompt that generation would give the model to the end of the assistant's turn.

    prompt_messages: so many at the start are not learnt, whoever says them.
    """
    if render is None:
        raise DataError(
            f"{where} needs a chat template, and the preset has none: it was not trained to chat. Use an instruct "
            f"preset; instruction records also work without, with template=None or a template of your own"
        )
    # Nothing can be asked of a template before the first message, so an assistant that begins is not learnt.
    first = max(1, prompt_messages)
    turns = [i for i, message in enumerate(messages) if i >= first and message["role"] == "assistant"]
    if not turns:
        made.dropped["no assistant turn"] += 1
        return None
    try:
        whole = render(messages, add_generation_prompt=False)
        prompts = [render(messages[:i], add_generation_prompt=True) for i in turns]
        ends = [render(messages[: i + 1], add_generation_prompt=False) for i in turns]
    except ChatTemplateError as error:
        raise DataError(f"{where}: {error}") from None
    if all(whole.startswith(end) and end.startswith(prompt) for prompt, end in zip(prompts, ends, strict=True)):
        answers = [(len(prompt), len(end)) for prompt, end in zip(prompts, ends, strict=True)]
        return _Text(whole, answers, rendered=True)
    if not ends[-1].startswith(prompts[-1]):
        raise DataError(
            f"{where}: the chat template writes an answer otherwise than it asks for one, so what is learnt would not "
            f"be what generation does: {_difference(prompts[-1], ends[-1])}. If it moves the system message, put that "
            f"into the first question"
        )
    made.notes[
        "conversations of which only the last answer is learnt: the template changes a turn when more follow"
    ] += 1
    return _Text(ends[-1], [(len(prompts[-1]), len(ends[-1]))], rendered=True)


def _difference(prompt: str, end: str) -> str:
    at = next((i for i, (a, b) in enumerate(zip(prompt, end, strict=False)) if a != b), min(len(prompt), len(end)))
    return f"it asks with {prompt[max(at - 20, 0) : at + 40]!r} and writes {end[max(at - 20, 0) : at + 40]!r}"


def _tokens(texts: Sequence[_Text], tokenizer: Tokenizer) -> Iterator[_Encoded]:
    """The tokens of each text, so that every prompt in it has the ids it has at generation."""
    special = [not text.rendered for text in texts]
    found = {add: iter(_encode(tokenizer, [t.text for t, adds in zip(texts, special, strict=True) if adds == add], add))
             for add in (True, False)}  # fmt: skip
    # A token may reach over the border ("Response: " + "Paris" -> " Paris"), or differ before it (GPT-2 reads "\n\n" at
    # the end of a text as one token, before a word as two). There the two sides are encoded apart, as in generation.
    for text, add in zip(texts, special, strict=True):
        ids, spans = next(found[add])
        borders = [a for a, _ in text.answers if a and not _is_prompt(text.text, a, ids, spans, tokenizer, add)]
        if borders:
            edges = [0, *borders, len(text.text)]
            parts = [_encode(tokenizer, [text.text[a:b]], add and not a)[0] for a, b in pairwise(edges)]
            ids = [token for part, _ in parts for token in part]
            spans = np.concatenate([ranges + start for (_, ranges), start in zip(parts, edges, strict=False)])
        yield ids, spans


def _is_prompt(text: str, border: int, ids: list[int], spans: np.ndarray, tokenizer: Tokenizer, special: bool) -> bool:
    """Whether the ids before the border are those of text[:border] alone."""
    count = int(np.sum(spans[:, 0] < border))
    # What is after a special token is encoded independently of what is before it, so long chats need not be repeated.
    inside = [i for i, token in enumerate(ids[:count]) if token in tokenizer.special_ids]
    first = next((i for i in reversed(inside) if spans[i, 0] < spans[i, 1]), None)
    start = 0 if first is None else int(spans[first, 0])
    [(alone, _)] = _encode(tokenizer, [text[start:border]], special and first is None)
    return bool(np.all(spans[:count, 1] <= border)) and ids[first or 0 : count] == alone


def _encode(tokenizer: Tokenizer, texts: Sequence[str], special: bool) -> list[_Encoded]:
    """As generation reads prompts: special: with the start token, unless the text spells it itself.

    Without the special tokens that some tokenizers put after a text: `_example` ends it, once.
    """
    encoded = []
    for text, (ids, offsets) in zip(
        texts, tokenizer.encode_offsets_batch(texts, "once" if special else False), strict=True
    ):
        spans = np.array(offsets, np.int64).reshape(-1, 2)
        count = int(np.sum(spans[:, 0] < len(text)))
        encoded.append((ids[:count], spans[:count]))
    return encoded


def _example(
    text: _Text, ids: list[int], spans: np.ndarray, tokenizer: Tokenizer, loss_on: str, made: Examples
) -> Example:
    ranges = text.answers if loss_on == "response" else [(0, len(text.text))]
    loss = np.zeros(len(ids), bool)
    for a, b in ranges:
        inside = (spans[:, 0] >= a) & (spans[:, 0] < b)
        if text.rendered and loss_on == "response":
            ends = [i for i in np.flatnonzero(inside) if ids[i] in tokenizer.special_ids]
            if not ends:
                made.notes["answers that the chat template ends with no special token: learning to stop is harder"] += 1
            # Templates put a line break after the token that ends a turn; generation never comes to write it.
            elif not text.text[spans[ends[-1], 1] : b].strip():
                inside[ends[-1] + 1 :] = False
        loss |= inside
    if not text.rendered:
        if tokenizer.eos_token_id is None:
            made.notes["texts without an end token, as the tokenizer has none: learning to stop is impossible"] += 1
        elif ids[-1:] != [tokenizer.eos_token_id]:
            ids, loss = [*ids, tokenizer.eos_token_id], np.append(loss, True)
    loss[:1] = False  # nothing is before the first token
    return Example(np.asarray(ids, np.int32), loss)
