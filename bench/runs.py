"""How long it takes to list a thousand runs: the first time in a process, again, and after one of
them changed.
"""

import os
import shutil
import tempfile
import time
from pathlib import Path

from cudlab.catalog import list_runs
from cudlab.config import get_settings

COUNT = 1000


def seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def lab(folder: Path, count: int = COUNT) -> None:
    "Copies of a shipped run under other names; the weights are holes of the right length."
    source = get_settings().checkpoints_path / "digits-cud-aim8"
    for i in range(count):
        copy = folder / f"{source.name}-{i:04d}"
        for file in (p for p in source.rglob("*") if p.is_file()):
            target = copy / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                with open(target, "wb") as f:
                    f.truncate(file.stat().st_size)
            else:
                shutil.copyfile(file, target)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CUDLAB_RUNS_PATH"] = folder
        lab(Path(folder))
        cold = seconds(list_runs)
        warm = [seconds(list_runs) for _ in range(5)]
        times = []
        for i in range(5):
            with open(Path(folder) / f"digits-cud-aim8-{i:04d}" / "scores.jsonl", "a") as f:
                f.write("{}\n")
            times.append(seconds(list_runs))
        print(
            f"{COUNT} runs listed: {cold:.3f} s cold, {sorted(warm)[2]:.3f} s warm, "
            f"{sorted(times)[2]:.3f} s after one changed (medians of 5)"
        )


if __name__ == "__main__":
    main()
