"""How long it takes to list a thousand runs: the first time in a process, again, and after one of
them changed.
"""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

from cudlab.catalog import list_runs
from cudlab.config import get_settings

COUNT = 1000
BIG = 8  # bytes from which a file is only as long as it should be: listing never reads weights


def seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def lab(folder: Path, count: int = COUNT) -> None:
    "Copies of a shipped run under other names; the weights are holes of the right length."
    source = get_settings().checkpoints_path / "digits-cud-aim8"
    for i in range(count):
        copy = folder / f"{source.name}-{i:04d}"
        copy.mkdir()
        for file in source.iterdir():
            if file.suffix == ".safetensors":
                with open(copy / file.name, "wb") as f:
                    f.truncate(file.stat().st_size)
            else:
                shutil.copyfile(file, copy / file.name)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CUDLAB_RUNS_PATH"] = folder
        lab(Path(folder))
        cold = seconds(list_runs)
        warm = [seconds(list_runs) for _ in range(5)]
        times = []
        for i in range(5):
            manifest = Path(folder) / f"digits-cud-aim8-{i:04d}" / "MANIFEST.json"
            manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"step": i}))
            times.append(seconds(list_runs))
        print(
            f"{COUNT} runs listed: {cold:.3f} s cold, {sorted(warm)[2]:.3f} s warm, "
            f"{sorted(times)[2]:.3f} s after one changed (medians of 5)"
        )


if __name__ == "__main__":
    main()
