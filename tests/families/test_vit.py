"""ViT and DeiT against transformers, on every backend; what all image encoders share."""

import dataclasses
import functools

import image_parity
import numpy as np
import pytest
import torch
import transformers
from image_parity import (
    SMALL,
    assert_close,
    assert_equal_insides,
    assert_equal_models,
    load,
    pixels,
    run_ours,
    save,
)
from text_parity import reference

from modelhub.core import vision
from modelhub.core.backends import get_backend, installed
from modelhub.core.tree import bind, check, flatten, initial_value
from modelhub.errors import ConfigError, InputError
from modelhub.families import family_of
from modelhub.families.vit import Config, Model, names

VIT = SMALL | {"intermediate_size": 48}
CASES = {
    "vit": (transformers.ViTForImageClassification, transformers.ViTConfig, VIT),
    "vit_oblong": (
        transformers.ViTForImageClassification, transformers.ViTConfig,
        VIT | {"image_size": (8, 12), "qkv_bias": False, "hidden_act": "quick_gelu", "num_channels": 1},
    ),
    "deit": (transformers.DeiTForImageClassification, transformers.DeiTConfig, VIT),
    "deit_teacher": (transformers.DeiTForImageClassificationWithTeacher, transformers.DeiTConfig, VIT),
}  # fmt: skip
HEADLESS = {
    "vit": (transformers.ViTModel, transformers.ViTConfig),
    "deit": (transformers.DeiTModel, transformers.DeiTConfig),
}


@functools.cache
def their_model(name):
    model_class, config_class, values = CASES[name]
    return reference(model_class, config_class(**values))


@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """A transformers model and the folder that transformers saved it to."""
    folder = tmp_path_factory.mktemp(request.param)
    their_model(request.param).save_pretrained(folder)
    return their_model(request.param), folder


@pytest.fixture(scope="module")
def ours(case, backend):
    return load(case[1], backend)


def trained_size(config):
    height, width = (config.image_size,) * 2 if isinstance(config.image_size, int) else config.image_size
    return pixels(height, width, channels=config.num_channels)


def test_trained_size(case, ours):
    assert_equal_models(ours, case[0], trained_size(ours.config))


def test_hidden_states_and_attention_maps(case, ours):
    assert_equal_insides(ours, case[0], trained_size(ours.config))


def test_another_size(case, ours):
    theirs, images = case[0], pixels(24, 12, channels=ours.config.num_channels)
    if ours.config.image_size == 16:
        assert_equal_models(ours, theirs, images, interpolate_pos_encoding=True)
    else:  # transformers takes every grid of positions for a square
        assert_equal_models(ours, made_for(theirs, ours.config.grid, (24, 12)), images)


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


@pytest.mark.parametrize("kind", HEADLESS)
def test_without_a_head(kind, backend, tmp_path):
    model_class, config_class = HEADLESS[kind]
    theirs = reference(model_class, config_class(**VIT))
    theirs.save_pretrained(tmp_path / "theirs")
    ours = load(tmp_path / "theirs", backend)
    assert ours.config.num_labels == 0 and "classifier.weight" not in ours.params
    wanted = image_parity.run_theirs(theirs, pixels(16, 16)).last_hidden_state
    found = run_ours(ours, pixels(16, 16))
    assert_close(found["last_hidden_state"], wanted)
    assert_close(found["pooled"], wanted[:, 0])
    save(ours, tmp_path / "ours")
    again = model_class.from_pretrained(tmp_path / "ours", add_pooling_layer=False)
    with torch.no_grad():
        assert_close(found["last_hidden_state"], again.eval()(torch.tensor(pixels(16, 16))).last_hidden_state)


def test_saved_models_load_in_transformers(case, tmp_path):
    theirs, folder = case
    save(load(folder, get_backend("numpy")), tmp_path / "saved")
    model = image_parity.read_by_transformers(type(theirs), tmp_path / "saved")
    assert model.config.id2label == theirs.config.id2label and model.config.label2id == theirs.config.label2id
    for (name, found), wanted in zip(model.state_dict().items(), theirs.state_dict().values(), strict=True):
        assert torch.equal(found, wanted), name


@pytest.mark.parametrize("name", CASES)
def test_names_in_memory(name):
    """transformers 5's state_dict has names of its own, with the prefix and without."""
    theirs = their_model(name)
    config = Config.from_hf(theirs.config.to_dict() | {"architectures": [type(theirs).__name__]})
    mapping, shapes = names("hf", config), {}
    for stored, tensor in theirs.state_dict().items():
        prefix = f"{theirs.base_model_prefix}."
        renamed = mapping.to_ours(stored)[0]
        assert mapping.to_ours(stored.removeprefix(prefix))[0] == renamed
        shapes[renamed] = tuple(tensor.shape)
    check(Model.abstract(config), shapes, name)


def test_gradients_are_those_of_autograd(tmp_path):
    theirs = their_model("vit")
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


OWN = VIT | {"model_type": "vit", "num_labels": 3}
BARE = OWN | {"modelhub": {"class_token": False, "pooling": "mean", "classifier_dropout": 0.5}}


def test_no_class_token(backend, tmp_path):
    """Against the parts of transformers' ViT, put together without the token."""
    theirs = their_model("vit")
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
    their_model("vit").save_pretrained(tmp_path)
    ours = load(tmp_path, get_backend(name, "cpu"))
    wanted, calls, fn = run_ours(ours, pixels(16, 16), collect=False), [], their_attention(name)

    def counting(*args, **options):
        calls.append(args[0].shape)
        return fn(*args, **options)

    ours.xp = ours.xp.with_attention(counting)
    assert_close(run_ours(ours, pixels(16, 16), collect=False)["logits"], wanted["logits"], 1e-5)
    assert calls == [(2, 4, 17, 8)] * 2


@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name):
    _, config_class, values = CASES[name]
    theirs = config_class(**values, architectures=[CASES[name][0].__name__])
    config = Config.from_hf(theirs.to_dict())
    assert config.id2label == {0: "cat", 1: "dog", 2: "fish"} and config.num_labels == 3
    assert Config.from_hf(config.to_hf()) == config and config.architecture == CASES[name][0].__name__
    again = config_class(**config.to_hf())
    for key in ("hidden_size", "layer_norm_eps", "qkv_bias", "hidden_act", "id2label", "num_labels", "num_channels"):
        assert getattr(again, key) == getattr(theirs, key), key


BASE = {
    "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "image_size": 224,
    "patch_size": 16, "hidden_act": "gelu", "qkv_bias": True, "encoder_stride": 16, "layer_norm_eps": 1e-12,
    "id2label": {str(index): f"class {index}" for index in range(1000)},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "parameters"),
    [  # as their papers and transformers' models have them
        ({"model_type": "vit", "architectures": ["ViTForImageClassification"]}, 86_567_656),
        ({"model_type": "deit", "architectures": ["DeiTForImageClassificationWithTeacher"]}, 87_338_192),
        ({"model_type": "vit", "modelhub": {"class_token": False, "pooling": "mean"}}, 86_566_120),
    ],
)
def test_parameters_of_base_models(changes, parameters):
    specs = flatten(Model.abstract(Config.from_hf(BASE | changes)))
    assert sum(np.prod(spec.shape) for spec in specs.values()) == parameters


def test_two_labels_that_transformers_leaves_out():
    data = {"model_type": "vit", "architectures": ["ViTForImageClassification"]}
    assert Config.from_hf(data).num_labels == 2
    assert Config.from_hf(data | {"architectures": ["ViTModel"]}).num_labels == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"head_dim": 16}, "head_dim=16"),
        ({"hidden_act": "mish"}, "'mish' is not supported"),
        ({"hidden_size": 30}, "no multiple of 4 heads"),
        ({"image_size": 18}, "image_size 18 is no multiple of patch_size 4"),
        ({"image_size": "16"}, r"image_size\[0\]='16'"),
        ({"patch_size": [4, 0]}, r"patch_size\[1\]=0"),
        ({"hidden_dropout_prob": 1.0, "qkv_bias": "no"}, "hidden_dropout_prob=1.0.*qkv_bias must be true or false"),
        ({"layer_norm_eps": 0}, "layer_norm_eps=0"),
        ({"modelhub": {"class_token": False}}, "needs a class token"),
        ({"modelhub": {"pooling": "max"}}, "pooling='max' must be one of cls, mean"),
        ({"modelhub": {"pooling": "none"}}, "one vector per image"),
        ({"modelhub": {"colour": 1}}, "no keys but class_token"),
        ({"id2label": ["cat", "dog"]}, "id2label must be an object"),
        ({"model_type": "deit", "modelhub": {"pooling": "mean"}}, "other poolings are for vit"),
        ({"model_type": "beit"}, "'beit' is not of this family"),
    ],
)
def test_bad_configs_raise(changes, says):
    with pytest.raises(ConfigError, match=says):
        Config.from_hf(OWN | changes)


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
