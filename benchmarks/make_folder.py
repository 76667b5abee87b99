"""Make a Hugging Face folder that all the libraries load from a GGUF file: make_folder.py GGUF FOLDER"""

import sys

from modelhub import CausalLM

file, folder = sys.argv[1:]
CausalLM.from_preset(file, backend="numpy", dtype="float32").save_to_preset(folder)
