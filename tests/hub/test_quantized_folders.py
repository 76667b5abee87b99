"""Folders that other libraries have quantised: what is read equals what those libraries dequantise."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from modelhub.errors import CheckpointError, ConfigError
from modelhub.hub.quantized_folders import QuantizedFolder
from modelhub.hub.quantized_modules import packed, unpacked

ROWS, COLUMNS = 64, 256


def weight(rows=ROWS, columns=COLUMNS, seed=0):
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) * 0.05


def folder(path, config, tensors):
    path.mkdir(exist_ok=True)
    save_file({name: x.contiguous() for name, x in tensors.items()}, path / "model.safetensors")
    return QuantizedFolder(path, config)


@pytest.mark.parametrize("bits", range(1, 9))
def test_bits_in_words(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 1 << bits, (5, 96)).astype(np.uint8)
    words = np.zeros((5, 3 * bits), np.uint64)
    for i in range(96):  # an integer of 96 * bits bits, cut into words
        at, shift = divmod(i * bits, 32)
        wide = codes[:, i].astype(np.uint64) << np.uint64(shift)
        words[:, at] |= wide & np.uint64(0xFFFFFFFF)
        if shift + bits > 32:
            words[:, at + 1] |= wide >> np.uint64(32)
    words = words.astype(np.uint32).view(np.int32)
    np.testing.assert_array_equal(unpacked(words, bits, 96), codes)
    if bits in (4, 8):
        np.testing.assert_array_equal(packed(codes, bits), words)


# --- compressed-tensors: packed by its own compressors ----------------------------------------------------------------


def compressed(path, format_, scale_dtype=torch.float16, order=None, **args):
    """A folder of one matrix that compressed-tensors has packed, and what it dequantises itself."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    args = QuantizationArgs(**args)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format_)
    w = weight().to(scale_dtype)
    if args.strategy == "group":
        parts = w.unflatten(1, (-1, args.group_size))
        low, high = parts.amin(-1), parts.amax(-1)
    elif args.strategy == "block":
        rows, columns = args.block_structure
        full = torch.nn.functional.pad(w, (0, -COLUMNS % columns, 0, -ROWS % rows))
        parts = full.reshape(-(-ROWS // rows), rows, -(-COLUMNS // columns), columns)
        low, high = parts.amin((1, 3)), parts.amax((1, 3))
    elif args.strategy == "channel":
        low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    else:
        low, high = w.min().reshape(1), w.max().reshape(1)
    scale, zero = calculate_qparams(low, high, args)
    state = {"weight": w, "weight_scale": scale, "weight_zero_point": zero}
    compressor = BaseCompressor.get_value_from_registry(format_)
    state = compressor.compress(state, scheme)
    wanted = compressor.decompress({**state, "weight_scale": state["weight_scale"].float()}, scheme)["weight"]
    config = QuantizationConfig(config_groups={"group_0": scheme}, format=format_, quantization_status="compressed")
    config = json.loads(config.model_dump_json())
    tensors = {f"model.layer.{name}": x for name, x in state.items()} | {"model.norm.weight": torch.ones(4)}
    return folder(path, config, tensors), wanted.float().numpy()


GROUPS = {"strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    "format_,args",
    [
        ("pack-quantized", {"num_bits": bits, "symmetric": symmetric, **more})
        for bits in (4, 8)
        for symmetric in (True, False)
        for more in (GROUPS, {"strategy": "group", "group_size": 128}, {"strategy": "channel"})
    ]
    + [("pack-quantized", {"num_bits": bits, **GROUPS}) for bits in (2, 3, 6)]
    + [("int-quantized", {"num_bits": 8, "symmetric": s, "strategy": "channel"}) for s in (True, False)]
    + [("int-quantized", {"num_bits": 8, "strategy": "tensor"})]
    + [("naive-quantized", {"num_bits": 8, **GROUPS})]
    + [
        ("float-quantized", {"num_bits": 8, "type": "float", **more})
        for more in (
            {"strategy": "tensor"},
            {"strategy": "channel"},
            {"strategy": "block", "block_structure": [32, 96]},
        )
    ],
)
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
def test_compressed_tensors(tmp_path, format_, args, scale_dtype):
    found, wanted = compressed(tmp_path, format_, scale_dtype, **args)
    with found:
        assert {*found.tensors} == {"model.layer.weight", "model.norm.weight"}
        assert found.tensors["model.layer.weight"].shape == (ROWS, COLUMNS)
        np.testing.assert_array_equal(found.read("model.layer.weight"), wanted)


def test_compressed_tensors_with_columns_in_another_order(tmp_path):
    """Older versions' actorder "group"; -1 in all of weight_g_idx: there is none."""
    rng = np.random.default_rng(0)
    codes, scales = rng.integers(-8, 8, (16, 64)), rng.random((16, 2)).astype(np.float32)
    order = rng.permutation(np.arange(64) // 32).astype(np.int32)
    config = {"quant_method": "compressed-tensors", "format": "pack-quantized"}
    for groups in (order, np.full(64, -1, np.int32)):
        tensors = {
            "l.weight_packed": torch.from_numpy(packed((codes + 8).astype(np.uint8), 4)),
            "l.weight_scale": torch.from_numpy(scales),
            "l.weight_shape": torch.tensor([16, 64]),
            "l.weight_g_idx": torch.from_numpy(groups),
        }
        at = groups if (groups >= 0).all() else np.arange(64) // 32
        with folder(tmp_path, config, tensors) as found:
            np.testing.assert_array_equal(found.read("l.weight"), codes.astype(np.float32) * scales[:, at])


# --- AWQ and GPTQ -----------------------------------------------------------------------------------------------------


def grouped(bits, group, symmetric=False):
    """scales and zero points (N, K / group) of the weight, and the rounded weight, as quantisers find them."""
    parts = weight().unflatten(1, (-1, group))
    if symmetric:
        scale = (parts.abs().amax(-1) / (2 ** (bits - 1) - 1)).half().float()
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        scale = ((parts.amax(-1) - parts.amin(-1)) / (2**bits - 1)).half().float()
        zero = (-parts.amin(-1) / scale).round().clamp(0, 2**bits - 1)
    codes = ((parts / scale[..., None]).round() + zero[..., None]).clamp(0, 2**bits - 1)
    return scale, zero, ((codes - zero[..., None]) * scale[..., None]).flatten(1)


@pytest.mark.parametrize("group", [32, 128])
def test_awq(tmp_path, group):
    gemm = pytest.importorskip("awq.modules.linear.gemm", reason="autoawq is not installed")
    from awq.utils.packing_utils import dequantize_gemm

    scale, zero, rounded = grouped(4, group)
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = rounded
    module = gemm.WQLinear_GEMM.from_linear(linear, 4, group, scales=scale.T, zeros=zero.T)
    state = module.state_dict()
    wanted = dequantize_gemm(state["qweight"], state["qzeros"], state["scales"].float(), 4, group).T
    assert (wanted - rounded).abs().max() < 1e-6
    config = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    with folder(tmp_path, config, {f"layer.{name}": x for name, x in state.items()}) as found:
        np.testing.assert_array_equal(found.read("layer.weight"), wanted.numpy())


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq(tmp_path, bits, order, symmetric, version):
    qlinear = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="gptqmodel is not installed")
    from types import SimpleNamespace

    from gptqmodel.utils.model import convert_gptq_v2_to_v1_format_module

    scale, zero, rounded = grouped(bits, 32, symmetric)
    groups = torch.arange(COLUMNS) // 32
    if order:  # the columns were quantised in another order
        places = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
        rounded, groups = rounded[:, places], groups[places]
    linear = torch.nn.Linear(COLUMNS, ROWS, bias=False)
    linear.weight.data = rounded
    module = qlinear.TorchLinear(bits, 32, symmetric, order, COLUMNS, ROWS)
    module.pack_original(linear, scale, zero, groups.int())
    module.post_init()
    wanted = module.dequantize_weight().float()
    assert (wanted.T - rounded).abs().max() < 1e-3
    if version == "gptq":
        convert_gptq_v2_to_v1_format_module(module, SimpleNamespace(bits=bits, pack_dtype=torch.int32))
    names = ("qweight", "qzeros", "scales", "g_idx")
    config = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": version, "desc_act": order}
    with folder(tmp_path, config, {f"layer.{name}": getattr(module, name) for name in names}) as found:
        np.testing.assert_allclose(found.read("layer.weight"), rounded.numpy(), rtol=1e-6, atol=1e-9)
        np.testing.assert_array_equal(found.read("layer.weight", "float16"), wanted.T.half().numpy())


# --- fp8, by transformers' own quantiser -------------------------------------------------------------------------------


@pytest.mark.parametrize("scale_fmt", [None, "ue8m0"])
@pytest.mark.parametrize("block", [[16, 128], None])
def test_fp8(tmp_path, block, scale_fmt):
    from types import SimpleNamespace

    from transformers.integrations.finegrained_fp8 import Fp8Dequantize, Fp8Quantize

    config = {"quant_method": "fp8", "weight_block_size": block, "fmt": "e4m3", "activation_scheme": "dynamic"}
    quantizer = SimpleNamespace(quantization_config=SimpleNamespace(weight_block_size=block, scale_fmt=scale_fmt))
    state = Fp8Quantize(quantizer).convert({"layer.weight": weight()})
    scales = state["layer.weight_scale_inv"]
    wanted = Fp8Dequantize(quantizer)._dequantize_one(state["layer.weight"], scales, torch.float32)
    with folder(tmp_path, config, state) as found:
        assert {*found.tensors} == {"layer.weight"}
        np.testing.assert_array_equal(found.read("layer.weight"), wanted.numpy())


def test_fp8_blocks_that_the_matrix_does_not_fill(tmp_path):
    """As DeepSeek's weight_dequant: the last blocks are cut off."""
    w = weight(72, 200).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 4, generator=torch.Generator().manual_seed(1))
    wanted = w.float() * scales.repeat_interleave(64, 0)[:72].repeat_interleave(64, 1)[:, :200]
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    with folder(tmp_path, config, {"layer.weight": w, "layer.weight_scale_inv": scales}) as found:
        np.testing.assert_array_equal(found.read("layer.weight"), wanted.numpy())


# --- bitsandbytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("rows", [ROWS, 3])
def test_bitsandbytes_4_bits(tmp_path, kind, double, rows):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    w = weight(rows)
    codes, state = functional.quantize_4bit(w, quant_type=kind, blocksize=64, compress_statistics=double)
    wanted = functional.dequantize_4bit(codes, state)
    tensors = {"layer.weight": codes} | {f"layer.weight.{n}": x for n, x in state.as_dict(packed=True).items()}
    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    with folder(tmp_path, config, tensors) as found:
        assert {*found.tensors} == {"layer.weight"}
        np.testing.assert_allclose(found.read("layer.weight"), wanted.numpy(), rtol=1e-6, atol=1e-9)


def test_bitsandbytes_8_bits(tmp_path):
    functional = pytest.importorskip("bitsandbytes.functional", reason="bitsandbytes is not installed")
    codes, scales, _ = functional.int8_vectorwise_quant(weight().half())
    wanted = functional.int8_vectorwise_dequant(codes, scales)
    tensors = {"layer.weight": codes, "layer.SCB": scales, "layer.weight_format": torch.zeros((), dtype=torch.uint8)}
    with folder(tmp_path, {"quant_method": "bitsandbytes", "load_in_8bit": True}, tensors) as found:
        assert {*found.tensors} == {"layer.weight"}
        np.testing.assert_allclose(found.read("layer.weight"), wanted.float().numpy(), rtol=1e-6)


# --- what cannot be read ----------------------------------------------------------------------------------------------

PLAIN = {"layer.weight": torch.ones(4, 32)}


@pytest.mark.parametrize(
    "config,named",
    [
        ({"quant_method": "aqlm"}, "quant_method='aqlm'.*compressed-tensors, awq, gptq, fp8, bitsandbytes"),
        ({"bits": 4}, "quant_method=None"),
        ("int4", "must be an object"),
        ({"quant_method": "awq", "version": "gemv"}, "version='gemv'.*another order"),
        ({"quant_method": "awq", "bits": 8}, "bits=8"),
        ({"quant_method": "gptq", "checkpoint_format": "marlin"}, "checkpoint_format='marlin'"),
        ({"quant_method": "gptq", "bits": 5}, "bits=5"),
        ({"quant_method": "fp8", "fmt": "e3m4"}, "fmt='e3m4'"),
        ({"quant_method": "fp8", "weight_block_size": 128}, "weight_block_size=128"),
        ({"quant_method": "compressed-tensors", "format": "nvfp4-pack-quantized"}, "format='nvfp4-pack-quantized'"),
        (
            {"quant_method": "compressed-tensors", "transform_config": {"config_groups": {"u": {"type": "hadamard"}}}},
            "transform_config.*compute something else",
        ),
        (
            {
                "quant_method": "compressed-tensors",
                "config_groups": {"a": {"weights": {"num_bits": 4, "type": "float"}}},
            },
            "num_bits=4",
        ),
    ],
)
def test_configs_that_cannot_be_read(tmp_path, config, named):
    with pytest.raises(ConfigError, match=named):
        folder(tmp_path, config, PLAIN)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32}
QWEIGHT = {"l.qweight": torch.zeros(4, 16, dtype=torch.int32), "l.scales": torch.ones(1, 16).half()}
QZEROS = {"l.qzeros": torch.zeros(1, 2, dtype=torch.int32)}


@pytest.mark.parametrize(
    "config,tensors,named",
    [
        (GPTQ, QWEIGHT, "'l.qzeros' is not there"),
        (GPTQ, QWEIGHT | QZEROS | {"l.scales": torch.ones(2, 16)}, "l.scales.*shape \\(1, 16\\)"),
        (GPTQ, QWEIGHT | QZEROS | {"l.g_idx": torch.full((32,), 9, dtype=torch.int32)}, "l.g_idx.*group"),
        ({"quant_method": "awq"}, QWEIGHT | QZEROS, "l.qweight.*8 columns"),
        ({"quant_method": "fp8"}, {"l.weight": torch.ones(4, 4).to(torch.float8_e4m3fn)}, "weight_scale_inv"),
        ({"quant_method": "bitsandbytes"}, {"l.weight": torch.zeros(8, 1, dtype=torch.uint8)}, "l.weight' is uint8"),
        (
            {"quant_method": "bitsandbytes"},
            {"l.weight.quant_state.bitsandbytes__nf4": torch.zeros(8, dtype=torch.uint8)},
            "JSON",
        ),
        (
            {"quant_method": "compressed-tensors"},
            {"l.weight_packed": torch.zeros(4, 4).int(), "l.weight_shape": torch.tensor([4, 999])},
            "l.weight_packed.*\\(4, 999\\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_the_config(tmp_path, config, tensors, named):
    with pytest.raises(CheckpointError, match=named):
        folder(tmp_path, config, tensors)


# Sound folders of each kind, made here; each is then broken in every way of a list.
INT32 = torch.arange(64, dtype=torch.int32)
NF4 = {"quant_type": "nf4", "blocksize": 64, "shape": [16, 32], "nested_blocksize": 256, "nested_offset": 0.5}


def state(entries):
    return torch.frombuffer(bytearray(json.dumps(entries).encode()), dtype=torch.uint8)


def four_bits(entries):
    return {
        "l.weight": torch.zeros(256, 1, dtype=torch.uint8), "l.weight.absmax": torch.zeros(8, dtype=torch.uint8),
        "l.weight.quant_map": torch.ones(16), "l.weight.nested_absmax": torch.ones(1),
        "l.weight.nested_quant_map": torch.ones(256), "l.weight.quant_state.bitsandbytes__nf4": state(entries),
    }  # fmt: skip


GROUP = {"weights": {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}, "targets": ["Linear"]}
SOUND = {
    "gptq": (GPTQ, QWEIGHT | QZEROS | {"l.g_idx": torch.zeros(32, dtype=torch.int32)}),
    "awq": (
        {"quant_method": "awq", "bits": 4, "group_size": 32},
        {
            "l.qweight": INT32.reshape(32, 2), "l.qzeros": torch.zeros(1, 2).int(),
            "l.scales": torch.ones(1, 16).half(),
        },
    ),
    "pack": (
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"a": GROUP}},
        {
            "l.weight_packed": INT32.reshape(16, 4), "l.weight_scale": torch.ones(16, 1),
            "l.weight_shape": torch.tensor([16, 32]), "l.weight_zero_point": torch.zeros(2, 1).int(),
        },
    ),
    "int": (
        {"quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"a": GROUP}},
        {"l.weight": torch.ones(16, 32).to(torch.int8), "l.weight_scale": torch.ones(16, 1)},
    ),
    "fp8": (
        {"quant_method": "fp8", "weight_block_size": [8, 16]},
        {"l.weight": torch.ones(16, 32).to(torch.float8_e4m3fn), "l.weight_scale_inv": torch.ones(2, 2)},
    ),
    "int8": (
        {"quant_method": "bitsandbytes", "load_in_8bit": True},
        {"l.weight": torch.ones(16, 32).to(torch.int8), "l.SCB": torch.ones(16)},
    ),
    "nf4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, four_bits(NF4)),
}  # fmt: skip
JUNK = [None, True, -1, 0, 1 << 40, 1.5, float("nan"), "x" * 1000, [], [1], [1 << 31, 1 << 31], {}, {"a": {"a": []}}]


def broken(config, tensors):
    """Configs with another value for a key, tensors that are gone, or of another shape, dtype or values."""
    for key in config:
        yield from (({**config, key: junk}, tensors) for junk in JUNK)
    for name, x in tensors.items():
        yield config, {n: y for n, y in tensors.items() if n != name}
        changed = [x.flatten(), x[..., None], x[:1], x[:0], torch.cat([x, x]), x.float(), x.to(torch.int64), x.view(-1)]
        changed += [x.to(torch.int8), x.to(torch.uint8), torch.full_like(x.float(), -7).to(x.dtype)]
        yield from ((config, {**tensors, name: y}) for y in changed)


def read_all(path, config, tensors):
    with folder(path, config, tensors) as found:
        for name in found.tensors:
            assert found.read(name).shape == found.tensors[name].shape
            if (codes := found.codes(name)) is not None:
                codes.group_size  # noqa: B018


@pytest.mark.parametrize("kind", SOUND)
def test_broken_folders_are_refused_or_read(tmp_path, kind):
    config, tensors = SOUND[kind]
    read_all(tmp_path, config, tensors)
    refused = 0
    for one in broken(config, tensors):
        try:
            read_all(tmp_path, *one)
        except (ConfigError, CheckpointError) as error:
            refused += 1
            assert len(str(error)) < 1000
    assert refused > 10


@pytest.mark.parametrize("key", NF4)
def test_a_broken_state_of_4_bits_is_refused_or_read(tmp_path, key):
    for junk in JUNK:
        try:
            read_all(tmp_path, {"quant_method": "bitsandbytes"}, four_bits({**NF4, key: junk}))
        except CheckpointError as error:
            assert "l.weight" in str(error)
