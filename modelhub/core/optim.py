"""Optimizers, learning-rate schedules, clipping and loss scaling: pure functions over {name: array}, on every backend.

An optimizer holds numbers only. Its state is a flat dict of float32 arrays under "slot/NAME", the same on every
backend, so a run may stop on one and go on on another; `init` and `update` can be traced by a compiler.

Every change is written as `x += change`. numpy and torch do that in place, so a second copy of the weights and of the
state never exists; elsewhere it is a plain sum, whose memory XLA takes from donated arguments. Hence `update` and
`clip` consume what they are given: pass them arrays that nobody else holds.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any, ClassVar

from modelhub.core.backends.base import Array, Backend, Shape
from modelhub.errors import ConfigError
from modelhub.habits import explained

Arrays = dict[str, Array]
Add = Callable[[Array, Array], Array]


def _check(owner: object, fits: Callable[[Any], bool], wanted: str, *names: str) -> None:
    """Raise ConfigError for a field whose value, or one of whose values, does not fit."""
    for name in names:
        value = getattr(owner, name)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not fits(number):
                raise ConfigError(f"{type(owner).__name__}: {name} must be {wanted}, got {value!r}")


def _not_negative(owner: object, *names: str) -> None:
    _check(owner, lambda x: 0.0 <= x < math.inf, "a finite number, 0 or more", *names)


def _below_one(owner: object, *names: str) -> None:
    _check(owner, lambda x: 0.0 <= x < 1.0, "at least 0 and below 1", *names)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _wide(xp: Backend, x: Array) -> Array:
    return xp.cast(x, "float32")


def _rms(xp: Backend, x: Array) -> Array:
    return xp.sqrt(xp.mean(x * x))


def _bias_correction(xp: Backend, beta: float, step: Array) -> Array:
    """1 - beta ** step. In float32 that difference would have lost 4 of 7 digits in the first steps of beta = 0.999."""
    if beta == 0.0:
        return step / step
    half = xp.tanh(step * (-0.5 * math.log(beta)))  # 1 - exp(-2 y) = 2 tanh(y) / (1 + tanh(y))
    return 2.0 * half / (1.0 + half)


def _adam(xp: Backend, g: Array, s: Arrays, step: Array, betas: tuple[float, float], eps: float, add: Add) -> Array:
    m = s["m"] = add(s["m"], (1.0 - betas[0]) * (g - s["m"]))
    v = s["v"] = add(s["v"], (1.0 - betas[1]) * (g * g - s["v"]))
    scale = xp.rsqrt(_bias_correction(xp, betas[1], step))
    return m / (xp.sqrt(v) * scale + eps) / _bias_correction(xp, betas[0], step)


@dataclass(frozen=True)
class Optimizer:
    """What all optimizers share.

    learning_rate: None takes the one given beside the optimizer, as in `compile(optim.SGD(momentum=0.9),
    learning_rate=0.1)`; it is kept here for the caller, who passes `update` what his schedule made of it.
    decay_only_matrices: none for arrays of one dimension (biases, norms); the default, as torch's, is all.
    """

    learning_rate: float | None = None
    _: KW_ONLY
    weight_decay: float = 0.0
    decay_only_matrices: bool = False

    def __post_init__(self) -> None:
        _not_negative(self, "learning_rate", "weight_decay")

    def init(self, xp: Backend, params: Mapping[str, Array]) -> Arrays:
        """The state before the first step: {"slot/NAME": float32 array}, all zeros.

        Parameters of another dtype than float32 also get a float32 copy, "master/NAME", which is what is trained:
        the small steps of training are lost in the 8 bits of a bfloat16.
        """
        return {
            key: _wide(xp, params[key.removeprefix("master/")]) if key.startswith("master/") else xp.zeros(shape)
            for key, shape in self._shapes(xp, params).items()
        }

    def update(
        self,
        xp: Backend,
        grads: Mapping[str, Array],
        state: Mapping[str, Array],
        params: Mapping[str, Array],
        learning_rate: Array,
        step: Array,
        finite: Array | None = None,
    ) -> tuple[Arrays, Arrays]:
        """One step: (new params, new state). CONSUMES the arrays of `state` and `params`: in place on numpy and torch.

        grads: of any float dtype, computed with in float32. learning_rate: float32 scalar; step: int32 scalar, 1 at the
        first step. They are arrays of xp, so no value of theirs compiles anything again. finite: bool scalar; where it
        is False params and state keep their values (see LossScale), and `step` should not count this step.
        Params keep their dtypes; the low-precision ones are their master copies, rounded.
        Raises ConfigError if the names in `state` or `grads` are not those that belong to `params`.
        """
        self._check_names("state", state, self._shapes(xp, params))
        self._check_names("grads", grads, params)

        def add(x: Array, change: Array) -> Array:
            x += change if finite is None else xp.where(finite, change, 0.0)
            return x

        new_params, new_state = {}, {}
        step = _wide(xp, step)
        for name, param in params.items():
            slots = {slot: _wide(xp, state[f"{slot}/{name}"]) for slot in self._slots(name, param.shape)}
            weight = _wide(xp, state.get(f"master/{name}", param))
            decay = 0.0 if self.decay_only_matrices and len(param.shape) < 2 else self.weight_decay
            change = self._step(xp, _wide(xp, grads[name]), weight, slots, learning_rate, step, decay, add)
            weight = add(weight, change)
            if f"master/{name}" in state:
                new_state[f"master/{name}"] = weight
            new_params[name] = xp.cast(weight, xp.dtype(param))
            new_state |= {f"{slot}/{name}": value for slot, value in slots.items()}
        return new_params, new_state

    def _shapes(self, xp: Backend, params: Mapping[str, Array]) -> dict[str, Shape]:
        shapes: dict[str, Shape] = {}
        for name, param in params.items():
            shape = tuple(param.shape)
            shapes |= {f"{slot}/{name}": size for slot, size in self._slots(name, shape).items()}
            if xp.dtype(param) != "float32":
                shapes[f"master/{name}"] = shape
        return shapes

    def _check_names(self, what: str, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
        if found.keys() == wanted.keys():
            return
        missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
        parts = [f"lacks {_some(missing)}"] * bool(missing) + [f"has {_some(extra)} too many"] * bool(extra)
        raise ConfigError(
            f"{type(self).__name__}: for these params, {what} {' and '.join(parts)}. State and gradients must be those "
            f"of the same params and optimizer; init(xp, params) makes a new state"
        )

    # --- each optimizer -------------------------------------------------------------------------------------

    def _slots(self, name: str, shape: Shape) -> dict[str, Shape]:
        """{slot: shape} of what is remembered for one parameter."""
        raise NotImplementedError

    def _step(
        self, xp: Backend, g: Array, p: Array, s: Arrays, lr: Array, step: Array, decay: float, add: Add
    ) -> Array:
        """What to add to the parameter p (float32) for its gradient g; slots `s` are replaced, by `add` only."""
        raise NotImplementedError


@explained
@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent as torch.optim.SGD, with momentum as in Sutskever et al. 2013 (nesterov) or plain.

    Weight decay adds to the gradient.
    """

    _: KW_ONLY
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_one(self, "momentum")
        if self.nesterov and not self.momentum:
            raise ConfigError("SGD: nesterov=True needs a momentum above 0, got 0.0; momentum=0.9 is usual")

    def _slots(self, name: str, shape: Shape) -> dict[str, Shape]:
        return {"m": shape} if self.momentum else {}

    def _step(
        self, xp: Backend, g: Array, p: Array, s: Arrays, lr: Array, step: Array, decay: float, add: Add
    ) -> Array:
        if decay:
            g = g + decay * p
        if self.momentum:
            m = s["m"] = add(s["m"], (self.momentum - 1.0) * s["m"] + g)
            g = g + self.momentum * m if self.nesterov else m
        return -lr * g


@explained
@dataclass(frozen=True)
class Adam(Optimizer):
    """Kingma and Ba 2014, arXiv:1412.6980, as torch.optim.Adam. Weight decay adds to the gradient."""

    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    _decoupled: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_one(self, "betas")
        _not_negative(self, "eps")

    def _slots(self, name: str, shape: Shape) -> dict[str, Shape]:
        return {"m": shape, "v": shape}

    def _step(
        self, xp: Backend, g: Array, p: Array, s: Arrays, lr: Array, step: Array, decay: float, add: Add
    ) -> Array:
        if decay and not self._decoupled:
            g = g + decay * p
        change = _adam(xp, g, s, step, self.betas, self.eps, add)
        return -lr * (change + decay * p if decay and self._decoupled else change)


@explained
@dataclass(frozen=True)
class AdamW(Adam):
    """Loshchilov and Hutter 2017, arXiv:1711.05101, as torch.optim.AdamW: weight decay apart from the gradient."""

    _: KW_ONLY
    weight_decay: float = 0.01
    _decoupled: ClassVar[bool] = True


@explained
@dataclass(frozen=True)
class Adafactor(Optimizer):
    """Shazeer and Stern 2018, arXiv:1804.04235, as torch.optim.Adafactor: no first moment, and of the second, for all
    but vectors, only its means over rows and columns.

    eps: (floor of the second moment's root; None: float32's epsilon, floor of a parameter's size in its step size).
    d: updates of a larger root mean square are scaled down to it. The learning rate counts relative to the size of a
    parameter, and is at most 1 / sqrt(step). Weight decay is apart from the gradient.
    """

    _: KW_ONLY
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, lambda x: x <= 0.0, "0 or less", "beta2_decay")
        _check(self, lambda x: x >= 1.0, "1 or more", "d")
        _not_negative(self, "eps")

    def _slots(self, name: str, shape: Shape) -> dict[str, Shape]:
        if len(shape) < 2:
            return {"v": shape}
        return {"row": (*shape[:-1], 1), "column": (*shape[:-2], 1, shape[-1])}

    def _step(
        self, xp: Backend, g: Array, p: Array, s: Arrays, lr: Array, step: Array, decay: float, add: Add
    ) -> Array:
        floor = 2.0**-23 if self.eps[0] is None else self.eps[0]
        share = step**self.beta2_decay
        square = g * g
        if "v" in s:
            variance = s["v"] = add(s["v"], share * (square - s["v"]))
        else:
            row = s["row"] = add(s["row"], share * (xp.mean(square, axis=-1, keepdims=True) - s["row"]))
            column = s["column"] = add(s["column"], share * (xp.mean(square, axis=-2, keepdims=True) - s["column"]))
            variance = row / xp.maximum(xp.mean(row, axis=-2, keepdims=True), floor) * column
        change = g * xp.rsqrt(xp.maximum(variance, floor * floor))
        size = xp.maximum(_rms(xp, p), self.eps[1]) * xp.minimum(lr, xp.rsqrt(step))
        change = change * (size / xp.maximum(_rms(xp, change) / self.d, 1.0))
        return -(change + lr * decay * p if decay else change)


@explained
@dataclass(frozen=True)
class Lion(Optimizer):
    """Chen et al. 2023, arXiv:2302.06675, as optax.lion: steps of the sign of the momentum. It wants learning rates 3
    to 10 times smaller than AdamW's. Weight decay is apart from the gradient."""

    _: KW_ONLY
    betas: tuple[float, float] = (0.9, 0.99)

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_one(self, "betas")

    def _slots(self, name: str, shape: Shape) -> dict[str, Shape]:
        return {"m": shape}

    def _step(
        self, xp: Backend, g: Array, p: Array, s: Arrays, lr: Array, step: Array, decay: float, add: Add
    ) -> Array:
        mixed = s["m"] + (1.0 - self.betas[0]) * (g - s["m"])
        sign = mixed / xp.maximum(xp.abs(mixed), 1e-37)  # a NaN stays one, as by comparisons it would not
        s["m"] = add(s["m"], (1.0 - self.betas[1]) * (g - s["m"]))
        return -lr * (sign + decay * p if decay else sign)


@explained
@dataclass(frozen=True)
class Muon(Optimizer):
    """Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/, as torch.optim.Muon: steps of the momentum with
    all its singular values brought near 1, for matrices. All other parameters, and matrices that have one of `exclude`
    in their names (the input and output layers, which it does not suit), are trained by AdamW.

    adjust_lr_fn: "match_rms_adamw" gives the steps the size of AdamW's (Liu et al. 2025, arXiv:2502.16982), so that one
    learning rate fits both halves; "original" is torch's default and wants a rate near 0.02.
    ns_dtype: of the Newton-Schulz iteration; "bfloat16", which torch uses, is faster on accelerators, and rougher.
    """

    _: KW_ONLY
    weight_decay: float = 0.1
    momentum: float = 0.95
    nesterov: bool = True
    ns_coefficients: tuple[float, float, float] = (3.4445, -4.7750, 2.0315)
    eps: float = 1e-7
    ns_steps: int = 5
    adjust_lr_fn: str = "match_rms_adamw"
    ns_dtype: str = "float32"
    betas: tuple[float, float] = (0.9, 0.999)
    adamw_eps: float = 1e-8
    exclude: tuple[str, ...] = ("embed", "lm_head", "classifier")

    def __post_init__(self) -> None:
        super().__post_init__()
        _below_one(self, "momentum", "betas")
        _not_negative(self, "eps", "adamw_eps")
        _check(self, lambda x: x in range(1, 100), "a whole number from 1 to 99", "ns_steps")
        _check(self, lambda x: x in ("match_rms_adamw", "original"), "match_rms_adamw or original", "adjust_lr_fn")
        _check(self, lambda x: x in ("float32", "bfloat16"), "float32 or bfloat16", "ns_dtype")

    def _slots(self, name: str, shape: Shape) -> dict[str, Shape]:
        if len(shape) == 2 and not any(part in name for part in self.exclude):
            return {"momentum": shape}
        return {"m": shape, "v": shape}

    def _step(
        self, xp: Backend, g: Array, p: Array, s: Arrays, lr: Array, step: Array, decay: float, add: Add
    ) -> Array:
        if "m" in s:
            change = _adam(xp, g, s, step, self.betas, self.adamw_eps, add)
        else:
            m = s["momentum"] = add(s["momentum"], (1.0 - self.momentum) * (g - s["momentum"]))
            rows, columns = p.shape
            size = max(1.0, rows / columns) if self.adjust_lr_fn == "original" else 0.04 * max(rows, columns)
            change = math.sqrt(size) * self._orthogonal(xp, g + self.momentum * (m - g) if self.nesterov else m)
        return -lr * (change + decay * p if decay else change)

    def _orthogonal(self, xp: Backend, x: Array) -> Array:
        """x (N, D) with its singular values between about 0.7 and 1.2, by Newton-Schulz iteration."""
        a, b, c = self.ns_coefficients
        tall = x.shape[0] > x.shape[1]
        x = xp.cast(x / xp.maximum(xp.sqrt(xp.sum(x * x)), self.eps), self.ns_dtype)
        x = xp.transpose(x, (1, 0)) if tall else x  # the square of the shorter side is what is multiplied
        for _ in range(self.ns_steps):
            gram = xp.matmul(x, xp.transpose(x, (1, 0)))
            x = a * x + xp.matmul(b * gram + c * xp.matmul(gram, gram), x)
        return _wide(xp, xp.transpose(x, (1, 0)) if tall else x)


_OPTIMIZERS: dict[str, type[Optimizer]] = {
    kind.__name__.lower(): kind for kind in (SGD, Adam, AdamW, Adafactor, Lion, Muon)
}


def get(optimizer: str | Optimizer, learning_rate: float | None = None, weight_decay: float | None = None) -> Optimizer:
    """An optimizer by name, or the one given; what it does not say itself is taken from the other arguments.

    Raises ConfigError for unknown names, and for a weight_decay that is not the object's own.
    """
    if isinstance(optimizer, Optimizer):
        if weight_decay and weight_decay != optimizer.weight_decay:
            raise ConfigError(
                f"weight_decay={weight_decay} was given beside an optimizer that has {optimizer.weight_decay}: "
                f"give it in one place, as in optim.{type(optimizer).__name__}(weight_decay={weight_decay})"
            )
        return replace(optimizer, learning_rate=learning_rate) if optimizer.learning_rate is None else optimizer
    if not isinstance(optimizer, str) or optimizer.lower() not in _OPTIMIZERS:
        raise ConfigError(
            f"optimizer {optimizer!r} is unknown: pass one of {', '.join(_OPTIMIZERS)}, or an object such as "
            f"optim.AdamW(betas=(0.9, 0.95))"
        )
    found = _OPTIMIZERS[optimizer.lower()](learning_rate)
    return found if weight_decay is None else replace(found, weight_decay=weight_decay)


# --- gradients ----------------------------------------------------------------------------------------------


def global_norm(xp: Backend, grads: Mapping[str, Array]) -> Array:
    """The Euclidean norm of all gradients as one vector: float32 scalar; not finite if one of them is not."""
    total = xp.zeros(())
    for name in sorted(grads):  # compilers bring dicts into their own order, and the last digit depends on it
        g = _wide(xp, grads[name])
        total = total + xp.sum(g * g)
    return xp.sqrt(total)


def clip(xp: Backend, grads: Mapping[str, Array], norm: Array, limit: float) -> Arrays:
    """Gradients, as float32, of a global norm of at most `limit`, as torch.nn.utils.clip_grad_norm_; CONSUMES `grads`.

    norm: what global_norm said of them. Raises ConfigError for a limit that is not above 0.
    """
    if not limit > 0.0:
        raise ConfigError(f"clip_norm must be above 0, got {limit!r}; None is for no clipping")
    return _scaled(xp, grads, xp.minimum(limit / (norm + 1e-6), 1.0))


def _scaled(xp: Backend, grads: Mapping[str, Array], factor: Array) -> Arrays:
    scaled = {}
    for name, g in grads.items():
        g = _wide(xp, g)
        g *= factor
        scaled[name] = g
    return scaled


@dataclass(frozen=True, kw_only=True)
class LossScale:
    """Keeps float16 gradients in range, as torch.amp.GradScaler (Micikevicius et al. 2017, arXiv:1710.03740).

    Multiply the loss by state["scale"] before differentiating, then:
        grads = scaling.unscale(xp, grads, state)
        norm = optim.global_norm(xp, grads)
        finite = norm < float("inf")
        params, slots = optimizer.update(xp, grads, slots, params, learning_rate, step, finite)
        state = scaling.update(xp, state, finite)
    The scale shrinks by backoff_factor after a step whose gradients are not finite, and grows by growth_factor after
    growth_interval good ones in a row.
    """

    init_scale: float = 65536.0
    growth_factor: float = 2.0
    backoff_factor: float = 0.5
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        _check(self, lambda x: 0.0 < x < math.inf, "a finite number above 0", "init_scale")
        _check(self, lambda x: 1.0 < x < math.inf, "a finite number above 1", "growth_factor")
        _check(self, lambda x: 0.0 < x < 1.0, "between 0 and 1", "backoff_factor")
        _check(self, lambda x: x >= 1, "1 or more", "growth_interval")

    def init(self, xp: Backend) -> Arrays:
        """{"scale": float32 scalar, "good_steps": int32 scalar}"""
        return {"scale": xp.array(float(self.init_scale)), "good_steps": xp.array(0)}

    def unscale(self, xp: Backend, grads: Mapping[str, Array], state: Mapping[str, Array]) -> Arrays:
        """The gradients of the loss itself, in float32; CONSUMES `grads`."""
        return _scaled(xp, grads, 1.0 / state["scale"])

    def update(self, xp: Backend, state: Mapping[str, Array], finite: Array) -> Arrays:
        """The state for the next step; finite: bool scalar, whether this step's gradients were."""
        scale, good = state["scale"], state["good_steps"] + 1
        grow = good >= self.growth_interval
        grown = xp.where(grow, scale * self.growth_factor, scale)
        return {
            "scale": xp.where(finite, grown, scale * self.backoff_factor),
            "good_steps": xp.where(finite & ~grow, good, 0),
        }


# --- schedules ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A factor for the learning rate, computed on the host, as transformers' get_scheduler has it.

    It rises from 0 during the first warmup_steps, or the first warmup_ratio of all steps.
    """

    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    _endless: ClassVar[bool] = False

    def __post_init__(self) -> None:
        _check(self, lambda x: x >= 0 and x % 1 == 0, "a whole number (warmup_ratio: a share)", "warmup_steps")
        _check(self, lambda x: 0.0 <= x <= 1.0, "between 0 and 1", "warmup_ratio")
        if self.warmup_steps and self.warmup_ratio:
            raise ConfigError(
                f"warmup_steps={self.warmup_steps} and warmup_ratio={self.warmup_ratio} were both given: give one"
            )

    def __call__(self, step: int, total_steps: int | None) -> float:
        """The factor for the update that follows `step` earlier ones, out of total_steps; None: nobody knows.

        Raises ConfigError if the number of all steps is needed and not known.
        """
        if total_steps is None and (self.warmup_ratio or not self._endless):
            raise ConfigError(
                f"{self} needs the number of all steps, which the data does not tell: give it (steps=...), or use "
                f"optim.Constant(warmup_steps=...)"
            )
        warmup = self.warmup_steps or math.ceil(self.warmup_ratio * (total_steps or 0))
        if step < warmup:
            return step / warmup
        return self._factor(min(1.0, (step - warmup) / max(1, (total_steps or 0) - warmup)))

    def _factor(self, progress: float) -> float:
        """At `progress`, from 0 at the end of the warm-up to 1 at the end of training."""
        raise NotImplementedError


@explained
@dataclass(frozen=True, kw_only=True)
class Constant(Schedule):
    """1, after the warm-up."""

    _endless: ClassVar[bool] = True

    def _factor(self, progress: float) -> float:
        return 1.0


@explained
@dataclass(frozen=True, kw_only=True)
class Linear(Schedule):
    """A straight line from 1 to final_ratio."""

    final_ratio: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check(self, lambda x: 0.0 <= x <= 1.0, "between 0 and 1", "final_ratio")

    def _factor(self, progress: float) -> float:
        return self.final_ratio + (1.0 - self.final_ratio) * (1.0 - progress)


@explained
@dataclass(frozen=True, kw_only=True)
class Cosine(Linear):
    """Half a cosine wave from 1 to final_ratio (Loshchilov and Hutter 2016, arXiv:1608.03983)."""

    def _factor(self, progress: float) -> float:
        return super()._factor(0.5 - 0.5 * math.cos(math.pi * progress))


_SCHEDULES: dict[str, type[Schedule]] = {kind.__name__.lower(): kind for kind in (Constant, Linear, Cosine)}


def get_schedule(schedule: str | Callable[[int, int | None], float] | None) -> Callable[[int, int | None], float]:
    """A schedule by name, or the one given: any function (step, total_steps) -> factor. None: constant.

    Raises ConfigError for unknown names.
    """
    if schedule is None:
        return Constant()
    if isinstance(schedule, str) and schedule.lower() in _SCHEDULES:
        return _SCHEDULES[schedule.lower()]()
    if not callable(schedule) or isinstance(schedule, type):
        raise ConfigError(
            f"schedule {schedule!r} is unknown: pass one of {', '.join(_SCHEDULES)}, an object such as "
            f"optim.Cosine(warmup_ratio=0.1), or a function (step, total_steps) -> factor"
        )
    return schedule
