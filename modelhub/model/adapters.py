"""LoRA: enabling, switching, merging, and PEFT's folders."""

import dataclasses
import logging
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelhub.core import custom, leaves, lora
from modelhub.core.tree import Params, flatten
from modelhub.errors import InputError
from modelhub.hub.adapters import read_adapter, write_adapter
from modelhub.hub.preset import as_address, resolve_adapter
from modelhub.hub.provenance import Provenance, TrainingRun, read_provenance, write_provenance
from modelhub.kinds import TaskKind, kind_reading
from modelhub.model.adapter_files import (
    as_files,
    check_pieces,
    check_shapes,
    in_order,
    names_in_files,
    own_copy,
    with_our_names,
    without_copies,
)
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
        params |= {key: own_copy(xp, base[key]) for key in whole}
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
        weights = self.weights
        xp, layers = weights.xp, weights.layers
        files = as_files(adapter, kind or kind_reading(weights.layout.base.reads), base, revision)
        attention = custom.attention_name(xp)

        def companions(work: Path) -> None:
            if layers or attention:
                write_provenance(work, Provenance(layers=tuple(layers.items()), attention=attention))
            if beside is not None:
                beside(work)

        write_adapter(Path(folder).expanduser(), files, companions)

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
        names = names_in_files(self.weights)
        files = with_our_names(read_adapter(Path(folder)), names, folder)
        made = read_provenance(Path(folder))
        check_pieces(self.weights, made, folder)
        config = lora.LoRAConfig(
            files.rank, files.alpha, files.dropout, files.use_rslora, files.use_dora, files.rank_pattern,
            files.alpha_pattern,
        )  # fmt: skip
        weights = self.weights
        xp, base_model, base = weights.xp, weights.layout.base, weights.base_params()
        modules = in_order(base_model, {key.partition(lora.MARK)[0] for key in files.tensors}, folder)
        arrays = without_copies(xp, files, base)
        more = lora.choose_whole(base_model, [*modules_to_save, *self.weights.new_heads], modules)
        plain = lora.plain(base_model, modules, [*arrays, *more])
        skeleton, specs = lora.attach(plain, config, modules)
        check_shapes(specs, flatten(plain), arrays, files, folder)
        base = _fitting(plain, base)
        params = {key: xp.array(files.tensors[key], "float32") for key in specs}
        params |= {key: xp.array(array, leaves.dtype_of(base[key])) for key, array in arrays.items()}
        params |= {key: own_copy(xp, base[key]) for key in more if key not in params}
        whole = tuple(key for key in params if key not in specs)
        told = (made.runs, made.labels) if made else ()
        self._add(Adapter(weights, name, config, modules, tuple(params), skeleton, plain, whole, *told), params)
        return name

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
