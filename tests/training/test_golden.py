"""Twenty fp32 steps on one CPU thread give the losses in golden_losses.txt: no refactoring changes the training.

After a change that is meant to alter them: `python tests/training/test_golden.py` writes the file anew; say why in the
commit.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from data_pipeline.loader import Batch
from sisa_dist.config import parse_config
from sisa_dist.engine import build_engine
from sisa_dist.parallel.mesh import init_mesh

GOLDEN = Path(__file__).with_name("golden_losses.txt")
STEPS = 20

CONFIG = {
    "seed": 7,
    "model": {
        "vocab_size": 200,
        "d_model": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "d_ff": 96,
        "mixer": ["sisa", "attention", "sisa"],
        "d_s": [16, 0, 8],
    },
    "schedule": {"warmup_steps": 0},
    "training": {"steps": STEPS, "seq_len": 150, "global_batch_tokens": 600},
}


def golden_run() -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step, on a stream that a model can learn: a noisy walk over the vocabulary."""
    config = parse_config(CONFIG, source="golden")
    engine = build_engine(config, init_mesh(config.parallel, device="cpu"))
    generator = np.random.Generator(np.random.Philox(key=[7, 0]))
    rows = []
    for _ in range(STEPS):
        walk = np.cumsum(generator.integers(1, 4, size=(4, 151)), axis=1) % 200
        window = torch.from_numpy(walk)
        halves = [Batch(window[i : i + 2, :-1], window[i : i + 2, 1:], None) for i in (0, 2)]
        result = engine.train_step(halves, 3e-3)
        rows.append((result.loss, result.grad_norm))
    return rows


def test_twenty_steps_give_the_golden_losses() -> None:
    expected = [tuple(map(float, line.split())) for line in GOLDEN.read_text(encoding="utf-8").splitlines()]
    assert len(expected) == STEPS
    got = golden_run()
    assert got[-1][0] < got[0][0] - 1
    # Another CPU's vector units round sums otherwise; twenty steps amplify 1e-7 to below 1e-4.
    np.testing.assert_allclose(np.array(got), np.array(expected), rtol=2e-4)


if __name__ == "__main__":
    torch.set_num_threads(1)
    GOLDEN.write_text("".join(f"{loss:.7f} {norm:.7f}\n" for loss, norm in golden_run()), encoding="utf-8")
