"""JAX's programs on the disk: what a full disk cut short goes, once, and what is whole stays."""

import os
import subprocess
import sys
import zlib

import pytest

pytest.importorskip("jax")

PROGRAM = """
import warnings
warnings.simplefilter("error")  # JAX only warns of entries that it cannot read
import jax
from modelhub.core.backends import get_backend
xp = get_backend("jax", "cpu")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
print(jax.jit(lambda x: x * 2 + 1)(jax.numpy.ones(3)).sum())
"""


def programs(folder):
    return sorted(folder.glob("*-cache"))


def test_programs_that_were_cut_short_are_made_again(tmp_path):
    environment = os.environ | {"MODELHUB_CACHE": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)

    def run():
        done = subprocess.run([sys.executable, "-c", PROGRAM], env=environment, capture_output=True, text=True)
        assert (done.returncode, done.stdout) == (0, "9.0\n"), done.stderr

    run()
    first = programs(tmp_path / "jax")
    assert first
    whole = {path: path.read_bytes() for path in first}
    for damaged in (b"", whole[first[0]][:50]):
        for path in first:
            path.write_bytes(damaged)
        run()
        assert programs(tmp_path / "jax") == first
        assert all(path.read_bytes() and len(path.read_bytes()) > 50 for path in first)


def test_each_program_is_looked_at_once(tmp_path):
    from modelhub.core.backends.jax import _remove_torn

    good, torn = tmp_path / "a-cache", tmp_path / "b-cache"
    good.write_bytes(zlib.compress(b"program" * 100))
    torn.write_bytes(zlib.compress(b"program" * 100)[:10])
    _remove_torn(tmp_path)
    assert good.exists() and not torn.exists()
    torn.write_bytes(b"")
    os.utime(torn, (0, 0))  # older than the last look
    _remove_torn(tmp_path)
    assert torn.exists()
    _remove_torn(tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()
