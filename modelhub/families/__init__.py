"""The registry of architecture families: one file each, found by the model_type of a config.

Other packages bring theirs with entry points of the group "modelhub.families": the name is a model_type, the value a
module with Config, Model and names as in llama.py. A program registers its own with modelhub.register. Both add to the
table here and never replace what is in it.
"""

import importlib
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from modelhub.core import custom
from modelhub.errors import ConfigError

# model_type in config.json -> module in this package.
FAMILIES = {
    "gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma", "gemma3": "gemma",
    "llama": "llama", "mistral": "llama",
    "vit": "vit", "deit": "vit", "modelhub_vit": "vit", "modelhub_dinov2": "dinov2",
    "dinov2": "dinov2", "dinov2_with_registers": "dinov2", "modelhub_dinov2_with_registers": "dinov2",
}  # fmt: skip
_GROUP = "modelhub.families"


def family_of(model_type: str | None) -> Any:
    """The family, a module or what was registered, for a model_type (Hugging Face's) or an architecture name (GGUF's).

    Raises ConfigError: nobody knows it, or the package that does is broken.
    """
    registered = custom.names("family")
    if isinstance(model_type, str) and model_type in FAMILIES:
        if model_type in registered:
            raise ConfigError(f"the family {model_type!r} was registered, and is one of modelhub's: take another name")
        return importlib.import_module(f"modelhub.families.{FAMILIES[model_type]}")
    if model_type in registered:
        return custom.find("family", model_type)
    points = entry_points(group=_GROUP)
    found = [point for point in points if point.name == model_type]
    if len(found) > 1:
        packages = " and ".join(_package(point) for point in found)
        raise ConfigError(f"model_type {model_type!r} is claimed by {packages}; uninstall all but one")
    if not found:
        known = [*FAMILIES, *registered, *sorted(points.names)]
        near = " and ".join(name for name in known if str(model_type).startswith(name))
        other = f" ({near} is, which has another architecture)" if near else ""
        raise ConfigError(f"model_type {model_type!r} is not supported{other}; supported: {', '.join(known)}")
    return _load(found[0])


def family_names() -> set[str]:
    """What a preset's card may give as its family."""
    return {*FAMILIES.values(), *custom.names("family"), *entry_points(group=_GROUP).names}


def _load(point: EntryPoint) -> Any:
    brings = f"{_package(point)} brings {point.value} for model_type {point.name!r}, which"
    try:
        family = point.load()
    except Exception as error:  # the other package's code may raise anything
        raise ConfigError(
            f"{brings} cannot be imported ({type(error).__name__}: {error}); update or uninstall it"
        ) from error
    if missing := [name for name in custom.FAMILY if not hasattr(family, name)]:
        raise ConfigError(f"{brings} lacks {', '.join(missing)}; a family has what modelhub/families/llama.py has")
    return family


def _package(point: EntryPoint) -> str:
    return f"the package {point.dist.name}" if point.dist else "a package"
