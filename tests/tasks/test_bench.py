"""Measuring backends in processes of their own, and the verdicts that backend="fastest" goes by."""

import json
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import numpy as np
import pytest

import modelhub
from modelhub import Backbone, CausalLM, ImageClassifier, nn
from modelhub.bench import compare as benches
from modelhub.bench import processes as bench_processes
from modelhub.bench.compare import FASTEST, bench, fastest
from modelhub.bench.processes import Row
from modelhub.core import custom
from modelhub.core.backends import NAMES, installed
from modelhub.errors import ConfigError, DeviceError, InputError, PresetNotFound, UnknownBackend
from modelhub.families import gemma
from modelhub.model.source import ATTENTION, LAYERS

TEXT, IMAGES, BACKBONE = "causal-lm", "image-classification", "backbone"

SHORT = {"prompt_tokens": 16, "max_new_tokens": 8}


@pytest.fixture
def processes(monkeypatch):
    """All that are started to measure."""
    started = []

    class Recorded(subprocess.Popen):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            started.append(self)

    # The name in this module: other parts start processes too.
    monkeypatch.setattr(bench_processes, "Popen", Recorded)
    return started


@pytest.fixture
def measured(monkeypatch):
    """In place of measuring: what was asked for; torch is the fastest and numpy fails."""
    asked = []

    def measure(model, workload, names, show):
        asked.append(workload)
        time.sleep(0.1)
        speeds = {"jax": 20.0, "torch": 310.4, "tensorflow": 5.25}
        rows = [Row(name, device="cpu", per_second=speeds.get(name)) for name in names]
        for row in rows:
            row.error, row.refused = (None, False) if row.per_second else ("no", True)
        return rows

    monkeypatch.setattr(benches, "measure", measure)
    monkeypatch.setattr(benches, "installed", lambda: ["jax", "torch", "tensorflow", "numpy"])
    return asked


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    cache = tmp_path_factory.mktemp("bench")
    return cache, bench("gemma3_tiny", device="cpu", train=True, steps=2, cache_dir=cache, **SHORT)


@pytest.mark.slow
def test_all_backends_are_measured(text):
    report = text[1]
    assert [row.backend for row in report.rows] == installed()
    assert (report.preset, report.unit, report.workload.task) == ("gemma3_tiny", "tokens", TEXT)
    for row in report.rows:
        assert row.error is None and row.version == report.machine["versions"][row.backend], row
        assert (row.device, row.dtype) == ("cpu", "float32")
        assert 0 < row.load_seconds < row.load_seconds_with_imports
        assert row.first_seconds > 0 and row.first_seconds_warm > 0 and row.per_second > 0
        assert 4 * 1_051_000 * 2 < row.peak_memory < 1 << 34
    best = max(report.rows, key=lambda row: row.per_second)
    assert report.fastest == best.backend
    found = json.loads(json.dumps(report.to_dict()))
    assert found["fastest"] == report.fastest and len(found["rows"]) == len(installed())


def test_training_is_measured_where_there_are_gradients(text):
    rows = {row.backend: row for row in text[1].rows}
    assert rows.pop("numpy").train_step_seconds is None
    for row in rows.values():
        # Several of the bundled instructions go into a row of 512 tokens.
        samples, tokens = (
            rate * row.train_step_seconds for rate in (row.train_samples_per_second, row.train_tokens_per_second)
        )
        assert 0.5 < samples < 50 and 100 < tokens < 1100
        assert row.train_peak_memory >= row.peak_memory


def test_bench_fills_the_cache_of_verdicts(text, processes, capsys):
    cache, report = text
    assert fastest("gemma3_tiny", task=CausalLM.task, device="cpu", cache_dir=cache) == report.fastest
    assert not processes
    said = capsys.readouterr().err
    assert said.startswith(f"fastest: {report.fastest} for gemma3_tiny on cpu: ") and said.count("\n") == 1
    assert all(name in said for name in installed()) and str(cache) in said
    lm = CausalLM.from_preset("gemma3_tiny", backend=FASTEST, device="cpu", cache_dir=cache)
    assert lm.backend == report.fastest and not processes
    assert capsys.readouterr().err == said


@pytest.mark.slow
def test_fastest_measures_once(processes, tmp_path):
    first = fastest("vit_tiny_fashion", task=IMAGES, device="cpu", cache_dir=tmp_path)
    assert first in installed() and len(processes) == len(installed())
    assert all(process.poll() is not None for process in processes)
    assert fastest("vit_tiny_fashion", task=IMAGES, device="cpu", cache_dir=tmp_path) == first
    assert len(processes) == len(installed())


@pytest.mark.parametrize("preset", ["gemma3_tiny", "vit_tiny_fashion"])
def test_a_backbone_alone(preset, tmp_path):
    model = benches._look(preset, {"offline": True, "cache_dir": tmp_path})
    workload = benches.Workload(BACKBONE, "cpu", prompt_tokens=16, repeats=1)
    [row] = bench_processes.measure(model, workload, ["numpy"], print)
    assert row.error is None and row.per_second > 0


def test_the_line_says_why(measured, tmp_path, capsys):
    assert fastest("gemma3_tiny", task=TEXT, cache_dir=tmp_path) == "torch"
    [kept] = (tmp_path / "fastest").glob("*.json")
    day = time.strftime("%Y-%m-%d")
    line = "fastest: torch for gemma3_tiny on cpu: 310 tokens/s (jax 20, tensorflow 5.25, numpy failed)"
    assert capsys.readouterr().err == f"{line}; measured on {day}, kept in {kept}\n"
    [workload] = measured
    assert (workload.prompt_tokens, workload.max_new_tokens, workload.train_steps) == (64, 32, 0)


def test_a_broken_backend_decides_for_a_day(tmp_path, monkeypatch, capsys):
    (tmp_path / "jax").mkdir()
    (tmp_path / "jax" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(benches, "installed", lambda: ["jax", "numpy"])
    assert fastest("gemma3_tiny", task=BACKBONE, device="cpu", cache_dir=tmp_path) == "numpy"
    said = capsys.readouterr().err
    assert "(jax failed); measured on" in said and ", for this day only, as failures may pass: jax: " in said
    [kept] = (tmp_path / "fastest").glob("*.json")

    def measure(model, workload, names, show):
        return [Row(name, per_second=2.0 if name == "jax" else 1.0) for name in names]

    monkeypatch.setattr(benches, "measure", measure)
    assert fastest("gemma3_tiny", task=BACKBONE, device="cpu", cache_dir=tmp_path) == "numpy"
    data = json.loads(kept.read_text())
    data["verdict"]["measured"] = "2001-01-01"
    kept.write_text(json.dumps(data))
    assert fastest("gemma3_tiny", task=BACKBONE, device="cpu", cache_dir=tmp_path) == "jax"


def test_what_modelhub_itself_refuses_lasts(tmp_path):
    model = benches._look("gemma3_tiny", {"offline": True, "cache_dir": tmp_path})
    [row] = bench_processes.measure(model, benches.Workload(TEXT, "gpu"), ["numpy"], print)
    assert row.error and row.refused


@pytest.mark.slow
def test_random_weights_need_no_files(tiny_preset, tmp_path, monkeypatch):
    folder = tmp_path / "no weights"
    shutil.copytree(tiny_preset, folder, ignore=shutil.ignore_patterns("*.safetensors*"))
    monkeypatch.setattr(benches, "installed", lambda: ["numpy", "torch"])
    lm = CausalLM.from_preset(str(folder), backend=FASTEST, device="cpu", load_weights=False, cache_dir=str(tmp_path))
    assert lm.backend in ("numpy", "torch")
    [kept] = (tmp_path / "fastest").glob("*.json")
    assert set(json.loads(kept.read_text())["verdict"]["speeds"]) == {"numpy", "torch"}


@pytest.fixture
def pieces(monkeypatch):
    """Layers and an attention, registered for torch alone and for all backends."""
    monkeypatch.setattr(custom, "_registered", list(custom._registered))

    @dataclass
    class Same(nn.Module):
        gate_proj: nn.Linear
        up_proj: nn.Linear
        down_proj: nn.Linear

        @classmethod
        def replacing(cls, old):
            return cls(old.gate_proj, old.up_proj, old.down_proj)

        def __call__(self, xp, x):
            return self.down_proj(xp, self.up_proj(xp, x))

    def attention(xp, q, k, v, mask, scale):
        return q

    for backend in ("torch", None):
        modelhub.register("layer", f"bench {backend}", backend)(Same)
        modelhub.register("attention", f"bench {backend}", backend)(attention)


@pytest.mark.parametrize("options", [{"layers": {"mlp": "bench torch"}}, {"attention": "bench torch"}])
def test_pieces_for_one_backend_decide(measured, pieces, tmp_path, capsys, options):
    lm = CausalLM.from_preset("gemma3_tiny", backend=FASTEST, device="cpu", cache_dir=str(tmp_path), **options)
    assert lm.backend == "torch" and not measured
    assert "fastest: torch for gemma3_tiny, because of pieces of your own" in capsys.readouterr().err


@pytest.mark.parametrize(
    "options",
    [{"layers": {"mlp": "bench None"}}, {"attention": "bench None"}, {"attention": lambda q, k, v, mask, scale: q}],
)
@pytest.mark.parametrize("task", [CausalLM, Backbone, ImageClassifier])
def test_pieces_that_may_run_anywhere_cannot_be_measured(measured, pieces, tmp_path, task, options):
    preset = "vit_tiny_fashion" if task is ImageClassifier else "gemma3_tiny"
    with pytest.raises(InputError, match="cannot measure pieces of your own .*; name a backend: jax, torch"):
        task.from_preset(preset, backend=FASTEST, cache_dir=str(tmp_path), **options)
    assert not measured


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"layers": {"mlp": "nobody's"}}, "no layer"),
        ({"layers": ["bench torch"]}, "layers must be"),
        ({"attention": "nobody's"}, "no attention"),
    ],
)
def test_loading_tells_what_is_wrong_with_pieces(measured, pieces, tmp_path, options, says):
    with pytest.raises(ConfigError, match=says):
        CausalLM.from_preset("gemma3_tiny", backend=FASTEST, device="cpu", cache_dir=str(tmp_path), **options)
    assert not measured


def test_pieces_of_a_folder(measured, pieces, tiny_preset, tmp_path):
    folder = shutil.copytree(tiny_preset, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())

    def ask(own, **options):
        (folder / "config.json").write_text(json.dumps(config | own))
        return fastest(folder, task=TEXT, cache_dir=tmp_path, **options)

    assert ask({LAYERS: [["mlp", "bench torch"]]}) == "torch"
    assert ask({ATTENTION: "bench torch"}) == "torch"
    with pytest.raises(InputError, match="the layer 'bench None'"):
        ask({LAYERS: [["mlp", "bench torch"]]}, layers={"mlp": "bench None"})
    assert not measured


def test_a_family_of_the_users_own(measured, pieces, tiny_preset, tmp_path):
    @modelhub.register("family", "bench gemma")
    class Family:
        Model, names = gemma.Model, staticmethod(gemma.names)

        class Config(gemma.Config):
            @classmethod
            def from_hf(cls, data):
                found = super().from_hf(data | {"model_type": "gemma3_text"})
                found.model_type = data["model_type"]
                return found

    folder = shutil.copytree(tiny_preset, tmp_path / "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "bench gemma"}))
    with pytest.raises(InputError, match="the family 'bench gemma'"):
        fastest(folder, task=TEXT, cache_dir=tmp_path)
    assert not measured


def test_what_a_verdict_depends_on(measured, tmp_path, monkeypatch):
    def ask(preset="gemma3_tiny", task=TEXT, **options):
        assert fastest(preset, task=task, cache_dir=tmp_path, **options) == "torch"
        return len(measured)

    assert (ask(), ask()) == (1, 1)
    assert ask(device="cpu") == 2
    assert ask(dtype="bfloat16") == 3
    assert ask("vit_tiny_fashion", IMAGES) == 4
    assert ask("vit_tiny_fashion", BACKBONE) == 5
    assert ask() == 5
    version = benches.version
    monkeypatch.setattr(benches, "version", lambda name: "999.0" if name == "torch" else version(name))
    assert (ask(), ask()) == (6, 6)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    assert ask() == 7


@pytest.mark.parametrize(
    "damage",
    ["", "{", "[]", '{"key": 1}', "null", "\x00\xff", "SPEEDS", "STRANGER", "KEY"],
)
def test_a_damaged_verdict_is_measured_anew(measured, tmp_path, damage):
    fastest("gemma3_tiny", task=TEXT, cache_dir=tmp_path)
    [kept] = (tmp_path / "fastest").glob("*.json")
    sound = json.loads(kept.read_text())
    broken = json.loads(kept.read_text())
    broken["verdict"] |= {"SPEEDS": {"speeds": {}}, "STRANGER": {"backend": "mxnet"}}.get(damage, {})
    broken["key"] |= {"KEY": {"cores": 10_000}}.get(damage, {})
    kept.write_text(json.dumps(broken) if damage.isupper() else damage)
    assert fastest("gemma3_tiny", task=TEXT, cache_dir=tmp_path) == "torch"
    assert len(measured) == 2 and json.loads(kept.read_text()) == sound


def test_two_at_once_measure_once(measured, tmp_path):
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(fastest("gemma3_tiny", task=TEXT, cache_dir=tmp_path)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert found == ["torch"] * 4 and len(measured) == 1


def test_a_cache_that_cannot_be_written_to(measured, tmp_path, capsys):
    (tmp_path / "fastest").write_text("a file where the folder should be")
    assert fastest("gemma3_tiny", task=TEXT, cache_dir=tmp_path) == "torch"
    assert "kept" not in capsys.readouterr().err


def test_nothing_is_measured_where_nothing_can_be_chosen(measured, tmp_path, monkeypatch):
    assert fastest("vit_tiny_fashion", task=TEXT, cache_dir=tmp_path) in benches.installed()  # loading tells
    monkeypatch.setattr(benches, "installed", lambda: ["numpy"])
    assert fastest("gemma3_tiny", task=TEXT, cache_dir=tmp_path) == "numpy"
    assert not measured and not (tmp_path / "fastest").exists()


def test_backends_that_fail_say_so(tmp_path):
    report = bench("gemma3_tiny", backends=["numpy"], device="gpu", cache_dir=tmp_path)
    assert "numpy sees only: cpu" in report.rows[0].error and report.fastest is None
    assert not (tmp_path / "fastest").exists()


def test_no_backend_at_all(measured, tmp_path, monkeypatch):
    monkeypatch.setattr(benches, "measure", lambda *_: [Row(n, error="no" if n == "jax" else "slow") for n in NAMES])
    with pytest.raises(InputError, match="'fastest'.*gemma3_tiny: jax: no; torch, tensorflow, numpy: slow"):
        fastest("gemma3_tiny", task=TEXT, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("raise SystemExit('out of luck')", "exit 1): out of luck"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9; memory may have run out"),
        ("import os; sys.stdout.write('{'); sys.stdout.flush(); os._exit(3)", "exit 3"),
    ],
)
def test_a_process_that_dies(tmp_path, monkeypatch, code, says):
    monkeypatch.setattr(bench_processes, "_START", f"import sys; sys.stdin.readline(); {code}")
    report = bench("gemma3_tiny", backends=["numpy", "jax"], train=True, cache_dir=tmp_path)
    assert len(report.rows) == 2 and all(says in row.error for row in report.rows)


def test_a_process_that_hangs(tmp_path, monkeypatch, processes):
    monkeypatch.setattr(bench_processes, "_START", "import sys, time; sys.stdin.readline(); time.sleep(60)")
    monkeypatch.setattr(bench_processes, "_PATIENCE", 0.3)
    [row] = bench("vit_tiny_fashion", backends=["numpy"], cache_dir=tmp_path).rows
    assert row.error == "no answer within 0.005 minutes, so the process was killed" and not row.refused
    assert processes[0].poll() is not None


def test_stopping_leaves_no_process(tmp_path, processes):
    def show(doing):
        if doing.endswith("runs"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench("vit_tiny_fashion", backends=["numpy"], show=show, cache_dir=tmp_path)
    assert len(processes) == 1 and processes[0].poll() is not None


@pytest.mark.slow
def test_memory_is_that_of_the_measuring_process(tmp_path):
    ours = np.ones(100_000_000)  # 800 MB
    report = bench("vit_tiny_fashion", backends=["numpy"], batch_size=2, cache_dir=tmp_path)
    assert report.unit == "images" and 20e6 < report.rows[0].peak_memory < ours.nbytes / 2
    assert not (tmp_path / "fastest").exists()  # one backend's figures are no verdict


def test_modules_of_the_working_directory_are_not_taken(tmp_path, monkeypatch):
    for name in ("json", "numpy"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong one')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    report = bench("vit_tiny_fashion", backends=["numpy"], cache_dir=tmp_path)
    assert report.rows[0].error is None


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"backends": ["jax", FASTEST]}, UnknownBackend, "'fastest'; those that can be measured: jax, torch"),
        ({"backends": []}, InputError, "one or more"),
        ({"steps": 0}, InputError, "steps=0"),
        ({"batch_size": 0}, InputError, "batch_size=0"),
        ({"prompt_tokens": 1000, "max_new_tokens": 25}, InputError, "at most 1024"),
        ({"max_new_tokens": 2}, InputError, "3 or more"),
        ({"preset": "gemma3_tinny"}, PresetNotFound, "gemma3_tiny"),
        ({"dtype": "int8"}, InputError, "dtype must be one of float32"),
        ({"device": "gpuu"}, DeviceError, "device must be cpu, gpu"),
    ],
)
def test_bad_input_is_told_before_anything_runs(options, error, says, processes, tmp_path):
    with pytest.raises(error, match=says):
        bench(**{"preset": "gemma3_tiny", "cache_dir": tmp_path} | options)
    assert not processes


@pytest.mark.parametrize(("options", "says"), [({"dtype": "int8"}, "'int8'"), ({"device": "gpuu"}, "'gpuu'")])
def test_the_callers_mistake_starts_nothing(options, says, processes, tmp_path):
    with pytest.raises((InputError, DeviceError), match=says):
        fastest("gemma3_tiny", task=TEXT, cache_dir=tmp_path, **options)
    assert not processes


def test_the_names_of_the_tasks():
    assert (CausalLM.task, ImageClassifier.task) == (TEXT, IMAGES)
