"""A run that is broken off."""

from modelhub.training import Callback


class StopAt(Callback):
    """Breaks the run off as an error in the user's code would."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, step, logs):
        if step == self.step:
            raise RuntimeError("broken off")
