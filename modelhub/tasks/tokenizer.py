"""The public Tokenizer: the one of processing, with presets resolved for it."""

from typing import Self

from modelhub.hub.gguf import open_gguf
from modelhub.hub.preset import resolve
from modelhub.processing import tokenizer as processing


class Tokenizer(processing.Tokenizer):
    """Text to ids and back; see modelhub.processing.tokenizer.Tokenizer for its methods."""

    @classmethod
    def from_preset(
        cls,
        preset: str,
        *,
        revision: str | None = None,
        offline: bool = False,
        token: str | None = None,
        cache_dir: str | None = None,
    ) -> Self:
        """The tokenizer of a registry name, a folder, a .gguf file or an hf:// address."""
        path = resolve(preset, revision=revision, offline=offline, token=token, cache_dir=cache_dir, weights=False).path
        if path.is_dir():
            return cls.from_folder(path)
        with open_gguf(path) as file:
            return cls.from_gguf(file.metadata)
