"""What CausalLM offers beyond plain text: chat, several answers, beams, numbers, the user's own sampler, scores."""

import json
import math
import shutil

import numpy as np
import pytest

from modelhub import CausalLM
from modelhub.core.backends import installed
from modelhub.errors import ChatTemplateError, InputError

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "The river?"}]
PROMPT = "In the morning"


@pytest.fixture(scope="module")
def chat_preset(tiny_preset, tmp_path_factory):
    folder = shutil.copytree(tiny_preset, tmp_path_factory.mktemp("chat") / "preset")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="module")
def lm(chat_preset):
    return CausalLM.from_preset(str(chat_preset), backend="numpy")


def test_chat_is_generate_on_the_rendered_template(lm):
    rendered = "<bos>system: Be brief.<eos>\nuser: The river?<eos>\nassistant: "
    ids = lm.tokenizer.encode(rendered, add_special_tokens=False)
    assert ids.count(lm.tokenizer.bos_token_id) == 1  # never twice
    answer = lm.chat(MESSAGES, max_new_tokens=8)
    assert lm.last_run.prompt_tokens == len(ids)
    assert "".join(lm.chat(MESSAGES, max_new_tokens=8, stream=True)) == answer


def test_a_growing_conversation_computes_only_what_is_new(lm):
    answer = lm.chat(MESSAGES, max_new_tokens=8)
    before = lm.last_run.prompt_tokens
    longer = [*MESSAGES, {"role": "assistant", "content": answer}, {"role": "user", "content": "And the mill?"}]
    reused = lm.chat(longer, max_new_tokens=8)
    assert lm.last_run.reused_tokens >= before - 1
    fresh = CausalLM.from_preset(lm.preset, backend="numpy")
    assert fresh.chat(longer, max_new_tokens=8) == reused
    assert fresh.last_run.reused_tokens == 0


def test_the_end_of_a_turn_ends_an_answer(lm):
    assert lm.tokenizer.token_to_id("<eos>") in lm._end_of_turn


def test_several_answers_and_their_numbers(lm):
    answers = lm.generate(PROMPT, max_new_tokens=6, temperature=1.0, num_return_sequences=3, logprobs=True)
    assert len(answers) == 3 and len({a.text for a in answers}) > 1
    for answer in answers:
        assert len(answer.token_ids) == len(answer.logprobs) and max(answer.logprobs) <= 0
        assert answer.score == pytest.approx(sum(answer.logprobs))
    nested = lm.generate([PROMPT, "The"], max_new_tokens=3, temperature=1.0, num_return_sequences=2)
    assert [len(group) for group in nested] == [2, 2]
    # The log-probabilities are those that score() finds for the same tokens.
    best = lm.generate(PROMPT, max_new_tokens=5, logprobs=True)
    ids = lm.tokenizer.encode(PROMPT)
    logits = lm.logits([ids + best.token_ids])[0].astype(np.float64)
    expected = [
        logits[len(ids) - 1 + i, token] - np.log(np.exp(logits[len(ids) - 1 + i]).sum())
        for i, token in enumerate(best.token_ids)
    ]
    np.testing.assert_allclose(best.logprobs, expected, atol=1e-3)


def test_beams(lm):
    beams = lm.generate(PROMPT, max_new_tokens=6, num_beams=4, num_return_sequences=4, logprobs=True)
    assert [b.score for b in beams] == sorted((b.score for b in beams), reverse=True)
    assert lm.generate(PROMPT, max_new_tokens=6, num_beams=4) == beams[0].text
    greedy = lm.generate(PROMPT, max_new_tokens=6, logprobs=True)
    assert beams[0].score >= greedy.score / max(1, len(greedy.token_ids)) - 1e-4


def test_a_sampler_of_ones_own(chat_preset, lm):
    expected = lm.generate(PROMPT, max_new_tokens=6)
    for name in installed():
        model = CausalLM.from_preset(str(chat_preset), backend=name, device="cpu")
        assert model.generate(PROMPT, 6, sampler=lambda xp, logits, uniform: xp.argmax(logits)) == expected
    assert lm.generate(PROMPT, 6, sampler=lambda logits: logits.argmax(-1)) == expected


def test_scores(lm):
    text = "The river runs past the old mill."
    score = lm.score(text)
    assert len(score.logprobs) == len(score.token_ids) - 1
    assert score.perplexity == pytest.approx(math.exp(-score.total / len(score.logprobs)))
    assert [s.text for s in lm.score([text, "The baker"])] == [text, "The baker"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"num_beams": 2, "stream": True}, "stream=True gives one answer"),
        ({"num_beams": 2, "temperature": 1.0}, "num_beams cannot be combined"),
        ({"num_beams": 2, "num_return_sequences": 3}, "as many beams as answers"),
        ({"num_return_sequences": 0}, "num_return_sequences must be 1 or more"),
        ({"sampler": lambda logits: logits}, "must return 1 token ids"),
        ({"sampler": lambda logits: np.array([400])}, "the vocabulary goes from 0 to 399"),
        ({"logit_bias": {400: 1.0}}, "logit_bias has the token id 400"),
        ({"repetition_penalty": 0.0}, "repetition_penalty must be more than 0"),
        ({"frequency_penalty": float("nan")}, "frequency_penalty must be a finite number"),
    ],
)
def test_bad_options(lm, options, says):
    with pytest.raises(InputError, match=says):
        lm.generate(PROMPT, max_new_tokens=3, **options)


def test_bad_conversations(lm, tiny_preset):
    with pytest.raises(ChatTemplateError, match="role 'robot'"):
        lm.chat([{"role": "robot", "content": "hm"}])
    with pytest.raises(InputError, match="no chat template.*KerasHub's presets have none"):
        CausalLM.from_preset(str(tiny_preset), backend="numpy").chat(MESSAGES)
    with pytest.raises(InputError, match="is empty"):
        lm.score("")
