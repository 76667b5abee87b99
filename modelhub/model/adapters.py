"""LoRA: enabling, switching, merging, and PEFT's folders."""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core import custom, leaves, lora
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Params, flatten
from modelhub.errors import CheckpointError, InputError
from modelhub.families import family_of
from modelhub.families.naming import NameMap
from modelhub.hub.adapter_parts import joined, spelled, split
from modelhub.hub.adapters import AdapterFiles, read_adapter, write_adapter
from modelhub.hub.preset import as_address, resolve_adapter
from modelhub.hub.provenance import Provenance, TrainingRun, read_provenance, write_provenance
from modelhub.kinds import TaskKind, kind_reading
from modelhub.model.weights import PARAMS, REPLACED, Change, Layout, Weights, adapter_store

log = logging.getLogger("modelhub")


@dataclass(repr=False)
class Adapter:
    """One adapter. names: of its parameters, under our names; their arrays are the Weights'.

    model: the skeleton with this adapter; the same one each time, so that nothing compiles again. plain: the skeleton
    of the model that it is merged into. whole: names of parameters that it has in place of the base's.
    """

    weights: Weights
    name: str
    config: lora.LoRAConfig
    modules: list[str]
    names: tuple[str, ...]
    model: Any
    plain: Any
    whole: tuple[str, ...] = ()
    runs: tuple[TrainingRun, ...] = ()  # what trained it
    labels: tuple[str, ...] = ()  # of the classes of its own head, where its files say them

    @property
    def params(self) -> Params:
        """Its arrays: apart, or among the model's while it is active."""
        params = self.weights.params
        return self.weights.stores.get(adapter_store(self.name)) or {name: params[name] for name in self.names}

    def __repr__(self) -> str:
        about = self.described()
        count = sum(map(leaves.count, self.params.values()))
        return (
            f"Adapter(rank={about['rank']}, alpha={about['alpha']:g}, targets={about['targets']}, {count:,} parameters)"
        )

    def described(self) -> dict[str, Any]:
        """For a model card: JSON values."""
        kinds = sorted({module.rpartition(".")[2] for module in self.modules})
        plain = {key: value for key, value in dataclasses.asdict(self.config).items() if not key.endswith("_pattern")}
        whole = sorted({name.rpartition(".")[0] for name in self.whole})
        described = plain | {"alpha": self.config.alpha or self.config.rank, "targets": kinds}
        return described | ({"modules_to_save": whole} if whole else {})


class AdapterSet(Mapping[str, Adapter]):
    """The adapters of a model by name, of which at most one is active at a time; their arrays are the Weights'."""

    def __init__(self, weights: Weights):
        self.weights = weights
        self._adapters: dict[str, Adapter] = {}

    def __getitem__(self, name: str) -> Adapter:
        return self._adapters[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._adapters)

    def __len__(self) -> int:
        return len(self._adapters)

    def __repr__(self) -> str:
        return repr(self._adapters)

    def __delitem__(self, name: str) -> None:
        """Forget one that is not active."""
        del self._adapters[name]
        self.weights.change(Change.TOLD, {adapter_store(name): None})

    @property
    def active(self) -> Adapter | None:
        """Merged or not."""
        name = self.weights.layout.active
        return None if name is None else self._adapters[name]

    def enable_lora(
        self, rank: int = 4, alpha: float | None = None, dropout: float = 0.0,
        targets: str | Sequence[str] | None = None, use_rslora: bool = False, use_dora: bool = False,
        *, name: str = "default", seed: int = 0, modules_to_save: Sequence[str] = (),
    ) -> None:  # fmt: skip
        """Add a new low-rank adapter and make it the active one; from now on `fit` trains it alone.

        rank, alpha (None: equal to rank), dropout, use_rslora, use_dora: as in PEFT. targets: names of linear layers
        ("q_proj", "mlp.up_proj"), patterns ("model.layers.1?.*"), or "all-linear"; None: queries and values.
        modules_to_save: as in PEFT, names of modules ("lm_head", "embed_tokens", "classifier") of which the adapter has
        a copy, that is trained whole and saved with it; a new head is always one of them.

        Raises ConfigError for values that make no sense and for targets that match nothing; InputError for a name that
        is taken.
        """
        if name in self:
            raise InputError(
                f"there is an adapter {name!r} already; give the new one another name=, or use set_adapter({name!r})"
            )
        base_model, xp = self.weights.layout.base, self.weights.xp
        config = lora.LoRAConfig(rank, alpha, dropout, use_rslora, use_dora)
        modules = lora.choose(base_model, targets)
        lora.check_ranks(base_model, config, modules)
        whole = lora.choose_whole(base_model, [*modules_to_save, *self.weights.new_heads], modules)
        plain = lora.plain(base_model, modules, whole)
        base = _fitting(plain, self.weights.base_params())
        skeleton, specs = lora.attach(plain, config, modules)
        params = lora.initial(xp, base, specs, seed)
        params |= {key: _own_copy(xp, base[key]) for key in whole}
        self._add(Adapter(self.weights, name, config, modules, tuple(params), skeleton, plain, tuple(whole)), params)

    def _add(self, adapter: Adapter, params: Params) -> None:
        self._adapters[adapter.name] = adapter
        self.weights.change(Change.TOLD, {adapter_store(adapter.name): params})
        self.set_adapter(adapter.name)

    def set_adapter(self, name: str | None) -> None:
        """Make an adapter the active one; None: none of them. A merged one is taken out of the weights first."""
        if name is not None and name not in self:
            raise InputError(f"there is no adapter {name!r}; there are {', '.join(self) or 'none'}")
        self._activate(name)

    def _activate(self, name: str | None) -> None:
        """Put an adapter's arrays beside the base model's parameters, and in place of some; the last one's apart."""
        weights = self.weights
        layout, base = weights.layout, weights.base_params()
        stores: dict[str, Params | None] = {}
        if layout.active is not None:  # keep what training made of it
            stores[adapter_store(layout.active)] = self[layout.active].params
        if name is None:
            layout, params, replaced = Layout(layout.base, layout.base, layout.base), base, {}
        else:
            adapter, store = self[name], adapter_store(name)
            own = stores.get(store) or weights.stores[store]
            layout = Layout(layout.base, adapter.plain, adapter.model, name)
            params = _fitting(adapter.model, base) | own
            replaced = {key: base[key] for key in adapter.whole if key in base}
            stores[store] = None
        weights.change(Change.SWITCHED, {**stores, PARAMS: params, REPLACED: replaced}, layout=layout)

    def merge_lora(self) -> None:
        """Put the active adapter into the weights: the same outputs, at the base model's speed. See unmerge_lora.

        Another adapter, enabled or loaded after that, takes it out again; training all weights makes it final, and so
        does a torch or TensorFlow module of the task, which may train them.
        """
        adapter, weights = self._require_adapter("merge"), self.weights
        xp, params, base = weights.xp, weights.params, weights.base_params()
        folding = lora.folding(xp, adapter.model, params)
        leaves.check_plain(
            {name: params[name] for name in folding}, "merging an adapter",
            "save or use the adapter beside them, or load the model unpacked",
        )  # fmt: skip
        folded = {name: xp.stop_gradient(fold()) for name, fold in folding.items()}  # of torch Parameters
        folded |= {name: params[name] for name in adapter.whole}
        weights.change(
            Change.SWITCHED,
            {
                adapter_store(adapter.name): adapter.params,
                PARAMS: _fitting(adapter.plain, base) | folded,
                REPLACED: {key: base[key] for key in folded if key in base},
            },
            layout=Layout(weights.layout.base, adapter.plain, adapter.plain, adapter.name, merged=True),
        )

    def unmerge_lora(self) -> None:
        """Undo merge_lora: the base weights are what they were, bit for bit."""
        if not self.weights.layout.merged:
            raise InputError("no adapter is merged; merge_lora() comes first")
        self._activate(self.weights.layout.active)

    def keep_merged(self) -> None:
        """Make a merge final: the adapter and what the optimizer remembers are forgotten, its weights are the model's
        own. `fit` begins with it."""
        weights, adapter = self.weights, self.active
        if adapter is None or not weights.layout.merged:
            return
        origin = weights.origin
        for run in adapter.runs:
            origin = dataclasses.replace(origin, provenance=origin.provenance.with_run(run))
        del self._adapters[adapter.name]
        if adapter.plain is not weights.layout.base:  # the head was the table of embeddings, and is it no more
            for other in self._adapters.values():
                other.plain, other.model = adapter.plain, lora.with_own_head(other.model)
        weights.change(
            Change.MERGED, {REPLACED: None, adapter_store(adapter.name): None}, origin=origin,
            layout=Layout(adapter.plain, adapter.plain, adapter.plain), config=weights.plain_config(),
        )  # fmt: skip

    def save_adapter(
        self, folder: str | os.PathLike[str], base: str = "", beside: Callable[[Path], None] | None = None,
        *, revision: str | None = None, kind: TaskKind | None = None,
    ) -> None:  # fmt: skip
        """Write the active adapter as a PEFT folder: adapter_config.json and adapter_model.safetensors.

        base: the name of the base model that the folder is to state. beside: writes more files into the folder.
        revision: of the base model. kind: what it is for; None: what such models are usually
        loaded for.
        """
        adapter = self._require_adapter("save", merged=True)
        config, arrays, weights = adapter.config, adapter.params, self.weights
        xp, layers = weights.xp, weights.layers
        kind, names = kind or kind_reading(weights.layout.base.reads), self._adapter_names()

        def theirs_of(module: str) -> str:
            name = names.to_theirs(module)[0]
            return name.removeprefix("model.") if kind.auto_class == "AutoModel" else name  # it has no head beside it

        theirs = {module: theirs_of(module) for module in lora.linears(lora.with_own_head(weights.layout.base))}
        full = {module: spelled(name, names.parts) for module, name in theirs.items()}
        short = {module: {name.rpartition(".")[2] for name in found} for module, found in full.items()}
        targets = sorted({name for module in adapter.modules for name in short[module]})
        # PEFT looks for short names in the parts of a model that are not here, too.
        alone = weights.origin.identity is None or weights.origin.part_of is None
        if not alone or [module for module in theirs if short[module] & {*targets}] != adapter.modules:
            targets = [name for module in adapter.modules for name in full[module]]
        parts = [name.rpartition(".") for name in adapter.whole]
        whole = {f"{module}.{kind}": f"{theirs_of(module)}.{kind}" for module, _, kind in parts}
        saved = {found for name in whole.values() for found in spelled(name.rpartition(".")[0], names.parts)}
        files = AdapterFiles(
            rank=config.rank,
            alpha=config.rank if config.alpha is None else config.alpha,
            dropout=config.dropout,
            use_rslora=config.use_rslora,
            use_dora=config.use_dora,
            targets=targets,
            rank_pattern={theirs[module]: rank for module, rank in config.rank_pattern.items()},
            alpha_pattern={theirs[module]: alpha for module, alpha in config.alpha_pattern.items()},
            base=base,
            tensors={
                f"{theirs[module]}{mark}{kind}": xp.get(arrays[f"{module}{mark}{kind}"])
                for module, mark, kind in (key.partition(lora.MARK) for key in arrays if key not in whole)
            },
            whole={theirs: xp.get(arrays[ours]) for ours, theirs in whole.items()},
            modules_to_save=sorted(saved if not alone else {name.rpartition(".")[2] for name in saved}),
            revision=revision,
            task_type=kind.peft,
        )

        attention = custom.attention_name(xp)

        def companions(work: Path) -> None:
            if layers or attention:
                write_provenance(work, Provenance(layers=tuple(layers.items()), attention=attention))
            if beside is not None:
                beside(work)

        write_adapter(Path(folder).expanduser(), split(files, names.parts), companions)

    def load_adapter(
        self, folder: str | os.PathLike[str], name: str | None = None, *, revision: str | None = None,
        offline: bool = False, token: str | None = None, modules_to_save: Sequence[str] = (),
    ) -> str:  # fmt: skip
        """Read a PEFT folder, or one at an address (hf://, kaggle://, file://), and make it the active adapter.

        Returns its name, by default that of the folder or repository. revision, offline, token: as in from_preset.
        modules_to_save: modules that it gets a copy of where its files have none; see enable_lora.
        Raises CheckpointError for files that are damaged, of an unknown kind, or made for another base model;
        PresetNotFound and DownloadError for addresses.
        """
        address = as_address(folder)
        folder = resolve_adapter(folder, revision=revision, offline=offline, token=token)
        if name is None:  # in a cache the folder is called after a commit
            name = re.split("[@?#]", Path(address).name)[0] if "://" in address else folder.resolve().name
        if name in self:
            raise InputError(f"there is an adapter {name!r} already; give this one another name=")
        files = self._with_our_names(read_adapter(Path(folder)), folder)
        made = read_provenance(Path(folder))
        self._check_pieces(made, folder)
        config = lora.LoRAConfig(
            files.rank, files.alpha, files.dropout, files.use_rslora, files.use_dora, files.rank_pattern,
            files.alpha_pattern,
        )  # fmt: skip
        weights = self.weights
        xp, base_model, base = weights.xp, weights.layout.base, weights.base_params()
        modules = _in_order(base_model, {key.partition(lora.MARK)[0] for key in files.tensors}, folder)
        arrays = self._without_copies(files, base)
        more = lora.choose_whole(base_model, [*modules_to_save, *self.weights.new_heads], modules)
        plain = lora.plain(base_model, modules, [*arrays, *more])
        skeleton, specs = lora.attach(plain, config, modules)
        _check_shapes(specs, flatten(plain), arrays, files, folder)
        base = _fitting(plain, base)
        params = {key: xp.array(files.tensors[key], "float32") for key in specs}
        params |= {key: xp.array(array, leaves.dtype_of(base[key])) for key, array in arrays.items()}
        params |= {key: _own_copy(xp, base[key]) for key in more if key not in params}
        whole = tuple(key for key in params if key not in specs)
        told = (made.runs, made.labels) if made else ()
        self._add(Adapter(weights, name, config, modules, tuple(params), skeleton, plain, whole, *told), params)
        return name

    def _adapter_names(self) -> NameMap:
        """Between our names of layers and those in PEFT's files, where they differ."""
        config, origin = self.weights.config, self.weights.origin
        names = getattr(family_of(config.model_type), "adapter_names", None)
        # Weights that are nowhere else are going to be saved as what they are here.
        return names(config, None if origin.identity is None else origin.part_of) if names else NameMap()

    def _with_our_names(self, files: AdapterFiles, folder: str | os.PathLike[str]) -> AdapterFiles:
        names = self._adapter_names()
        modules = {key.partition(lora.MARK)[0] for key in files.tensors} | {k.rpartition(".")[0] for k in files.whole}
        ours = {module: found[0] for module in modules if (found := names.to_ours(module))}
        if unused := sorted(modules - ours.keys()):
            log.warning(
                "%s adapts %d layers of parts that are not loaded here, such as %s: they are left out, also where this "
                "adapter is saved", folder, len(unused), unused[0],
            )  # fmt: skip

        def renamed(table: Mapping[str, Any], module_of: Callable[[str], str]) -> dict[str, Any]:
            kept = {key: value for key, value in table.items() if module_of(key) in ours}
            return {ours[module_of(key)] + key[len(module_of(key)) :]: value for key, value in kept.items()}

        def of_parameter(key: str) -> str:
            return key.rpartition(".")[0]

        files = dataclasses.replace(
            files,
            rank_pattern=renamed(files.rank_pattern, str),
            alpha_pattern=renamed(files.alpha_pattern, str),
            tensors=renamed(files.tensors, lambda key: key.partition(lora.MARK)[0]),
            whole=renamed(files.whole, of_parameter),
            copies=frozenset(renamed(dict.fromkeys(files.copies), of_parameter)),
        )
        return joined(files, names.parts)

    def _without_copies(self, files: AdapterFiles, params: Params) -> dict[str, np.ndarray]:
        """The whole parameters of an adapter, but for those that say what the base model says."""
        head, table = f"{lora.HEAD}.weight", f"{lora.TABLE}.weight"
        wanted = {name.rpartition(".")[2] for name in files.modules_to_save}
        found: dict[str, np.ndarray] = {}
        for name, array in files.whole.items():
            tied = name == head and head not in params and table in params
            base = params.get(table if tied else name)
            copied = name in files.copies or name.split(".")[-2] not in wanted
            if copied and base is not None and tuple(base.shape) == array.shape:
                stored = self.weights.xp.get(_own_copy(self.weights.xp, base))
                if np.array_equal(stored, array.astype(stored.dtype)):
                    continue
            found[name] = array
            if tied and name in files.copies:  # there it is one array with the table, and so it stays
                found.setdefault(table, array)
        return found

    def _check_pieces(self, made: Provenance | None, folder: str | os.PathLike[str]) -> None:
        """What an adapter's maker had in the base model of their own must be in this one."""
        layers, xp = self.weights.layers, self.weights.xp
        if made and made.layers and made.layers != tuple(layers.items()):
            raise CheckpointError(
                f"{folder}: this adapter is for a base model with layers of its maker's own, and this model has "
                f"{dict(layers) or 'none'}. Load the base model with layers={dict(made.layers)}, where they are "
                f"registered, and the adapter on it"
            )
        own = custom.attention_name(xp)
        if made and made.attention and made.attention != own:
            log.warning(
                "%s was trained with the attention function %r, and this model has %s: its answers may differ. Load "
                "the base model with attention=%r, where it is registered", folder, made.attention,
                f"{own!r}" if own else "the usual one", made.attention,
            )  # fmt: skip

    def trainable_names(self) -> list[str]:
        """What `fit` trains: the active adapter, else everything."""
        own = self.active.names if self.active is not None and self.weights.has_adapter else None
        return [name for name in self.weights.params if own is None or name in own]

    def _require_adapter(self, what: str, merged: bool = False) -> Adapter:
        if (adapter := self.active) is None:
            raise InputError(f"there is no active adapter to {what}; enable_lora() or load_adapter() makes one")
        if self.weights.layout.merged and not merged:
            raise InputError(f"the adapter {adapter.name!r} is merged already")
        return adapter


def _fitting(skeleton: Any, base: Params) -> Params:
    """The base model's parameters for a skeleton that may have its head apart; it is no copy of the table."""
    table = base.get(f"{lora.TABLE}.weight")
    return {name: base.get(name, table) for name in flatten(skeleton) if lora.MARK not in name}


def _own_copy(xp: Backend, x: Any) -> Array:
    """What an adapter trains whole starts from: of packed weights the numbers that they stand for."""
    return xp.copy(xp.stop_gradient(xp.values(x)))


def _in_order(base: Any, modules: Iterable[str], folder: str | os.PathLike[str]) -> list[str]:
    layers = lora.linears(lora.with_own_head(base))
    wanted = set(modules)
    if unknown := sorted(wanted - layers.keys()):
        raise CheckpointError(
            f"{folder}: this adapter is for another base model: it changes {len(unknown)} layers that this model does "
            f"not have, the first {unknown[0]}; this model has layers such as {next(iter(layers))}"
        )
    return [name for name in layers if name in wanted]


def _check_shapes(
    specs: Mapping[str, Any], plain: Mapping[str, Any], whole: Mapping[str, np.ndarray], files: AdapterFiles,
    folder: str | os.PathLike[str],
) -> None:  # fmt: skip
    """specs: of the adapter's own tensors; plain: of the parameters of the model that it is for."""
    found = {name: files.tensors[name] for name in specs if name in files.tensors} | dict(whole)
    needed = {**plain, **specs}
    problems = [f"{name} {x.shape} is no parameter of this model" for name, x in found.items() if name not in needed]
    problems += [
        f"{name} is {array.shape}, this model needs {needed[name].shape}"
        for name, array in found.items()
        if name in needed and array.shape != needed[name].shape
    ]
    problems += [f"{name} is missing" for name in specs if name not in files.tensors]
    if not problems:
        return
    advice = ""
    for name, array in whole.items():
        module = name.partition(".")[0]
        if name in needed and array.shape[1:] == needed[name].shape[1:] and array.shape != needed[name].shape:
            if module in (lora.HEAD, lora.TABLE.partition(".")[0]):
                advice = "\nThe vocabulary was resized before training: merge it with PEFT, and load the result"
            elif module in lora.HEADS:
                advice = f"\nIts head has {len(array)} classes: load the base model with num_classes={len(array)}"
    raise CheckpointError(
        f"{folder}: this adapter is for another base model{f' ({files.base})' if files.base else ''}:\n  "
        + "\n  ".join(problems[:10]) + advice
    )  # fmt: skip
