"""What `fit` and `evaluate` are given, besides data: checked, with one wording for all tasks."""

import os
from collections.abc import Sequence
from typing import Any

from modelhub.errors import InputError


def check_split(validation_split: float, validation_data: Any) -> None:
    if validation_data is not None or not 0.0 < validation_split < 1.0:
        raise InputError("give validation_data, or a validation_split between 0 and 1, not both")


def check_flag(name: str, value: Any) -> None:
    if value not in (True, False):  # 1 and 0 as well, as in Keras
        raise InputError(f"{name} must be True or False, got {value!r}")


def check_whole(name: str, value: Any, least: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name} must be a whole number, {least} or more, got {value!r}")


def name_of(data: Any) -> str:
    """What to call the data in a model card."""
    if isinstance(data, str | os.PathLike):
        return os.path.basename(os.path.abspath(data))
    if isinstance(data, tuple) and len(data) == 2:  # (images, labels)
        return f"{len(data[0])} rows from memory"
    if name := getattr(getattr(data, "info", None), "dataset_name", None):  # a Hugging Face Dataset
        return str(name)
    return f"{len(data)} rows from memory" if isinstance(data, Sequence) else "batches from a program"
