"""The commands. Heavy imports stand inside them, so that `modelhub --help` answers at once."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

import modelhub
from modelhub.cli import bench, cache, classify, conformance, convert, options, presets, publish
from modelhub.cli import quantize as quantizing
from modelhub.cli.options import DATA, option
from modelhub.errors import InputError

app = options.App(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Open models on numpy, JAX, PyTorch and TensorFlow: load, generate, look around.",
)
out = Console()
err = Console(stderr=True, soft_wrap=True)


LORA, OPTIMIZER, RUN = "LoRA: without any of these, all weights are trained", "Optimization", "Run"


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


app.command("list")(presets.list_)
app.command()(presets.info)
app.command()(presets.pull)
app.command()(presets.register)
app.command()(convert.convert)
app.command()(quantizing.quantize)
app.command()(publish.publish)
app.command()(classify.classify)
app.command()(bench.bench)
app.command()(conformance.conformance)
app.add_typer(cache.app, name="cache")


@app.command()
def generate(
    preset: options.Preset,
    prompt: Annotated[
        str | None, typer.Argument(help="the text to continue; without one, or for -, standard input is read")
    ] = None,
    adapter: options.Adapter = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    stop: Annotated[list[str] | None, option("end before this text; may be given several times")] = None,
    seed: options.Seed = 0,
    echo: Annotated[bool, option("print the prompt too")] = False,
    backend: options.Backend = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Continue a prompt, streaming."""
    # Mistakes should not cost the time that loading a model takes.
    check_generation(max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    text = _piped() if prompt in (None, "-") else prompt
    lm = _load(preset, backend, device, dtype, quantize, offline, adapter)
    pieces = lm.generate(
        text, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, stop=stop, seed=seed,
        stream=True, echo=echo,
    )  # fmt: skip
    if as_json:
        print(options.answer_as_json(lm, "".join(pieces)))
        return
    _print_stream(pieces)
    err.print(_speed(lm), style="dim")


@app.command()
def chat(
    preset: options.Preset,
    adapter: options.Adapter = None,
    system: Annotated[str | None, option("a system message")] = None,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_k: options.TopK = None,
    top_p: options.TopP = None,
    min_p: options.MinP = None,
    repetition_penalty: options.RepetitionPenalty = None,
    template_options: options.TemplateOption = None,
    seed: options.Seed = 0,
    backend: options.Backend = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Hold a conversation with an instruct preset; /help lists what can be typed besides questions."""
    from modelhub.cli.chat import Chat

    check_generation(
        max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p,
        repetition_penalty=repetition_penalty,
    )  # fmt: skip
    lm = _load(preset, backend, device, dtype, quantize, offline, adapter)
    given = {
        "max_new_tokens": max_new_tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
        "repetition_penalty": repetition_penalty, "seed": seed,
        "template_options": options.template_options(template_options),
    }  # fmt: skip
    if sys.stdin.isatty():
        err.print(f"{preset} on {lm.backend} ({lm.device}). /help for commands, Ctrl-C stops an answer, Ctrl-D leaves.")
    Chat(lm, given, system, as_json).loop()


@app.command()
def finetune(
    context: typer.Context,
    recipe: Annotated[
        str | None, typer.Argument(help="a .toml file, or the name of a bundled one, such as lora_smollm2")
    ] = None,
    preset: Annotated[str | None, option("a registry name, a folder, a .gguf file or an hf:// address")] = None,
    output: Annotated[str | None, option("where the adapter or the model goes; the run is kept in OUTPUT_run")] = None,
    backend: options.Backend = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    offline: options.Offline = False,
    dry_run: Annotated[bool, option("say what would be trained on and how much memory it takes, and stop")] = False,
    data: options.Data = None,
    validation_data: Annotated[str | None, option("like data, measured after each epoch", DATA)] = None,
    validation_split: Annotated[float | None, option("or a share of the data to hold out for it", DATA)] = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = None,
    packing: options.Packing = None,
    loss_on: options.LossOn = None,
    template: options.Template = None,
    template_options: options.TemplateOption = None,
    kind: options.Kind = None,
    on_error: options.OnError = None,
    problem_type: Annotated[
        str | None, option("images: single_label_classification, multi_label_classification or regression", DATA)
    ] = None,
    augment: Annotated[bool | None, option("images: random parts, mirrored half of the time", DATA)] = None,
    rank: Annotated[int | None, option("of the adapter's matrices (default: 4)", LORA)] = None,
    alpha: Annotated[float | None, option("the update is scaled by alpha / rank (default: rank)", LORA)] = None,
    dropout: Annotated[float | None, option("share of the adapter's inputs to leave out", LORA)] = None,
    targets: Annotated[
        list[str] | None, option("layers by name or pattern, or all-linear (default: q_proj, v_proj)", LORA)
    ] = None,
    modules_to_save: Annotated[
        list[str] | None, option("layers to train whole beside LoRA, such as lm_head", LORA, "--module-to-save")
    ] = None,
    use_rslora: Annotated[bool | None, option("scale by alpha / sqrt(rank)", LORA)] = None,
    use_dora: Annotated[bool | None, option("learn lengths and directions apart", LORA)] = None,
    optimizer: Annotated[str | None, option("sgd, adam, adamw (default), adafactor, lion or muon", OPTIMIZER)] = None,
    learning_rate: Annotated[
        float | None, option("of the first step after warm-up (default: 5e-5; LoRA: 2e-4; a head: 1e-3)", OPTIMIZER)
    ] = None,
    schedule: Annotated[str | None, option("constant (default), linear or cosine", OPTIMIZER)] = None,
    weight_decay: Annotated[float | None, option("pull of the weights to 0", OPTIMIZER)] = None,
    label_smoothing: Annotated[float | None, option("images: share of a label that all classes get", OPTIMIZER)] = None,
    clip_norm: Annotated[float | None, option("largest norm of all gradients together", OPTIMIZER)] = None,
    mixed_precision: Annotated[str | None, option("auto, mixed_bfloat16 or mixed_float16", OPTIMIZER)] = None,
    matmul_precision: Annotated[str | None, option("highest, or high for TF32", OPTIMIZER)] = None,
    remat: Annotated[bool | None, option("compute activations twice instead of keeping them", OPTIMIZER)] = None,
    jit: Annotated[bool | None, option("compile the step (default: what the backend does best)", OPTIMIZER)] = None,
    freeze_backbone: Annotated[
        bool | None, option("images: train a head (default without LoRA), or everything", RUN, "--head/--full")
    ] = None,
    epochs: Annotated[int | None, option("passes over the data (default: 1; of a head: 10)", RUN)] = None,
    steps: Annotated[int | None, option("optimizer steps in all, instead of epochs", RUN)] = None,
    grad_accum: Annotated[int | None, option("batches in one optimizer step (default: 1)", RUN)] = None,
    checkpoint_dir: Annotated[str | None, option("the run's folder (default: OUTPUT_run)", RUN)] = None,
    save_steps: Annotated[int | None, option("steps between checkpoints (default: two minutes)", RUN)] = None,
    resume: Annotated[bool | None, option("go on with checkpoints (default: if there are any)", RUN)] = None,
    seed: Annotated[int | None, option("of the adapter, the order of the data and dropout", RUN)] = None,
) -> None:
    """Train an adapter or all weights on data; the same command again goes on where a run was stopped."""
    from modelhub.cli import finetune as runs

    given = _given(context, "recipe", "offline", "dry_run")
    if given.get("targets") == ["all-linear"]:
        given["targets"] = "all-linear"
    if folder := runs.finetune(recipe, given, offline=offline, dry_run=dry_run):
        print(folder)


@app.command()
def evaluate(
    context: typer.Context,
    preset: Annotated[str, option("a registry name, a folder, a .gguf file or an hf:// address")],
    data: Annotated[str, option("a .jsonl, .json, .csv or .parquet file; dolly_style.jsonl is bundled", DATA)],
    adapter: options.Adapter = None,
    sequence_length: options.SequenceLength = None,
    batch_size: options.BatchSize = None,
    packing: options.Packing = None,
    loss_on: options.LossOn = None,
    template: options.Template = None,
    template_options: options.TemplateOption = None,
    kind: options.Kind = None,
    on_error: options.OnError = None,
    backend: options.Backend = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    quantize: options.Quantize = None,
    offline: options.Offline = False,
    as_json: options.Json = False,
) -> None:
    """Measure loss, perplexity and the accuracy of single tokens on data; of images loss and accuracy."""
    from modelhub.cli import finetune as runs

    given = _given(context, "preset", "data", "adapter", "offline", "as_json")
    found = runs.evaluate(preset, data, given, adapter, offline)
    if as_json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        print(f"{name:<10} {f'{value:,.0f}' if name in ('tokens', 'images') else f'{value:.4f}'}")


@app.command()
def doctor(as_json: options.Json = False) -> None:
    """Say what is installed, which devices each backend sees, and what to do about what is missing."""
    from modelhub.cli.doctor import examine

    report = examine()
    if as_json:
        print(json.dumps(report, indent=2))
        return
    out.print(f"modelhub {report['modelhub']}, Python {report['python']}, {report['machine']}")
    out.print(f"cache: {escape(report['cache'])} ({report['cache_bytes'] / 1e6:,.0f} MB)")
    out.print(f"native kernels: {escape(report['kernels'])}")
    table = Table("backend", "version", "devices", "what to do")
    for row in report["backends"]:
        table.add_row(row["name"], row["version"] or "-", ", ".join(row["devices"]) or "-", escape(row["advice"]))
    out.print(table)
    out.print(f"models load on [bold]{report['default_backend']}[/bold] unless told otherwise (--backend, set_backend)")


@app.command()
def demo(
    preset: Annotated[str, option("the model that answers and learns")] = "smollm2_135m_instruct_q4",
    tiny: Annotated[bool, option("take the two million parameters that came with modelhub", None, "--tiny")] = False,
    output: Annotated[Path, option("where the adapter and the curve go")] = Path("modelhub_demo"),
    backend: options.Backend = None,
    device: options.Device = None,
    offline: options.Offline = False,
) -> None:
    """Let a real language model answer, fine-tune it on bundled rows, and let it answer again: about three minutes."""
    from modelhub.cli import demo as demonstration

    demonstration.demo(demonstration.TINY if tiny else preset, output, backend, device, offline)


def _load(
    preset: str, backend: str | None, device: str | None, dtype: str | None, quantize: str | None, offline: bool,
    adapter: str | None = None,
) -> Any:  # fmt: skip
    from modelhub.cli.finetune import load

    placed = {"backend": backend, "device": device, "dtype": dtype, "quantize": quantize}
    return load(preset, placed, offline=offline, adapter=adapter)


def check_generation(max_new_tokens: int | None, **sampling: float | None) -> None:
    """Raise InputError for what no model can do."""
    from modelhub.generation.sampling import Sampler

    if max_new_tokens is not None and max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be 1 or more, got {max_new_tokens}")
    Sampler(**sampling)  # type: ignore[arg-type]


def _piped() -> str:
    """What standard input holds. Raises InputError where a person sits there, and for what is no UTF-8."""
    if sys.stdin.isatty():
        raise InputError('give a prompt: modelhub generate PRESET "...", or send one through a pipe')
    data = sys.stdin.buffer.read()
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"standard input is not UTF-8: byte {error.start} is 0x{data[error.start]:02x}. Convert it first, for "
            f"example with iconv -f latin1 -t utf-8"
        ) from None


def _given(context: typer.Context, *others: str) -> dict[str, Any]:
    """The options on the command line but for `others`: what is not there is for the recipe or the API to say."""
    absent = (None, ())  # () is a list's
    given = {k: v for k, v in context.params.items() if v not in absent and k not in others}
    if pairs := given.get("template_options"):
        given["template_options"] = options.template_options(pairs)
    return given


def _print_stream(pieces: Any) -> None:
    try:
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
    finally:  # also after Ctrl-C: the shell's prompt begins a line
        sys.stdout.write("\n")
        sys.stdout.flush()


def _speed(lm: Any) -> str:
    run = lm.last_run
    return (
        f"{lm.backend} on {lm.device}: {run.new_tokens} tokens{options.rate(run, ' at ')}, first after "
        f"{run.seconds_to_first_token:.2f} s"
    )
