"""Fixtures that all tests share. Before a framework is imported it is told to be quiet, and how many threads to use."""

import ctypes
import gc
import os
import re
import signal
import sys
import zlib
from collections import Counter
from pathlib import Path

# A shell's background job ignores Ctrl-C, one under nohup a closed terminal, and so would all that the tests start.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Two threads, or one each where pytest-xdist runs the tests in several processes.
_threads = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS", "NPROC"):
    os.environ.setdefault(_name, _threads)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # torch's waiting threads would spin: 100 times slower on busy CPUs
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")  # off: tests leave nothing in the user's cache

import pytest

from modelhub.core.backends import get_backend, installed
from modelhub.errors import DownloadError

pytest.register_assert_rewrite("text_parity", "text_suite")


def pytest_collection_modifyitems(config, items):
    """What takes an hour is run when it is asked for by name: pytest -m soak. Of a test's crossings with the backends,
    those with numpy and with one other are quick, and the rest is slow."""
    if "soak" not in config.option.markexpr:
        config.hook.pytest_deselected(items=[item for item in items if item.get_closest_marker("soak")])
        items[:] = [item for item in items if not item.get_closest_marker("soak")]
    # What needs most memory first, while the processes are small; then long files before short ones.
    sizes = Counter(item.path for item in items)
    items.sort(key=lambda item: (item.get_closest_marker("real") is None, -sizes[item.path], str(item.path)))
    used, choices = {item: _frameworks(item) for item in items}, {}
    for item, names in used.items():
        choices.setdefault(_test(item), set()).update(names)
    for item, names in used.items():
        if names and names != {_quick(item, sorted(choices[_test(item)]))}:
            item.add_marker("slow")


def pytest_configure(config):
    if hasattr(config.option, "loadscopereorder"):
        # pytest-xdist would put the shortest files last, real weights among them.
        config.option.loadscopereorder = False


def _test(item):
    return item.nodeid.partition("[")[0]


def _frameworks(item):
    """The names of backends, but numpy, among the parameters of a test."""
    parameters = getattr(item, "callspec", None)
    words = re.split("[^a-z]+", parameters.id) if parameters else ()
    return {"jax", "torch", "tensorflow"}.intersection(words)


def _quick(item, names):
    """Torch for whole models, which the others compile for seconds; for operations and layers a name that differs from
    test to test, always the same for each."""
    if "torch" in names and not {"core", "families", "interop"}.intersection(item.path.parts):
        return "torch"
    return names[zlib.crc32(_test(item).encode()) % len(names)]


@pytest.fixture(autouse=True, scope="module")
def memory_is_given_back():
    """Frameworks keep what they have compiled, and the C library what was freed: of all tests some 10 GB."""
    yield
    if sys.platform != "linux" or _resident() < 2.5e9:
        return
    if "jax" in sys.modules:
        sys.modules["jax"].clear_caches()
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture(autouse=True)
def nothing_of_the_users(request, tmp_path_factory, monkeypatch):
    """Caches and cards of the user's own are neither seen nor changed; real weights are worth keeping, though."""
    if request.node.get_closest_marker("real") is None:
        home = tmp_path_factory.getbasetemp()
        monkeypatch.setenv("MODELHUB_CACHE", str(home / "cache"))
        monkeypatch.setenv("XDG_CONFIG_HOME", str(home / "config"))


@pytest.fixture(params=installed(), scope="session")
def backend(request):
    """Every installed backend, on the CPU."""
    return get_backend(request.param, "cpu")


@pytest.fixture(scope="session")
def gemma3_gguf() -> Path:
    """The real Gemma 3 270M, Q4_K_M: $MODELHUB_TEST_GEMMA3_GGUF, or else downloaded into the usual cache."""
    if given := os.environ.get("MODELHUB_TEST_GEMMA3_GGUF"):
        return Path(given)
    from modelhub.hub.preset import resolve

    try:
        return Path(resolve("gemma3_270m_q4").path)
    except DownloadError as error:
        if os.environ.get("CI"):
            raise
        pytest.skip(f"the real Gemma 3 270M is not here and cannot be downloaded: {error}")


@pytest.fixture(scope="session")
def tiny_preset(tmp_path_factory) -> Path:
    """A complete tiny Gemma 3 preset in a folder."""
    from tiny_preset import write_preset

    return write_preset(tmp_path_factory.mktemp("presets") / "tiny_gemma3")
