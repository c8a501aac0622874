"""The demo's training script: one rank. Needs nothing but `ranklog`; a real script looks just like `main`.

    <dir>/rank<rank>.<attempt>.proof     first step, number of log() calls that returned (2 x u64, little-endian)
    <dir>/rank<rank>.checkpoint          JSON: the next step and the weights

The training is real, if small: logistic regression by stochastic gradient descent on points of two noisy classes, drawn
from the rank's own seed, so that every demo gives the same curves. A rank that is started again goes on from its last
checkpoint. The proof is written after each log() returned, by one pwrite, so SIGKILL cannot take it back.
"""

import json
import math
import os
import random
import struct
import sys
import time
from pathlib import Path

import ranklog
from ranklog import fs

DIMENSIONS = 16
BATCH_POINTS = 48
CHECKPOINT_STEPS = 20
STEP_S = 0.01
NOISE = 1.5
PROOF = struct.Struct("<QQ")


def proof_path(directory: Path, rank: int, attempt: int) -> Path:
    """Return where a rank notes what it has logged in that attempt."""
    return directory / f"rank{rank}.{attempt}.proof"


def read_proof(path: Path) -> tuple[int, int]:
    """Return (first step, number of log() calls that returned); (0, 0) if it did not get so far."""
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return 0, 0
    first, count = PROOF.unpack(raw) if len(raw) == PROOF.size else (0, 0)
    return first, count


class Model:
    """Logistic regression; `train` is one step of gradient descent."""

    def __init__(self, rank: int, weights: list[float]) -> None:
        truth = random.Random(7)  # noqa: S311 - the same two classes for every rank
        self.weights = weights
        self._truth = [truth.gauss(0, 1) for _ in range(DIMENSIONS)]
        self._random = random.Random(1000 + rank)  # noqa: S311

    def skip(self, steps: int) -> None:
        """Draw what `steps` steps would have drawn, so that a restart sees the data of an undisturbed run."""
        for _ in range(steps):
            self._batch()

    def _batch(self) -> list[tuple[list[float], float]]:
        batch = []
        for _ in range(BATCH_POINTS):
            point = [self._random.gauss(0, 1) for _ in range(DIMENSIONS)]
            score = sum(a * b for a, b in zip(point, self._truth, strict=True)) + self._random.gauss(0, NOISE)
            batch.append((point, 1.0 if score > 0 else 0.0))
        return batch

    def train(self, rate: float) -> dict[str, float]:
        """Do one step; return its metrics."""
        batch = self._batch()
        gradient = [0.0] * DIMENSIONS
        loss = right = 0.0
        for point, label in batch:
            score = sum(a * b for a, b in zip(point, self.weights, strict=True))
            chance = 1 / (1 + math.exp(-max(-30.0, min(30.0, score))))
            loss -= math.log(max(1e-9, chance if label else 1 - chance))
            right += (chance > 0.5) == (label > 0.5)
            gradient = [g + (chance - label) * value for g, value in zip(gradient, point, strict=True)]
        gradient = [g / BATCH_POINTS for g in gradient]
        self.weights = [w - rate * g for w, g in zip(self.weights, gradient, strict=True)]
        norm = math.sqrt(sum(g * g for g in gradient))
        return {"loss": loss / BATCH_POINTS, "acc": right / BATCH_POINTS, "grad_norm": norm}


def main(directory: Path, steps: int) -> None:
    """Train and log; the launcher's environment says which rank this is."""
    run = ranklog.init(project="demo", config={"model": "logistic regression", "steps": steps, "batch": BATCH_POINTS})
    rank, attempt = run.rank or 0, int(sys.argv[3])
    checkpoint = directory / f"rank{rank}.checkpoint"
    first, weights = json.loads(checkpoint.read_text()) if checkpoint.exists() else (0, [0.0] * DIMENSIONS)
    model = Model(rank, weights)
    model.skip(first)
    proof = os.open(proof_path(directory, rank, attempt), os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    for step in range(first, steps):
        began_s = time.perf_counter()
        metrics = model.train(rate=0.04)
        time.sleep(max(0.0, STEP_S - (time.perf_counter() - began_s)))
        ranklog.log({**metrics, "step_time": time.perf_counter() - began_s}, step=step)
        os.pwrite(proof, PROOF.pack(first, step - first + 1), 0)
        if (step + 1) % CHECKPOINT_STEPS == 0:
            temporary = checkpoint.with_suffix(".tmp")
            temporary.write_text(json.dumps([step + 1, model.weights]))
            fs.rename(temporary, checkpoint)
    ranklog.finish()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
