"""The confusion matrix of a classifier, whatever it reads."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from modelhub.core.problems import MULTI_LABEL, REGRESSION
from modelhub.errors import InputError
from modelhub.training.callbacks import optional_package


class ConfusionMatrix:
    """How often each class was taken for each; `add` batch after batch.

    counts: int64 (classes, classes), rows are what was right; for several labels a row (classes, 2, 2), of each label
    [[rightly not, wrongly], [missed, rightly]], as scikit-learn's multilabel_confusion_matrix. drawn: it will be.
    """

    def __init__(self, names: Sequence[str], problem: str, drawn: bool = False):
        if problem == REGRESSION:
            raise InputError("a confusion matrix counts classes, and this model learns numbers (regression)")
        self._figure = optional_package("matplotlib.figure", "a picture of the confusion matrix") if drawn else None
        if problem == MULTI_LABEL and drawn:
            raise InputError("with several labels a row there is a matrix for each label, and no picture of them")
        self.names, self._several = names, problem == MULTI_LABEL
        shape = (len(names), 2, 2) if self._several else (len(names), len(names))
        self.counts = np.zeros(shape, np.int64)

    def add(self, logits: np.ndarray, labels: np.ndarray, meant: np.ndarray) -> None:
        """logits (B, classes); labels as core/problems.py has them; meant (B,): which rows count."""
        logits, labels = logits[meant], labels[meant]
        if self._several:
            columns = np.broadcast_to(np.arange(len(self.names)), labels.shape)
            np.add.at(self.counts, (columns, (labels >= 0.5).astype(int), (logits > 0).astype(int)), 1)
        else:
            right = labels if labels.ndim == 1 else labels.argmax(1)
            np.add.at(self.counts, (right, logits.argmax(1)), 1)

    def draw(self, path: Path) -> None:
        """A picture, .png, .svg or .pdf."""
        names, matrix = self.names, self.counts
        size = min(3 + 0.35 * len(names), 16)
        assert self._figure is not None
        figure = self._figure.Figure(figsize=(size + 1, size), layout="constrained")
        axes = figure.add_subplot()
        shares = matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
        figure.colorbar(axes.imshow(shares, cmap="Blues", vmin=0, vmax=1), label="share of the class")
        axes.set(xlabel="predicted label", ylabel="true label")
        if len(names) <= 40:  # more would not be legible
            axes.set_xticks(range(len(names)), names, rotation=90)
            axes.set_yticks(range(len(names)), names)
        if len(names) <= 20:
            for (row, column), count in np.ndenumerate(matrix):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(count), ha="center", va="center", color=colour, fontsize=8)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
