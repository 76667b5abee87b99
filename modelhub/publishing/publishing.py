"""Saving and publishing a task: folders that other tools load, their card, the check before upload.

The functions that take a task are its methods, too.
"""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core import custom
from modelhub.core.backends.base import Array
from modelhub.core.leaves import Packed, count
from modelhub.errors import BackendNotInstalled, CheckpointError
from modelhub.hub import publish as hub
from modelhub.hub.cache import staging
from modelhub.hub.card import CardFacts, check_card, inherited, missing_licence, notice, render_card
from modelhub.hub.files import licence_files
from modelhub.hub.model_folder import MAX_SHARD_SIZE, model_folder, write_card
from modelhub.hub.provenance import Provenance, write_provenance
from modelhub.hub.sources import HubSource
from modelhub.kinds import IMAGES
from modelhub.model.loading import DTYPES, check_dtype, stored_dtype
from modelhub.model.origin import at_address
from modelhub.model.saving import compressed_of, write_backbone
from modelhub.model.weights import Snapshot
from modelhub.training.history import History

# How far outputs may be from those in memory, relative to the largest: a merged adapter sums in another order and
# rounds to the weights' dtype.
_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}
_PACKED = 2e-2


def provenance(task: Any) -> Provenance:
    """Where the model comes from and what it was trained on, an active adapter included."""
    adapter, found = task.backbone.adapter, task.backbone.provenance
    return dataclasses.replace(found, runs=found.runs + adapter.runs) if adapter else found


def save_to_preset(
    task: Any, folder: str | os.PathLike[str], dtype: str | None = None, *, max_shard_size: int = MAX_SHARD_SIZE,
    dequantize: bool = False,
) -> None:  # fmt: skip
    """Write a Hugging Face model folder: config, weights (an active adapter merged in), tokenizer, model card.

    transformers and `from_preset` load it. The folder is replaced as a whole, or not at all; the task stays as it
    is. With layers or attention of the user's own only `from_preset` loads it, where they are registered. dtype: of
    the weights in the files, "float32", "bfloat16" or "float16"; None: the model's. max_shard_size:
    bytes of a file of weights; more are split, with an index.

    Quantised weights are written as they are, in compressed-tensors' pack-quantized form, which transformers and vLLM
    load where compressed-tensors is installed; `from_preset(folder, quantize="keep")` gives them back bit for bit. A
    table of embeddings is written in floats, and if it is the head quantised beside them. dtype is then that of all
    floats. dequantize: write floats alone.

    Raises ConfigError for quantised weights that the format cannot hold, naming them, and with an adapter on them.
    """
    write_model(task, Path(folder).expanduser().resolve(), dtype, max_shard_size, dequantize=dequantize)


def save_adapter(task: Any, folder: str | os.PathLike[str]) -> None:
    """Write the active adapter as a folder that PEFT, transformers and vLLM load, with a model card."""
    _save_adapter(task, Path(folder).expanduser().resolve())


def publish(
    task: Any, address: str, private: bool = True, adapter_only: bool = False, revision: str | None = None,
    message: str | None = None, licence: str | None = None, dry_run: bool = False,
    *, base_model: str | None = None, from_scratch: bool = False, datasets: Sequence[str] = (),
    dtype: str | None = None, token: str | None = None, dequantize: bool = False,
) -> hub.Published | hub.Plan:  # fmt: skip
    """Send the model, or its adapter alone, to a hub: save it, load it again and compare, then upload.

    address: hf://owner/name, kaggle://owner/model/framework/variation, or file:///folder/name, a shared folder that
        needs no server. private: where the hub can hide a model. revision: a branch (Hugging Face), or the part
        after @ (folders). message: of the commit, or the version's notes.
    licence: identifier as the Hugging Face Hub spells it ("apache-2.0", "gemma"); None: the base model's.
    base_model: repository on the Hub, where it is not known already; with adapter_only the one that holds the
        weights which the adapter goes on. from_scratch: there is no base model.
    datasets: names on the Hub of what it was trained on, for the card.
    dtype: of the weights in the files; None: the model's, or the files' own where it is published as it was loaded.
    dry_run: send nothing and return what would be sent.
    dequantize: send floats in place of quantised weights; as in `save_to_preset`.

    Raises InputError for a card without a licence or an origin, and for an adapter on weights that are published
    nowhere; CheckpointError if what was written does not compute what the model in memory computes; DownloadError
    when the hub refuses or cannot be reached. What is said of the model here is remembered once it is published.
    """
    target = hub.check_address(address, revision)
    facts: dict[str, Any] = {"title": target.title, "address": target.address, "datasets": tuple(datasets)}
    digests: dict[str, str] = {}
    weights, before = task.backbone.weights, task.backbone.weights.origin
    done: hub.Published | None = None
    try:
        _describe(task, licence, base_model, from_scratch, adapter_only)
        card = _facts(task, adapter_only, **facts)
        check_card(card)
        licence = card.provenance.licence
        with staging() as work:
            folder = work / target.title
            if adapter_only:
                _save_adapter(task, folder, **facts)
                _compare_adapter(task, folder)
            else:
                write_model(
                    task, folder, dtype or _stored_dtype(task), MAX_SHARD_SIZE, digests, dequantize=dequantize, **facts
                )
                _compare(task, folder)
            remarks = tuple(filter(None, [missing_licence(card)]))
            if dry_run:
                plan = hub.plan(folder, address, private=private, revision=revision, licence=licence, token=token)
                return dataclasses.replace(plan, remarks=plan.remarks + remarks)
            done = hub.publish_folder(
                folder, address, private=private, revision=revision, message=message, licence=licence, token=token,
                digests=digests,
            )  # fmt: skip
        if not adapter_only and task.backbone.adapter is None:
            weights.describe(identity=at_address(done.address), part_of=None)
        return dataclasses.replace(done, remarks=done.remarks + remarks)
    finally:
        if done is None:
            weights.describe(provenance=before.provenance, identity=before.identity)


def _describe(task: Any, licence: str | None, base_model: str | None, from_scratch: bool, adapter: bool) -> None:
    """Take up what the publisher says of the model, or of the weights that the adapter goes on."""
    weights, found = task.backbone.weights, task.backbone.provenance
    if licence:
        kept = inherited(found) or found.base_licence
        weights.describe(provenance=dataclasses.replace(found, licence=licence, base_licence=kept))
    if adapter and base_model:
        weights.describe(identity=Provenance(base_model=base_model))
    elif base_model or from_scratch:
        named = {"base_model": base_model or found.base_model, "from_scratch": from_scratch}
        weights.describe(provenance=dataclasses.replace(weights.origin.provenance, **named))


def _stored_dtype(task: Any) -> str | None:
    """Of the files that the model was loaded from, if it is still what was loaded."""
    stored = stored_dtype(task.config)
    return stored if task.backbone.untouched and stored in DTYPES else None


def write_model(
    task: Any, target: Path, dtype: str | None, max_shard_size: int, digests: dict[str, str] | None = None,
    check: Callable[[Path], None] | None = None, dequantize: bool = False, **facts: Any,
) -> None:  # fmt: skip
    """As `save_to_preset`. digests: gets the sha256 of each file of weights. check: is given the finished folder before
    it takes the place of `target`; what it raises leaves things as they were. facts: further ones for the card."""
    dtype = check_dtype(dtype)
    compressed = None if dequantize else compressed_of(task.backbone)
    if compressed is not None:
        facts |= {"quantized": tuple(compressed.schemes.items())}
    with model_folder(target) as work:
        task.write_processors(work)
        write_backbone(work, task.backbone, dtype, max_shard_size, digests, compressed)
        _write_companions(task, work, target, adapter=False, **facts)
        if check is not None:
            check(work)


def _save_adapter(task: Any, target: Path, **facts: Any) -> None:
    weights = task.backbone.identity or Provenance()
    # PEFT reads it as a repository or a path, and knows no other addresses.
    base = weights.base_model or (weights.base if weights.base and os.path.isabs(weights.base) else "")
    at = weights.base or ""
    revision = HubSource.parse(at).revision if at.startswith("hf://") else None
    task.backbone.save_adapter(
        target, base, lambda work: _write_companions(task, work, target, True, **facts), revision=revision,
        kind=task.kind,
    )  # fmt: skip


def _write_companions(task: Any, work: Path, target: Path, adapter: bool, **facts: Any) -> None:
    """What tells people about the model. target: the folder that `work` is going to be."""
    provenance = _provenance_of(task, adapter)
    write_provenance(work, provenance)
    theirs = {name: text for name, text in licence_files(target).items() if not name.startswith("NOTICE")}
    texts = theirs | task.backbone.licence_files
    facts = {"title": target.name, "licence_files": tuple(sorted(texts))} | facts
    # A folder that modelhub saved may have got a card by hand since, and is published with it.
    saved = task.backbone.untouched
    old = saved if saved and not adapter and (saved / "modelhub.json").is_file() else target
    curve = _draw(provenance, work, task.kind.unit)
    write_card(work, render_card(_facts(task, adapter, curve=curve, **facts)), old)
    if text := notice(provenance):
        ours, kept = text.encode(), texts.get("NOTICE", b"")
        if ours.splitlines()[0] not in kept:
            texts["NOTICE"] = b"\n\n".join(filter(None, [kept.rstrip(), ours]))
    for name, content in texts.items():
        (work / name).write_bytes(content)


def _provenance_of(task: Any, adapter: bool) -> Provenance:
    """For the card of the model; of its adapter alone: the weights that it goes on, and what trained it."""
    found, active, backbone = provenance(task), task.backbone.adapter, task.backbone
    if not adapter or active is None:
        return found
    weights = backbone.identity or Provenance()
    return dataclasses.replace(
        found, base=weights.base, base_model=weights.base_model, from_scratch=False, runs=active.runs,
        base_licence=inherited(found) or found.base_licence, layers=tuple(backbone.layers.items()),
        attention=custom.attention_name(backbone.xp), labels=tuple(task.adapter_labels),
    )  # fmt: skip


def _facts(task: Any, adapter: bool, **facts: Any) -> CardFacts:
    backbone = task.backbone
    if adapter and backbone.adapter is not None:
        counted = list(backbone.adapter.params.values())
    else:
        counted = [backbone.params[name] for name in backbone.plain_names()]
    facts = {"licence_files": tuple(backbone.licence_files)} | facts
    return CardFacts(
        task=task.kind.name, model_type=backbone.config.model_type, dtype=backbone.dtype,
        provenance=_provenance_of(task, adapter), parameters=sum(map(count, counted)), adapter=adapter,
        has_chat_template=task.chats, layers=tuple(backbone.layers.items()),
        attention=custom.attention_name(backbone.xp), own_family=backbone.config.model_type in custom.names("family"),
        classes=len(task.adapter_labels) if adapter else 0, problem_type=getattr(task.config, "problem_type", None),
        **facts,
    )  # fmt: skip


def probe(task: Any) -> np.ndarray:
    """The task's outputs for an input that is always the same."""
    xp, config = task.backbone.xp, task.config
    if task.backbone.model.reads == IMAGES:
        shape = (2, config.num_channels, *config.size)
        values = np.sin(np.arange(np.prod(shape), dtype=np.float64) * 0.37).astype(np.float32).reshape(shape)
        x = xp.array(values, "float32")
    else:
        length = min(16, config.max_position_embeddings)
        x = xp.array(np.array([[(7919 * i + 1) % config.vocab_size for i in range(length)]]), "int32")

    def program(now: Snapshot) -> Any:
        def outputs(model: Any, x: Array) -> Array:
            return now.xp.cast(task.kind.forward(now.xp, model, x), "float32")

        return now.xp.compile(outputs, now.skeleton, hot=False)

    return np.array(xp.get(task.backbone.weights.snapshot().run("probe", program, x)))


def _compare(task: Any, folder: Path) -> None:
    backbone = task.backbone
    placed = {"backend": backbone.xp.name, "device": backbone.xp.device, "dtype": backbone.dtype, "quantize": "keep"}
    _check_equal(task, probe(type(task).from_preset(folder, **placed)), probe(task), folder)


def _compare_adapter(task: Any, folder: Path) -> None:
    """The adapter's folder on the weights that are in memory already."""
    backbone, name, merged = task.backbone, task.backbone.active_adapter, task.backbone.merged
    expected = probe(task)
    again = backbone.load_adapter(folder, "as published")
    try:
        _check_equal(task, probe(task), expected, folder)
    finally:
        backbone.set_adapter(name)
        del backbone.adapters[again]
        if merged:
            backbone.merge_lora()


def _check_equal(task: Any, found: np.ndarray, expected: np.ndarray, folder: Path) -> None:
    dtype = task.dtype
    difference = float(np.abs(found - expected).max())
    # Quantised weights round what they are multiplied with to 8 bits, where it is a few rows.
    share = max(_TOLERANCE[dtype], _PACKED if any(isinstance(x, Packed) for x in task.params.values()) else 0)
    allowed = share * float(np.abs(expected).max())
    if not difference <= allowed:  # NaN must not pass
        raise CheckpointError(
            f"{folder} was written and loaded again, and its {task.kind.output} differ from those of the model in "
            f"memory by {difference:.3g} (at most {allowed:.3g} is rounding). Nothing was sent. Are all weights finite "
            f"numbers?"
        )


def _draw(provenance: Provenance, folder: Path, unit: str) -> str | None:
    """curve.png of the last run; its name, or None without a run or without matplotlib."""
    if not provenance.runs or not (losses := provenance.runs[-1].losses):
        return None
    history = History(unit)
    steps = [{"step": step, "epoch": 0, "loss": loss} for step, loss in losses]
    history.load_state_dict({"history": {}, "epoch": [], "steps": steps})
    try:
        return history.plot(folder / "curve.png").name
    except BackendNotInstalled:
        return None
