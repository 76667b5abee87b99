"""Reads and writes the tokenizer of a Hugging Face folder.

tokenizer.json decides the ids, as in transformers. Where a tokenizer.model lies beside it and gives the same ids, that
is loaded in its place, which takes a tenth of the time. How this is known without parsing the vocabulary:

1. The head of tokenizer.json says Gemma's kind: BPE with byte fallback; " " becomes "▁" and nothing else is normalized;
   no prefix space; the plain SentencePiece decoder; every added token is matched in the raw text, inside words too.
2. Its vocabulary has as many entries as the model, and 64 of them, spread evenly, have the model's ids.
3. It merges runs of spaces in the order that `spm.merge_space_runs` gives the model.
4. The model normalizes nothing, has all the byte pieces, and scores that are ranks (BPE's, not unigram's).

Anything else is read by the `tokenizers` library.
"""

from __future__ import annotations

import copy
import json
import mmap
import os
import re
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, models, normalizers, processors
from tokenizers import Tokenizer as HFTokenizer

from modelhub.errors import TokenizerError
from modelhub.processing import spm
from modelhub.processing.guards import (
    LARGEST_CONFIG,
    LARGEST_ID,
    LARGEST_TOKENIZER,
    check_growth,
    check_size,
    read_json,
)
from modelhub.processing.tokenizer_classes import apply_class, check_class

KEPT_KEYS = ("model_max_length", "padding_side", "truncation_side")
# read beside tokenizer.json: those of an older tokenizer would change the new one
OTHER_FILES = {
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
}


class TokenizerEngine(Protocol):
    """Text to ids and back, without the special tokens around a text."""

    size: int

    def encode(self, text: str) -> list[int]: ...
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]: ...
    def encode_offsets_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]: ...
    def id_to_token(self, token_id: int) -> str | None: ...
    def token_to_id(self, token: str) -> int | None: ...
    def to_tokenizers(self, strips_space: bool) -> HFTokenizer: ...


@dataclass
class TokenizerParts:
    """All that a Tokenizer is made of, wherever it came from."""

    engine: TokenizerEngine
    decoder: dict[str, Any] | None  # as tokenizer.json spells it
    special_ids: frozenset[int]
    named: dict[str, str | None]  # "bos" -> "<bos>"
    prefix_ids: list[int]
    suffix_ids: list[int]
    config: Mapping[str, Any]  # as tokenizer_config.json spells it
    chat_template: str | None = None

    @property
    def cleans_up(self) -> bool:
        """Whether decoded texts lose the spaces before punctuation; of BPE transformers does not do it either."""
        wanted = self.config.get("clean_up_tokenization_spaces") is True
        return (
            wanted
            and isinstance(self.engine, TokenizersEngine)
            and not isinstance(self.engine.backend.model, models.BPE)
        )


class TokenizersEngine:
    """The `tokenizers` library behind the interface of TokenizerEngine."""

    def __init__(self, backend: HFTokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        # Kept for `to_tokenizers` only: Tokenizer adds the special tokens, and byte-level ones cut spaces off offsets.
        self.post_processor = backend.post_processor
        backend.post_processor = None
        self.backend = backend
        self.size = max([backend.get_vocab_size(), *(i + 1 for i in backend.get_added_tokens_decoder())])
        if self.size > LARGEST_ID:
            raise TokenizerError(f"The tokenizer has the token id {self.size - 1}; expected at most {LARGEST_ID}.")

    def encode(self, text: str) -> list[int]:
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_offsets_batch(self, texts: Sequence[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        encodings = self.backend.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return self.backend.decode(ids, skip_special_tokens)

    def to_tokenizers(self, strips_space: bool) -> HFTokenizer:
        backend = copy.deepcopy(self.backend)
        backend.post_processor = self.post_processor
        return backend


def read_folder(folder: Path) -> TokenizerParts:
    """Reads tokenizer.json and/or tokenizer.model, with the config files beside them."""
    config = _read_json(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:  # else it is complete, and transformers reads neither of these
        config = {**config, **_read_json(folder / "special_tokens_map.json")}
        config["added_tokens_legacy"] = _read_json(folder / "added_tokens.json")
    parts = _read_tokenizer(folder, config)
    if not (folder / "tokenizer_config.json").is_file() and not any(parts.named.values()):
        ids = {**_read_json(folder / "config.json"), **_read_json(folder / "generation_config.json")}
        for name in ("bos", "eos", "pad"):
            index = ids.get(f"{name}_token_id")
            index = index[0] if isinstance(index, list) else index  # generation may stop at several
            parts.named[name] = parts.engine.id_to_token(index) if index is not None else None
    parts.chat_template = _chat_template(folder, config)
    return parts


def write_folder(folder: Path, parts: TokenizerParts) -> None:
    """Writes what `read_folder` and transformers' AutoTokenizer read: tokenizer.json and tokenizer_config.json.

    For Gemma's kind of SentencePiece also tokenizer.model, which loads faster, and which llama.cpp's converter needs.
    All files are complete before the first old one is replaced.
    """
    engine, named = parts.engine, parts.named
    backend = engine.to_tokenizers(strips_space=parts.decoder == sentencepiece_decoder(True))
    before, after = ([engine.id_to_token(i) or "" for i in ids] for ids in (parts.prefix_ids, parts.suffix_ids))
    if backend.post_processor is None and before + after:
        second = [f"{token}:1" for token in (*before, "$B", *after)]
        backend.post_processor = processors.TemplateProcessing(
            single=[*before, "$A", *after],
            pair=[*before, "$A", *after, *second],
            special_tokens=list(zip(before + after, parts.prefix_ids + parts.suffix_ids, strict=True)),
        )
    # of the source's config only what does not make transformers build another tokenizer
    tokens = {key: value for key, value in parts.config.items() if key.endswith("_token")}
    config = {key: _content(value) for key, value in tokens.items() if isinstance(value, str | dict)}
    config |= {key: parts.config[key] for key in KEPT_KEYS if key in parts.config}
    for key in ("extra_special_tokens", "additional_special_tokens"):
        extra = parts.config.get(key)
        if isinstance(extra, list):
            config[key] = [_content(token) for token in extra]
        elif isinstance(extra, dict):
            config[key] = {name: _content(token) for name, token in extra.items()}
    config |= {f"{name}_token": token for name, token in named.items()}
    if before in ([], [named["bos"]]) and after in ([], [named["eos"]]):  # else only the post-processor can say it
        config |= {"add_bos_token": bool(before), "add_eos_token": bool(after)}
    config |= {"clean_up_tokenization_spaces": parts.cleans_up, "tokenizer_class": "PreTrainedTokenizerFast"}
    if parts.config.get("split_special_tokens") is True:
        config["split_special_tokens"] = True
    config["chat_template"] = parts.chat_template
    config = {key: value for key, value in config.items() if value is not None}
    files = {
        "tokenizer.json": backend.to_str().encode(),
        "tokenizer_config.json": json.dumps(config, indent=2, ensure_ascii=False).encode(),
    }
    if isinstance(engine, spm.SentencePieceEngine) and (
        isinstance(backend.model, models.BPE)
        and isinstance(backend.normalizer, normalizers.Replace)
        and backend.pre_tokenizer is None
    ):
        files["tokenizer.model"] = engine.sp.serialized_model_proto()
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".tokenizer") as beside:
        for name, content in files.items():
            (Path(beside) / name).write_bytes(content)
        for name in files:
            os.replace(Path(beside) / name, folder / name)
    for name in OTHER_FILES - files.keys():
        (folder / name).unlink(missing_ok=True)


def _read_tokenizer(folder: Path, config: Mapping[str, Any]) -> TokenizerParts:
    check_class(config, folder)
    json_file, model_file = folder / "tokenizer.json", folder / "tokenizer.model"
    for file in (json_file, model_file):
        check_size(file, LARGEST_TOKENIZER)
    if json_file.is_file():
        return _read_json_through_model(json_file, model_file, config) or _read_tokenizer_json(json_file, config)
    if model_file.is_file():
        return read_tokenizer_model(model_file, config)
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else "no such folder"
    raise TokenizerError(
        f"No tokenizer in {folder}: looked for tokenizer.json and tokenizer.model, found {found}. Copy one of them "
        "there, or write tokenizer.json with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)."
    )


def _read_tokenizer_json(path: Path, config: Mapping[str, Any]) -> TokenizerParts:
    try:
        backend = HFTokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise TokenizerError(
            f"{path} ({path.stat().st_size} bytes) is not a tokenizer that the tokenizers library reads: {error}. "
            "Download it again; a file of some 130 bytes is a Git LFS pointer, not the tokenizer."
        ) from error
    apply_class(backend, config, path.parent)
    backend.add_tokens(tokens_to_add(config, backend.get_added_tokens_decoder()))
    added = backend.get_added_tokens_decoder()
    parts = (backend.post_processor, backend.decoder, backend.normalizer, backend.pre_tokenizer)
    post_processor, decoder, normalizer, pre_tokenizer = (part and json.loads(part.__getstate__()) for part in parts)
    check_growth(normalizer, pre_tokenizer)
    check_growth(decoder)
    return make_parts(TokenizersEngine(backend), added, config, decoder, _template_ids(post_processor))


def _read_json_through_model(json_file: Path, model_file: Path, config: Mapping[str, Any]) -> TokenizerParts | None:
    """Loads tokenizer.model in place of tokenizer.json; None where the ids could differ (the rule is at the top)."""
    if not model_file.is_file() or not json_file.stat().st_size or config.get("split_special_tokens") is True:
        return None
    with json_file.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        head = _head_of_gemma_kind(data)
        if head is None:
            return None
        try:
            sp = spm.load_model(spm.merge_space_runs(model_file.read_bytes()))
        except TokenizerError:  # tokenizer.json alone is enough
            return None
        if not _same_vocabulary(data, head["model_start"], sp):
            return None
    added = {token.pop("id"): AddedToken(**token) for token in head["added_tokens"]}
    add_tokens(added, sp, tokens_to_add(config, added))
    if any(token.normalized or token.single_word for token in added.values()):
        return None
    engine = spm.SentencePieceEngine(sp, added)
    return make_parts(engine, added, config, head["decoder"], _template_ids(head["post_processor"]))


def read_tokenizer_model(path: Path, config: Mapping[str, Any], own_prefix: bool = False) -> TokenizerParts:
    """tokenizer.model alone: BPE that keeps the text as transformers converts it, other kinds as SentencePiece does.

    own_prefix: a model that puts a space before the text does it itself, before a text that starts with one too.
    """
    if wrong := [key for key in ("split_special_tokens", "clean_up_tokenization_spaces") if config.get(key) is True]:
        raise TokenizerError(
            f"{path.parent}: tokenizer_config.json says {' and '.join(wrong)}, which tokenizer.model alone cannot do. "
            "Write tokenizer.json beside it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    model = path.read_bytes()
    sp = spm.load_model(model)
    spec = spm.read_spec(model)
    prefix_space = config.get("add_prefix_space")
    prefix_space = spec.add_dummy_prefix if prefix_space is None else bool(prefix_space)
    as_transformers = spec.model_type == spm.BPE and spec.keeps_text and not (own_prefix and spec.add_dummy_prefix)
    if as_transformers:
        sp = spm.load_model(spm.merge_space_runs(model) + spm.NO_DUMMY_PREFIX)
    own = {"unk": sp.unk_id(), "bos": sp.bos_id(), "eos": sp.eos_id(), "pad": sp.pad_id()}
    config = {**{f"{name}_token": sp.id_to_piece(i) for name, i in own.items() if i >= 0}, **config}
    added = dict(spec.added)
    add_tokens(added, sp, tokens_to_add(config, added))
    engine = spm.SentencePieceEngine(sp, added, prefix_space=as_transformers and prefix_space)
    around = ids_around(
        engine, config, add_bos=config.get("add_bos_token", True), add_eos=config.get("add_eos_token", False)
    )
    return make_parts(engine, added, config, sentencepiece_decoder(prefix_space), around)


def make_parts(
    engine: TokenizerEngine,
    added: Mapping[int, AddedToken],
    config: Mapping[str, Any],
    decoder: dict[str, Any] | None,
    around: tuple[list[int], list[int]],
) -> TokenizerParts:
    special = frozenset(i for i, token in added.items() if token.special)
    named = {name: _content(config.get(f"{name}_token")) for name in ("bos", "eos", "pad", "unk")}
    return TokenizerParts(engine, decoder, special, named, *around, config)


def tokens_to_add(config: Mapping[str, Any], known: Mapping[int, AddedToken]) -> list[AddedToken]:
    """The config's tokens that the tokenizer does not have, or has with other flags, in transformers' order."""
    known_flags = {repr(token) for token in known.values()}
    special = {key: value for key, value in config.items() if key.endswith("_token") and isinstance(value, str | dict)}
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    specials = [*special.values(), *(extra.values() if isinstance(extra, dict) else extra)]
    contents = {_content(token) for token in specials}

    decoder = {int(i): _added_token(token) for i, token in config.get("added_tokens_decoder", {}).items()}
    for content, index in config.get("added_tokens_legacy", {}).items():
        decoder[index] = AddedToken(content, normalized=content not in contents, special=content in contents)
    tokens = [token for _, token in sorted(decoder.items()) if repr(token) not in known_flags]
    names = {token.content for token in [*known.values(), *tokens]}
    for token in specials:
        if _content(token) not in names:
            tokens.append(_added_token(token, special=True))
            names.add(_content(token))
    return tokens


def add_tokens(added: dict[int, AddedToken], sp: SentencePieceProcessor, tokens: Iterable[AddedToken]) -> None:
    """Gives tokens the ids that the tokenizers library would: their own where they have one, else the next."""
    ids = {token.content: i for i, token in added.items()}
    for token in tokens:
        index = ids.get(token.content, spm.piece_id(sp, token.content))
        if index is None:
            index = max([len(sp), *(i + 1 for i in added)])
        added[index] = token
        ids[token.content] = index


def _added_token(token: str | Mapping[str, Any], **flags: bool) -> AddedToken:
    if isinstance(token, str):
        return AddedToken(token, **flags)
    return AddedToken(**{key: value for key, value in token.items() if key != "__type"} | flags)


def _content(token: Any) -> Any:
    """A token's text: configs hold a string, or a dict with its flags."""
    return token["content"] if isinstance(token, dict) else token


def _head_of_gemma_kind(data: mmap.mmap) -> dict[str, Any] | None:
    """What stands before the vocabulary of tokenizer.json, with its offset as "model_start"; None for other kinds."""
    start = data.find(b'"model":')  # the tokenizers library writes the model last
    end = data.find(b'"vocab":', start)
    try:
        head = json.loads(data[:start].decode().rstrip().rstrip(",") + "}")
        model = json.loads(data[start + len('"model":') : end].decode().rstrip().rstrip(",") + "}")
        pre_tokenizer = head["pre_tokenizer"]
        gemma_kind = (
            head["normalizer"] == {"type": "Replace", "pattern": {"String": " "}, "content": spm.SPACE}
            # splitting at spaces does nothing after the normalizer left none
            and (
                pre_tokenizer is None or (pre_tokenizer["type"], pre_tokenizer["pattern"]) == ("Split", {"String": " "})
            )
            and head["decoder"] == sentencepiece_decoder(prefix_space=False)
            and (model["type"], model["byte_fallback"], model["dropout"]) == ("BPE", True, None)
            and not (model.get("ignore_merges") or model["continuing_subword_prefix"] or model["end_of_word_suffix"])
            and isinstance(head["added_tokens"], list)
            and (head["post_processor"] is None or head["post_processor"]["type"] == "TemplateProcessing")
        )
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return {**head, "model_start": end} if gemma_kind else None


def _same_vocabulary(data: mmap.mmap, start: int, sp: SentencePieceProcessor) -> bool:
    """Rules 2 to 4; start: where the vocabulary of tokenizer.json begins."""
    if not sp.is_byte(sp.piece_to_id("<0x00>")) or sp.normalize("  a\tﬁ ") != "  a\tﬁ ".replace(" ", spm.SPACE):
        return False
    size = len(sp)
    for index in [*range(0, size, -(-size // 64)), size - 1]:
        key = json.dumps(sp.id_to_piece(index), ensure_ascii=False).encode() + b":"
        start = data.find(key, start) + len(key)
        found = start >= len(key) and re.match(rb"\s*%d\b" % index, data[start : start + 32])
        if not found or not sp.get_score(index).is_integer():
            return False
    merges = data.find(b'"merges"', start)
    if merges < 0 or b":" in data[start:merges] or not re.search(rb"\]\s*\}\s*\}\s*$", data[-64:]):
        return False
    # A pair is written ["a", "b"], by older versions "a b". 512 KB hold all of Gemma's first merges, runs of newlines
    # and of spaces.
    text = data[merges : merges + 2**19].decode(errors="ignore")
    pairs = re.findall(f'"({spm.SPACE}+)(?:"\\s*,\\s*"| )({spm.SPACE}+)"', text)
    lengths = [len(left) + len(right) for left, right in pairs]
    return lengths == sorted(lengths) and bool(lengths) == (spm.piece_id(sp, spm.SPACE * 2) is not None)


def _template_ids(post_processor: Mapping[str, Any] | None) -> tuple[list[int], list[int]]:
    """The special ids that a post-processor puts before and after one text."""
    if post_processor is None:
        return [], []
    kind = post_processor["type"]
    if kind == "Sequence":
        around = [_template_ids(part) for part in post_processor["processors"]]
        return [i for before, _ in reversed(around) for i in before], [i for _, after in around for i in after]
    if kind in ("BertProcessing", "RobertaProcessing"):
        return [post_processor["cls"][1]], [post_processor["sep"][1]]
    sides: tuple[list[int], list[int]] = ([], [])
    if kind == "TemplateProcessing":
        side = 0
        for part in post_processor["single"]:
            if "Sequence" in part:
                side = 1
            else:
                sides[side].extend(post_processor["special_tokens"][part["SpecialToken"]["id"]]["ids"])
    return sides


def ids_around(
    engine: TokenizerEngine, config: Mapping[str, Any], add_bos: bool, add_eos: bool
) -> tuple[list[int], list[int]]:
    """The special ids before and after one text, where flags say so and not a post-processor."""
    sides = []
    for key, wanted in (("bos_token", add_bos), ("eos_token", add_eos)):
        token = _content(config.get(key))
        index = engine.token_to_id(token) if wanted and token else None
        sides.append([] if index is None else [index])
    return sides[0], sides[1]


def sentencepiece_decoder(prefix_space: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": spm.SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix_space:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def _chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the config's; of several named templates the one called default."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        check_size(file, LARGEST_CONFIG)
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        template = {entry["name"]: entry["template"] for entry in template}
    template = template.get("default") if isinstance(template, dict) else template
    if not isinstance(template, str | None):
        raise TokenizerError(f"The chat template in {folder} must be text, found {template!r:.80}. Download it again.")
    return template


def _read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, without its nulls; empty where there is no such file."""
    if not path.is_file():
        return {}
    return {key: value for key, value in read_json(path).items() if value is not None}
