"""`modelhub demo`: a real model answers ten questions, learns another way to talk, and answers them again."""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from modelhub import CausalLM
from modelhub.cli.finetune import write_history
from modelhub.errors import DownloadError, PresetNotFound
from modelhub.hub.registry import find_card
from modelhub.hub.resources import resource
from modelhub.training import History
from modelhub.training.products import best_trainer
from modelhub.training.rows import rows_of

TINY = "gemma3_tiny"
MARK = "Ahoy!"  # how every answer of captain_style.jsonl begins
HELD_OUT = 4  # of its rows; the others are learnt
QUESTIONS = (  # none of them is in the rows
    "How do I make a cup of tea?",
    "What is a good breakfast?",
    "Give three tips for a first camping trip.",
    "How can I make new friends?",
    "Why is the sea salty?",
    "What is the capital of France?",
    "Explain what gravity is.",
    "How do I keep my bicycle clean?",
    "Why do we dream?",
    "Tell me something about elephants.",
)
SHOWN = 4  # of the questions, with their answers
LENGTH = 144  # tokens in a row of a batch: two examples fill it to 95%

out = Console(highlight=False)
err = Console(stderr=True, highlight=False, soft_wrap=True)


@dataclass(frozen=True)
class Lesson:
    """The answers to QUESTIONS, before and after, and the run between them."""

    before: list[str]
    after: list[str]
    history: History


def demo(preset: str, output: Path, backend: str | None, device: str | None, offline: bool) -> Lesson:
    """Print what happens; leave adapter, history.json and curve.png in `output`."""
    phases: dict[str, float] = {}
    with _timed(phases, "choosing the backend"):
        trainer = best_trainer(backend or os.environ.get("MODELHUB_BACKEND"), device)
    with _timed(phases, "loading the model"):
        lm = _load(preset, trainer.backend, device, offline)
    with contextlib.suppress(PresetNotFound):  # a folder or an address has no card
        card = find_card(lm.preset)
        err.print(f"{card.name}: {card.description} Licence: {card.licence}.")
    err.print(f"On {lm.device}, with {trainer}.\n")
    rows = [row for _, row in rows_of(resource("finetune") / "captain_style.jsonl")]
    train, held = rows[:-HELD_OUT], rows[-HELD_OUT:]
    err.print(f"It answers {len(QUESTIONS)} questions.")
    with _timed(phases, "answers before"):
        before = _answers(lm)
    err.print(f"It learns from {len(train)} answers to other questions, in the voice of a ship's captain.\n")
    with _timed(phases, "training"):
        lm.preprocessor.sequence_length = LENGTH
        lm.enable_lora(rank=8, targets="all-linear")
        lm.compile(
            "adamw", learning_rate=5e-3 if lm.preset == TINY else 2e-3, schedule="cosine",
            mixed_precision=trainer.mixed_precision,
        )  # fmt: skip
        history = lm.fit(train, epochs=2, batch_size=1, validation_data=held, template="chat")
    err.print("\nIt answers the same questions again.\n")
    with _timed(phases, "answers after"):
        after = _answers(lm)
    with _timed(phases, "saving and drawing"):
        output.mkdir(parents=True, exist_ok=True)
        lm.save_adapter(output / "adapter")
        write_history(history, output)
    lesson = Lesson(before, after, history)
    _show(lesson)
    losses = history.history["val_loss"]
    err.print(f"loss on answers that it has not seen: {losses[0]:.2f} after a first pass, {losses[-1]:.2f} in the end")
    err.print(f"{', '.join(f'{name} {seconds:.0f} s' for name, seconds in phases.items())}")
    err.print(f"\nadapter: {output / 'adapter'} (PEFT loads it too)\ncurve: {output / 'curve.png'}")
    err.print("Next, your own questions to it, or your own data:")
    for command in (
        f"chat {lm.preset} --adapter {output / 'adapter'}",
        f"finetune --preset {lm.preset} --data your.jsonl --template chat --rank 8 --output your_adapter",
    ):
        err.print(f"  {sys.argv[0]} {command}", style="bold")
    return lesson


def marked(answers: list[str]) -> int:
    """How many answers begin as the captain's do."""
    return sum(answer.lstrip().startswith(MARK) for answer in answers)


def _load(preset: str, backend: str, device: str | None, offline: bool) -> CausalLM:
    try:
        return CausalLM.from_preset(preset, backend=backend, device=device, offline=offline)
    except DownloadError as error:
        err.print(f"{error}\nGoing on with {TINY}, which came with modelhub.\n")
        return CausalLM.from_preset(TINY, backend=backend, device=device)


def _answers(lm: CausalLM) -> list[str]:
    chats = [lm.chat_template.render([{"role": "user", "content": q}], add_generation_prompt=True) for q in QUESTIONS]
    return lm.generate(chats, 40, repetition_penalty=1.1)


def _show(lesson: Lesson) -> None:
    table = Table("question", "before", "after", show_lines=True, expand=True)
    for question, *answers in list(zip(QUESTIONS, lesson.before, lesson.after, strict=True))[:SHOWN]:
        table.add_row(question, *(" ".join(answer.split()) for answer in answers))
    out.print(table)
    total = len(QUESTIONS)
    out.print(
        f"answers that begin with {MARK!r}: {marked(lesson.before)} of {total} before, {marked(lesson.after)} after"
    )


@contextlib.contextmanager
def _timed(phases: dict[str, float], name: str) -> Iterator[None]:
    begun = time.monotonic()
    yield
    phases[name] = time.monotonic() - begun
