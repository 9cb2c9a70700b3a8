"""What every model's entry of manifest.json begins with."""

import hashlib
from pathlib import Path
from typing import Any

from bdclean.networks.checkpoint.checkpoint import Checkpoint
from bdclean.record.run import Rate


def entry_of(path: Path, kind: str, seed: int, correct: Rate) -> dict[str, Any]:
    """The entry of the model at `path` as if it had no backdoor; `correct`: its accuracy."""
    return {
        "file": path.name,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "kind": kind,
        "architecture": Checkpoint.read(path).arch.name,
        "attack": None,
        "trigger": None,
        "target": None,
        "seed": seed,
        "clean_accuracy": correct.value,
        "attack_success_rate": None,
        "n": correct.n,
    }
