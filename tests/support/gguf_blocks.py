"""Random blocks of GGUF's quantised types, as no writer would make them: every code, every scale."""

import numpy as np
from gguf import GGMLQuantizationType as GGMLType
from gguf.constants import GGML_QUANT_SIZES

SCALE_BYTES = {  # where a block keeps its float16 scales
    GGMLType.Q4_0: slice(0, 2),
    GGMLType.Q4_1: slice(0, 4),
    GGMLType.Q5_0: slice(0, 2),
    GGMLType.Q5_1: slice(0, 4),
    GGMLType.Q8_0: slice(0, 2),
    GGMLType.Q4_K: slice(0, 4),
    GGMLType.Q5_K: slice(0, 4),
    GGMLType.Q6_K: slice(208, 210),
    GGMLType.Q2_K: slice(80, 84),
    GGMLType.Q3_K: slice(108, 110),
    GGMLType.IQ4_NL: slice(0, 2),
    GGMLType.IQ4_XS: slice(0, 2),
    GGMLType.MXFP4: slice(0, 0),
}
EXPONENTS = (104, 144)  # of MXFP4's scales: those of float16, from 2^-24 to 2^15


def random_blocks(
    shape: tuple[int, ...], kind: GGMLType, seed: int = 0, scale: float = 1.0, exponents: tuple[int, int] = (0, 252)
) -> np.ndarray:
    """Random bytes with finite scales, normal ones times `scale`, as (rows, bytes in a row)."""
    elements, nbytes = GGML_QUANT_SIZES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] // elements, nbytes), np.uint8)
    if kind == GGMLType.MXFP4:
        blocks[..., 0] = rng.integers(*exponents, blocks.shape[:-1])
    scales = blocks[..., SCALE_BYTES[kind]]
    drawn = scale * rng.standard_normal((*scales.shape[:-1], scales.shape[-1] // 2))
    scales[...] = drawn.astype(np.float16).view(np.uint8)
    return blocks.reshape(*shape[:-1], -1)
