"""to_torch as a torch.nn.Module: transformers' names, logits, losses and gradients; the task's own memory."""

import copy
import dataclasses
import io
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tiny_families
import torch
import transformers
from image_parity import SMALL
from safetensors.torch import load_file
from text_parity import reference

from modelhub import CausalLM, ImageClassifier, nn, to_torch
from modelhub.errors import InputError
from modelhub.families import family_of
from modelhub.interop.torch import TorchModule

IDS = torch.tensor(np.random.default_rng(0).integers(4, 400, (3, 20)))
MASK = torch.ones_like(IDS)
MASK[1, 14:], MASK[2, :5] = 0, 0  # padded on the right, and on the left
IMAGES = {
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig, {"intermediate_size": 48}),
    "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig, {"intermediate_size": 48}),
    "deit_teacher": (
        transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig, {"intermediate_size": 48},
    ),
    "dinov2": (transformers.Dinov2ForImageClassification, transformers.Dinov2Config, {"mlp_ratio": 2}),
    "registers": (
        transformers.Dinov2WithRegistersForImageClassification, transformers.Dinov2WithRegistersConfig,
        {"num_register_tokens": 3},
    ),
}  # fmt: skip
PIXELS = torch.tensor(np.random.default_rng(1).standard_normal((4, 3, 16, 16)), dtype=torch.float32)
CLASSES = torch.tensor([0, 2, 1, 2])


def close(found, wanted, tolerance=1e-4):
    """To within `tolerance` of the largest value."""
    assert found.shape == wanted.shape and torch.isfinite(found).all()
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.fixture(scope="module", params=tiny_families.CONFIGS)
def family(request, tmp_path_factory):
    """The transformers model, and the folder that it saved itself to, with a tokenizer."""
    folder = tmp_path_factory.mktemp("families") / request.param
    config = tiny_families.CONFIGS[request.param]
    tiny_families.write_preset(folder, config)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module", params=IMAGES)
def encoder(request, tmp_path_factory):
    model_class, config_class, values = IMAGES[request.param]
    model, folder = reference(model_class, config_class(**SMALL | values)), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return model, folder


def load(folder, task=CausalLM):
    return task.from_preset(str(folder), backend="torch", device="cpu", dtype="float32")


@pytest.fixture
def lm(tiny_preset):
    return load(tiny_preset)


def gradients(model, loss):
    """{name in the file: gradient}"""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


# --- transformers' names and numbers ----------------------------------------------------------------------------------


def test_text_is_transformers_own(family):
    theirs, folder = family
    net = to_torch(load(folder))
    assert isinstance(net, torch.nn.Module) and not net.training
    assert set(net.state_dict()) == set(load_file(folder / "model.safetensors"))
    assert all(net.state_dict()[name].shape == x.shape for name, x in net.state_dict().items())
    labels = torch.where(MASK == 1, IDS, -100)
    labels[:, :7] = -100  # a prompt
    positions = (MASK.cumsum(1) - 1).clamp(min=0)
    for inputs in ({"attention_mask": MASK, "labels": labels}, {"attention_mask": MASK, "position_ids": positions}):
        found, wanted = net(IDS, **inputs), theirs(input_ids=IDS, **inputs)
        assert found.logits.dtype == torch.float32
        close(found.logits[MASK == 1], wanted.logits[MASK == 1])
        if "labels" in inputs:
            torch.testing.assert_close(found.loss, wanted.loss, rtol=1e-4, atol=1e-6)
            ours, their_own = gradients(net, found.loss), gradients(theirs, wanted.loss)
            for name, gradient in their_own.items():
                assert (ours[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-7, name
    counted = net(IDS, MASK, labels=labels, num_items_in_batch=torch.tensor(100))
    wanted = theirs(input_ids=IDS, attention_mask=MASK, labels=labels, num_items_in_batch=torch.tensor(100))
    torch.testing.assert_close(counted.loss, wanted.loss, rtol=1e-4, atol=1e-6)


def test_images_are_transformers_own(encoder):
    theirs, folder = encoder
    net = to_torch(load(folder, ImageClassifier))
    assert set(net.state_dict()) == set(load_file(folder / "model.safetensors"))
    found = net(PIXELS, labels=CLASSES)
    if type(theirs).__name__.endswith("Teacher"):  # which transformers has no loss for
        wanted = theirs(PIXELS)
        wanted_loss = torch.nn.functional.cross_entropy(wanted.logits, CLASSES)
    else:
        wanted = theirs(PIXELS, labels=CLASSES)
        wanted_loss = wanted.loss
    close(found.logits, wanted.logits)
    torch.testing.assert_close(found.loss, wanted_loss, rtol=1e-4, atol=1e-6)
    ours, their_own = gradients(net, found.loss), gradients(theirs, wanted_loss)
    names = family_of(net.config.model_type).names("hf", net.config)
    renamed = {names.to_ours(name)[0]: gradient for name, gradient in their_own.items()}
    assert set(renamed) <= set(net.state_dict())
    for name, gradient in renamed.items():
        assert (ours[name] - gradient).abs().max() <= 1e-3 * gradient.abs().max() + 1e-7, name


def test_backbones_give_hidden_states(lm, encoder):
    close(to_torch(lm.backbone)(IDS).last_hidden_state, lm.backbone(IDS))
    theirs, folder = encoder
    found = to_torch(load(folder, ImageClassifier).backbone)(pixel_values=PIXELS)
    close(found.last_hidden_state, theirs.base_model(PIXELS).last_hidden_state)


def test_outputs_are_like_transformers(lm):
    net = to_torch(lm)
    plain, full = net(input_ids=IDS), net(input_ids=IDS, labels=IDS)
    assert plain.loss is None and list(plain) == ["logits"] and plain[0] is plain.logits is plain["logits"]
    assert list(full) == ["loss", "logits"] and full[0] is full.loss and full[:2] == full.to_tuple()
    with pytest.raises(AttributeError, match="nonsense"):
        full.nonsense  # noqa: B018


# --- weights in and out -----------------------------------------------------------------------------------------------


def takes_weights_of(theirs, net, inputs):
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    net.load_state_dict(theirs.state_dict())
    close(net(inputs).logits, theirs(inputs).logits)


def test_weights_from_a_transformers_model_in_memory(family):
    takes_weights_of(family[0], to_torch(load(family[1])), IDS)


def test_weights_from_an_encoder_in_memory(encoder):
    """Where transformers 5 has other names than in files."""
    takes_weights_of(encoder[0], to_torch(load(encoder[1], ImageClassifier)), PIXELS)


def test_weights_into_a_transformers_model(lm, tiny_preset):
    net = to_torch(lm)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_preset, dtype=torch.float32)
    with torch.no_grad():
        net.model.norm.weight += 0.5
    left = theirs.load_state_dict(net.state_dict(), strict=False)
    assert left.missing_keys == ["lm_head.weight"] and not left.unexpected_keys  # tied
    close(theirs(IDS).logits, net(IDS).logits)


def test_state_dict_through_a_file(lm, tiny_preset):
    file = io.BytesIO()
    lm.enable_lora(rank=2)
    net = to_torch(lm)
    names = [name for name in net.state_dict() if ".lora." in name]
    assert names[0] == "model.layers.0.self_attn.q_proj.lora.lora_A" and len(names) == 8
    assert [name for name, x in net.named_parameters() if x.requires_grad] == names
    with torch.no_grad():
        for name in names:
            net.get_parameter(name).normal_()
    torch.save(net.state_dict(), file)
    file.seek(0)
    other = load(tiny_preset)
    other.enable_lora(rank=2)
    again = to_torch(other)
    again.load_state_dict(torch.load(file))
    close(again(IDS).logits, net(IDS).logits)
    np.testing.assert_allclose(other.logits(IDS), lm.logits(IDS), atol=1e-4)
    with pytest.raises(RuntimeError, match="size mismatch"):
        again.load_state_dict(net.state_dict() | {"model.norm.weight": torch.ones(3)})
    with pytest.raises(RuntimeError, match="nonsense"):
        again.load_state_dict(net.state_dict() | {"nonsense": torch.ones(3)})


# --- the task's own memory --------------------------------------------------------------------------------------------


def test_one_memory_both_ways(lm):
    net, again = to_torch(lm), to_torch(lm)
    assert all(x is again.get_parameter(name) is lm.params[name] for name, x in net.named_parameters())
    before = lm.logits(IDS)
    with torch.no_grad():
        net.model.norm.weight += 1
    assert np.abs(lm.logits(IDS) - before).max() > 0.1
    np.testing.assert_allclose(lm.logits(IDS), net(IDS).logits.detach(), atol=1e-4)
    assert np.allclose(lm.logits(IDS), again(IDS).logits.detach(), atol=1e-4)


def test_a_plain_loop_changes_what_the_task_says(lm):
    """Trained on one sentence, it says it."""
    sentence = "The river runs past the old mill and under the bridge."
    before = lm.generate("The river", max_new_tokens=12)
    ids = torch.tensor(lm.tokenizer.encode(sentence))
    loader = torch.utils.data.DataLoader([{"input_ids": ids, "labels": ids}] * 40, batch_size=4, shuffle=True)
    net = to_torch(lm).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    losses = []
    for _ in range(3):
        for batch in loader:
            optimizer.zero_grad()
            loss = net(**batch).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    assert losses[-1] < 0.1 < 3 < losses[0]
    said = lm.generate("The river", max_new_tokens=12)
    assert said != before and said.startswith(" runs past the old mill")


def test_moving_the_module_moves_the_task(lm):
    net = to_torch(lm)
    wanted = net(IDS).logits
    assert net.to(torch.bfloat16) is net and net.dtype == torch.bfloat16 and lm.dtype == "bfloat16"
    assert {x.dtype for x in lm.params.values()} == {torch.bfloat16}
    assert net(IDS).logits.dtype == torch.float32
    close(net(IDS).logits, wanted, 0.1)
    np.testing.assert_allclose(lm.logits(IDS), net(IDS).logits.detach(), atol=0.3)
    assert lm.generate("The river", max_new_tokens=4) is not None
    net.half()
    assert lm.dtype == "float16" and net.device.type == lm.device == "cpu"
    close(net(IDS).logits, wanted, 0.1)
    lm.params = {name: x.detach().float() for name, x in lm.params.items()}
    net.bfloat16()  # has nothing to do with the task any more
    assert {x.dtype for x in lm.params.values()} == {torch.float32}


def test_what_the_task_has_got_since_goes_along(lm):
    net = to_torch(lm)
    lm.enable_lora(rank=2)
    net.bfloat16()
    assert lm.dtype == "bfloat16" and all(x is lm.params[name] for name, x in net.named_parameters())
    assert {x.dtype for name, x in lm.params.items() if ".lora." in name} == {torch.float32}
    np.testing.assert_allclose(lm.logits(IDS), net(IDS).logits.detach(), atol=0.3)
    assert lm.generate("The river", max_new_tokens=4) is not None
    name = "model.layers.0.mlp.up_proj.weight"
    lm.params = lm.params | {name: lm.params[name].detach().clone()}
    net.float()
    assert lm.dtype == "float32" and {x.dtype for x in lm.params.values()} == {torch.float32}


def test_copies_are_nobodys(lm):
    net = to_torch(lm)
    copied = copy.deepcopy(net)
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for other in (copied, loaded):
        close(other(IDS).logits, net(IDS).logits, 1e-6)
        with torch.no_grad():
            other.model.norm.weight += 1
        assert (other(IDS).logits - net(IDS).logits).abs().max() > 0.1
        other.half()
    assert lm.dtype == "float32" and next(net.parameters()).dtype == torch.float32


@pytest.mark.parametrize("backend", ["jax", "numpy", "tensorflow"])
def test_tasks_of_other_backends_are_moved(tiny_preset, backend):
    lm = CausalLM.from_preset(str(tiny_preset), backend=backend, device="cpu", dtype="float32")
    kept, wanted = dict(lm.params), lm.logits(IDS)
    net = to_torch(lm)
    assert lm.backend == "torch"
    np.testing.assert_allclose(net(IDS).logits.detach(), wanted, atol=1e-4)
    before = {name: np.array(x) for name, x in kept.items()}
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.fill_(7)
    assert all(np.array_equal(np.array(x), before[name]) for name, x in kept.items())


# --- modules ----------------------------------------------------------------------------------------------------------


def test_it_is_a_tree_of_torch_layers(lm):
    net = to_torch(lm)
    layer = net.model.layers[0].self_attn.q_proj
    assert isinstance(layer, torch.nn.Linear) and isinstance(layer, nn.Linear) and isinstance(layer, TorchModule)
    assert (layer.in_features, layer.out_features, layer.bias, layer.lora) == (32, 32, None, None)
    table = net.get_input_embeddings()
    assert isinstance(table, torch.nn.Embedding) and (table.num_embeddings, table.embedding_dim) == (400, 32)
    assert isinstance(net.model.layers, torch.nn.ModuleList) and len(net.model.layers) == 2
    assert "q_proj): Linear(in_features=32, out_features=32, bias=False)" in repr(net)
    x = torch.randn(2, 5, 32)
    mlp = net.model.layers[0].mlp
    gate = torch.nn.functional.gelu(x @ mlp.gate_proj.weight.T, approximate="tanh")
    close(mlp(x), (gate * (x @ mlp.up_proj.weight.T)) @ mlp.down_proj.weight.T)
    assert net in {net} and net != copy.deepcopy(net)


def test_hooks(lm):
    net = to_torch(lm)
    wanted, seen = net(IDS).logits, []
    layer, block = net.model.layers[1].mlp.up_proj, net.model.layers[0]
    handles = [
        layer.register_forward_hook(lambda module, args, y: seen.append((args, y))),
        block.register_forward_pre_hook(lambda module, args: seen.append(args)),
        block.register_full_backward_hook(lambda module, before, after: seen.append(after)),
    ]
    net(IDS, labels=IDS).loss.backward()
    into_block, (into_layer, y), gradient = seen
    assert into_block[0].shape == (3, 20, 32) and gradient[0].shape == (3, 20, 32)
    assert len(into_layer) == 1 and into_layer[0].shape == (3, 20, 32) and y.shape == (3, 20, 64)
    for handle in handles:
        handle.remove()
    reversed_ = layer.register_forward_hook(lambda module, args, y: -y)
    assert (net(IDS).logits - wanted).abs().max() > 0.1
    reversed_.remove()
    halved = layer.register_forward_pre_hook(lambda module, args: (args[0] * 0,))
    assert (net(IDS).logits - wanted).abs().max() > 0.1
    halved.remove()
    close(net(IDS).logits, wanted, 1e-6)


class Reversed(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return -self.inner(x)


def test_layers_of_ones_own_in_any_place(lm):
    net = to_torch(lm)
    block = net.model.layers[0]
    linear = torch.nn.Linear(32, 64, bias=False)
    with torch.no_grad():
        linear.weight.copy_(-block.mlp.up_proj.weight)
    wanted = net(IDS).logits
    block.mlp.up_proj = linear
    assert isinstance(linear, torch.nn.Linear) and (net(IDS).logits - wanted).abs().max() > 0.1
    block.mlp = Reversed(torch.nn.Sequential(block.mlp))
    close(net(IDS).logits, wanted)
    net(IDS, labels=IDS).loss.backward()
    assert linear.weight.grad.abs().max() > 0
    assert linear(torch.ones(1, 32)).shape == (1, 64)
    skipped = torch.nn.Identity()
    skipped.forward = lambda x, context, index: x
    net.model.layers[1] = skipped
    net.model.layers[0] = skipped
    net.model.layers.append(copy.deepcopy(skipped))
    x = net.model.norm(net.model.embed_tokens(IDS) * 32**0.5)
    close(net(IDS).logits, x @ net.model.embed_tokens.weight.T, 1e-3)


def test_a_single_module():
    mlp = nn.LayerNorm.abstract(8, 1e-5)
    net = to_torch(mlp)
    x = torch.randn(2, 3, 8)
    assert isinstance(net, torch.nn.LayerNorm) and dict(net.named_parameters()).keys() == {"weight", "bias"}
    close(net(x), torch.nn.functional.layer_norm(x, (8,)))

    @dataclasses.dataclass
    class Gated(nn.Module):
        inner: nn.Linear
        scales: list
        gate: Any = None
        factor: float = 2.0

        def __call__(self, xp, x):
            y = self.inner(xp, x) * self.scales[0] * self.factor
            return y if self.gate is None else xp.sigmoid(self.gate) * y

    tensors = torch.randn(8, 8), torch.tensor(3.0), torch.randn(8)
    for gate in (None, tensors[2]):
        net = to_torch(Gated(nn.Linear(tensors[0]), [tensors[1]], gate))
        wanted = x @ tensors[0].T * 6
        close(net(x), wanted if gate is None else torch.sigmoid(gate) * wanted)
        names = {"inner.weight", "scales.0", *(("gate",) if gate is not None else ())}
        assert net.state_dict().keys() == names
    net.factor = 4.0
    close(net(x), torch.sigmoid(tensors[2]) * wanted * 2)


def test_a_layer_of_a_task_is_a_copy(tiny_preset):
    """Its arrays may be those of another framework, and what the task keeps of a prompt was made with them."""
    lm = CausalLM.from_preset(str(tiny_preset), backend="jax", device="cpu", dtype="float32")
    kept = dict(lm.params)
    before = {name: np.array(x) for name, x in kept.items()}
    lm.to("torch")
    wanted = lm.logits(IDS)
    with torch.no_grad():
        for parameter in to_torch(lm.backbone.module.model.layers[0]).parameters():
            parameter.add_(1)
    assert all((np.asarray(x) == before[name]).all() for name, x in kept.items())
    np.testing.assert_array_equal(lm.logits(IDS), wanted)
    net = to_torch(lm)  # live: its Parameters stay what they are
    norm = net.model.norm.requires_grad_(False)
    single = to_torch(lm.backbone.module.model.norm)
    assert single.weight is norm.weight and not norm.weight.requires_grad


def test_what_is_frozen_stays_frozen(lm):
    net = to_torch(lm).requires_grad_(False)
    net.model.norm.requires_grad_(True)
    to_torch(lm.backbone)
    assert [name for name, x in net.named_parameters() if x.requires_grad] == ["model.norm.weight"]
    lm.enable_lora(rank=2)  # the task's own choice
    names = [name for name, x in to_torch(lm).named_parameters() if x.requires_grad]
    assert names == lm.backbone.trainable_names()
    lm.set_adapter(None)
    assert all(x.requires_grad for x in to_torch(lm).parameters())


def test_dropout_of_an_adapter(lm):
    lm.enable_lora(rank=4, dropout=0.5)
    net = to_torch(lm)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    quiet = net(IDS).logits
    close(net(IDS).logits, quiet, 1e-7)
    net.train()

    def noisy(seed):
        torch.manual_seed(seed)
        return net(IDS).logits

    assert torch.equal(noisy(1), noisy(1)) and not torch.equal(noisy(1), noisy(2))
    assert not torch.equal(noisy(1), quiet)
    close(net.eval()(IDS).logits, quiet, 1e-7)


def test_dropout_is_the_same_when_blocks_are_recomputed(lm):
    lm.enable_lora(rank=4, dropout=0.5)
    net, found = to_torch(lm).train(), []
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    for recomputed in (False, True):
        net.is_gradient_checkpointing = recomputed
        torch.manual_seed(3)
        found.append(gradients(net, net(IDS, labels=IDS).loss))
    assert all(torch.allclose(found[0][name], x, atol=1e-6) for name, x in found[1].items())


def test_without_dropout_nothing_is_drawn(lm):
    net = to_torch(lm).train()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    net(IDS, labels=IDS).loss.backward()
    assert torch.equal(torch.get_rng_state(), before)


def test_dropout_of_an_encoder(tmp_path):
    config = transformers.ViTConfig(
        **SMALL, intermediate_size=48, hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.1
    )
    reference(transformers.ViTForImageClassification, config).save_pretrained(tmp_path)
    transformers.ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(tmp_path)
    net = to_torch(load(tmp_path, ImageClassifier))
    quiet = net(PIXELS).logits
    net.train()
    torch.manual_seed(0)
    one, other = net(PIXELS).logits, net(PIXELS).logits
    torch.manual_seed(0)
    assert torch.equal(net(PIXELS).logits, one) and not torch.equal(one, other) and not torch.equal(one, quiet)


def test_own_attention(tiny_preset, lm):
    def blind(q, k, v, mask, scale):
        return 0 * q

    own = CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu", attention=blind)
    found = to_torch(own)(IDS).logits.detach()
    assert (found - to_torch(lm)(IDS).logits).abs().max() > 0.1
    np.testing.assert_allclose(found, own.logits(IDS), atol=1e-4)


def test_gradient_checkpointing(lm):
    net = to_torch(lm).train()
    wanted = gradients(net, net(IDS, labels=IDS).loss)
    calls = []
    net.model.layers[0].register_forward_pre_hook(lambda *_: calls.append(1))
    for options in ({"use_reentrant": True}, {"determinism_check": "none"}):
        with pytest.raises(InputError, match=f"leave {options} out"):
            net.gradient_checkpointing_enable(options)
    assert not net.is_gradient_checkpointing
    net.gradient_checkpointing_enable({"use_reentrant": False})
    found = gradients(net, net(IDS, labels=IDS).loss)
    assert len(calls) == 2 and all(torch.allclose(found[name], x, atol=1e-6) for name, x in wanted.items())
    net.gradient_checkpointing_disable()
    net(IDS, labels=IDS).loss.backward()
    assert len(calls) == 3


# --- bad input --------------------------------------------------------------------------------------------------------


def test_bad_input(lm):
    with pytest.raises(InputError, match="expected a CausalLM.*got builtins.dict"):
        to_torch({"weights": 1})
    net = to_torch(lm)
    assert to_torch(net) is net
    with pytest.raises(InputError, match=r"input_ids must be called with tensors of torch, got a numpy.ndarray"):
        net(IDS.numpy())
    with pytest.raises(InputError, match=r"input_ids must be of shape \(batch, time\), got \(20,\)"):
        net(IDS[0])
    with pytest.raises(InputError, match=r"attention_mask must be .* got \(1, 1, 20, 20\)"):
        net(IDS, torch.ones(1, 1, 20, 20).tril())
    with pytest.raises(InputError, match=r"attention_mask must be .* got \(20,\)"):
        net(IDS, MASK[0])
    with pytest.raises(InputError, match=r"position_ids must be .* got \(20,\)"):
        net(IDS, position_ids=torch.arange(20))
    with pytest.raises(InputError, match="got torch.float32"):
        net(IDS.float())
    with pytest.raises(InputError, match="no embeddings"):
        net(IDS, output_hidden_states=True)
    with pytest.raises(InputError, match="Linear must be called with tensors"):
        net.model.layers[0].mlp.up_proj(np.ones((2, 32)))
    with pytest.raises(InputError, match="labels must be integers"):
        net(IDS, labels=IDS[:, :5])
    assert net(IDS).logits.isfinite().all()


def test_without_torch():
    program = (
        "import sys, modelhub; sys.modules['torch'] = None\n"
        "try: modelhub.to_torch({})\n"
        "except modelhub.errors.BackendNotInstalled as error: print(error)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "pip install 'modelhub[torch]'" in done.stdout, done.stderr
