"""How long an NFE-quality curve takes on the digits: three solvers, six budgets, three noise seeds,
2,000 samples a point.
"""

import shutil
import tempfile
import time
from pathlib import Path

import torch

from cudlab.config import get_settings, set_threads
from cudlab.evaluate import evaluate, parse_evaluation
from cudlab.run import Run


def time_curve(name: str = "digits-rf", **choices) -> None:
    "The whole job on a copy of a run without its scores."
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / name
        shutil.copytree(
            get_settings().checkpoints_path / name,
            folder,
            ignore=shutil.ignore_patterns("scores.jsonl"),
        )
        job = parse_evaluation(
            {
                "run": str(folder),
                "solvers": "euler ab2 unipc2-bh2",
                "nfes": "1 2 3 4 6 8",
                "seeds": "0 1 2",
            }
            | choices
        )
        begin = time.perf_counter()
        count = sum(event.new for event in evaluate(Run(folder), job))
        took = time.perf_counter() - begin
        solving = sum(s["seconds"] for s in Run(folder).scores)
    print(
        f"curve of {name}: {count} points of {job.n:,} samples in {took:.1f} s on "
        f"{torch.get_num_threads()} threads, {solving:.1f} s of it samples and their features"
    )


if __name__ == "__main__":
    set_threads()
    time_curve()
