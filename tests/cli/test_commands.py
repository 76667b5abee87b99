"""The command line as a shell sees it."""

import json
import shutil
import subprocess
import sys

import pytest

ENTRY = [sys.executable, "-c", "from modelhub.cli import main; main()"]


def run(*arguments, stdin=""):
    return subprocess.run([*ENTRY, *arguments], input=stdin, capture_output=True, text=True, timeout=120)


@pytest.fixture(scope="module")
def preset(tiny_preset, tmp_path_factory):
    folder = shutil.copytree(tiny_preset, tmp_path_factory.mktemp("cli") / "preset")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    template = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    return str(folder)


def test_list_and_info():
    cards = json.loads(run("list", "--json", "--family", "llama").stdout)
    assert "smollm2_135m_instruct_q4" in [card["name"] for card in cards]
    assert {card["family"] for card in cards} == {"llama"}
    info = json.loads(run("info", "gemma3_270m_q4", "--json").stdout)
    assert info["parameters"] == 268_098_176 and info["licence"] == "gemma"
    assert "gemma3_270m_q4" in run("list").stdout


def test_generate(preset):
    options = ("--backend", "numpy", "--max-new-tokens", "8")
    plain = run("generate", preset, "In the morning", *options)
    assert plain.returncode == 0 and "numpy on cpu: 8 tokens" in plain.stderr
    found = json.loads(run("generate", preset, "-", *options, "--json", stdin="In the morning").stdout)
    assert found["new_tokens"] == 8 and found["text"] + "\n" == plain.stdout


def test_chat(preset, tmp_path):
    saved = tmp_path / "chat.json"
    lines = f"Hello\n/system Be brief.\nHello again\n/save {saved}\n/nonsense\n/exit\nnever read\n"
    done = run("chat", preset, "--backend", "numpy", "--max-new-tokens", "4", stdin=lines)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2 and "/nonsense is no command" in done.stderr
    messages = json.loads(saved.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant"]


def test_doctor():
    report = json.loads(run("doctor", "--json").stdout)
    rows = {row["name"]: row for row in report["backends"]}
    assert set(rows) == {"jax", "torch", "tensorflow", "numpy"}
    assert rows["numpy"]["version"] and rows["numpy"]["devices"] == ["cpu"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("generate", "gemma_2b_em", "x"), "Did you mean gemma_2b_en"),
        (("info", "nothing"), "there is no preset 'nothing'"),
        (("generate", "PRESET", ""), "prompt 0 is empty"),
        (("generate", "PRESET", "x", "--backend", "numpy", "--device", "gpu"), "numpy sees only: cpu"),
        (("generate", "PRESET", "x", "--backend", "mxnet"), "unknown backend 'mxnet'"),
    ],
)
def test_errors_are_one_line_and_no_traceback(preset, arguments, says):
    done = run(*(preset if a == "PRESET" else a for a in arguments))
    assert done.returncode == 1 and done.stdout == ""
    assert says in done.stderr and "Traceback" not in done.stderr
