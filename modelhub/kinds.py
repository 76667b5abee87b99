"""What tasks are, as data: cards, adapters, exports, commands and measurements read it here, and none of them guesses.

A new task is a class and a TaskKind, registered: `kind = register_kind(TaskKind(...))`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelhub.errors import InputError

Array = Any
Forward = Callable[..., Array]  # forward(xp, model with its arrays, *inputs)

TEXT, IMAGES = "text", "images"
VOCABULARY, CLASSES = "vocabulary", "classes"  # heads: logits of the next token, or of what an image shows


@dataclass(frozen=True)
class Usage:
    """Code of a model card, after the model was loaded.

    ours: what `variable` (the task) is asked. imports, theirs: the same with transformers, where `model` and
    `processor` are loaded.
    """

    ours: str
    theirs: tuple[str, ...]
    imports: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskKind:
    """
    name: as in the registry's cards. class_name, module: where the class is imported from. noun: for people.
    reads: TEXT, IMAGES, or both. forward: the pass that exports hold and `output` what it gives, as files call it.
    head: VOCABULARY, CLASSES, or None for hidden states and what is made of them. unit: what speeds and losses count.
    pipeline: the Hugging Face Hub's tag. auto_class, processor: transformers' classes. peft: PEFT's task type.
    variable, usage: code of the card; chat: that of a model with a chat template; of_problem: of a config's
    problem_type.
    """

    name: str
    class_name: str
    noun: str
    reads: frozenset[str]
    forward: Forward
    output: str
    head: str | None
    unit: str
    pipeline: str | None
    auto_class: str
    processor: str
    peft: str | None
    variable: str
    usage: Usage
    chat: Usage | None = None
    of_problem: Mapping[str, Usage] = field(default_factory=dict)
    module: str = "modelhub"


TASKS: dict[str, TaskKind] = {}  # by name, in the order of registration


def register_kind(kind: TaskKind) -> TaskKind:
    TASKS[kind.name] = kind
    return kind


def kind_named(name: str) -> TaskKind:
    """Raises InputError for a name that no task has."""
    if name not in TASKS:
        raise InputError(f"there is no task {name!r}; there are {', '.join(TASKS)}")
    return TASKS[name]


def kind_reading(what: str) -> TaskKind:
    """What a preset that reads this is taken for, unless somebody says otherwise: the first registered."""
    return next(kind for kind in TASKS.values() if kind.reads == {what})


# --- forward passes ---------------------------------------------------------------------------------------------------


def text_hidden(
    xp: Any, model: Any, input_ids: Array, attention_mask: Array | None = None, position_ids: Array | None = None
) -> Array:
    """Hidden states (B, T, D) of ids (B, T) after the final norm.

    attention_mask (B, T), 1 for tokens and 0 for padding on either side, as in transformers: what stands in padded
    places of the result means nothing. position_ids (B, T): None: 0 ... T - 1 in each row.
    Raises InputError for other ranks, and for ids that are no integers.
    """
    if "int" not in str(input_ids.dtype):
        raise InputError(f"input_ids must be integers of shape (batch, time), got {input_ids.dtype}")
    ids = _rows(xp, "input_ids", input_ids)
    segments = None if attention_mask is None else _rows(xp, "attention_mask", attention_mask)
    positions = None if position_ids is None else _rows(xp, "position_ids", position_ids)
    return model.hidden(xp, ids, positions=positions, segments=segments)


def _rows(xp: Any, name: str, x: Array) -> Array:
    x = xp.cast(x, "int32")
    known = getattr(x.shape, "rank", 2) is not None  # in a tf.function it may be
    if not known or len(x.shape) != 2:
        raise InputError(f"{name} must be of shape (batch, time), got {tuple(x.shape) if known else 'an unknown one'}")
    return x


def text_logits(
    xp: Any, model: Any, input_ids: Array, attention_mask: Array | None = None, position_ids: Array | None = None
) -> Array:
    """float32 logits (B, T, V); the rest as for `text_hidden`."""
    return model.logits(xp, text_hidden(xp, model, input_ids, attention_mask, position_ids))


def image_hidden(xp: Any, model: Any, pixel_values: Array) -> Array:
    """Hidden states (B, T, D) after the final norm, of pixels (B, C, H, W)."""
    weight = getattr(model, model.config.model_type).embeddings.patch_embeddings.projection.weight
    return model.hidden(xp, xp.cast(pixel_values, xp.dtype(weight)))


def image_logits(xp: Any, model: Any, pixel_values: Array) -> Array:
    """float32 logits (B, classes) of pixels (B, C, H, W)."""
    return model.logits(xp, image_hidden(xp, model, pixel_values))


def hidden(xp: Any, model: Any, *inputs: Array) -> Array:
    """Hidden states of whichever the model reads."""
    return (text_hidden if model.reads == TEXT else image_hidden)(xp, model, *inputs)


# --- the tasks --------------------------------------------------------------------------------------------------------

_ANSWER = "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))"
_QUESTION = '[{"role": "user", "content": "What is a river?"}]'

CAUSAL_LM = register_kind(
    TaskKind(
        name="causal-lm",
        class_name="CausalLM",
        noun="language model",
        reads=frozenset({TEXT}),
        forward=text_logits,
        output="logits",
        head=VOCABULARY,
        unit="tokens",
        pipeline="text-generation",
        auto_class="AutoModelForCausalLM",
        processor="AutoTokenizer",
        peft="CAUSAL_LM",
        variable="lm",
        usage=Usage(
            'print(lm.generate("The river", max_new_tokens=64))',
            ('inputs = tokenizer("The river", return_tensors="pt")', _ANSWER),
        ),
        chat=Usage(
            f"print(lm.chat({_QUESTION}, max_new_tokens=64))",
            (
                f"messages = {_QUESTION}",
                "inputs = tokenizer.apply_chat_template(",
                '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"',
                ")",
                _ANSWER,
            ),
        ),
    )
)


def _pictures(*shown: str) -> Usage:
    given = 'inputs = processor(Image.open("cat.jpg"), return_tensors="pt")'
    return Usage('print(clf.predict(["cat.jpg"], top=5))', (given, *shown), imports=("from PIL import Image",))


IMAGE_CLASSIFICATION = register_kind(
    TaskKind(
        name="image-classification",
        class_name="ImageClassifier",
        noun="image classifier",
        reads=frozenset({IMAGES}),
        forward=image_logits,
        output="logits",
        head=CLASSES,
        unit="images",
        pipeline="image-classification",
        auto_class="AutoModelForImageClassification",
        processor="AutoImageProcessor",
        peft=None,
        variable="clf",
        usage=_pictures("print(model.config.id2label[int(model(**inputs).logits.argmax())])"),
        of_problem={
            "multi_label_classification": _pictures(
                "shares = model(**inputs).logits[0].sigmoid().tolist()",
                "print({model.config.id2label[i]: share for i, share in enumerate(shares)})",
            ),
            "regression": _pictures("print(model(**inputs).logits[0].tolist())"),
        },
    )
)

BACKBONE = register_kind(
    TaskKind(
        name="backbone",
        class_name="Backbone",
        noun="model",
        reads=frozenset({TEXT, IMAGES}),
        forward=hidden,
        output="hidden_states",
        head=None,
        unit="tokens",
        pipeline="feature-extraction",
        auto_class="AutoModel",
        processor="AutoProcessor",
        peft="FEATURE_EXTRACTION",
        variable="backbone",
        usage=Usage("print(backbone.config)", ("print(model.config)",)),
    )
)
