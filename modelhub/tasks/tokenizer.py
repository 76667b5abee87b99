"""The public Tokenizer: the one of processing, with presets resolved for it."""

import os
from typing import Self, Unpack

from modelhub.hub.gguf import open_gguf
from modelhub.model.options import SourceOptions, resolve_preset, takes
from modelhub.processing import tokenizer as processing


class Tokenizer(processing.Tokenizer):
    """Text to ids and back; see modelhub.processing.tokenizer.Tokenizer for its methods."""

    @classmethod
    @takes(SourceOptions)
    def from_preset(cls, preset: str | os.PathLike[str], **options: Unpack[SourceOptions]) -> Self:
        """The tokenizer of a registry name, a folder, a .gguf file or an hf:// address."""
        path = resolve_preset(preset, {**options, "load_weights": False}).path
        if path.is_dir():
            return cls.from_folder(path)
        with open_gguf(path) as file:
            return cls.from_gguf(file.metadata)
