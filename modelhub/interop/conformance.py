"""How far each family on each backend is from its transformers class: logits, loss and gradients, as a table."""

import functools
import importlib
import importlib.util
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import ml_dtypes
import numpy as np

from modelhub import kinds
from modelhub.core import losses
from modelhub.core.backends import get_backend, installed
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Params, bind, check
from modelhub.errors import BackendNotInstalled, InputError, NoGradients
from modelhub.families import family_of

DTYPES = ("float32", "bfloat16")
QUANTITIES = ("logits", "loss", "gradients")
BOUND = 1e-4  # of every float32 figure
FACTOR = 3.0  # how many times as far from float32 as transformers' bfloat16 ours may be
ROUNDING = 2.0**-9  # what rounding to bfloat16 changes at most, relative to the number

# Head width is not width over heads, queries are grouped, no two sizes are equal; the window is a third of a row.
_TEXT: dict[str, Any] = {
    "vocab_size": 101, "hidden_size": 32, "intermediate_size": 44, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
}  # fmt: skip
_GEMMA = _TEXT | {"sliding_window": 8, "query_pre_attn_scalar": 7}
_IMAGE: dict[str, Any] = {
    "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 16, "patch_size": 4,
    "num_labels": 11, "layer_norm_eps": 1e-3,
}  # fmt: skip
# Wavelengths of all three kinds: kept, blended and stretched.
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16, "rope_theta": 100.0,
}  # fmt: skip
_GEMMA3_ROPE = {
    "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1000.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
}


@dataclass(frozen=True)
class Case:
    """A model class of transformers and the config of a tiny model; size of the images, None: it reads text."""

    model: str
    config: dict[str, Any]
    size: tuple[int, int] | None = None


FAMILIES = {
    "gemma": Case("GemmaForCausalLM", _TEXT | {"num_key_value_heads": 1}),
    "gemma2": Case("Gemma2ForCausalLM", _GEMMA | {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 8.0}),
    "gemma3": Case(
        "Gemma3ForCausalLM",
        _GEMMA | {"num_hidden_layers": 4, "sliding_window_pattern": 3, "rope_parameters": _GEMMA3_ROPE},
    ),
    "llama": Case("LlamaForCausalLM", _TEXT),
    "llama3": Case("LlamaForCausalLM", _TEXT | {"rope_parameters": _LLAMA3}),
    "llama_biases": Case("LlamaForCausalLM", _TEXT | {"attention_bias": True, "mlp_bias": True}),
    "mistral": Case("MistralForCausalLM", _TEXT | {"sliding_window": 8}),
    "vit": Case("ViTForImageClassification", _IMAGE | {"intermediate_size": 48}, (16, 16)),
    "deit": Case("DeiTForImageClassification", _IMAGE | {"intermediate_size": 48}, (16, 16)),
    # Of another size than the positions are for.
    "dinov2": Case("Dinov2ForImageClassification", _IMAGE | {"mlp_ratio": 2}, (24, 12)),
    "dinov2_with_registers": Case(
        "Dinov2WithRegistersForImageClassification", _IMAGE | {"mlp_ratio": 2, "num_register_tokens": 3}, (24, 12)
    ),
}


@dataclass(frozen=True)
class Figure:
    """One comparison: of logits and the loss the largest difference, of gradients that over the largest gradient.

    difference: from transformers in the same dtype; error: from transformers in float32; theirs: how far transformers
    itself is from there in this dtype. bound: of the difference in float32, of the error in bfloat16.
    """

    family: str
    backend: str
    dtype: str
    quantity: str
    difference: float
    error: float
    theirs: float
    bound: float

    @property
    def conforms(self) -> bool:
        return self.error <= self.bound  # False for NaN. In float32 the two are one.

    def __str__(self) -> str:
        return (
            f"{self.family} on {self.backend} in {self.dtype}: {self.quantity} off by {self.error:.2g}, "
            f"where {self.bound:.2g} is the most"
        )


@dataclass(frozen=True)
class ConformanceReport:
    """What `conformance` found, and the versions of what it compared."""

    figures: list[Figure]
    versions: dict[str, str]

    @property
    def failures(self) -> list[Figure]:
        return [figure for figure in self.figures if not figure.conforms]

    def as_json(self) -> str:
        rows = [asdict(figure) | {"conforms": figure.conforms} for figure in self.figures]
        return json.dumps({"versions": self.versions, "figures": rows}, indent=2)

    def as_markdown(self) -> str:
        parts = [_INTRODUCTION.format(versions=", ".join(f"{name} {x}" for name, x in self.versions.items()))]
        for dtype, text, measure, with_own in _TABLES:
            if figures := [figure for figure in self.figures if figure.dtype == dtype]:
                parts += [text, _table(figures, measure, with_own)]
        return "\n\n".join(parts) + "\n"


def conformance(
    families: Sequence[str] | None = None,
    backends: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    progress: Callable[[list], Iterable] = iter,
) -> ConformanceReport:
    """Compare tiny random models with their transformers classes, on the CPU: about ten seconds a family.

    families: names out of FAMILIES; backends; dtypes: out of DTYPES; None: all, or all installed backends.
    progress: is given the list of comparisons and gives them back one by one, as tqdm does.

    Raises InputError for unknown names, UnknownBackend, and BackendNotInstalled where torch, transformers or a backend
    that was asked for is missing.
    """
    families = _chosen("family", families, tuple(FAMILIES))
    dtypes = _chosen("dtype", dtypes, DTYPES)
    opened = [get_backend(name, "cpu") for name in backends or installed()]
    _check_transformers()
    theirs = functools.cache(lambda family, dtype: _theirs(FAMILIES[family], dtype))
    figures: list[Figure] = []
    for family, dtype, xp in progress(
        [(family, dtype, xp) for family in families for dtype in dtypes for xp in opened]
    ):
        ours = _ours(FAMILIES[family], xp, dtype)
        for quantity in QUANTITIES if ours.gradients is not None else QUANTITIES[:-1]:
            wanted, exact = theirs(family, dtype), theirs(family, "float32")
            own = _distance(quantity, wanted, exact)
            bound = BOUND if dtype == "float32" else max(FACTOR * own, ROUNDING * _largest(quantity, exact))
            difference, error = _distance(quantity, ours, wanted), _distance(quantity, ours, exact)
            figures.append(Figure(family, xp.name, dtype, quantity, difference, error, own, bound))
    return ConformanceReport(figures, _versions(opened))


@dataclass
class _Found:
    logits: np.ndarray  # of tokens, not of padding
    loss: np.ndarray
    gradients: dict[str, np.ndarray] | None  # under our names; None: the backend has none


def _theirs(case: Case, dtype: str) -> _Found:
    import torch

    model, (inputs, labels) = _their_model(case), _batch(case)
    weights = _weights(case)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.from_numpy(weights[name]))
    model.to(getattr(torch, dtype))
    tensors = {name: torch.from_numpy(x) for name, x in inputs.items()}
    if case.size:
        tensors = {name: x.to(model.dtype) for name, x in tensors.items()}
    done = model(**tensors, labels=torch.from_numpy(labels).long())
    done.loss.backward()
    gradients = {
        name: np.zeros(parameter.shape, np.float32) if parameter.grad is None else parameter.grad.float().numpy()
        for name, parameter in model.named_parameters()
    }
    logits, loss = (x.detach().float().numpy() for x in (done.logits, done.loss))
    return _Found(_tokens(logits, inputs), loss, _renamed(case, gradients))


def _ours(case: Case, xp: Backend, dtype: str) -> _Found:
    family, config = _family(case)
    skeleton, arrays = family.Model.abstract(config), _renamed(case, _weights(case))
    check(skeleton, {name: x.shape for name, x in arrays.items()}, case.model)
    params = {name: xp.array(x, dtype) for name, x in arrays.items()}
    inputs, labels = _batch(case)
    given, wanted = [xp.array(x) for x in inputs.values()], xp.array(labels)
    forward = kinds.image_logits if case.size else kinds.text_logits
    loss_of = losses.cross_entropy if case.size else losses.causal_lm_loss

    def logits(model: Any, *inputs: Array) -> Array:
        return forward(xp, model, *inputs)

    def loss(params: Params, labels: Array, *inputs: Array) -> tuple[Array, None]:
        return loss_of(forward(xp.for_training(), bind(skeleton, params), *inputs), labels), None

    found = xp.get(xp.compile(logits, skeleton, hot=None)(params, *given))
    try:
        (value, _), grads = xp.compile(xp.value_and_grad(loss), training=True)(params, wanted, *given)
    except NoGradients:
        value, gradients = loss(params, wanted, *given)[0], None
    else:
        gradients = {name: xp.get(x).astype(np.float32) for name, x in grads.items()}
    return _Found(_tokens(found, inputs), np.asarray(xp.get(value)), gradients)


def _their_model(case: Case) -> Any:
    import transformers

    model_class = getattr(transformers, case.model)
    # The faster attention functions know no soft-cap.
    return model_class._from_config(model_class.config_class(**case.config), attn_implementation="eager").eval()


def _family(case: Case) -> tuple[Any, Any]:
    """Our family and its config, of what transformers would write to config.json."""
    import transformers

    data = getattr(transformers, case.model).config_class(**case.config).to_dict()
    family = family_of(data["model_type"])
    return family, family.Config.from_hf(data | {"architectures": [case.model]})


def _weights(case: Case) -> Params:
    """Under transformers' names; large, so that caps and windows bite, and numbers that bfloat16 holds exactly."""
    generator = np.random.default_rng(0)
    return {
        name: (0.3 * generator.standard_normal(parameter.shape)).astype(ml_dtypes.bfloat16).astype(np.float32)
        for name, parameter in _their_model(case).named_parameters()
    }


def _batch(case: Case) -> tuple[Params, np.ndarray]:
    """What the model reads, by the names of transformers' arguments and in the order of ours, and labels."""
    generator = np.random.default_rng(1)
    if case.size:
        pixels = generator.standard_normal((8, 3, *case.size)).astype(np.float32)
        return {"pixel_values": pixels}, generator.integers(0, case.config["num_labels"], 8).astype(np.int32)
    ids = generator.integers(0, case.config["vocab_size"], (3, 26)).astype(np.int32)
    mask = np.ones_like(ids)
    mask[1, :9] = mask[2, 20:] = 0
    labels = np.where(mask == 1, ids, -100)
    labels[0, :7] = -100  # a prompt
    labels[1, 9] = -100  # it would be foretold by padding
    return {"input_ids": ids, "attention_mask": mask}, labels


def _renamed(case: Case, arrays: Params) -> Params:
    """Under our names."""
    family, config = _family(case)
    names, found = family.names("hf", config), {}
    for theirs, x in arrays.items():
        if (renamed := names.to_ours(theirs)) is not None:
            ours, via = renamed
            found[ours] = via.to_ours(x.copy())
    return found


def _tokens(logits: np.ndarray, inputs: Params) -> np.ndarray:
    """Without what stands in padded places, which means nothing."""
    mask = inputs.get("attention_mask")
    return logits if mask is None else logits[mask == 1]


def _distance(quantity: str, found: _Found, wanted: _Found) -> float:
    ours, theirs = getattr(found, quantity), getattr(wanted, quantity)
    if quantity != "gradients":
        return float(np.abs(ours - theirs).max())
    return _peak({name: x - theirs[name] for name, x in ours.items()}) / _peak(theirs)


def _largest(quantity: str, found: _Found) -> float:
    """Of what `_distance` measures."""
    return 1.0 if quantity == "gradients" else float(np.abs(getattr(found, quantity)).max())


def _peak(gradients: Params) -> float:
    return float(np.max([np.abs(x).max() for x in gradients.values()]))  # NaN if there is one, unlike Python's max


def _chosen(what: str, names: Sequence[str] | None, known: tuple[str, ...]) -> Sequence[str]:
    if unknown := [name for name in names or () if name not in known]:
        raise InputError(f"unknown {what} {', '.join(map(repr, unknown))}; choose among {', '.join(known)}")
    return names or known


def _check_transformers() -> None:
    missing = [name for name in ("torch", "transformers") if importlib.util.find_spec(name) is None]
    if missing:
        raise BackendNotInstalled(
            f"conformance compares with transformers' models in torch, but {' and '.join(missing)} cannot be found. "
            f"Install it with: pip install {' '.join(missing)}"
        )


def _versions(opened: Sequence[Backend]) -> dict[str, str]:
    found = {"modelhub": sys.modules["modelhub"].__version__}  # a checkout is not installed
    found |= {name: version(name) for name in ("transformers", "torch")}
    return found | {xp.name: importlib.import_module(xp.name).__version__ for xp in opened}


_INTRODUCTION = """\
# Conformance

How far every family on every backend is from its transformers class. This page is what

    pip install 'modelhub[all]' transformers
    modelhub conformance --output docs/conformance.md

writes; this one is of {versions},
on the CPU. The command exits with status 1 if a figure is over its bound. Some families or backends only:
`--families gemma3,vit --backends jax,torch`; for scripts: `--json`.

Compared are models with the same weights under Hugging Face's names: three or four layers, random weights so large
that soft-caps bite and attention looks at single tokens, rows longer than the sliding window, one of them padded on
the left, one on the right, and one that starts with a prompt without loss. DINOv2 gets images of another size than its
positions are for. transformers runs eagerly, modelhub as `fit` and `logits` do. The measures:

- **logits**: the largest absolute difference, over all tokens and classes;
- **loss**: the absolute difference of the mean loss (transformers' own, with labels of -100; cross entropy for images);
- **gradients**: the largest absolute difference of any number in any parameter's gradient, over the largest gradient;
  numpy has none. What is over its bound is bold."""

# dtype, title and text; what of a Figure is shown; whether transformers' own error is.
_TABLES = (
    ("float32", f"""\
## float32

Distance from transformers in float32. Bound: {BOUND:g} for every figure.""", "difference", False),
    ("bfloat16", f"""\
## bfloat16: distance from float32

How far bfloat16 here, and in transformers, is from transformers in float32 with the same weights (which are numbers
that bfloat16 holds exactly). Bound: {FACTOR:g} times transformers' own distance, or what one rounding to bfloat16
changes at most, {ROUNDING:.2g} of the largest value, where that is more: a loss may be right by accident.""",
     "error", True),
    ("bfloat16", """\
## bfloat16: distance from transformers

Both in bfloat16, for whoever compares outputs. Two computations that round at different places are as far apart as
their distances from float32 together, so this has no bound. transformers rounds the loss of images, too.""",
     "difference", False),
)  # fmt: skip


def _table(figures: list[Figure], measure: str, with_own: bool) -> str:
    """Rows: a family's logits, loss and gradients; columns: backends. What is over its bound is bold."""
    found = {(figure.family, figure.quantity, figure.backend): figure for figure in figures}
    backends = list(dict.fromkeys(figure.backend for figure in figures))
    rows = [["family", "", *(["transformers"] if with_own else []), *backends]]
    for family in dict.fromkeys(figure.family for figure in figures):
        for index, quantity in enumerate(QUANTITIES):
            cells = [found.get((family, quantity, backend)) for backend in backends]
            if not any(cells):
                continue
            own = [f"{cell.theirs:.1e}" for cell in cells if cell][:1] if with_own else []
            rows.append(["" if index else family, quantity, *own, *(_shown(cell, measure) for cell in cells)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows.insert(1, ["-" * width for width in widths[:2]] + ["-" * (width - 1) + ":" for width in widths[2:]])
    lines = [
        [x.ljust(width) if i < 2 else x.rjust(width) for i, (x, width) in enumerate(zip(row, widths, strict=True))]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _shown(figure: Figure | None, measure: str) -> str:
    if figure is None:
        return ""  # numpy has no gradients
    value = getattr(figure, measure)
    text = f"{value:.1e}" if value else "0"
    return text if figure.conforms or (measure, figure.dtype) == ("difference", "bfloat16") else f"**{text}**"
