"""`modelhub demo`: a real model answers, learns from a few of the bundled rows, and answers again."""

import contextlib
import sys
from pathlib import Path

from rich.console import Console

from modelhub import CausalLM
from modelhub.cli.finetune import write_history
from modelhub.cli.options import rate
from modelhub.errors import DownloadError, PresetNotFound
from modelhub.hub.registry import find_card
from modelhub.hub.resources import resource
from modelhub.training.records import rows_of

TINY = "gemma3_tiny"
QUESTION = "Give three tips for a first camping trip."
ROWS, HELD_OUT = 72, 24  # of the bundled ones

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def demo(preset: str, output: Path, backend: str | None, device: str | None, offline: bool) -> None:
    """Print what happens; leave adapter, history.json and curve.png in `output`."""
    lm = _load(preset, backend, device, offline)
    tiny = lm.preset == TINY
    with contextlib.suppress(PresetNotFound):  # a folder or an address has no card
        card = find_card(lm.preset)
        err.print(f"{card.name}: {card.description} Licence: {card.licence}.", soft_wrap=True)
    err.print(f"On {lm.backend}, {lm.device}.\n")
    before = _answer(lm, "before")
    rows = [row for _, row in rows_of(resource("finetune") / "dolly_style.jsonl")]
    rows = [row for row in rows if not row["context"] and row["instruction"] != QUESTION][: ROWS + HELD_OUT]
    train, held = rows[:-HELD_OUT], rows[-HELD_OUT:]
    lm.preprocessor.sequence_length = 512
    lm.enable_lora(rank=8, targets="all-linear")
    lm.compile("adamw", learning_rate=5e-3 if tiny else 5e-4, schedule="cosine")
    loss = lm.evaluate(held, template="chat")["loss"]
    err.print(f"\nloss on {len(held)} rows that it will not see: {loss:.3f}. Now it learns from {len(train)} others.\n")
    history = lm.fit(train, epochs=2, batch_size=1, validation_data=held, template="chat")
    output.mkdir(parents=True, exist_ok=True)
    lm.save_adapter(output / "adapter")
    write_history(history, output)
    err.print(f"\nloss on the rows that it has not seen: {loss:.3f} before, {history.history['val_loss'][-1]:.3f} now")
    after = _answer(lm, "after")
    if after == before:
        err.print("(the answer is the same: try more rows, or a higher learning rate)")
    err.print(f"\nadapter: {output / 'adapter'} (PEFT loads it too)\ncurve: {output / 'curve.png'}")
    err.print("Next, your own words with the adapter, or your own data:")
    for command in (
        f"chat {lm.preset} --adapter {output / 'adapter'}",
        f"finetune --preset {lm.preset} --data your.jsonl --template chat --rank 8 --output your_adapter",
    ):
        err.print(f"  {sys.argv[0]} {command}", style="bold", soft_wrap=True)


def _load(preset: str, backend: str | None, device: str | None, offline: bool) -> CausalLM:
    if preset == TINY:
        return CausalLM.from_preset(TINY, backend=backend, device=device)
    try:
        return CausalLM.from_preset(preset, backend=backend, device=device, offline=offline)
    except DownloadError as error:
        err.print(f"{error}\nGoing on with {TINY}, which came with modelhub.\n", soft_wrap=True)
        return CausalLM.from_preset(TINY, backend=backend, device=device)


def _answer(lm: CausalLM, when: str) -> str:
    out.print(f"[bold]{when}[/bold] [dim]{QUESTION}[/dim]", soft_wrap=True)
    pieces = []
    for piece in lm.chat([{"role": "user", "content": QUESTION}], 60, repetition_penalty=1.1, stream=True):
        pieces.append(piece)
        out.print(piece, end="", markup=False, soft_wrap=True)
    out.print()
    assert lm.last_run is not None
    if speed := rate(lm.last_run, ""):
        err.print(f"[dim]{speed}[/dim]")
    return "".join(pieces)
