"""What all sources share: what may be asked of them, the cache's place, the files of a preset."""

import hashlib
import os
import re
import socket
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from modelhub.errors import CheckpointError, DownloadError, PresetNotFound
from modelhub.hub import licences
from modelhub.progress import bar

# An adapter is small, and PEFT's folders may hold one beside a model: it comes along.
_TEXT_FILES = {
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "adapter_config.json",
    "adapter_model.safetensors",
    "modelhub.json",  # where it comes from; and so does the front matter of the card
    "README.md",
}
_KERAS_FILES = {"metadata.json", "task.json", "preprocessor.json", "image_converter.json"}
# Some write more digits than transformers, or fewer; names with something in between are variants (model.fp32-...).
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_KERAS_SHARD = re.compile(r"model_\d+\.weights\.h5")
_PICKLE = re.compile(r"[^/]*\.(bin|pt|pth|ckpt|pkl)")


class Unreachable(DownloadError):
    """The network, or the server that was asked, does not answer."""


class Unresolved(Unreachable):
    """There is no network: the name of a host has no address."""

    def __init__(self, host: str):
        super().__init__(f"no network: the address of {host} could not be found")
        self.host = host


def check_resolves(url: str) -> None:
    """Raise Unresolved where the host of an address is not known, before a client tries for half a minute.

    Behind a proxy it is the proxy that looks names up.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxies = getproxies()
    if not host or ((proxies.get(parts.scheme) or proxies.get("all")) and not proxy_bypass(host)):
        return
    try:
        socket.getaddrinfo(host, parts.port or 443)
    except (OSError, UnicodeError) as error:  # the latter: no name that a host can have
        raise Unresolved(host) from error


@dataclass(frozen=True)
class Options:
    """What a caller may ask of any source."""

    revision: str | None = None
    token: str | None = field(default=None, repr=False)  # not into tracebacks and logs
    cache_dir: str | os.PathLike[str] | None = None
    weights: bool = True  # False: config and tokenizer are enough


def cache_root(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The cache folder: cache_dir, else $MODELHUB_CACHE, else ~/.cache/modelhub."""
    chosen = cache_dir or os.environ.get("MODELHUB_CACHE") or "~/.cache/modelhub"
    return Path(os.path.abspath(os.path.expanduser(chosen)))


def client_cache(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """The cache of huggingface_hub that is in use, found without importing it.

    Without a choice of the user's it is the Hub's own: what transformers has fetched is not fetched again.
    """
    if cache_dir or os.environ.get("MODELHUB_CACHE"):
        return cache_root(cache_dir) / "hf"
    if constants := sys.modules.get("huggingface_hub.constants"):
        return Path(constants.HF_HUB_CACHE)
    environment = os.environ
    home = environment.get("HF_HOME") or os.path.join(environment.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    chosen = environment.get("HF_HUB_CACHE") or environment.get("HUGGINGFACE_HUB_CACHE") or os.path.join(home, "hub")
    return Path(os.path.expanduser(os.path.expandvars(chosen)))


class Source(Protocol):
    """A place that a preset is fetched from."""

    @property
    def verified(self) -> bool: ...  # whether somebody has seen that this address holds the preset

    @property
    def revision(self) -> str | None: ...  # the one in the address; Options.revision goes before it

    def takes(self, revision: str) -> bool:
        """Whether Options.revision can be meant for this source."""
        raise NotImplementedError

    def find(self, options: Options) -> Path | None:
        """The files in the cache, complete, or None. No network."""

    def fetch(self, options: Options) -> Path:
        """Bring what is missing into the cache; the folder, or the .gguf file. Raises DownloadError, PresetNotFound."""
        raise NotImplementedError

    def address(self, path: Path) -> str:
        """Where exactly the files at `path` came from."""
        raise NotImplementedError


def needed(paths: Iterable[str], weights: bool, where: str = "the preset") -> list[str]:
    """Those of a repository's files, relative and with forward slashes, that loading it takes; sorted.

    weights: False leaves the weights out. where: the repository's address, for errors. The weights are one set, in
    this order of preference: model.safetensors, its shards and their index, KerasHub's model.weights.h5, its shards
    and their index; some repositories hold them several times. Of an adapter's folder: the adapter.

    Raises PresetNotFound where there is neither model nor adapter, and CheckpointError where all weights are pickles.
    """
    paths = sorted(paths)
    top = [path for path in paths if "/" not in path]
    index, keras_index = "model.safetensors.index.json", "model.weights.json"
    parts: list[str] = []
    if "model.safetensors" in top:
        parts = ["model.safetensors"]
    elif index in top and (shards := [path for path in top if _SHARD.fullmatch(path)]):
        parts = [index, *shards]
    elif "model.weights.h5" in top:
        parts = ["model.weights.h5"]
    elif keras_index in top and (shards := [path for path in top if _KERAS_SHARD.fullmatch(path)]):
        parts = [keras_index, *shards]
    text = [path for path in top if path in _TEXT_FILES or licences.FILES.fullmatch(path)]
    if any(part.endswith(".h5") for part in parts):
        text += [path for path in paths if path in _KERAS_FILES or path.startswith("assets/tokenizer/")]
        parts += [path for path in top if path == "task.weights.h5"]  # a classifier's head
    adapter = {"adapter_config.json", "adapter_model.safetensors"} <= set(text)
    pickles = [path for path in top if _PICKLE.fullmatch(path)]
    if "config.json" not in text and "adapter_config.json" not in text:
        files = [path for path in paths if path.lower().endswith(".gguf")]
        hint = f". It holds GGUF files: give the path of one, such as {files[0]}" if files else ""
        raise PresetNotFound(f"{where} has no config.json: it is no model folder{hint}")
    if pickles and not adapter and not parts and (weights or "config.json" not in text):
        raise CheckpointError(
            f"{where} holds its weights only as pickles ({', '.join(pickles[:5])}), and opening a pickle can run any "
            "code that its author put in it; nothing was fetched. Take a repository with safetensors, or, if you trust "
            "the author, convert once with transformers: "
            "AutoModelForCausalLM.from_pretrained(name).save_pretrained(new_folder)"
        )
    if weights and not parts and not adapter:
        raise PresetNotFound(
            f"{where} has a config.json and no weights that modelhub reads: expected model.safetensors, "
            f"model-00001-of-00002.safetensors and so on with {index}, or model.weights.h5; found {', '.join(top[:10])}"
        )
    return sorted({*text, *(parts if weights else ())})


def sha256_of(path: Path) -> str:
    """Of a file's bytes, as hex digits. Raises OSError."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def progress(name: str, size: int) -> Iterator[Callable[[int, int], object]]:
    """A bar on stderr, where that is a terminal, after two seconds. Yields show(bytes written, bytes downloaded)."""
    with bar(total=size, desc=name, unit="B", unit_scale=True) as shown:
        yield lambda written, downloaded: shown.update(min(written + downloaded, size) - shown.n)
