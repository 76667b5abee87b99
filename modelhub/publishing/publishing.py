"""What a task needs to be saved and published: folders that other tools load, their card, the check before upload."""

import dataclasses
import datetime
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from modelhub.core import custom
from modelhub.errors import BackendNotInstalled, CheckpointError
from modelhub.habits import Habits
from modelhub.hub import publish
from modelhub.hub.card import CardFacts, check_card, inherited, missing_licence, notice, render_card
from modelhub.hub.files import licence_files
from modelhub.hub.provenance import Provenance, TrainingRun, write_provenance
from modelhub.hub.sources import HubSource, cache_root
from modelhub.model.backbone import Backbone, at_address
from modelhub.model.loading import DTYPES, check_dtype, stored_dtype
from modelhub.model.saving import MAX_SHARD_SIZE, model_folder, own_attention, write_backbone, write_card
from modelhub.training.history import History

# How far logits may be from those in memory, relative to the largest: a merged adapter sums in another order and rounds
# to the weights' dtype.
_TOLERANCE = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 5e-2}


class Publishing(Habits):
    """Mixed into tasks. They say what they are (`task`), how to look at their outputs, and what goes with weights."""

    task: str  # as in the registry's cards
    backbone: Backbone
    preset: str

    def _write_processors(self, folder: Path) -> None:
        """Tokenizer or image processor, and further config files."""
        raise NotImplementedError

    def _probe(self) -> np.ndarray:
        """Logits of an input that is always the same."""
        raise NotImplementedError

    @property
    def provenance(self) -> Provenance:
        """Where the model comes from and what it was trained on, an active adapter included."""
        adapter = self.backbone.adapter
        found = self.backbone.provenance
        return dataclasses.replace(found, runs=found.runs + adapter.runs) if adapter else found

    def save_to_preset(
        self, folder: str | os.PathLike[str], dtype: str | None = None, *, max_shard_size: int = MAX_SHARD_SIZE
    ) -> None:
        """Write a Hugging Face model folder: config, weights (an active adapter merged in), tokenizer, model card.

        transformers and `from_preset` load it. The folder is replaced as a whole, or not at all; the task stays as it
        is. With layers or attention of the user's own only `from_preset` loads it, where they are registered. dtype: of
        the weights in the files, "float32", "bfloat16" or "float16"; None: the model's. max_shard_size:
        bytes of a file of weights; more are split, with an index.
        """
        self._save(Path(folder).expanduser().resolve(), dtype, max_shard_size)

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write the active adapter as a folder that PEFT, transformers and vLLM load, with a model card."""
        self._save_adapter(Path(folder).expanduser().resolve())

    def publish(
        self, address: str, private: bool = True, adapter_only: bool = False, revision: str | None = None,
        message: str | None = None, licence: str | None = None, dry_run: bool = False,
        *, base_model: str | None = None, from_scratch: bool = False, datasets: Sequence[str] = (),
        dtype: str | None = None, token: str | None = None,
    ) -> publish.Published | publish.Plan:  # fmt: skip
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

        Raises InputError for a card without a licence or an origin, and for an adapter on weights that are published
        nowhere; CheckpointError if what was written does not compute what the model in memory computes; DownloadError
        when the hub refuses or cannot be reached. What is said of the model here is remembered once it is published.
        """
        target = publish.check_address(address, revision)
        facts: dict[str, Any] = {"title": target.title, "address": target.address, "datasets": tuple(datasets)}
        digests: dict[str, str] = {}
        backbone, before = self.backbone, (self.backbone.provenance, self.backbone.identity)
        done: publish.Published | None = None
        staging: Path | None = None
        try:
            self._tell(licence, base_model, from_scratch, adapter_only)
            card = self._facts(adapter_only, **facts)
            check_card(card)
            licence = card.provenance.licence
            (cache_root() / "publishing").mkdir(parents=True, exist_ok=True)
            staging = Path(tempfile.mkdtemp(dir=cache_root() / "publishing"))
            folder = staging / target.title
            if adapter_only:
                self._save_adapter(folder, **facts)
                self._compare_adapter(folder)
            else:
                self._save(folder, dtype or self._stored_dtype(), MAX_SHARD_SIZE, digests, **facts)
                self._compare(folder)
            remarks = tuple(filter(None, [missing_licence(card)]))
            if dry_run:
                plan = publish.plan(folder, address, private=private, revision=revision, licence=licence, token=token)
                return dataclasses.replace(plan, remarks=plan.remarks + remarks)
            done = publish.publish_folder(
                folder, address, private=private, revision=revision, message=message, licence=licence, token=token,
                digests=digests,
            )  # fmt: skip
            if not adapter_only and backbone.adapter is None:
                backbone.identity, backbone.part_of = at_address(done.address), None
            return dataclasses.replace(done, remarks=done.remarks + remarks)
        finally:
            if done is None:
                backbone.provenance, backbone.identity = before
            if staging is not None:
                shutil.rmtree(staging, ignore_errors=True)

    def _tell(self, licence: str | None, base_model: str | None, from_scratch: bool, adapter: bool) -> None:
        """Take up what the publisher says of the model, or of the weights that the adapter goes on."""
        backbone, found = self.backbone, self.backbone.provenance
        if licence:
            kept = inherited(found) or found.base_licence
            backbone.provenance = dataclasses.replace(found, licence=licence, base_licence=kept)
        if adapter and base_model:
            backbone.identity = Provenance(base_model=base_model)
        elif base_model or from_scratch:
            backbone.provenance = dataclasses.replace(
                backbone.provenance, base_model=base_model or found.base_model, from_scratch=from_scratch
            )

    def _stored_dtype(self) -> str | None:
        """Of the files that the model was loaded from, if it is still what was loaded."""
        stored = stored_dtype(self.backbone.config)
        return stored if self.backbone.untouched and stored in DTYPES else None

    def _save(
        self, target: Path, dtype: str | None, max_shard_size: int, digests: dict[str, str] | None = None, **facts: Any
    ) -> None:
        check_dtype(dtype)
        with model_folder(target) as work:
            self._write_processors(work)
            write_backbone(work, self.backbone, dtype, max_shard_size, digests)
            self._write_companions(work, target, adapter=False, **facts)

    def _save_adapter(self, target: Path, **facts: Any) -> None:
        weights = self.backbone.identity or Provenance()
        # PEFT reads it as a repository or a path, and knows no other addresses.
        base = weights.base_model or (weights.base if weights.base and os.path.isabs(weights.base) else "")
        at = weights.base or ""
        revision = HubSource.parse(at).revision if at.startswith("hf://") else None
        self.backbone.save_adapter(
            target, base, lambda work: self._write_companions(work, target, True, **facts), revision=revision
        )

    def _write_companions(self, work: Path, target: Path, adapter: bool, **facts: Any) -> None:
        """What tells people about the model. target: the folder that `work` is going to be."""
        provenance = self._told(adapter)
        write_provenance(work, provenance)
        theirs = {name: text for name, text in licence_files(target).items() if not name.startswith("NOTICE")}
        texts = theirs | self.backbone.licence_files
        facts = {"title": target.name, "licence_files": tuple(sorted(texts))} | facts
        # A folder that modelhub saved may have got a card by hand since, and is published with it.
        saved = self.backbone.untouched
        old = saved if saved and not adapter and (saved / "modelhub.json").is_file() else target
        write_card(work, render_card(self._facts(adapter, curve=_draw(provenance, work, self.task), **facts)), old)
        if text := notice(provenance):
            ours, kept = text.encode(), texts.get("NOTICE", b"")
            if ours.splitlines()[0] not in kept:
                texts["NOTICE"] = b"\n\n".join(filter(None, [kept.rstrip(), ours]))
        for name, content in texts.items():
            (work / name).write_bytes(content)

    def _told(self, adapter: bool) -> Provenance:
        """For the card of the model; of its adapter alone: the weights that it goes on, and what trained it."""
        found, active = self.provenance, self.backbone.adapter
        if not adapter or active is None:
            return found
        weights = self.backbone.identity or Provenance()
        return dataclasses.replace(
            found, base=weights.base, base_model=weights.base_model, from_scratch=False, runs=active.runs,
            base_licence=inherited(found) or found.base_licence, layers=tuple(self.backbone.layers.items()),
            attention=own_attention(self.backbone), labels=tuple(self._own_classes()),
        )  # fmt: skip

    def _own_classes(self) -> list[str]:
        """What the classes of the active adapter's own head are called."""
        return []

    def _facts(self, adapter: bool, **facts: Any) -> CardFacts:
        backbone = self.backbone
        if adapter and backbone.adapter is not None:
            counted = list(backbone.adapter.params.values())
        else:
            counted = [backbone.params[name] for name in backbone.plain_names()]
        facts = {"licence_files": tuple(backbone.licence_files)} | facts
        return CardFacts(
            task=self.task, model_type=backbone.config.model_type, dtype=backbone.dtype, provenance=self._told(adapter),
            parameters=sum(int(np.prod(x.shape)) for x in counted), adapter=adapter,
            has_chat_template=self._chats(), layers=tuple(backbone.layers.items()), attention=own_attention(backbone),
            own_family=backbone.config.model_type in custom.names("family"),
            classes=len(self._own_classes()) if adapter else 0, **facts,
        )  # fmt: skip

    def _chats(self) -> bool:
        return False

    def _record(self, history: History, settings: Mapping[str, Any], data: str, report: Any) -> None:
        """Remember a finished run of `fit` for the model's card."""
        adapter = self.backbone.adapter
        told = {key: value for key, value in settings.items() if key not in ("data", "adapter", "preset")}
        run = TrainingRun(
            data=data,
            settings=told | {"steps": len(history.steps), "epochs": len(history.epoch)},
            metrics={name: values[-1] for name, values in history.history.items() if values},
            losses=[(int(step["step"]), step["loss"]) for step in history.steps],
            adapter=None if adapter is None else adapter.described(),
            examples=getattr(report, "examples", None),
            tokens=getattr(report, "tokens", None),
            seconds=sum(step.get("seconds", 0.0) for step in history.steps),
            backend=self.backbone.xp.name,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
        if adapter is not None:
            adapter.runs += (run,)
        else:
            self.backbone.provenance = self.backbone.provenance.with_run(run)

    def _compare(self, folder: Path) -> None:
        backbone = self.backbone
        again = type(self).from_preset(  # type: ignore[attr-defined]
            folder, backend=backbone.xp.name, device=backbone.xp.device, dtype=backbone.dtype
        )
        _check_equal(again._probe(), self._probe(), folder, backbone.dtype)

    def _compare_adapter(self, folder: Path) -> None:
        """The adapter's folder on the weights that are in memory already."""
        backbone, name, merged = self.backbone, self.backbone.active_adapter, not self.backbone.has_adapter
        expected = self._probe()
        again = backbone.load_adapter(folder, "as published")
        try:
            _check_equal(self._probe(), expected, folder, backbone.dtype)
        finally:
            backbone.set_adapter(name)
            del backbone.adapters[again]
            if merged:
                backbone.merge_lora()


def _check_equal(found: np.ndarray, expected: np.ndarray, folder: Path, dtype: str) -> None:
    difference = float(np.abs(found - expected).max())
    allowed = _TOLERANCE[dtype] * float(np.abs(expected).max())
    if not difference <= allowed:  # NaN must not pass
        raise CheckpointError(
            f"{folder} was written and loaded again, and its logits differ from those of the model in memory by "
            f"{difference:.3g} (at most {allowed:.3g} is rounding). Nothing was sent. Are all weights finite numbers?"
        )


def _draw(provenance: Provenance, folder: Path, task: str) -> str | None:
    """curve.png of the last run; its name, or None without a run or without matplotlib."""
    if not provenance.runs or not (losses := provenance.runs[-1].losses):
        return None
    history = History()
    counted = {} if task == "causal-lm" else {"images": 0}  # what the loss is per
    history.load_state_dict({"history": {}, "epoch": [], "steps": [
        {"step": step, "epoch": 0, "loss": loss} | counted for step, loss in losses
    ]})  # fmt: skip
    try:
        return history.plot(folder / "curve.png").name
    except BackendNotInstalled:
        return None
