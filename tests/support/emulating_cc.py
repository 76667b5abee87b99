"""A C compiler for hatch_build.py (CC="python3 emulating_cc.py cc"): what is compiled for AVX512 or for products of bytes
becomes plain C with SIMDe's stand-ins for those instructions, and runs on any processor with AVX2; see emulated.h."""

import os
import sys
from pathlib import Path

HEADER = str(Path(__file__).with_name("emulated.h"))
STAND_INS = {
    "avxvnni": ["-DEMULATED=256", "-DEMULATED_VNNI"],
    "avx512": ["-DEMULATED=512"],
    "avx512vnni": ["-DEMULATED=512", "-DEMULATED_VNNI"],
}

command = sys.argv[1:]
isa = next((word.removeprefix("-DISA=") for word in command if word.startswith("-DISA=")), None)
if isa in STAND_INS:
    command = [word for word in command if not word.startswith(("-mavx512", "-mavxvnni", "-mprefer"))]
    command += [*STAND_INS[isa], "-mavx2", "-mfma", "-mf16c", "-include", HEADER]
elif any(word.endswith("dispatch.c") for word in command):
    command += ["-DPROCESSOR_OF_THE_ENVIRONMENT", "-include", HEADER]
os.execvp(command[0], command)
