"""Training: what users of `fit` touch."""

from modelhub.training.callbacks import (
    BestCheckpoint,
    Callback,
    EarlyStopping,
    JSONLogger,
    ProgressBar,
    TensorBoardLogger,
    WandbLogger,
)
from modelhub.training.history import History

__all__ = [
    "BestCheckpoint",
    "Callback",
    "EarlyStopping",
    "History",
    "JSONLogger",
    "ProgressBar",
    "TensorBoardLogger",
    "WandbLogger",
]
