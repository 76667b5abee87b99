"""Low-rank adapters: which layers get one, the skeleton with them, their first values, and merging.

Hu et al. 2021, arXiv:2106.09685; rsLoRA: Kalajdzievski 2023, arXiv:2312.03732; DoRA: Liu et al. 2024,
arXiv:2402.09353. Names are PEFT's. The layer itself is modelhub.core.nn.LoRA.
"""

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from modelhub.core.backends.base import Array, Backend
from modelhub.core.custom import means
from modelhub.core.nn import Linear, LoRA, row_lengths
from modelhub.core.tree import Module, Params, Spec, children, flatten, initial_value, with_parts
from modelhub.errors import ConfigError

ALL_LINEAR = "all-linear"
DEFAULT_TARGETS = (("q_proj", "v_proj"), ("query", "value"))  # the first whose layers there are
HEADS = {"lm_head", "classifier", "cls_classifier", "distillation_classifier"}
HEAD, TABLE = "lm_head", "model.embed_tokens"  # of models of text; a head may be the table of embeddings
HEAD_WEIGHT, TABLE_WEIGHT = f"{HEAD}.weight", f"{TABLE}.weight"
MARK = ".lora."  # in the names of an adapter's parameters: MODULE.lora.lora_A
ModuleT = TypeVar("ModuleT", bound=Module)


@dataclass(frozen=True)
class LoRAConfig:
    """alpha None: equal to rank. The update is scaled by alpha / rank, with use_rslora by alpha / sqrt(rank).

    rank_pattern, alpha_pattern: other values for single modules, by their full names.
    """

    rank: int = 4
    alpha: float | None = None
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for rank in (self.rank, *self.rank_pattern.values()):
            if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
                raise ConfigError(f"LoRA: rank must be a whole number, 1 or more, got {rank!r}")
        if not 0.0 <= self.dropout < 1.0:
            raise ConfigError(f"LoRA: dropout must be at least 0 and below 1, got {self.dropout!r}")
        if self.alpha is not None and not self.alpha > 0:
            raise ConfigError(f"LoRA: alpha must be above 0, got {self.alpha!r}")

    def rank_of(self, module: str) -> int:
        return self.rank_pattern.get(module, self.rank)

    def scale_of(self, module: str) -> float:
        rank = self.rank_of(module)
        alpha = self.alpha_pattern.get(module, rank if self.alpha is None else self.alpha)
        return alpha / (rank**0.5 if self.use_rslora else rank)


def linears(node: Any, prefix: str = "") -> dict[str, Linear]:
    """{dotted name: layer} of all Linear layers."""
    if isinstance(node, Linear):
        return {prefix: node}
    found: dict[str, Linear] = {}
    for name, child in children(node):
        found |= linears(child, f"{prefix}.{name}" if prefix else name)
    return found


def with_own_head(skeleton: ModuleT) -> ModuleT:
    """The skeleton with a head in a place of its own where the table of embeddings was the head; it starts as that
    table."""
    if getattr(skeleton, HEAD, skeleton) is not None:
        return skeleton
    table: Any = dict(children(dict(children(skeleton))["model"]))["embed_tokens"]
    return dataclasses.replace(skeleton, **{HEAD: Linear(table.weight)})  # type: ignore[type-var]


def plain(skeleton: ModuleT, modules: Iterable[str], whole: Iterable[str] = ()) -> ModuleT:
    """The skeleton that the weights of a model fit once an adapter of `modules`, and of the parameters `whole`, is
    merged into them: a head that differs from the table of embeddings is apart from it."""
    ends = {*modules, *(name.rpartition(".")[0] for name in whole)}
    return with_own_head(skeleton) if ends & {HEAD, TABLE} else skeleton


def choose(skeleton: Module, targets: str | Sequence[str] | None) -> list[str]:
    """The names of the layers that `targets` mean, in the model's order.

    targets: "all-linear" (all but the head), or names: of a layer ("q_proj", "self_attn.q_proj", the full name) or a
    pattern for the full name ("model.layers.1?.*_proj"). None: the projections of queries and values. A head that is
    the table of embeddings has no other name than "lm_head".

    Raises ConfigError, listing what exists, if one of them means no layer.
    """
    tied = linears(with_own_head(skeleton)).keys() - linears(skeleton).keys()
    everything = list(linears(with_own_head(skeleton)))
    if targets == ALL_LINEAR:
        return [name for name in everything if name.partition(".")[0] not in HEADS]
    endings = sorted({name.rpartition(".")[2] for name in everything if name not in tied})
    if targets is None:
        targets = next((pair for pair in DEFAULT_TARGETS if {*pair} <= {*endings}), DEFAULT_TARGETS[0])
    wanted = [targets] if isinstance(targets, str) else list(targets)
    found: set[str] = set()
    for target in wanted:
        matches = {name for name in everything if (name == target if name in tied else means(target, name))}
        if not matches and f".{TABLE}".endswith(f".{target}"):
            raise ConfigError(
                f"LoRA: target {target!r} is the table of embeddings, which can be trained whole beside LoRA on other "
                f"layers, modules_to_save=[{target!r}], but has no low-rank update here"
            )
        if not matches:
            raise ConfigError(
                f"LoRA: target {target!r} matches no linear layer of this model. There are {', '.join(endings)}; full "
                f'names are like {everything[0]!r}; "all-linear" means all but the head'
            )
        found |= matches
    if not found:
        raise ConfigError('LoRA: targets is empty; name at least one layer, or "all-linear"')
    return [name for name in everything if name in found]


def choose_whole(skeleton: Module, modules: Sequence[str], adapted: Iterable[str]) -> list[str]:
    """The parameters of `modules`, which are to be trained as a whole beside an adapter of the layers `adapted`.

    modules: as in PEFT's modules_to_save, names ("lm_head", "embed_tokens", "classifier") or full names.

    Raises ConfigError, listing what exists, if one of them means nothing, or what is adapted.
    """
    names = list(flatten(with_own_head(skeleton)))
    places = {name.rpartition(".")[0] for name in names}
    found: set[str] = set()
    for wanted in [modules] if isinstance(modules, str) else modules:
        matches = {place for place in places if f".{place}".endswith(f".{wanted}")}
        if not matches:
            kinds = ", ".join(sorted({place.rpartition(".")[2] for place in places}))
            raise ConfigError(
                f"modules_to_save: this model has no module {wanted!r} with parameters; there are {kinds}"
            )
        found |= matches
    if both := sorted(found.intersection(adapted)):
        raise ConfigError(f"modules_to_save: {both[0]} would be trained as a whole and have an adapter; choose one")
    return [name for name in names if name.rpartition(".")[0] in found]


def check_ranks(skeleton: Module, config: LoRAConfig, modules: Iterable[str]) -> None:
    """Raise ConfigError if a new adapter would have a larger rank than one of its layers."""
    layers = linears(with_own_head(skeleton))
    shapes = {name: layers[name].weight.shape for name in modules}
    small = [f"{name} ({n} x {k})" for name, (n, k) in shapes.items() if config.rank_of(name) > min(n, k)]
    if small:
        raise ConfigError(
            f"LoRA: rank {config.rank} is larger than {len(small)} of the targeted layers, the first {small[0]}: such "
            f"an update would have more parameters than the layer. Take a smaller rank, or other targets"
        )


def attach(skeleton: ModuleT, config: LoRAConfig, modules: Iterable[str]) -> tuple[ModuleT, dict[str, Spec]]:
    """The skeleton with an adapter in each of `modules`, and the adapter's {parameter name: Spec}."""
    layers = linears(skeleton)
    replaced: dict[str, Linear] = {}
    for name in modules:
        outputs, inputs = layers[name].weight.shape
        rank = config.rank_of(name)
        adapter = LoRA.abstract(
            inputs, outputs, rank, scale=config.scale_of(name), dropout=config.dropout, use_dora=config.use_dora,
            salt=zlib.crc32(name.encode()) >> 1,
        )  # fmt: skip
        replaced[name] = dataclasses.replace(layers[name], lora=adapter)
    changed = with_parts(skeleton, replaced)
    return changed, {name: spec for name, spec in flatten(changed).items() if MARK in name}


def initial(xp: Backend, params: Params, specs: Mapping[str, Spec], seed: int) -> Params:
    """First values of an adapter, float32: A random as in PEFT, B zero, DoRA's magnitudes those of the weights."""
    values: Params = {}
    for name, spec in specs.items():
        module, _, kind = name.partition(MARK)
        if kind == "lora_magnitude_vector":
            weight = xp.stop_gradient(xp.values(params[f"{module}.weight"]))  # it may be a torch Parameter
            values[name] = row_lengths(xp, xp.cast(weight, "float32"))
        else:
            values[name] = xp.put(initial_value(name, spec, seed))
    return values


def folding(xp: Backend, skeleton: Module, params: Params) -> dict[str, Callable[[], Array]]:
    """{name of a weight: what computes it} of the layers that have an adapter: the weights that do alone what both do
    together."""
    found: dict[str, Callable[[], Array]] = {}
    for module, layer in linears(skeleton).items():
        if layer.lora is not None:
            prefix = module + MARK
            bound = dataclasses.replace(
                layer.lora, **{n[len(prefix) :]: x for n, x in params.items() if n.startswith(prefix)}
            )
            found[f"{module}.weight"] = functools.partial(bound.folded, xp, params[f"{module}.weight"])
    return found
