"""ViT and DeiT against transformers, on every backend; what all image encoders share."""

import dataclasses
import functools

import image_parity
import numpy as np
import pytest
import torch
import transformers
from image_parity import SMALL, assert_close, load, pixels, run_ours, save
from image_suite import ImageSuite

from modelhub.core import vision
from modelhub.core.backends import get_backend, installed
from modelhub.core.tree import bind, check, flatten, initial_value
from modelhub.errors import ConfigError, InputError
from modelhub.families import family_of
from modelhub.families.vit import Config, Model, names

VIT = SMALL | {"intermediate_size": 48}
OBLONG = {"image_size": (8, 12), "qkv_bias": False, "hidden_act": "quick_gelu", "num_channels": 1}
OWN = VIT | {"model_type": "vit", "num_labels": 3}
BARE = OWN | {"modelhub": {"class_token": False, "pooling": "mean", "classifier_dropout": 0.5}}
BASE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "image_size": 224,
    "patch_size": 16, "hidden_act": "gelu", "qkv_bias": True, "encoder_stride": 16, "layer_norm_eps": 1e-12,
    "id2label": {str(index): f"class {index}" for index in range(1000)},
}  # fmt: skip
TEACHER = {"model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"]}


class TestViT(ImageSuite):
    cases = {
        "vit": (transformers.ViTForImageClassification, VIT),
        "vit_oblong": (transformers.ViTForImageClassification, VIT | OBLONG),
        "deit": (transformers.DeiTForImageClassification, VIT),
        "deit_teacher": (transformers.DeiTForImageClassificationWithTeacher, VIT),
    }
    headless = {
        "vit": (transformers.ViTModel, {"add_pooling_layer": False}),
        "deit": (transformers.DeiTModel, {"add_pooling_layer": False}),
    }
    published = {  # as their papers and transformers' models have them
        "vit": (BASE | {"model_type": "vit", "architectures": ["ViTForImageClassification"]}, 86_567_656),
        "deit_teacher": (BASE | TEACHER, 87_338_192),
        "no class token": (
            BASE | {"model_type": "vit", "modelhub": {"class_token": False, "pooling": "mean"}},
            86_566_120,
        ),
    }
    refused_from = OWN
    refused = {
        "head_dim=16": {"head_dim": 16},
        "'mish' is not supported": {"hidden_act": "mish"},
        "no multiple of 4 heads": {"hidden_size": 30},
        "image_size 18 is no multiple of patch_size 4": {"image_size": 18},
        r"image_size\[0\]='16'": {"image_size": "16"},
        r"patch_size\[1\]=0": {"patch_size": [4, 0]},
        "hidden_dropout_prob=1.0.*qkv_bias must be true or false": {"hidden_dropout_prob": 1.0, "qkv_bias": "no"},
        "layer_norm_eps=0": {"layer_norm_eps": 0},
        "needs a class token": {"modelhub": {"class_token": False}},
        "pooling='max' must be one of cls, mean": {"modelhub": {"pooling": "max"}},
        "one vector per image": {"modelhub": {"pooling": "none"}},
        "no keys but class_token": {"modelhub": {"colour": 1}},
        "id2label must be an object": {"id2label": ["cat", "dog"]},
        "other poolings are for vit": {"model_type": "deit", "modelhub": {"pooling": "mean"}},
        "'beit' is not of this family": {"model_type": "beit"},
    }

    @classmethod
    def at_size(cls, theirs, config, size):
        if config.image_size == 16:
            return theirs, {"interpolate_pos_encoding": True}
        return made_for(theirs, config.grid, size), {}  # transformers takes every grid of positions for a square


def made_for(theirs, grid, size):
    """The model with its positions resized by torch."""
    state = theirs.state_dict()
    table = state["vit.embeddings.position_embeddings"]
    patches = table[:, 1:].reshape(1, *grid, -1).permute(0, 3, 1, 2)
    patches = torch.nn.functional.interpolate(patches, size=(size[0] // 4, size[1] // 4), mode="bicubic")
    table = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], 1)
    model = type(theirs)(type(theirs.config)(**theirs.config.to_dict() | {"image_size": size})).eval()
    model.load_state_dict(state | {"vit.embeddings.position_embeddings": table})
    return model


def test_gradients_are_those_of_autograd(tmp_path):
    theirs = TestViT.build("vit")
    theirs.save_pretrained(tmp_path)
    ours, xp = load(tmp_path, get_backend("torch", "cpu")), get_backend("torch", "cpu").for_training()
    images, weights = torch.tensor(pixels(16, 16)), torch.tensor(pixels(1, 3, batch=2, channels=1)[:, 0, 0])

    def loss(params, x):
        model = bind(ours.skeleton, params)
        return (torch.log_softmax(model.logits(xp, model.encode(xp, x)), -1) * weights).sum(), None

    (value, _), found = xp.value_and_grad(loss)(ours.params, images)
    wanted = (torch.log_softmax(theirs(images).logits, -1) * weights).sum()
    theirs.zero_grad()
    wanted.backward()
    assert value.item() == pytest.approx(wanted.item(), rel=1e-5)
    for name, parameter in theirs.named_parameters():
        gradient = found[ours.names.to_ours(name)[0]]
        scale = max(parameter.grad.abs().max().item(), 1e-3)  # of key biases it is 0
        assert (gradient - parameter.grad).abs().max().item() <= 1e-4 * scale, name


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize(
    ("old", "new"), [((4, 4), (7, 3)), ((14, 14), (5, 29)), ((3, 8), (1, 8)), ((37, 37), (16, 16))]
)
def test_positions_are_resized_as_by_torch(backend, old, new, antialias):
    table = np.random.default_rng(0).standard_normal((1, old[0] * old[1], 6)).astype(np.float32)
    grid = torch.tensor(table).reshape(1, *old, 6).permute(0, 3, 1, 2)
    wanted = torch.nn.functional.interpolate(grid, size=new, mode="bicubic", align_corners=False, antialias=antialias)
    found = vision.resized(backend, backend.array(table), old, new, antialias)
    assert_close(backend.get(found), wanted.permute(0, 2, 3, 1).reshape(1, -1, 6), 1e-5)


def test_no_class_token(backend, tmp_path):
    """Against the parts of transformers' ViT, put together without the token."""
    theirs = TestViT.build("vit")
    config = Config.from_hf(BARE)
    params = {names("hf", config).to_ours(name)[0]: tensor.numpy() for name, tensor in theirs.state_dict().items()}
    del params["vit.embeddings.cls_token"]
    params["vit.embeddings.position_embeddings"] = params["vit.embeddings.position_embeddings"][:, 1:]
    skeleton = Model.abstract(config)
    check(skeleton, {name: x.shape for name, x in params.items()}, "test")
    folder = tmp_path / "bare"
    ours = image_parity.SimpleNamespace(
        xp=backend, config=config, skeleton=skeleton, params={name: backend.array(x) for name, x in params.items()}
    )
    save(ours, folder)
    again = load(folder, backend)
    assert again.config == config
    with torch.no_grad():
        x = theirs.vit.embeddings.patch_embeddings(torch.tensor(pixels(16, 16)))
        x = x + theirs.vit.embeddings.position_embeddings[:, 1:]
        for layer in theirs.vit.layers:
            x = layer(x)
        pooled = theirs.vit.layernorm(x).mean(1)
        wanted = theirs.classifier(pooled)
    found = run_ours(again, pixels(16, 16))
    assert_close(found["pooled"], pooled)
    assert_close(found["logits"], wanted)
    with pytest.raises(ValueError, match="modelhub_vit"):  # and not other numbers without a word
        transformers.AutoConfig.from_pretrained(folder)


def test_poolings(backend):
    hidden = np.random.default_rng(0).standard_normal((2, 5, 4)).astype(np.float32)
    cls, mean = hidden[:, 0], hidden[:, 2:].mean(1)
    wanted = {"cls": cls, "mean": mean, "cls_mean": np.concatenate([cls, mean], 1), "none": hidden}
    assert set(wanted) == set(vision.POOLINGS)
    for pooling, values in wanted.items():
        assert_close(backend.get(vision.pool(backend, backend.array(hidden), pooling, 2)), values, 1e-6)


KEYS = np.array([7, 8], np.int32)
DROPPING = BARE | {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.2}


def logits_while_training(xp, remat=False):
    config = Config.from_hf(DROPPING)
    skeleton = Model.abstract(config)
    params = {name: xp.array(initial_value(name, spec, 0) * 5) for name, spec in flatten(skeleton).items()}

    def forward(model, x, keys):
        tx = xp.for_training(keys, remat=remat)
        return model.logits(tx, model.encode(tx, x))

    program = xp.compile(forward, skeleton, training=True)
    return xp.get(program(params, xp.array(pixels(16, 16)), xp.array(KEYS)))


@functools.cache
def dropped_by_numpy():
    return logits_while_training(get_backend("numpy"))


@pytest.mark.parametrize("remat", [False, True])
def test_dropout_is_the_same_everywhere(backend, remat):
    assert_close(logits_while_training(backend, remat), dropped_by_numpy())


@pytest.mark.parametrize("rate", ["hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"])
def test_each_rate_drops_something(rate):
    xp = get_backend("numpy")
    plain = dataclasses.replace(
        Config.from_hf(BARE), hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, classifier_dropout=0.0
    )
    params = {n: xp.array(initial_value(n, s, 0) * 5) for n, s in flatten(Model.abstract(plain)).items()}

    def logits(config, tx):
        model = bind(Model.abstract(config), params)
        return model.logits(tx, model.encode(tx, xp.array(pixels(16, 16))))

    training, dropping = xp.for_training(xp.array(KEYS)), dataclasses.replace(plain, **{rate: 0.3})
    assert np.abs(logits(dropping, training) - logits(plain, training)).max() > 1e-3
    np.testing.assert_array_equal(logits(dropping, xp), logits(plain, xp))


def test_dropout_of_attention_weights(backend):
    rate, tokens = 0.25, 64
    rng = np.random.default_rng(0)
    q, k = (backend.array((rng.standard_normal((2, 3, tokens, tokens)) * 0.3).astype(np.float32)) for _ in range(2))
    v = backend.array(np.broadcast_to(np.eye(tokens, dtype=np.float32), (2, 3, tokens, tokens)))
    training = backend.for_training(backend.array(KEYS))
    plain = backend.get(training.attention(q, k, v))
    dropped = backend.get(training.attention(q, k, v, dropout=rate, salt=5))
    kept = dropped != 0
    assert abs(1 - kept.mean() - rate) < 0.01
    np.testing.assert_allclose(dropped[kept], plain[kept] / (1 - rate), rtol=1e-4)
    assert (kept[0] != kept[1]).any() and (kept[0, 0] != kept[0, 1]).any()
    other = backend.get(training.attention(q, k, v, dropout=rate, salt=6))
    assert ((other != 0) != kept).any()
    np.testing.assert_allclose(backend.get(backend.attention(q, k, v, dropout=rate, salt=5)), plain, atol=1e-6)


def their_attention(name):
    if name == "torch":
        return torch.nn.functional.scaled_dot_product_attention
    import jax

    def attention(q, k, v, mask, *, scale):
        assert mask is None
        return jax.nn.dot_product_attention(*(x.swapaxes(1, 2) for x in (q, k, v)), scale=scale).swapaxes(1, 2)

    return attention


@pytest.mark.parametrize("name", [name for name in ("torch", "jax") if name in installed()])
def test_own_attention(name, tmp_path):
    TestViT.build("vit").save_pretrained(tmp_path)
    ours = load(tmp_path, get_backend(name, "cpu"))
    wanted, calls, fn = run_ours(ours, pixels(16, 16), collect=False), [], their_attention(name)

    def counting(*args, **options):
        calls.append(args[0].shape)
        return fn(*args, **options)

    ours.xp = ours.xp.with_attention(counting)
    assert_close(run_ours(ours, pixels(16, 16), collect=False)["logits"], wanted["logits"], 1e-5)
    assert calls == [(2, 4, 17, 8)] * 2


def test_two_labels_that_transformers_leaves_out():
    data = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    assert Config.from_hf(data).num_labels == 2
    assert Config.from_hf(data | {"architectures": ["ViTModel"]}).num_labels == 0


@pytest.mark.parametrize(
    ("shape", "says"),
    [
        ((2, 1, 16, 16), r"\(2, 1, 16, 16\); the model takes images of 3 channels"),
        ((3, 16, 16), r"got \(3, 16, 16\)"),
        (
            (1, 3, 18, 16),
            "18 x 16 pixels, which patches of 4 x 4 do not divide; resize or crop it, for example to 16 x 16",
        ),
        ((1, 3, 16, 2), "for example to 16 x 4"),
    ],
)
def test_images_that_do_not_fit_raise(shape, says):
    xp, config = get_backend("numpy"), Config.from_hf(OWN)
    skeleton = Model.abstract(config)
    model = bind(skeleton, {name: initial_value(name, spec, 0) for name, spec in flatten(skeleton).items()})
    with pytest.raises(InputError, match=says):
        model.encode(xp, np.zeros(shape, np.float32))


def test_logits_without_a_head_raise():
    config = Config.from_hf(OWN | {"architectures": ["ViTModel"]})
    with pytest.raises(ConfigError, match="no classification head"):
        Model.abstract(config).logits(get_backend("numpy"), np.zeros((1, 17, 32), np.float32))


def test_the_registry_knows_them():
    assert family_of("deit").Model is Model and family_of("modelhub_vit").Config is Config
