"""The command line as a shell sees it."""

import errno
import json
import os
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


def test_chat_for_programs(preset):
    done = run("chat", preset, "--json", "--backend", "numpy", "--max-new-tokens", "4", stdin="Hello\n/reset\nAgain\n")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    plain = run("chat", preset, "--backend", "numpy", "--max-new-tokens", "4", stdin="Hello\n")
    assert len(answers) == 2 and answers[0]["text"] + "\n" == plain.stdout and answers[0]["backend"] == "numpy"
    assert [answer["preset"] for answer in answers] == [preset] * 2 and answers[0]["new_tokens"] <= 4
    assert "tokens" not in done.stderr and "a new conversation" in done.stderr


@pytest.mark.parametrize("command", [(), ("generate",), ("cache",), ("cache", "rm"), ("finetune",)])
def test_flags_show_no_type_in_help(command):
    told = run(*command, "--help").stdout
    assert "--help" in told and "<bool>" not in told
    assert command != ("generate",) or "<int>" in told


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
        (("generate", "gemma_2b_en", "x", "--temperature", "-1"), "temperature must be"),  # and fetches nothing
        (("generate", "gemma_2b_en", "x", "--top-p", "3"), "top_p must be"),
        (("generate", "gemma_2b_en", "x", "--max-new-tokens", "0"), "max_new_tokens must be"),
        (("chat", "gemma_2b_en", "--top-k", "-1"), "top_k must be"),
    ],
)
def test_errors_are_one_line_and_no_traceback(preset, arguments, says):
    done = run(*(preset if a == "PRESET" else a for a in arguments))
    assert done.returncode == 1 and done.stdout == ""
    assert says in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("module", ["modelhub", "modelhub.cli"])
def test_as_a_module(module):
    done = subprocess.run([sys.executable, "-m", module, "--version"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "modelhub 0.1.0\n")


def test_a_prompt_through_a_pipe(preset):
    options = ("--backend", "numpy", "--max-new-tokens", "4")
    piped, given = (
        run("generate", preset, *options, stdin="In the morning"),
        run("generate", preset, "In the morning", *options),
    )
    assert piped.returncode == 0 and piped.stdout == given.stdout
    done = subprocess.run([*ENTRY, "generate", preset, "-"], input=b"caf\xe9", capture_output=True, timeout=120)
    assert done.returncode == 1 and done.stdout == b""
    assert b"standard input is not UTF-8: byte 3 is 0xe9" in done.stderr and b"iconv -f latin1" in done.stderr


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
@pytest.mark.parametrize(
    "arguments", [("list",), ("doctor", "--json"), ("generate", "PRESET", "a", "--backend", "numpy")]
)
def test_a_full_standard_output_is_told_in_one_line(preset, arguments):
    arguments = [preset if text == "PRESET" else text for text in arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run([*ENTRY, *arguments], stdout=full, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 1 and "cannot be written: No space left on device" in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (MemoryError(), "the memory that this process may have is used up"),
        (ImportError("lib.so: failed to map segment from shared object"), "the memory that this process may have"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "the memory that this process may have is used up"),
    ],
)
def test_memory_that_is_used_up_is_told_in_one_line(error, says):
    program = f"import errno; from modelhub.cli import main, commands\nerror = {error!r}\n"
    program += "def app(): raise error\ncommands.app = app; main()"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("modelhub: ") and says in done.stderr
    assert "Traceback" not in done.stderr


def test_weights_that_do_not_fit_are_told_with_figures(preset, monkeypatch):
    from modelhub import CausalLM
    from modelhub.errors import OutOfMemory
    from modelhub.hub.checkpoint import SafetensorsCheckpoint

    def full(*arguments):
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(SafetensorsCheckpoint, "read", full)
    with pytest.raises(OutOfMemory, match=r"its weights take 0 MB in float32, and [\d,]+ MB are free") as caught:
        CausalLM.from_preset(preset, backend="numpy")
    assert isinstance(caught.value, MemoryError)


def test_the_limit_of_the_process_counts_as_memory():
    program = (
        "import resource; from modelhub.core.backends.base import host_memory; before = host_memory()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (3 << 30, -1)); print(before, host_memory())"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    before, after = map(int, done.stdout.split())
    assert 1 << 30 < after < 3 << 30 <= before or after <= before


def test_quantize(preset, tmp_path):
    """A folder that loads as it is, of all weights and with texts to calibrate on."""
    from modelhub import CausalLM
    from modelhub.core.quantized import Tiles

    texts = tmp_path / "texts.txt"
    texts.write_text("The river runs past the mill.\n\nThe baker opens the shop.")
    schemes = "*=int4,embed_tokens=int8"
    for name, extra, wanted in (
        ("plain", (), {"int4"}),
        ("calibrated", ("--scheme", schemes, "--calibration", str(texts)), {"int4", "int8"}),
    ):
        done = run("quantize", preset, str(tmp_path / name), *extra)
        assert done.returncode == 0 and done.stdout.strip() == str(tmp_path / name), done.stderr
        lm = CausalLM.from_preset(str(tmp_path / name), backend="numpy", quantize="keep")
        assert {x.scheme for x in lm.params.values() if isinstance(x, Tiles)} == wanted
    done = run("quantize", preset, str(tmp_path / "model.gguf"))
    assert done.returncode and "modelhub convert" in done.stderr
    assert "quantize must be one of" in run("quantize", preset, str(tmp_path / "no"), "--scheme", "int3").stderr
