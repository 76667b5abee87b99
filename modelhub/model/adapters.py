"""LoRA on a Backbone: enabling, switching, merging, and PEFT's folders."""

import dataclasses
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modelhub.core import lora
from modelhub.core.backends.base import Array, Backend
from modelhub.core.tree import Params, flatten
from modelhub.errors import CheckpointError, InputError
from modelhub.families import family_of
from modelhub.families.naming import NameMap
from modelhub.habits import Habits
from modelhub.hub.adapters import AdapterFiles, read_adapter, write_adapter
from modelhub.hub.preset import resolve_adapter
from modelhub.hub.provenance import Provenance, TrainingRun, read_provenance, write_provenance
from modelhub.kinds import kind_reading


@dataclass(repr=False)
class Adapter:
    """One adapter. params: its arrays, under our names; those of the active one are in the Backbone's params too.

    model: the skeleton with this adapter; the same one each time, so that nothing compiles again.
    """

    config: lora.LoRAConfig
    modules: list[str]
    params: Params
    model: Any
    runs: tuple[TrainingRun, ...] = ()  # what trained it

    def __repr__(self) -> str:
        about = self.described()
        count = sum(math.prod(x.shape) for x in self.params.values())
        return (
            f"Adapter(rank={about['rank']}, alpha={about['alpha']:g}, targets={about['targets']}, {count:,} parameters)"
        )

    def described(self) -> dict[str, Any]:
        """For a model card: JSON values."""
        kinds = sorted({module.rpartition(".")[2] for module in self.modules})
        plain = {key: value for key, value in dataclasses.asdict(self.config).items() if not key.endswith("_pattern")}
        return plain | {"alpha": self.config.alpha or self.config.rank, "targets": kinds}


class Adapters(Habits):
    """What a Backbone can do with adapters; at most one of them is active at a time.

    base_model: the skeleton without any. adapters: all of them by name. active_adapter: a name or None. optimizer: what
    the last `fit` left.
    """

    base_model: Any
    layers: Mapping[str, str]  # {pattern: name} of the user's own in it
    config: Any
    model: Any
    xp: Backend
    params: Params
    adapters: dict[str, Adapter]
    active_adapter: str | None
    optimizer: Any = None
    provenance: Provenance  # of the weights without any adapter
    identity: Provenance | None  # what they are, as base and base_model; None: there is no other copy of them
    _replaced: Params  # the base weights that merge_lora has put others in place of

    def enable_lora(
        self, rank: int = 4, alpha: float | None = None, dropout: float = 0.0,
        targets: str | Sequence[str] | None = None, use_rslora: bool = False, use_dora: bool = False,
        *, name: str = "default", seed: int = 0,
    ) -> None:  # fmt: skip
        """Add a new low-rank adapter and make it the active one; from now on `fit` trains it alone.

        rank, alpha (None: equal to rank), dropout, use_rslora, use_dora: as in PEFT. targets: names of linear layers
        ("q_proj", "mlp.up_proj"), patterns ("model.layers.1?.*"), or "all-linear"; None: queries and values.

        Raises ConfigError for values that make no sense and for targets that match nothing; InputError for a name that
        is taken.
        """
        if name in self.adapters:
            raise InputError(
                f"there is an adapter {name!r} already; give the new one another name=, or use set_adapter({name!r})"
            )
        config = lora.LoRAConfig(rank, alpha, dropout, use_rslora, use_dora)
        modules = lora.choose(self.base_model, targets)
        lora.check_ranks(self.base_model, config, modules)
        skeleton, specs = lora.attach(self.base_model, config, modules)
        self.set_adapter(None)
        params = lora.initial(self.xp, self.params, specs, seed)
        self.adapters[name] = Adapter(config, modules, params, skeleton)
        self.set_adapter(name)

    def set_adapter(self, name: str | None) -> None:
        """Make an adapter the active one; None: none of them. A merged one is taken out of the weights first."""
        if name is not None and name not in self.adapters:
            raise InputError(f"there is no adapter {name!r}; there are {', '.join(self.adapters) or 'none'}")
        if self._replaced:
            self.unmerge_lora()
        base = self._base_params()
        if (kept := self.adapter) is not None:  # keep what training made of it
            kept.params = {key: self.params[key] for key in kept.params}
        self.active_adapter = name
        self._use_adapter(base)

    def merge_lora(self) -> None:
        """Put the active adapter into the weights: the same outputs, at the base model's speed. See unmerge_lora.

        Another adapter, enabled or loaded after that, takes it out again; training all weights makes it final, and so
        does a torch or TensorFlow module of the task, which may train them.
        """
        adapter = self._require_adapter("merge")
        folding = lora.folding(self.xp, self.model, self.params)
        weights = {name: self.xp.stop_gradient(fold()) for name, fold in folding.items()}  # of torch Parameters
        base = self._base_params()
        adapter.params = {k: x for k, x in self.params.items() if lora.MARK in k}
        self._use(self.base_model, base | weights)
        self._replaced = {key: base[key] for key in weights}

    def unmerge_lora(self) -> None:
        """Undo merge_lora: the base weights are what they were, bit for bit."""
        if not self._replaced:
            raise InputError("no adapter is merged; merge_lora() comes first")
        base, self._replaced = self.params | self._replaced, {}
        self._use_adapter(base)

    def keep_merged(self) -> None:
        """Make a merge final: the adapter and what the optimizer remembers are forgotten, its weights are the model's
        own. `fit` begins with it."""
        if self._replaced:
            for run in self.adapters.pop(self.active_adapter or "").runs:
                self.provenance = self.provenance.with_run(run)
            self.active_adapter, self._replaced, self.identity, self.optimizer = None, {}, None, None

    def save_adapter(
        self, folder: str | os.PathLike[str], base: str = "", beside: Callable[[Path], None] | None = None,
        task_type: str | None = None,
    ) -> None:  # fmt: skip
        """Write the active adapter as a PEFT folder: adapter_config.json and adapter_model.safetensors.

        base: the name of the base model that the folder is to state. beside: writes more files into the folder.
        task_type: PEFT's; None: that of the task that such models are usually loaded for.
        """
        adapter = self._require_adapter("save", merged=True)
        config, arrays = adapter.config, adapter.params if self._replaced else self.params
        theirs = {module: self._adapter_names().to_theirs(module)[0] for module in lora.linears(self.base_model)}
        endings = {module: name.rpartition(".")[2] for module, name in theirs.items()}
        targets = sorted({endings[module] for module in adapter.modules})
        if [module for module in theirs if endings[module] in targets] != adapter.modules:
            targets = [theirs[module] for module in adapter.modules]
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
            tensors={_renamed(key, theirs.__getitem__): self.xp.get(arrays[key]) for key in adapter.params},
            task_type=task_type or kind_reading(self.base_model.reads).peft,
        )

        def companions(work: Path) -> None:
            if self.layers:
                write_provenance(work, Provenance(layers=tuple(self.layers.items())))
            if beside is not None:
                beside(work)

        write_adapter(Path(folder).expanduser(), files, companions)

    def load_adapter(
        self, folder: str | os.PathLike[str], name: str | None = None, *, revision: str | None = None,
        offline: bool = False, token: str | None = None,
    ) -> str:  # fmt: skip
        """Read a PEFT folder, or one at an address (hf://, kaggle://, file://), and make it the active adapter.

        Returns its name, by default that of the folder or repository. revision, offline, token: as in from_preset.
        Raises CheckpointError for files that are damaged, of an unknown kind, or made for another base model;
        PresetNotFound and DownloadError for addresses.
        """
        address = os.fspath(folder)
        folder = resolve_adapter(folder, revision=revision, offline=offline, token=token)
        if name is None:  # in a cache the folder is called after a commit
            name = re.split("[@?#]", Path(address).name)[0] if "://" in address else folder.resolve().name
        if name in self.adapters:
            raise InputError(f"there is an adapter {name!r} already; give this one another name=")
        files = self._with_our_names(read_adapter(Path(folder)))
        made = read_provenance(Path(folder))
        if made and made.layers and made.layers != tuple(self.layers.items()):
            raise CheckpointError(
                f"{folder}: this adapter is for a base model with layers of its maker's own, and this model has "
                f"{dict(self.layers) or 'none'}. Load the base model with layers={dict(made.layers)}, where they are "
                f"registered, and the adapter on it"
            )
        config = lora.LoRAConfig(
            files.rank, files.alpha, files.dropout, files.use_rslora, files.use_dora, files.rank_pattern,
            files.alpha_pattern,
        )  # fmt: skip
        modules = _in_order(self.base_model, {key.partition(lora.MARK)[0] for key in files.tensors}, folder)
        skeleton, specs = lora.attach(self.base_model, config, modules)
        _check_shapes(specs, files, folder)
        params = {key: self.xp.array(files.tensors[key], "float32") for key in specs}
        self.adapters[name] = Adapter(config, modules, params, skeleton, made.runs if made else ())
        self.set_adapter(name)
        return name

    def _adapter_names(self) -> NameMap:
        """Between our names of layers and those in PEFT's files, where they differ."""
        names = getattr(family_of(self.config.model_type), "adapter_names", None)
        return names(self.config) if names else NameMap()

    def _with_our_names(self, files: AdapterFiles) -> AdapterFiles:
        names = self._adapter_names()

        def ours(module: str) -> str:
            renamed = names.to_ours(module)
            return renamed[0] if renamed else module

        return dataclasses.replace(
            files,
            rank_pattern={ours(module): rank for module, rank in files.rank_pattern.items()},
            alpha_pattern={ours(module): alpha for module, alpha in files.alpha_pattern.items()},
            tensors={_renamed(key, ours): array for key, array in files.tensors.items()},
        )

    @property
    def adapter(self) -> Adapter | None:
        """The active one, merged or not."""
        return None if self.active_adapter is None else self.adapters[self.active_adapter]

    @property
    def has_adapter(self) -> bool:
        """Whether an adapter is active, and not merged."""
        return self.active_adapter is not None and not self._replaced

    def trainable_names(self) -> list[str]:
        """What `fit` trains: the active adapter, else everything."""
        return [name for name in self.params if lora.MARK in name] if self.has_adapter else list(self.params)

    def plain_param(self) -> Callable[[str], Array]:
        """Gives, one by one, the parameters of a model without adapters that does the same."""
        folding = lora.folding(self.xp, self.model, self.params)
        return lambda name: folding[name]() if name in folding else self.params[name]

    def plain_names(self) -> list[str]:
        """The parameters of the model without adapters, in its own order."""
        return list(flatten(self.base_model))

    def _base_params(self) -> Params:
        return {name: self.params[name] for name in self.plain_names()}

    def _require_adapter(self, what: str, merged: bool = False) -> Adapter:
        if (adapter := self.adapter) is None:
            raise InputError(f"there is no active adapter to {what}; enable_lora() or load_adapter() makes one")
        if self._replaced and not merged:
            raise InputError(f"the adapter {self.active_adapter!r} is merged already")
        return adapter

    def _use_adapter(self, base: Params) -> None:
        """Put the active adapter, if there is one, beside the base model's parameters."""
        if (adapter := self.adapter) is None:
            self._use(self.base_model, base)
        else:
            self._use(adapter.model, base | adapter.params)

    def _use(self, model: Any, params: Params) -> None:
        raise NotImplementedError


def _renamed(key: str, rename: Callable[[str], str]) -> str:
    """The name of an adapter's tensor with its layer renamed."""
    module, mark, rest = key.partition(lora.MARK)
    return f"{rename(module)}{mark}{rest}"


def _in_order(base: Any, modules: Iterable[str], folder: str | os.PathLike[str]) -> list[str]:
    layers = lora.linears(base)
    wanted = set(modules)
    if unknown := sorted(wanted - layers.keys()):
        raise CheckpointError(
            f"{folder}: this adapter is for another base model: it changes {len(unknown)} layers that this model does "
            f"not have, the first {unknown[0]}; this model has layers such as {next(iter(layers))}"
        )
    return [name for name in layers if name in wanted]


def _check_shapes(specs: Any, files: AdapterFiles, folder: str | os.PathLike[str]) -> None:
    wrong = [
        f"{name} is {files.tensors[name].shape}, this model needs {spec.shape}"
        for name, spec in specs.items()
        if name in files.tensors and files.tensors[name].shape != spec.shape
    ]
    missing = [f"{name} is missing" for name in specs if name not in files.tensors]
    if wrong or missing:
        raise CheckpointError(
            f"{folder}: this adapter is for another base model{f' ({files.base})' if files.base else ''}:\n  "
            + "\n  ".join((wrong + missing)[:10])
        )
