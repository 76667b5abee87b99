"""What is known of where weights come from."""

import dataclasses
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

from modelhub.errors import CheckpointError
from modelhub.hub.card import inherited
from modelhub.hub.files import licence_files
from modelhub.hub.preset import Preset
from modelhub.hub.provenance import PRESET, Provenance, read_provenance
from modelhub.hub.sources import HubSource

log = logging.getLogger("modelhub")


@dataclass(frozen=True)
class Origin:
    """Where weights come from.

    provenance: what they were made from, and what they were trained on. identity: what they are, for an adapter that
    goes on them: base is an address, a preset (modelhub:NAME) or a path, base_model a repository on the Hub; None: they
    are nowhere but in memory. licence_files: name -> text of what is to go with every copy. untouched: the folder or
    file that they were loaded from, for as long as nothing has replaced them. part_of: the model_type of a larger
    model, such as one that sees, if this one is a part of what is there.
    """

    provenance: Provenance
    identity: Provenance | None = None
    licence_files: Mapping[str, bytes] = field(default_factory=dict)
    untouched: Path | None = None
    part_of: str | None = None


RANDOM = Origin(Provenance(from_scratch=True))  # weights that nothing was loaded into


def origin_of(preset: Preset, told: Provenance | None = None) -> Origin:
    """Of a folder or file, what it says itself; else the registry's card, or the address.

    told: what a file says.

    What a stranger's README calls its base model is the parent, and never what the folder's own weights are.
    """
    try:
        told = read_provenance(preset.path) if preset.path.is_dir() else told
    except CheckpointError as error:  # the model may be sound all the same
        log.warning("%s", error)
        told = None
    if (card := preset.card) is not None:
        base = preset.source if re.match("(hf|kaggle|https)://", preset.source) else PRESET + card.name
        identity = Provenance(base, card.base_model)
        provenance = dataclasses.replace(identity, licence=card.licence)
    elif preset.source.startswith("file://"):
        identity, provenance = at_address(preset.source), told or Provenance()
    else:
        identity = at_address(preset.source)
        provenance = identity
        if told is not None:
            provenance = dataclasses.replace(identity, licence=told.licence, base_licence=inherited(told))
    return Origin(provenance, identity, licence_files(preset.path))


def at_address(address: str) -> Provenance:
    """The identity of weights at an address; of file:///folder the path."""
    if address.startswith("file://"):
        return Provenance(url2pathname(urlsplit(address).path))
    return Provenance(address, HubSource.parse(address).repo if address.startswith("hf://") else None)
