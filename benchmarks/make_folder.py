"""Make a Hugging Face folder that all the libraries load from a Gemma GGUF file: make_folder.py GGUF FOLDER"""

import json
import sys
from pathlib import Path

from safetensors.numpy import save_file
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken
from transformers import GemmaTokenizer
from transformers.tokenization_utils_base import generate_merges

from modelhub import Backbone
from modelhub.hub.gguf import open_gguf

file, folder = sys.argv[1], Path(sys.argv[2])
folder.mkdir(parents=True, exist_ok=True)
backbone = Backbone.from_preset(file, backend="numpy", dtype="float32")
save_file(backbone.params, folder / "model.safetensors", metadata={"format": "pt"})
(folder / "config.json").write_text(json.dumps(backbone.config.to_hf(), indent=1))

with open_gguf(file) as gguf:
    keys = ("tokens", "scores", "token_type")
    entries = list(zip(*(gguf.metadata[f"tokenizer.ggml.{key}"] for key in keys), strict=True))
proto = sentencepiece_model_pb2.ModelProto()
for index, (token, score, kind) in enumerate(entries):
    kind = 3 if index < 3 else 2 if index == 3 else 4 if kind == 3 else int(kind)  # <pad> <eos> <bos>, <unk>
    proto.pieces.add(piece=token.replace(" ", "▁"), score=score, type=kind)
trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
trainer.model_type, trainer.byte_fallback = trainer.BPE, True
trainer.pad_id, trainer.eos_id, trainer.bos_id, trainer.unk_id = range(4)
trainer.pad_piece, trainer.eos_piece, trainer.bos_piece, trainer.unk_piece = (token for token, _, _ in entries[:4])
normalizer.name, normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = "identity", False, False
(folder / "tokenizer.model").write_bytes(proto.SerializeToString())

vocab = {piece.piece: index for index, piece in enumerate(proto.pieces)}
tokenizer = GemmaTokenizer(vocab=vocab, merges=generate_merges(vocab), add_bos_token=True)
added = [AddedToken(p.piece, normalized=False, special=p.type != 4) for p in proto.pieces if p.type in (2, 3, 4)]
tokenizer.add_tokens(added)
tokenizer.save_pretrained(folder)
