"""The tests of every family of text models, against transformers. A family is given to them, in a test file of its own:

    class TestLlama(TextSuite):
        cases = {"llama": tiny("llama"), "mistral": tiny("mistral")}

The tests whose names end in "main" run on the first case of each class of transformers; the others on all.
"""

import copy
import functools
import json
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import gguf
import numpy as np
import pytest
import text_parity as parity
import transformers

from modelhub.core.decoder import GLOBAL, LOCAL
from modelhub.core.tree import bind, flatten
from modelhub.errors import ConfigError
from modelhub.families import family_of
from modelhub.families.config import unknown_keys
from modelhub.generation import decode
from modelhub.interop.conformance import FAMILIES, Case

# No two dimensions are equal, so that none can stand in for another; a norm's epsilon is seen only where it is large.
SIZES = FAMILIES["llama"].config | {"rms_norm_eps": 0.05}
IDS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (2, 26)).astype(np.int32)
ROWS = [np.random.default_rng(1).integers(0, SIZES["vocab_size"], length).tolist() for length in (26, 9, 17)]
STEPS = 4
ARCHITECTURES = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}

# What no family of decoders reads: changes of a config, and what the error says.
REFUSED = {
    "another family": ({"model_type": "gpt2"}, "'gpt2' is not"),
    "no model_type": ({"model_type": None}, "model_type None"),
    "a size as text": ({"hidden_size": "32"}, "hidden_size='32'"),
    "a size as a fraction": ({"num_hidden_layers": 2.5}, "num_hidden_layers=2.5"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers=0"),
    "no heads": ({"num_attention_heads": 0}, "num_attention_heads=0"),
    "two bad sizes": ({"num_key_value_heads": 0, "vocab_size": -1}, "vocab_size=-1, num_key_value_heads=0"),
    "heads that share unevenly": (
        {"num_attention_heads": 4, "num_key_value_heads": 3},
        "num_attention_heads 4.*no multiple of num_key_value_heads 3",
    ),
    "odd head width": ({"head_dim": 7}, "head_dim=7 is odd"),
    "an unknown activation": ({"hidden_act": "relu6", "hidden_activation": "relu6"}, "'relu6' is not supported"),
    "an unknown rope": ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "'yarn' is not supported"),
    "half a rope": ({"rope_scaling": {"rope_type": "llama3", "factor": 4.0}}, "needs low_freq_factor"),
    "rope with unknown keys": (
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0}},
        "attention_factor",
    ),
    "experts": ({"num_experts": 8}, "num_experts=8 changes the maths"),
    "looking ahead": ({"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
}  # fmt: skip


def tiny(family, **changes):
    """The case of `modelhub conformance`, with these keys."""
    case = FAMILIES[family]
    return replace(case, config=case.config | {"rms_norm_eps": SIZES["rms_norm_eps"]} | changes)


def their_class(case):
    return getattr(transformers, case.model)


def their_config(case, **changes):
    return their_class(case).config_class(**copy.deepcopy(case.config) | changes)


@functools.cache
def _built(model, config):
    return parity.reference(getattr(transformers, model), their_config(Case(model, json.loads(config))))


def build(case):
    """transformers' model of a case, with random weights. Not to be changed: tests share it."""
    return _built(case.model, json.dumps(case.config))


def with_config(model, config):
    """The same weights, read with another config; None if they do not fit."""
    other = type(model)._from_config(config, attn_implementation="eager").eval()
    shapes = [{name: x.shape for name, x in either.named_parameters()} for either in (model, other)]
    if shapes[0] != shapes[1]:
        return None
    other.load_state_dict(model.state_dict())
    return other


def read_by_transformers(data):
    """What transformers makes of a config.json: the text part."""
    return transformers.AutoConfig.for_model(**copy.deepcopy(dict(data))).get_text_config()


def maths(config, ours):
    """All that the forward pass depends on, in transformers' present spelling. ours: our config class."""
    keys = {*ours.values(), "model_type", "rope_parameters", "hidden_act"} & type(config)().to_dict().keys()
    return {key: value for key, value in config.to_dict().items() if key in keys}


def change_between(before, after):
    """The largest change of a logit, where the largest logit is 1."""
    return np.abs(after - before).max() / np.abs(before).max()


class TextSuite:
    """cases: {name: Case}, tiny configs in which together every option of the family is switched on.

    features: {what: (case, changes)}, of what the logits must depend on; single keys of the cases are tried anyway.
    published: {name: config.json as published}. refused: {what: (changes of refused_from, what the error says)}.
    not_gguf: {case: what the error says}, of what llama.cpp cannot do.
    """

    cases: ClassVar[dict] = {}
    features: ClassVar[dict] = {}
    published: ClassVar[dict] = {}
    refused: ClassVar[dict] = {}
    refused_from: ClassVar[dict] = {}
    not_gguf: ClassVar[dict] = {}

    def pytest_generate_tests(self, metafunc):
        main = sorted({case.model: name for name, case in reversed(self.cases.items())}.values())
        tables = {
            "case": self.cases, "main": main, "feature": self.features, "stored": self.stored(),
            "refusal": self.refused, "common_refusal": REFUSED,
        }  # fmt: skip
        for name, table in tables.items():
            if name in metafunc.fixturenames:
                metafunc.parametrize(name, list(table), scope="class")

    @classmethod
    def stored(cls):
        """config.json of every case as transformers writes it, and the published ones."""
        written = {name: json.loads(json.dumps(their_config(case).to_dict())) for name, case in cls.cases.items()}
        return cls.published | written

    @pytest.fixture(scope="class")
    @classmethod
    def theirs(cls, case):
        return build(cls.cases[case])

    @pytest.fixture(scope="class")
    @classmethod
    def ours(cls, theirs, backend):
        return parity.load(theirs, backend)

    @pytest.fixture(scope="class")
    @classmethod
    def their_main(cls, main):
        return build(cls.cases[main])

    @pytest.fixture(scope="class")
    @classmethod
    def our_main(cls, their_main, backend):
        return parity.load(their_main, backend)

    # The forward pass.

    def test_logits(self, ours, theirs):
        parity.assert_close(ours.engine.logits(ours.params, IDS), parity.reference_logits(theirs, IDS))

    def test_cached_logits_of_a_batch(self, ours, theirs):
        """Rows of different length side by side, each as if it were alone and without a cache."""
        found = parity.cached_logits(ours, ROWS, STEPS)
        for row, logits in zip(ROWS, found, strict=True):
            parity.assert_close(logits, parity.reference_logits(theirs, [row])[0, -STEPS - 1 :])

    def test_prompts_longer_than_a_chunk_main(self, their_main, backend, monkeypatch):
        """Prompts that end inside, at the end and just after a chunk."""
        monkeypatch.setattr(decode, "CHUNK", 16)
        rows = [np.random.default_rng(2).integers(0, 101, length).tolist() for length in (5, 16, 17, 40)]
        found = parity.cached_logits(parity.load(their_main, backend), rows, 0)
        for row, logits in zip(rows, found, strict=True):
            parity.assert_close(logits, parity.reference_logits(their_main, [row])[0, -1:])

    def test_packed_examples_do_not_see_each_other_main(self, our_main, their_main, backend):
        row = np.concatenate([ROWS[1], ROWS[2]])[None].astype(np.int32)
        positions = np.concatenate([np.arange(9), np.arange(17)])[None].astype(np.int32)
        segments = np.repeat([1, 2], [9, 17])[None].astype(np.int32)

        def run(model, ids, positions, segments):
            return model.logits(backend, model.model(backend, ids, positions=positions, segments=segments))

        given = map(backend.array, (row, positions, segments))
        found = backend.compile(run, our_main.skeleton, hot=False)(our_main.params, *given)
        wanted = np.concatenate([parity.reference_logits(their_main, [ROWS[i]])[0] for i in (1, 2)])
        parity.assert_close(backend.get(found)[0], wanted)

    def test_compiled_equals_eager_main(self, our_main, backend):
        def run(model, ids):
            return model.logits(backend, model.model(backend, ids))

        ids = backend.array(IDS[:, :12])
        eager = backend.get(run(bind(our_main.skeleton, our_main.params), ids))
        compiled = backend.get(backend.compile(run, our_main.skeleton)(our_main.params, ids))
        parity.assert_close(compiled, eager, 2e-5)

    def test_bfloat16_main(self, their_main, backend):
        """As near to the float32 logits as transformers' own bfloat16, on average, with and without a cache."""
        half = copy.deepcopy(their_main).bfloat16()
        rounded = copy.deepcopy(half).float()  # what rounding the weights alone does is not the forward pass's fault
        wanted, theirs = parity.reference_logits(rounded, IDS), parity.reference_logits(half, IDS)
        ours = parity.load(their_main, backend, "bfloat16")
        assert {backend.dtype(array) for array in ours.params.values()} == {"bfloat16"}
        found = ours.engine.logits(ours.params, IDS)
        noise = np.abs(theirs - wanted).mean()
        assert found.dtype == np.float32 and noise > 0
        assert np.abs(found - wanted).mean() <= 1.5 * noise
        cached = parity.cached_logits(ours, IDS.tolist(), 2)
        assert np.abs(cached - wanted[:, -3:]).mean() <= 2 * noise

    # Every option must bite, or the comparisons prove nothing.

    def test_every_option_changes_the_logits(self, case, theirs):
        """By more than the tolerance. But for sizes, which are seen in the shapes, and for what a case switches off."""
        values, wanted = self.cases[case].config, parity.reference_logits(theirs, IDS)
        sizes = family_of(theirs.config.model_type).Config.sizes()
        changes = {}
        for key in [key for key, value in values.items() if key not in sizes and value is not None]:
            config = type(theirs.config)(**{name: x for name, x in copy.deepcopy(values).items() if name != key})
            try:
                if (other := with_config(theirs, config)) is not None:
                    changes[key] = change_between(wanted, parity.reference_logits(other, IDS))
            except TypeError:
                continue  # transformers cannot run without it, such as a window without its width
        assert {key: change for key, change in changes.items() if not change > parity.TOLERANCE} == {}

    def test_the_feature_changes_the_logits(self, feature):
        case, changes = self.features[feature]
        model = build(self.cases[case])
        other = with_config(model, their_config(self.cases[case], **changes))
        with_it, without = (parity.reference_logits(either, IDS) for either in (model, other))
        assert change_between(with_it, without) > 0.05

    # Configs.

    def test_config_round_trip(self, stored):
        data = self.stored()[stored]
        cls = family_of(data["model_type"]).Config
        config = cls.from_hf(data)
        assert unknown_keys(config.extra) == []
        written = json.loads(json.dumps(config.to_hf()))
        assert cls.from_hf(written) == config
        wanted, found = read_by_transformers(data), read_by_transformers(written)
        assert maths(found, cls) == maths(wanted, cls)
        assert found.model_type == wanted.model_type == config.model_type
        assert written["architectures"] == [transformers.AutoModelForCausalLM._model_mapping[type(wanted)].__name__]

    def test_config_means_what_transformers_reads(self, stored):
        data = self.stored()[stored]
        config, wanted = family_of(data["model_type"]).Config.from_hf(data), read_by_transformers(data)
        layers = [LOCAL if getattr(wanted, "sliding_window", None) else GLOBAL] * config.num_hidden_layers
        assert config.layer_types == (getattr(wanted, "layer_types", None) or layers)
        assert config.sliding_window == getattr(wanted, "sliding_window", None)
        shared = set(vars(config)) & set(wanted.to_dict()) - {"extra", "hidden_activation"}
        assert len(shared) >= 12
        assert {key: getattr(config, key) for key in shared} == {key: getattr(wanted, key) for key in shared}
        for kind in (GLOBAL, LOCAL):
            theirs, ours = wanted.rope_parameters, config.rope_of(kind)
            theirs = theirs.get(kind, theirs)  # Gemma 3 has two
            assert (ours.theta, ours.factor) == (theirs["rope_theta"], theirs.get("factor", 1.0))
            same = [key for key in vars(ours) if key in theirs]
            assert "rope_type" in same and all(getattr(ours, key) == theirs[key] for key in same)

    def test_written_config_gives_the_same_logits(self, theirs):
        written = family_of(theirs.config.model_type).Config.from_hf(theirs.config.to_dict()).to_hf()
        again = with_config(theirs, transformers.AutoConfig.for_model(**written))
        assert (parity.reference_logits(again, IDS) == parity.reference_logits(theirs, IDS)).all()

    def test_refused_by_every_family_main(self, main, common_refusal):
        changes, message = REFUSED[common_refusal]
        case = self.cases[main]
        kind = their_class(case).config_class.model_type
        with pytest.raises(ConfigError, match=message):
            family_of(kind).Config.from_hf({"model_type": kind} | SIZES | changes)

    def test_refused(self, refusal):
        changes, message = self.refused[refusal]
        with pytest.raises(ConfigError, match=message):
            family_of(self.refused_from["model_type"]).Config.from_hf(self.refused_from | changes)

    # Names.

    def test_names_are_hugging_faces(self, theirs):
        family, config = self._of(theirs)
        wanted = set(theirs.state_dict()) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
        mapping = family.names("hf", config)
        assert set(flatten(family.Model.abstract(config))) == wanted
        assert (
            {mapping.to_ours(name)[0] for name in wanted} == {mapping.to_theirs(name)[0] for name in wanted} == wanted
        )

    @pytest.mark.parametrize("tied", [True, False])
    def test_gguf_names_are_those_of_gguf_py(self, theirs, tied):
        family, config = self._of(theirs, tie_word_embeddings=tied)
        if "gguf" not in config.FORMATS:
            pytest.skip("the family has no GGUF files")
        ours = flatten(family.Model.abstract(config))
        arch = ARCHITECTURES[config.FORMATS["gguf"].archs.get(config.model_type, config.model_type)]
        oracle, table = gguf.get_tensor_name_map(arch, config.num_hidden_layers), family.names("gguf", config)
        theirs = {name: table.to_theirs(name)[0] for name in ours}
        for name, found in theirs.items():
            wanted = oracle.get_name(name, (".weight", ".bias"))
            if name == "lm_head.weight" and wanted is None:
                continue  # llama.cpp's Gemma always ties; the name is the one of all other architectures
            assert found == wanted
            assert table.to_ours(found)[0] == name
        assert len(set(theirs.values())) == len(ours)

    def test_gguf_round_trip(self, case, theirs):
        """Config and values; what llama.cpp cannot do is refused."""
        family, config = self._of(theirs)
        if "gguf" not in config.FORMATS:
            pytest.skip("the family has no GGUF files")
        if case in self.not_gguf:
            with pytest.raises(ConfigError, match=self.not_gguf[case]):
                config.to_gguf()
            return
        metadata, more = config.to_gguf()
        table, tensors = family.names("gguf", config), dict(more)
        for name, spec in flatten(family.Model.abstract(config)).items():
            value = np.random.default_rng(0).standard_normal(spec.shape).astype(np.float32)
            there, via = table.to_theirs(name)
            tensors[there] = via.to_theirs(value.copy())
            np.testing.assert_allclose(table.to_ours(there)[1].to_ours(tensors[there].copy()), value, atol=1e-6)
        file = SimpleNamespace(metadata=metadata, tensors=tensors, read=lambda name, dtype="float32": tensors[name])
        found = type(config).from_gguf(file)
        assert replace(found, model_type=config.model_type) == config  # Mistral without a window is a Llama there

    @staticmethod
    def _of(theirs, **changes):
        family = family_of(theirs.config.model_type)
        return family, family.Config.from_hf(theirs.config.to_dict() | changes)
