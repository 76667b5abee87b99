"""Which installed backend is going to train fastest here: a guess from one product of matrices, in a second or two.

`backend="fastest"` runs the model itself, each backend in a process of its own: right, and too long for a run of a
minute. Training is mostly products of some hundred rows, and how fast these are in float32 and in bfloat16 differs
between processors and libraries by up to ten times, more than all else together.
"""

import contextlib
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from modelhub.core.backends import Backend, get_backend, installed
from modelhub.core.measured import choice
from modelhub.errors import NoGradients

_ROWS, _WIDTH, _INNER = 128, 576, 1536  # a row of tokens through an MLP of SmolLM2-135M
_SECONDS = 0.2  # for each product that is timed
_WORTH = 1.5  # bfloat16 has to be this much faster: norms, softmax and the optimizer stay in float32


@dataclass(frozen=True)
class TrainingChoice:
    """backend: its name. mixed_precision: as `compile` takes it. rates: {("torch", "float32"): GFLOP/s}."""

    backend: str
    mixed_precision: str | None
    rates: dict[tuple[str, str], float]

    def __str__(self) -> str:
        shown = [f"{' in '.join(pair)} {rate:.0f}" for pair, rate in sorted(self.rates.items(), key=lambda x: -x[1])]
        return f"{self.backend}{' in bfloat16' if self.mixed_precision else ''}" + (
            f" (products, GFLOP/s: {', '.join(shown)})" if shown else ""
        )


def best_trainer(backend: str | None = None, device: str | None = None) -> TrainingChoice:
    """The backend, and its precision, with the fastest products among the installed ones that can train.

    backend: only this one; its precision is chosen. device: as in from_preset. Where there is an accelerator it is
    the backend that from_preset would take, in the checkpoint's own dtype, and nothing is measured.

    Raises UnknownBackend, BackendNotInstalled and DeviceError.
    """
    usual = get_backend(backend, device)
    if usual.device != "cpu":
        return TrainingChoice(usual.name, None, {})
    rates: dict[tuple[str, str], float] = {}
    for xp in _that_train([backend] if backend else installed()):
        rates[xp.name, "float32"] = plain = _rate(xp, "float32")
        if (half := _rate(xp, "bfloat16")) >= _WORTH * plain:
            rates[xp.name, "bfloat16"] = half
    if not rates:
        return TrainingChoice(usual.name, None, {})
    name, dtype = max(rates, key=lambda pair: rates[pair])
    return TrainingChoice(name, "mixed_bfloat16" if dtype == "bfloat16" else None, rates)


def best_precision(xp: Backend) -> str | None:
    """What `compile` takes "auto" for: "mixed_bfloat16" where a processor multiplies bfloat16 well faster than float32,
    else None. Measured once for this machine and the framework's version, and kept. An accelerator is left to the dtype
    of the weights, which is the checkpoint's own there.
    """
    if xp.device != "cpu" or not _that_train([xp.name]):
        return None
    names = ("mixed_bfloat16", "float32")
    version = sys.modules[xp.name].__version__  # the name of a package differs between builds of TensorFlow
    found = choice(
        f"precision of training on {xp.name} {version}", names,
        lambda: best_trainer(xp.name, "cpu").mixed_precision or names[1],
    )  # fmt: skip
    return found if found == names[0] else None


def _that_train(names: Sequence[str]) -> list[Backend]:
    found = []
    for name in names:
        with contextlib.suppress(NoGradients):
            xp = get_backend(name, "cpu")
            xp.value_and_grad(lambda variables: (variables, None))
            found.append(xp)
    return found


def _rate(xp: Backend, dtype: str) -> float:
    """GFLOP/s of the best call: what else the machine does only makes calls slower."""
    random = np.random.default_rng(0)
    x, weight = (
        xp.cast(xp.put(random.standard_normal(shape, dtype=np.float32)), dtype)
        for shape in ((_ROWS, _WIDTH), (_INNER, _WIDTH))
    )
    xp.get(xp.linear(x, weight))  # programs are compiled, threads started
    best, begun = float("inf"), time.perf_counter()
    while (now := time.perf_counter()) - begun < _SECONDS:
        xp.get(xp.linear(x, weight))
        best = min(best, time.perf_counter() - now)
    return 2e-9 * _ROWS * _WIDTH * _INNER / best
