"""Beam search against that of transformers, on a tiny random Llama where several tokens end a sequence."""

import functools

import numpy as np
import pytest
import torch
import transformers

from modelhub.families.llama import Config, Model
from modelhub.generation.beam import BeamOptions
from modelhub.generation.decode import GenerationEngine

STOPS = (3, 11, 29)
PROMPTS = [np.random.default_rng(seed).integers(0, 41, length).tolist() for seed, length in ((0, 7), (1, 3))]


@functools.cache
def theirs():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=41, hidden_size=24, intermediate_size=40, num_attention_heads=4, num_key_value_heads=2,
        num_hidden_layers=2, max_position_embeddings=64, initializer_range=0.25, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def engine(backend):
    return GenerationEngine(backend, Model.abstract(Config.from_hf(theirs().config.to_dict())), "float32")


@pytest.fixture(scope="module")
def params(backend):
    return {name: backend.array(tensor.detach().numpy()) for name, tensor in theirs().named_parameters()}


@functools.cache
def transformers_beams(prompt, options):
    """[(tokens up to and with the end, score)] of one prompt, the best first."""
    found = theirs().generate(
        torch.tensor([prompt]), num_beams=options.num_beams, num_return_sequences=options.num_beams,
        max_new_tokens=options.max_new_tokens, length_penalty=options.length_penalty, do_sample=False,
        early_stopping=options.early_stopping, eos_token_id=sorted(options.stop_ids) or None, use_cache=True,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    beams = []
    for sequence, score in zip(
        found.sequences[:, len(prompt) :].tolist(), found.sequences_scores.tolist(), strict=True
    ):
        end = next((i + 1 for i, token in enumerate(sequence) if token in options.stop_ids), len(sequence))
        beams.append((sequence[:end], score))
    return beams


OPTIONS = [
    BeamOptions(2, 8, frozenset()),
    BeamOptions(3, 10, frozenset({3})),
    *(
        BeamOptions(beams, 12, frozenset(STOPS), penalty, early)
        for beams, penalty in ((2, 1.0), (4, 0.3), (4, 2.0), (3, -1.0))
        for early in (True, False, "never")
    ),
]


@pytest.mark.parametrize(
    "options",
    OPTIONS,
    ids=lambda o: f"{o.num_beams} beams {len(o.stop_ids)} ends penalty {o.length_penalty} early {o.early_stopping}",
)
def test_same_beams_as_transformers(engine, params, options):
    """Two prompts of different length at once, each as transformers does it alone."""
    for prompt, beams in zip(PROMPTS, engine.beam_search(params, PROMPTS, options), strict=True):
        wanted = transformers_beams(tuple(prompt), options)
        assert [tokens for tokens, _ in wanted] == beams.finished[: options.num_beams]
        np.testing.assert_allclose(beams.finished_scores, [score for _, score in wanted], rtol=1e-4)


def test_the_options_matter():
    """Ends, length penalties and early stopping each change the beams, or the test above proves little."""
    prompt = tuple(PROMPTS[0])

    def found(*options):
        return [tokens for tokens, _ in transformers_beams(prompt, BeamOptions(*options))]

    assert any(len(tokens) < 12 for tokens in found(4, 12, frozenset(STOPS), 0.3, False))
    assert found(4, 12, frozenset(STOPS), 0.3, False) != found(4, 12, frozenset(STOPS), 2.0, False)
    assert found(4, 12, frozenset(STOPS), 2.0, True) != found(4, 12, frozenset(STOPS), 2.0, "never")
