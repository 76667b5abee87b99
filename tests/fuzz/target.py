"""What is damaged: for each reader a folder of sound files, and a function that reads and uses all that is in it."""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fuzz import mutations
from fuzz.mutations import Damage

TARGETS: dict[str, "Target"] = {}  # weights.py, presets.py and texts.py fill it


@dataclass(frozen=True)
class Target:
    """damage: file -> how it is damaged; other files of the folder stay as they are. weight: its share of the cases."""

    write: Callable[[Path], Any]
    load: Callable[[Path], Any]
    damage: dict[str, Damage]
    weight: float = 1.0

    def damaged(self, folder: Path, rng: random.Random) -> dict[str, bytes | None]:
        """file -> what is in it now; None: it is gone."""
        names = rng.sample(sorted(self.damage), 2 if len(self.damage) > 1 and rng.random() < 0.1 else 1)
        files: dict[str, bytes | None] = {}
        for name in names:
            data = (folder / name).read_bytes()
            how = self.damage[name] if rng.random() < 0.9 else mutations.raw
            files[name] = None if rng.random() < 0.01 else how(rng, data)
        return files


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")
