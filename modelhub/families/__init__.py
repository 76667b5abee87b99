"""The registry of architecture families: one file each, found by the model_type of a config."""

import importlib
from types import ModuleType

from modelhub.errors import ConfigError

# model_type in config.json -> module in this package.
FAMILIES = {
    "gemma": "gemma", "gemma2": "gemma", "gemma3_text": "gemma", "gemma3": "gemma",
    "llama": "llama", "mistral": "llama",
}  # fmt: skip


def family_of(model_type: str | None) -> ModuleType:
    """The family module for a model_type (Hugging Face's) or an architecture name (GGUF's)."""
    if model_type not in FAMILIES:
        raise ConfigError(f"model_type {model_type!r} is not supported; supported: {', '.join(FAMILIES)}")
    return importlib.import_module(f"modelhub.families.{FAMILIES[model_type]}")
