"""What people use around torch models, on those of to_torch: torch.compile, torch.export, DDP, FSDP2, PEFT, the Trainer."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import peft
import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.utils import prune

from modelhub import CausalLM, ImageClassifier, to_torch
from modelhub.errors import InputError

IDS = torch.tensor(np.random.default_rng(0).integers(4, 400, (2, 20)))
WORKER = Path(__file__).with_name("torch_worker.py")


def close(found, wanted, tolerance=1e-4):
    """To within `tolerance` of the largest value."""
    assert found.shape == wanted.shape and torch.isfinite(found).all()
    assert (found - wanted).abs().max() <= tolerance * wanted.abs().max() + 1e-7


def gradients(model, **inputs):
    """The loss and {name: gradient}."""
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    found = {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}
    model.zero_grad()
    return loss.detach(), found


def same(found, wanted, tolerance=1e-3):
    (loss, ours), (wanted_loss, theirs) = found, wanted
    torch.testing.assert_close(loss, wanted_loss, rtol=1e-4, atol=1e-5)
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        close(ours[name], gradient, tolerance)


@pytest.fixture
def lm(tiny_preset):
    return CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu", dtype="float32")


@pytest.fixture
def clf():
    return ImageClassifier.from_preset("vit_tiny_fashion", backend="torch", device="cpu", dtype="float32")


def images(clf, count=2):
    shape = clf.config.num_channels, clf.config.image_size, clf.config.image_size
    return torch.tensor(np.random.default_rng(0).standard_normal((count, *shape)), dtype=torch.float32)


# --- torch.compile, torch.export, torch.func --------------------------------------------------------------------------


@pytest.fixture
def compiled():
    torch._dynamo.reset()
    yield lambda net, backend="aot_eager", **more: torch.compile(net, fullgraph=True, backend=backend, **more)
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_compiled_whole(lm, compiled, training):
    """An adapter with dropout too: its random numbers are part of the graph."""
    lm.enable_lora(rank=2, dropout=0.3)
    net = to_torch(lm).train(training)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    fast = compiled(net)
    mask = torch.ones_like(IDS)
    mask[0, 15:] = 0
    torch.manual_seed(0)
    found = gradients(fast, input_ids=IDS, attention_mask=mask, labels=IDS)
    torch.manual_seed(0)
    wanted = gradients(net, input_ids=IDS, attention_mask=mask, labels=IDS)
    same((found[0], {name.removeprefix("_orig_mod."): x for name, x in found[1].items()}), wanted)
    assert not training or not torch.equal(fast(IDS).logits, fast(IDS).logits)


@pytest.mark.slow
def test_compiled_for_any_size(lm, compiled):
    net = to_torch(lm)
    count = torch._dynamo.testing.CompileCounter()
    fast = compiled(net, count, dynamic=True)
    for batch, time in ((2, 20), (3, 11), (4, 33)):
        ids = torch.randint(4, 400, (batch, time))
        close(fast(ids).logits, net(ids).logits)
    assert count.frame_count == 1


@pytest.mark.slow
def test_compiled_block_by_block(lm, compiled):
    net = to_torch(lm)
    wanted = gradients(net, input_ids=IDS, labels=IDS)
    net.model.layers[0].compile(fullgraph=True, backend="aot_eager")
    net.model.layers[1] = compiled(net.model.layers[1])
    loss, found = gradients(net, input_ids=IDS, labels=IDS)
    same((loss, {name.replace("_orig_mod.", ""): x for name, x in found.items()}), wanted)


@pytest.mark.slow
def test_compiled_in_bfloat16(lm, compiled):
    net = to_torch(lm).bfloat16()
    close(compiled(net)(IDS).logits, net(IDS).logits, 0.02)


INDUCTOR = """
import sys, torch
from modelhub import CausalLM, to_torch

def found(model):
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), [x.grad for x in net.parameters()]

ids = torch.arange(40).reshape(2, 20) * 7919 % 400
net = to_torch(CausalLM.from_preset(sys.argv[1], backend="torch", device="cpu", dtype="float32"))
wanted = found(net)
net.zero_grad()
torch.testing.assert_close(found(torch.compile(net, fullgraph=True)), wanted, rtol=1e-3, atol=1e-4)
print("equal")
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor takes a C++ compiler")
def test_inductor(tiny_preset):
    """In a process of its own: it does not take distutils as other libraries have imported it."""
    done = subprocess.run([sys.executable, "-c", INDUCTOR, str(tiny_preset)], capture_output=True, text=True)
    assert done.stdout == "equal\n", done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("enlarged", [False, True])
def test_images_compiled(clf, compiled, enlarged):
    net = to_torch(clf)
    pixels = images(clf)
    if enlarged:  # the position embeddings are resized
        pixels = torch.nn.functional.interpolate(pixels, scale_factor=2)
    close(compiled(net)(pixels).logits, net(pixels).logits)


@pytest.mark.slow
@pytest.mark.parametrize("strict", [False, True])
def test_exported_for_any_size(lm, tmp_path, strict):
    net = to_torch(lm)
    batch, time = torch.export.Dim("batch", max=64), torch.export.Dim("time", min=2, max=128)
    shapes = {"input_ids": {0: batch, 1: time}, "attention_mask": {0: batch, 1: time}}
    inputs = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    program = torch.export.export(net, (), inputs, dynamic_shapes=shapes, strict=strict)
    torch.export.save(program, tmp_path / "lm.pt2")
    run = torch.export.load(tmp_path / "lm.pt2").module()
    ids = torch.randint(4, 400, (5, 37))
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    found = run(input_ids=ids, attention_mask=mask)
    close(found.logits[mask == 1], net(ids, mask).logits[mask == 1])


@pytest.mark.parametrize("strict", [False, True])
def test_images_exported(clf, strict):
    net = to_torch(clf)
    shapes = {"pixel_values": {0: torch.export.Dim("batch")}}
    program = torch.export.export(net, (images(clf),), dynamic_shapes=shapes, strict=strict)
    close(program.module()(images(clf, 5)).logits, net(images(clf, 5)).logits)


def test_functional_call(lm):
    net = to_torch(lm)
    params = {name: x.detach() for name, x in net.named_parameters()}

    def loss(params, ids):
        return torch.func.functional_call(net, params, (ids[None],), {"labels": ids[None]}).loss

    _, wanted = gradients(net, input_ids=IDS[:1], labels=IDS[:1])
    for training in (False, True):  # nothing drops, so nothing is drawn, which vmap would not allow
        net.train(training)
        found = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, IDS)
        for name, gradient in wanted.items():
            close(found[name][0], gradient, 1e-3)


def test_tools_of_torch_nn_utils(lm):
    net = to_torch(lm)
    before = net(IDS).logits
    average = torch.optim.swa_utils.AveragedModel(net)
    mlp = net.model.layers[0].mlp
    torch.nn.utils.parametrizations.weight_norm(mlp.up_proj)
    close(net(IDS).logits, before)
    prune.l1_unstructured(mlp.gate_proj, "weight", 0.5)
    assert (net(IDS).logits - before).abs().max() > 0.01
    _, found = gradients(net, input_ids=IDS, labels=IDS)
    assert found["model.layers.0.mlp.gate_proj.weight_orig"].eq(0).float().mean() >= 0.5
    close(average(IDS).logits, before, 1e-6)


# --- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_ddp_and_fsdp2(tiny_preset, tmp_path, lm):
    """Two processes with half of the rows each: the loss and the gradients of one with all of them."""
    sys.path.insert(0, str(WORKER.parent))
    try:
        from torch_worker import IDS as ROWS
    finally:
        sys.path.remove(str(WORKER.parent))
    output = tmp_path / "found.pt"
    command = [sys.executable, str(WORKER), str(tiny_preset)]
    others = ["2", str(tmp_path / "meeting"), str(output)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [subprocess.Popen([*command, str(rank), *others], env=environment) for rank in range(2)]
    try:
        assert [process.wait(120) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
    found = torch.load(output)
    net = to_torch(lm)
    wanted = gradients(net, input_ids=ROWS, labels=ROWS)
    same(found["ddp"], wanted)
    same(found["fsdp"], wanted)
    net(ROWS, labels=ROWS).loss.backward()
    torch.optim.AdamW(net.parameters(), lr=1e-2).step()
    torch.testing.assert_close(found["after a step"][0], net(ROWS, labels=ROWS).loss, rtol=1e-3, atol=1e-4)


def test_checkpoint_wrapper(lm):
    net = to_torch(lm)
    wanted, calls = gradients(net, input_ids=IDS, labels=IDS), []
    block = net.model.layers[0]
    block.register_forward_pre_hook(lambda *_: calls.append(1))
    apply_activation_checkpointing(net, check_fn=lambda module: type(module) is type(block))
    assert net.model.layers[0] is not block
    loss, found = gradients(net, input_ids=IDS, labels=IDS)
    assert len(calls) == 2
    same((loss, {name.replace("_checkpoint_wrapped_module.", ""): x for name, x in found.items()}), wanted)


# --- PEFT -------------------------------------------------------------------------------------------------------------


def with_noise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0.0, 0.3)
    return model


LORA = {
    "usual": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "lora_dropout": 0.1},
    "dora": {"r": 2, "target_modules": "all-linear", "use_dora": True},
}


@pytest.mark.parametrize("case", LORA)
def test_peft_wraps_text(lm, tiny_preset, tmp_path, case):
    net = to_torch(lm)
    before = net(IDS).logits
    model = with_noise(peft.get_peft_model(net, peft.LoraConfig(task_type="CAUSAL_LM", **LORA[case])))
    layer = net.model.layers[1].self_attn.q_proj
    assert isinstance(layer, peft.tuners.lora.Linear) and isinstance(layer.base_layer, torch.nn.Linear)
    _, found = gradients(model.train(), input_ids=IDS, attention_mask=torch.ones_like(IDS), labels=IDS)
    assert found and all("lora_" in name and x.abs().max() > 0 for name, x in found.items())
    changed = model.eval()(input_ids=IDS).logits
    assert (changed - before).abs().max() > 0.1
    with model.disable_adapter():
        close(model(input_ids=IDS).logits, before, 1e-6)
    # The same adapter on the transformers class gives the same.
    model.save_pretrained(tmp_path / "adapter")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_preset, dtype=torch.float32)
    close(peft.PeftModel.from_pretrained(theirs, tmp_path / "adapter")(IDS).logits, changed)
    # And so does ours.
    other = CausalLM.from_preset(str(tiny_preset), backend="torch")
    other.load_adapter(tmp_path / "adapter")
    close(torch.tensor(other.logits(IDS)), changed.detach())
    merged = model.merge_and_unload()
    assert merged is net and not isinstance(net.model.layers[1].self_attn.q_proj, peft.tuners.lora.LoraLayer)
    close(net(IDS).logits, changed)
    close(torch.tensor(lm.logits(IDS)), changed.detach())  # merged in place: the task's own weights


def test_peft_on_embeddings(lm, tiny_preset, tmp_path):
    model = peft.get_peft_model(to_torch(lm), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(0.0, 0.3)
    changed = model.eval()(IDS).logits
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_preset, dtype=torch.float32)
    close(peft.PeftModel.from_pretrained(theirs, tmp_path).eval()(IDS).logits, changed)


@pytest.mark.parametrize("config", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_peft_by_prompts_is_refused(lm, config):
    model = peft.get_peft_model(to_torch(lm), config(num_virtual_tokens=4, task_type="CAUSAL_LM"))
    with pytest.raises(InputError, match="PEFT's prompt and prefix tuning"):
        model(input_ids=IDS, attention_mask=torch.ones_like(IDS))


def test_modules_that_peft_saves_come_back_by_load_params(lm):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"], task_type="CAUSAL_LM")
    model = with_noise(peft.get_peft_model(to_torch(lm), lora))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(1.0)
    merged = model.merge_and_unload().eval()
    wanted = merged(IDS).logits
    assert np.abs(lm.logits(IDS) - wanted.detach().numpy()).max() > 0.1  # PEFT's copy is trained, not ours
    lm.load_params(merged.state_dict())
    close(torch.tensor(lm.logits(IDS)), wanted.detach())


def test_peft_wraps_images(clf, tmp_path):
    net, pixels = to_torch(clf), images(clf)
    before = net(pixels).logits
    model = with_noise(peft.get_peft_model(net, peft.LoraConfig(r=4, target_modules=["query", "value"])))
    _, found = gradients(model, pixel_values=pixels, labels=torch.tensor([0, 1]))
    assert {name.split(".")[-3] for name in found} == {"lora_A", "lora_B"}
    changed = model(pixels).logits
    assert (changed - before).abs().max() > 0.1
    model.save_pretrained(tmp_path / "adapter")
    other = ImageClassifier.from_preset("vit_tiny_fashion", backend="torch", device="cpu", dtype="float32")
    other.load_adapter(tmp_path / "adapter")
    close(to_torch(other)(pixels).logits, changed)


# --- the Trainer ------------------------------------------------------------------------------------------------------


def trained(net, data, tmp_path, **options):
    """The log of 20 steps on one CPU."""
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path / "trainer"), max_steps=20, per_device_train_batch_size=4, logging_steps=1,
        report_to=[], use_cpu=True, disable_tqdm=True, seed=0, lr_scheduler_type="constant", **options,
    )  # fmt: skip
    trainer = transformers.Trainer(model=net, args=arguments, train_dataset=data, eval_dataset=data[:6])
    trainer.train()
    return trainer, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.fixture(scope="module")
def sentences():
    rng = np.random.default_rng(0)
    rows = []
    for number in range(16):
        ids = torch.tensor((rng.integers(4, 400) + 3 * np.arange(24)) % 396 + 4)
        labels = ids.clone()
        labels[: 4 + number % 8] = -100
        rows.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels})
    return rows


@pytest.mark.slow
def test_trainer(lm, sentences, tmp_path, tiny_preset):
    trainer, losses = trained(to_torch(lm), sentences, tmp_path, learning_rate=1e-2)
    assert len(losses) == 20 and losses[-1] < 0.6 * losses[0]
    ids = torch.stack([row["input_ids"] for row in sentences])
    labels = torch.stack([row["labels"] for row in sentences])
    logits = torch.tensor(lm.logits(ids))[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten())
    assert loss < 0.6 * losses[0]  # the task has learned it
    found = trainer.evaluate()
    assert 0 < found["eval_loss"] < losses[0]
    assert trainer.predict(sentences[:6]).predictions.shape == (6, 24, 400)
    trainer.save_model(str(tmp_path / "saved"))
    (tmp_path / "saved" / "config.json").write_text((tiny_preset / "config.json").read_text())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float32)
    close(theirs(ids).logits, torch.tensor(lm.logits(ids)))


@pytest.mark.slow
def test_trainer_accumulates_and_recomputes(tiny_preset, sentences, tmp_path):
    """As on the transformers class, loss for loss: the labels of a step are counted over all of its batches."""
    options = {"gradient_accumulation_steps": 2, "learning_rate": 1e-3, "gradient_checkpointing": True}
    lm = CausalLM.from_preset(str(tiny_preset), backend="torch", device="cpu", dtype="float32")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_preset, dtype=torch.float32)
    (_, found), (_, wanted) = (trained(net, sentences, tmp_path, **options) for net in (to_torch(lm), theirs))
    np.testing.assert_allclose(found, wanted, rtol=1e-3)


def test_trainer_with_label_smoothing(lm, tiny_preset, sentences, tmp_path):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny_preset, dtype=torch.float32)
    options = transformers.TrainingArguments(str(tmp_path), label_smoothing_factor=0.1, report_to=[], use_cpu=True)
    batch = {name: torch.stack([row[name] for row in sentences]) for name in sentences[0]}
    with torch.no_grad():
        found, wanted = (
            transformers.Trainer(model=net.eval(), args=options).compute_loss(net, dict(batch))
            for net in (to_torch(lm), theirs)
        )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_trainer_in_bfloat16(lm, sentences, tmp_path):
    trainer, losses = trained(to_torch(lm), sentences, tmp_path, learning_rate=1e-2, bf16=True)
    assert losses[-1] < 0.6 * losses[0] and lm.dtype == "float32"
    assert trainer.predict(sentences[:6]).predictions.shape == (6, 24, 400)


def test_trainer_with_peft(lm, sentences, tmp_path):
    model = peft.get_peft_model(to_torch(lm), peft.LoraConfig(task_type="CAUSAL_LM", **LORA["usual"]))
    trainer, losses = trained(model, sentences, tmp_path, learning_rate=3e-2)
    assert losses[-1] < 0.95 * losses[0]
    trainer.save_model(str(tmp_path / "adapter"))
    lm.load_adapter(tmp_path / "adapter")
    ids = sentences[0]["input_ids"][None]
    close(torch.tensor(lm.logits(ids)), model.eval()(ids).logits.detach())


def test_trainer_on_images(clf, tmp_path):
    pixels = images(clf, 16)
    data = [{"pixel_values": x, "labels": number % 3} for number, x in enumerate(pixels)]
    trainer, losses = trained(to_torch(clf), data, tmp_path, learning_rate=1e-3, remove_unused_columns=True)
    assert losses[-1] < 0.5 * losses[0]
    assert trainer.predict(data[:6]).predictions.shape == (6, clf.config.num_labels)
