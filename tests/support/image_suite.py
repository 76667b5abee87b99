"""The tests of every family of image encoders, against transformers. A family is given to them, in a file of its own:

class TestViT(ImageSuite):
    cases = {"vit": (transformers.ViTForImageClassification, SMALL | {"intermediate_size": 48})}
"""

import functools
import json
from typing import ClassVar

import image_parity as parity
import numpy as np
import pytest
import torch
from image_parity import pixels
from text_parity import reference

from modelhub.core.backends import get_backend
from modelhub.core.tree import check, flatten
from modelhub.errors import ConfigError
from modelhub.families import family_of


class ImageSuite:
    """cases: {name: (transformers' class of models with a head, values of its config)}.

    headless: {case: transformers' class without a head, and options of its from_pretrained}. sizes: other heights and
    widths than the trained one. several: cases that in memory have several tensors where the file has one. published:
    {what: (config.json, how many parameters)}. refused: {what the error says: changes of refused_from}.
    """

    cases: ClassVar[dict] = {}
    headless: ClassVar[dict] = {}
    sizes: ClassVar[tuple] = ((24, 12),)
    several: ClassVar[tuple] = ()
    published: ClassVar[dict] = {}
    refused: ClassVar[dict] = {}
    refused_from: ClassVar[dict] = {}

    def pytest_generate_tests(self, metafunc):
        tables = {
            "case": self.cases, "bare": self.headless, "size": self.sizes, "model": self.published,
            "refusal": self.refused, "as_one": [name for name in self.cases if name not in self.several],
        }  # fmt: skip
        for name, table in tables.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, list(table), scope="class", ids=str)

    @classmethod
    @functools.cache
    def build(cls, name):
        """transformers' model of a case, with random weights. Not to be changed: tests share it."""
        model_class, values = cls.cases[name]
        return reference(model_class, model_class.config_class(**values))

    @classmethod
    def at_size(cls, theirs, config, size):
        """transformers' model for images of another size, and options of its forward pass."""
        return theirs, {}

    @pytest.fixture(scope="class")
    @classmethod
    def theirs(cls, case):
        return cls.build(case)

    @pytest.fixture(scope="class")
    @classmethod
    def folder(cls, theirs, tmp_path_factory):
        folder = tmp_path_factory.mktemp("theirs")
        theirs.save_pretrained(folder)
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def ours(cls, folder, backend):
        return parity.load(folder, backend)

    # The forward pass.

    def test_logits_and_features(self, ours, theirs):
        parity.assert_equal_models(ours, theirs, trained(ours.config))

    def test_another_size(self, ours, theirs, size):
        model, options = self.at_size(theirs, ours.config, size)
        images = pixels(*size, channels=ours.config.num_channels)
        parity.assert_equal_models(ours, model, images, **options)

    def test_hidden_states_and_attention_maps(self, ours, theirs):
        parity.assert_equal_insides(ours, theirs, trained(ours.config))

    def test_without_a_head(self, bare, backend, tmp_path):
        model_class, options = self.headless[bare]
        theirs = reference(model_class, model_class.config_class(**self.cases[bare][1]))
        theirs.save_pretrained(tmp_path / "theirs")
        ours = parity.load(tmp_path / "theirs", backend)
        assert ours.config.num_labels == 0 and "classifier.weight" not in ours.params
        wanted = parity.run_theirs(theirs, trained(ours.config)).last_hidden_state
        found = parity.run_ours(ours, trained(ours.config))
        parity.assert_close(found["last_hidden_state"], wanted)
        parity.assert_close(found["pooled"][:, : wanted.shape[-1]], wanted[:, 0])
        parity.save(ours, tmp_path / "ours")
        again = parity.read_by_transformers(model_class, tmp_path / "ours", **options)
        assert again.state_dict()
        assert all(torch.equal(x, theirs.state_dict()[name]) for name, x in again.state_dict().items())

    # Files.

    def test_saved_models_load_in_transformers(self, theirs, folder, tmp_path):
        parity.save(parity.load(folder, get_backend("numpy")), tmp_path / "saved")
        model = parity.read_by_transformers(type(theirs), tmp_path / "saved")
        assert model.config.id2label == theirs.config.id2label and model.config.label2id == theirs.config.label2id
        for (name, found), wanted in zip(model.state_dict().items(), theirs.state_dict().values(), strict=True):
            assert torch.equal(found, wanted), name

    def test_names_in_memory(self, as_one):
        """transformers 5's state_dict has names of its own, with the prefix and without."""
        theirs = self.build(as_one)
        family = family_of(theirs.config.model_type)
        config = family.Config.from_hf(theirs.config.to_dict() | {"architectures": [type(theirs).__name__]})
        mapping, shapes = family.names("hf", config), {}
        for stored, tensor in theirs.state_dict().items():
            renamed = mapping.to_ours(stored)[0]
            assert mapping.to_ours(stored.removeprefix(f"{theirs.base_model_prefix}."))[0] == renamed
            shapes[renamed] = tuple(tensor.shape)
        check(family.Model.abstract(config), shapes, as_one)

    def test_config_round_trip(self, case):
        model_class, values = self.cases[case]
        theirs = model_class.config_class(**values, architectures=[model_class.__name__])
        cls = family_of(theirs.model_type).Config
        config = cls.from_hf(theirs.to_dict())
        assert (config.id2label, config.num_labels) == (values["id2label"], len(values["id2label"]))
        assert cls.from_hf(config.to_hf()) == config and config.architecture == model_class.__name__
        again = model_class.config_class(**config.to_hf())
        shared = {*vars(config), "num_labels"} & {*dir(theirs)}
        assert len(shared) >= 14
        assert as_json(again, shared) == as_json(theirs, shared)

    def test_parameters_of_published_models(self, model):
        data, parameters = self.published[model]
        family = family_of(data["model_type"])
        specs = flatten(family.Model.abstract(family.Config.from_hf(data)))
        assert sum(np.prod(spec.shape) for spec in specs.values()) == parameters

    def test_refused(self, refusal):
        with pytest.raises(ConfigError, match=refusal):
            family_of(self.refused_from["model_type"]).Config.from_hf(self.refused_from | self.refused[refusal])


def trained(config):
    """Images of the size that the model is made for."""
    return pixels(*config.size, channels=config.num_channels)


def as_json(config, keys):
    return json.loads(json.dumps({key: getattr(config, key) for key in keys}))
