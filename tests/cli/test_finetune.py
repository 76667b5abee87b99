"""`modelhub finetune` and `modelhub evaluate`, on tiny random models."""

import inspect
import io
import json
import shutil
import signal
import subprocess
import sys
import tomllib
from importlib.util import find_spec

import numpy as np
import pytest
from safetensors.numpy import load_file

from modelhub import CausalLM, ImageClassifier, cli, optim
from modelhub.cli.finetune import TOP, kind_of, read_recipe, recipe_keys
from modelhub.errors import InputError
from modelhub.hub.resources import resource
from modelhub.kinds import CAUSAL_LM, IMAGE_CLASSIFICATION
from modelhub.training import checkpoints, engine

ROWS = [{"instruction": f"What does the baker do on day {day}?", "response": "opens the shop"} for day in range(12)]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}<eos>{% endfor %}"


@pytest.fixture(scope="module")
def preset(tiny_preset, tmp_path_factory):
    folder = shutil.copytree(tiny_preset, tmp_path_factory.mktemp("finetune") / "preset")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with rows.jsonl in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return tmp_path


@pytest.fixture
def run(preset, here, monkeypatch, capsys, caplog):
    """Call the command as a shell does; returns (exit code, standard output, standard error with the log)."""

    def run(command, *arguments, usual=True):
        usual = ["--preset", preset, "--data", "rows.jsonl", "--backend", "torch", "--sequence-length", 64] * usual
        monkeypatch.setattr(sys, "argv", ["modelhub", command, *map(str, usual), *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
            raise SystemExit(0)
        shown, logged = capsys.readouterr(), caplog.text
        caplog.clear()
        return stopped.value.code or 0, shown.out, shown.err + logged

    return run


LORA = ("--rank", 4, "--learning-rate", "0.05", "--steps", 12)


def losses(folder):
    return [step["loss"] for step in json.loads((folder / "history.json").read_text())["steps"]]


def test_an_adapter_is_trained_measured_and_used(run, preset, here, monkeypatch):
    code, out, err = run("finetune", "--output", "tuned", *LORA, "--targets", "all-linear", "--validation-split", 0.2)
    assert (code, out) == (0, "tuned\n")
    assert "LoRA) on torch, cpu, for 12 steps" in err and "»opens the shop<eos>«" in err
    assert "epoch 1: loss" in err and "val_loss" in err and f"generate {preset} --adapter tuned" in err
    written = {path.name for path in (here / "tuned").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "modelhub.json"} <= written
    written = losses(here / "tuned_run")
    assert (here / "tuned_run" / "curve.png").is_file() == (find_spec("matplotlib") is not None)
    assert len(written) == 12 and written[-1] < 0.5 * written[0]

    before, after = (json.loads(run("evaluate", "--json", *more)[1]) for more in ((), ("--adapter", "tuned")))
    assert after["loss"] < 0.5 * before["loss"] and after["tokens"] == before["tokens"] > 12
    assert after["perplexity"] == pytest.approx(np.exp(after["loss"]))
    lm = CausalLM.from_preset(str(preset), backend="torch")
    lm.preprocessor.sequence_length = 64
    lm.load_adapter("tuned")
    assert lm.evaluate(ROWS) == pytest.approx(after)
    code, out, _ = run("evaluate", "--adapter", "tuned")
    assert code == 0 and [line.split()[0] for line in out.splitlines()] == ["loss", "perplexity", "accuracy", "tokens"]

    prompt = f"Instruction:\n{ROWS[0]['instruction']}\n\nResponse:\n"
    code, out, _ = run("generate", preset, prompt, "--adapter", "tuned", "--backend", "torch", usual=False)
    assert code == 0 and out == lm.generate(prompt) + "\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello"))
    code, out, _ = run("chat", preset, "--adapter", "tuned", "--backend", "torch", "--max-new-tokens", 9, usual=False)
    assert code == 0 and out == lm.chat([{"role": "user", "content": "Hello"}], 9) + "\n"


@pytest.mark.slow
def test_all_weights_are_trained_and_saved_as_a_model(run, here):
    arguments = ("finetune", "--output", "tuned", "--learning-rate", "0.01", "--steps", 3)
    code, out, err = run(*arguments)
    assert (code, out) == (0, "tuned\n") and "all weights" in err
    tuned = here / "tuned"
    assert {"config.json", "model.safetensors"} <= {path.name for path in tuned.iterdir()}
    assert not {"history.json", "finished"} & {path.name for path in tuned.iterdir()}
    changed = load_file(tuned / "model.safetensors")
    measured = run("evaluate", "--preset", "tuned", "--data", "rows.jsonl", "--json", usual=False)
    assert measured[0] == 0 and json.loads(measured[1])["loss"] < losses(here / "tuned_run")[0]
    # Once more: there is nothing left to train, and the result is written again over itself.
    code, out, err = run(*arguments)
    assert code == 0 and "nothing left to do" in err
    again = load_file(tuned / "model.safetensors")
    assert all(np.array_equal(changed[name], again[name]) for name in changed)


def interrupt_at(monkeypatch, step):
    train = engine.TrainingEngine.train

    def interrupted(self, batches, number, learning_rate):
        if number == step:
            signal.raise_signal(signal.SIGINT)
        return train(self, batches, number, learning_rate)

    monkeypatch.setattr(engine.TrainingEngine, "train", interrupted)


def test_ctrl_c_keeps_the_run_and_the_same_command_goes_on(run, here, monkeypatch):
    arguments = ("finetune", *LORA, "--dropout", 0.1, "--batch-size", 1, "--seed", 3)
    assert run(*arguments, "--output", "whole")[0] == 0
    with monkeypatch.context() as patch:
        interrupt_at(patch, 5)
        code, out, err = run(*arguments, "--output", "parts")
    assert (code, out) == (130, "")
    assert "stopped: the same command goes on after step 5" in err and "Traceback" not in err
    assert not (here / "parts").exists()
    code, _, err = run(*arguments, "--output", "parts")
    assert code == 0 and "after step 5" in err
    assert losses(here / "parts_run") == losses(here / "whole_run")
    whole, parts = (load_file(here / name / "adapter_model.safetensors") for name in ("whole", "parts"))
    assert all(np.array_equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_a_run_goes_on_on_another_backend_but_not_with_other_settings(run, here):
    assert run("finetune", "--output", "tuned", *LORA, "--steps", 4)[0] == 0
    code, _, err = run("finetune", "--output", "tuned", *LORA, "--alpha", 2)
    assert code == 1 and "adapter.alpha: None in the checkpoint, 2.0 asked for" in err
    code, _, err = run("finetune", "--output", "tuned", *LORA, "--backend", "jax")
    assert code == 0 and "after step 4" in err and len(losses(here / "tuned_run")) == 12
    code, _, err = run("finetune", "--output", "tuned", *LORA, "--alpha", 2, "--no-resume", "--steps", 2)
    assert code == 0 and len(losses(here / "tuned_run")) == 2
    code, _, err = run("finetune", "--output", "other", *LORA, "--resume")
    assert code == 1 and "holds no checkpoint" in err


def test_a_dry_run_trains_and_writes_nothing(run, here):
    code, out, err = run("finetune", *LORA, "--dry-run")
    assert (code, out) == (0, "") and "12 examples" in err and "memory: about" in err and "step 1" not in err
    assert [path.name for path in here.iterdir()] == ["rows.jsonl"]


def test_a_recipe(run, preset, here):
    shutil.copytree(preset, here / "recipes" / "model")
    (here / "recipes" / "recipe.toml").write_text("""
        preset = "./model"
        backend = "torch"
        data = "../rows.jsonl"
        output = "tuned"
        sequence_length = 64
        [lora]
        rank = 2
        targets = "all-linear"
        [compile]
        optimizer = { name = "adamw", betas = [0.8, 0.9] }
        learning_rate = 1
        schedule = { name = "linear", warmup_steps = 2 }
        metrics = ["accuracy"]
        [fit]
        steps = 4
        packing = false
    """)
    # From another folder: what is in a recipe is meant from where it is, an option from where the user is.
    code, out, err = run("finetune", here / "recipes" / "recipe.toml", "--learning-rate", 0.01, usual=False)
    assert code == 0 and out == f"{here / 'recipes' / 'tuned'}\n", err
    config = json.loads((here / "recipes" / "tuned" / "adapter_config.json").read_text())
    assert config["r"] == 2 and len(config["target_modules"]) == 7
    steps = json.loads((here / "recipes" / "tuned_run" / "history.json").read_text())["steps"]
    assert [step["learning_rate"] for step in steps] == pytest.approx([0, 0.005, 0.01, 0.005])
    options = (
        "--output",
        "mine",
        "--rank",
        3,
        "--targets",
        "q_proj",
        "--targets",
        "up_proj",
        "--checkpoint-dir",
        "kept",
    )
    assert run("finetune", "recipes/recipe.toml", *options, usual=False)[0] == 0
    config = json.loads((here / "mine" / "adapter_config.json").read_text())
    assert config["r"] == 3 and config["target_modules"] == ["q_proj", "up_proj"]
    assert (here / "kept" / "history.json").is_file() and not (here / "mine_run").exists()


@pytest.mark.slow
def test_every_option(run, here):
    code, out, err = run(
        "finetune", "--output", "tuned", "--validation-data", "rows.jsonl", "--batch-size", 2, "--no-packing",
        "--loss-on", "all", "--template", "chat", "--kind", "dolly", "--rank", 2, "--alpha", 4, "--dropout", 0.1,
        "--targets", "all-linear", "--use-rslora", "--use-dora", "--optimizer", "adafactor", "--learning-rate", 0.01,
        "--schedule", "cosine", "--weight-decay", 0.01, "--clip-norm", 1, "--mixed-precision", "mixed_bfloat16",
        "--matmul-precision", "highest", "--remat", "--no-jit", "--epochs", 2, "--steps", 5, "--grad-accum", 2,
        "--save-steps", 2, "--seed", 1, "--device", "cpu", "--dtype", "float32", "--offline",
    )  # fmt: skip
    assert code == 0, err
    assert "modelhub chat" in err and "user: What does the baker" in err
    config = json.loads((here / "tuned" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["use_dora"]) == (2, 4, True, True)
    meta = json.loads((here / "tuned_run" / "step-00000005" / "run.json").read_text())["meta"]["settings"]
    assert meta["batch_size"] == 2 and meta["grad_accum"] == 2 and meta["loss_on"] == "all" and meta["seed"] == 1
    assert meta["schedule"].startswith("Cosine(") and meta["clip_norm"] == 1.0 and "Adafactor" in meta["optimizer"]
    code, out, err = run(
        "evaluate", "--adapter", "tuned", "--batch-size", 3, "--no-packing", "--loss-on", "all", "--template", "chat",
        "--kind", "dolly", "--device", "cpu", "--dtype", "float32", "--offline", "--json",
    )  # fmt: skip
    assert code == 0 and json.loads(out)["tokens"] > 100, err


def test_options_recipes_and_the_api_have_the_same_names():
    from modelhub.cli.commands import evaluate, finetune

    keys = {key for table in recipe_keys().values() for key in table}
    options = set(inspect.signature(finetune).parameters) - {"context", "recipe", "offline", "dry_run"}
    assert options == keys - {"metrics"}  # there is only one
    assert len(keys) == sum(map(len, recipe_keys().values())), "an option must mean one key"
    loading = {key for task in (CausalLM, ImageClassifier) for key in inspect.signature(task.from_preset).parameters}
    assert set(TOP) - {"data", "validation_data", "output", "sequence_length"} <= loading
    measured = set(inspect.signature(evaluate).parameters) - {"context", "as_json", "adapter", "offline"} - set(TOP)
    assert measured == set(inspect.signature(CausalLM.evaluate).parameters) - {"task", "data"}


@pytest.mark.parametrize("name", sorted(path.stem for path in resource("finetune").glob("[!v]*.toml")))  # not images
def test_bundled_recipes(name, tiny_preset, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    settings = read_recipe(name)
    assert settings == read_recipe(str(resource("finetune") / f"{name}.toml"))
    top = settings[""]
    assert top["data"] == str(resource("finetune").resolve() / "dolly_style.jsonl")
    assert top["output"] == tomllib.loads((resource("finetune") / f"{name}.toml").read_text())["output"]
    assert (resource("presets") / f"{top['preset']}.toml").is_file()
    assert ("lora" in settings) == name.startswith("lora")
    lm = CausalLM.from_preset(str(tiny_preset), backend="numpy")
    lm.compile(**settings["compile"])
    lm.enable_lora(**settings.get("lora", {}))


def test_bundled_recipes_and_rows_are_found_by_name(run, preset, here):
    code, out, err = run("finetune", "lora_smollm2", "--steps", 1, "--rank", 1, "--data", "dolly_style.jsonl")
    assert (code, out) == (0, "smollm2_lora\n") and (here / "smollm2_lora_run" / "history.json").is_file()
    # A file of the user's own under that name goes before.
    (here / "dolly_style.jsonl").write_text(json.dumps(ROWS[0]))
    code, _, err = run("finetune", "lora_smollm2", "--data", "dolly_style.jsonl", "--validation-split", 0, "--dry-run")
    assert code == 0 and "1 examples" in err


def test_everything_that_is_wrong_with_a_recipe_is_said_at_once(here):
    (here / "recipe.toml").write_text("""
        prest = "gemma_2b_en"
        lora = true
        rank = 4
        [fit]
        epochs = 2.5
        packing = "no"
        sequence_length = 64
        targets = ["q_proj"]
        resume = 1
        callbacks = ["x"]
        [compile]
        learning_rat = 0.1
        metrics = "accuracy"
        clip_norm = true
        optimizer = { betas = [0.9, 0.99] }
        [lorra]
    """)
    with pytest.raises(InputError) as error:
        read_recipe("recipe.toml")
    assert str(error.value).split("\n  ")[1:] == [
        "prest is unknown; did you mean preset?",
        "lora must be a table: [lora]",
        "rank belongs into [lora]",
        "epochs in [fit] must be a whole number, found 2.5",
        "packing in [fit] must be true or false, found 'no'",
        "sequence_length in [fit] belongs above all tables",
        "targets in [fit] belongs into [lora]",
        "resume in [fit] must be text or true or false, found 1",
        "callbacks in [fit] is unknown",
        "learning_rat in [compile] is unknown; did you mean learning_rate?",
        "metrics in [compile] must be a list of texts, found 'accuracy'",
        "clip_norm in [compile] must be a number, found True",
        'optimizer in [compile] must be a name, or a table as in { name = "cosine", warmup_steps = 10 }, found '
        "{'betas': [0.9, 0.99]}",
        "[lorra] is no table of a recipe; did you mean lora?",
    ]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("preset = ", "Invalid value"),
        ('[compile]\noptimizer = { name = "adamwx" }', "optimizer 'adamwx' is unknown"),
        ('[compile]\noptimizer = { name = "adamw", beta = 1 }', "AdamW, the optimizer, has no setting beta; did you mean betas"),
        ('[compile]\nschedule = { name = "cosine", warmup_steps = "ten" }', "the schedule cannot be made of"),
        ('[compile]\nschedule = { name = "cosine", warmup_steps = -1 }', "warmup_steps must be"),
        ('preset = "x"', "finetune needs --data, --output, or a recipe"),
    ],
)  # fmt: skip
def test_recipes_that_cannot_be_used(run, here, text, says):
    (here / "recipe.toml").write_text(text)
    code, out, err = run("finetune", "recipe.toml", usual=False)
    assert (code, out) == (1, "") and says in err and "Traceback" not in err


def test_schedules_and_optimizers_as_tables(here):
    (here / "recipe.toml").write_text(
        '[compile]\noptimizer = { name = "sgd", momentum = 0.9 }\nschedule = { name = "cosine", warmup_ratio = 0.1 }'
    )
    compile_ = read_recipe("recipe.toml")["compile"]
    assert compile_ == {"optimizer": optim.SGD(momentum=0.9), "schedule": optim.Cosine(warmup_ratio=0.1)}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("--output", "o", "--data", "absent.jsonl"), "absent.jsonl: no such file"),
        (("--output", "o", "--data", "bad.jsonl"), "bad.jsonl, row 2 (line 2): response missing"),
        (("--output", "o", "--validation-data", "bad.jsonl"), "bad.jsonl, row 2 (line 2): response missing"),
        (("--output", "o", "--preset", "./absent"), "absent"),
        (("lora_smollm", "--output", "o"), "there is no recipe lora_smollm; did you mean lora_smollm2?"),
        (("--output", "full"), "full holds notes.txt, which saving a model there would remove"),
        (("--output", "full", "--rank", 2), "full holds notes.txt, which saving an adapter there would remove"),
        (("--output", "rows.jsonl"), "rows.jsonl holds a file"),
        (("--output", "o", "--checkpoint-dir", "o/run"), "is inside the output o"),
        (("--output", "rows.jsonl/o"), "rows.jsonl cannot be made"),
        (("--output", "o", "--targets", "q_prj"), "target 'q_prj' matches no linear layer"),
        (("--output", "o", "--rank", 0), "rank must be a whole number, 1 or more, got 0"),
        (("--output", "o", "--optimizer", "sdg"), "optimizer 'sdg' is unknown"),
        (("--output", "o", "--epochs", 0), "epochs must be a whole number, 1 or more"),
        (("--output", "o", "--sequence-length", 4096), "sequence_length must be 2 to 128"),
        (("--output", "o", "--loss-on", "answers"), 'loss_on must be "response" or "all"'),
        (("--output", "o", "--backend", "numpy"), "numpy"),
        (("--output", "o", "--learning-rate", "1e30", "--optimizer", "sgd"), "the loss is"),
        ((), "finetune needs --output, or a recipe"),
    ],
)  # fmt: skip
def test_errors_are_one_message_and_no_traceback(run, here, arguments, says):
    (here / "bad.jsonl").write_text(json.dumps(ROWS[0]) + '\n{"instruction": "What?"}\n')
    (here / "full").mkdir()
    (here / "full" / "notes.txt").write_text("mine")
    code, out, err = run("finetune", *arguments)
    assert (code, out) == (1, "") and "modelhub: " in err and says in err and "Traceback" not in err
    assert not (here / "o").exists() and (here / "full" / "notes.txt").read_text() == "mine"


def test_wrong_options_are_told_by_name(run):
    code, _, err = run("finetune", "--output", "o", "--epochs", "three")
    assert code == 2 and "--epochs" in err and "Traceback" not in err
    assert run("finetune", "--output", "o", "--learning-rat", "1")[0] == 2
    for arguments in (("--data", "absent.jsonl"), ("--adapter", "absent")):
        code, out, err = run("evaluate", *arguments)
        assert (code, out) == (1, "") and err.startswith("modelhub: ") and "absent" in err


@pytest.mark.slow
def test_a_real_ctrl_c_ends_with_130(preset, here):
    """In a process of its own, from the signal to the exit code."""
    program = f"""
import os, signal
from modelhub.training import checkpoints, engine
train = engine.TrainingEngine.train
def signalled(self, batches, number, learning_rate):
    if number == 2:
        os.kill(os.getpid(), signal.SIGINT)
    return train(self, batches, number, learning_rate)
engine.TrainingEngine.train = signalled
import sys
sys.argv = ["modelhub", "finetune", "--preset", {str(preset)!r}, "--data", "rows.jsonl", "--backend", "torch",
            "--sequence-length", "64", "--rank", "2", "--epochs", "9", "--output", "o"]
from modelhub.cli import main
main()
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=here, capture_output=True, text=True, timeout=120)
    assert done.returncode == 130 and done.stdout == ""
    assert "stopped: the same command goes on after step 2" in done.stderr and "Traceback" not in done.stderr


def test_what_a_revision_reads(tmp_path, tiny_preset, monkeypatch):
    """Of a preset that once read images."""
    monkeypatch.setenv("MODELHUB_CACHE", str(tmp_path / "cache"))
    for name, preset in {"model": tiny_preset, "model@v1": resource("presets") / "vit_tiny_fashion"}.items():
        shutil.copytree(preset, tmp_path / name)
        (tmp_path / name / "SHA256SUMS").unlink(missing_ok=True)
    address = (tmp_path / "model").as_uri()
    assert kind_of(address, offline=False)[0] is CAUSAL_LM
    kind, config = kind_of(address, offline=False, revision="v1")
    assert kind is IMAGE_CLASSIFICATION and config.size == (28, 28)


# A terminal of its own, which is closed in the middle of a step, as when the line of an ssh session breaks.
CLOSED = """
import contextlib, os, pty, sys
child, terminal = pty.fork()
if child == 0:
    from modelhub.training import checkpoints, engine
    train = engine.TrainingEngine.train
    def step(self, batches, number, learning_rate):
        if number == 2:
            with contextlib.suppress(OSError):
                print("second step", flush=True)
                sys.stdin.readline()  # ends when the terminal is gone
        return train(self, batches, number, learning_rate)
    engine.TrainingEngine.train = step
    from modelhub.cli import main
    main()
seen = b""
while b"second step" not in seen:
    seen += os.read(terminal, 1000)
os.close(terminal)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_a_terminal_that_is_closed_costs_no_step(preset, here):
    arguments = ["finetune", "--preset", str(preset), "--data", "rows.jsonl", "--backend", "torch", "--rank", "2"]
    arguments += ["--sequence-length", "64", "--epochs", "9", "--output", "o"]
    done = subprocess.run(
        [sys.executable, "-c", CLOSED, *arguments], cwd=here, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.split() == ["130"], done.stderr
    assert checkpoints.latest(here / "o_run").step == 2


def test_an_output_of_another_run_is_not_replaced(run, here):
    assert run("finetune", "--output", "tuned", "--rank", 2, "--steps", 1)[0] == 0
    shutil.rmtree(here / "tuned_run")
    before = (here / "tuned" / "adapter_model.safetensors").read_bytes()
    for more in (("--rank", 3), ()):
        code, _, err = run("finetune", "--output", "tuned", "--steps", 1, *more)
        assert code == 1 and "tuned holds a" in err and "give another output" in err
    assert (here / "tuned" / "adapter_model.safetensors").read_bytes() == before


@pytest.mark.parametrize(
    ("option", "says"),
    [
        (("--rank", 0), "rank must be a whole number"),
        (("--steps", -1), "steps must be a whole number"),
        (("--batch-size", 0), "batch_size must be a whole number"),
        (("--optimizer", "adamx"), "optimizer 'adamx' is unknown"),
        (("--schedule", "cosin"), "schedule 'cosin' is unknown"),
        (("--data", "nowhere.jsonl"), "nowhere.jsonl: no such file or folder"),
    ],
)
def test_what_needs_no_model_is_told_before_one_is_fetched(run, here, monkeypatch, option, says):
    def fetched(*arguments, **more):
        pytest.fail("the preset was asked for")

    monkeypatch.setattr("modelhub.cli.finetune.kind_of", fetched)
    options = {"--preset": "gemma_2b_en", "--data": "rows.jsonl", "--output": "o"} | dict([option])
    code, out, err = run("finetune", *(text for pair in options.items() for text in pair), usual=False)
    assert (code, out) == (1, "") and says in err and "Traceback" not in err


def test_the_learning_rate_that_is_taken_where_none_is_given(run, here):
    """LoRA's matrices start from zeros, and take larger steps."""
    for more, rate in ((("--rank", 2), 2e-4), ((), 5e-5), (("--rank", 2, "--learning-rate", 5e-5), 5e-5)):
        assert run("finetune", "--output", f"o{len(more)}", "--steps", 1, *more)[0] == 0
        steps = json.loads((here / f"o{len(more)}_run" / "history.json").read_text())["steps"]
        assert [step["learning_rate"] for step in steps] == [rate]
