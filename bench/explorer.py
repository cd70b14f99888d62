"""What the explorer costs: first picture and whole film, errors, payloads, and how soon the page
stands.

Times are of the callbacks in this process, on a warm run: what a browser adds is its own. The MNIST
network is untrained: its speed is the same.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "apps"))

import torch
from request import SampleForm

from cudlab.config import Config, set_threads


def film(form: dict, rounds: int = 5) -> tuple:
    """Medians of (first picture, last picture, everything) in seconds, the bare network calls in
    between, and the bytes of the film.
    """
    from views import trajectory

    times = []
    for k in range(rounds + 1):
        began, marks, pages = time.perf_counter(), [], []
        for page in trajectory.stream_sample(*(form | dict(seed=k)).values()):
            marks.append(time.perf_counter() - began)
            pages.append(page)
        times.append((marks[0], marks[-2], marks[-1]))
    return *(statistics.median(t[i] for t in times[1:]) for i in range(3)), len(pages[-1][0])


def bare(name: str, count: int, steps: int) -> float:
    "Seconds of so many network calls and nothing else."
    from offer import open_run

    run = open_run(name)
    f, x = run.velocity(), torch.randn(count, *run.shape)
    t = torch.full((count,), 0.5)
    with torch.no_grad():
        f(x, t)
        began = time.perf_counter()
        for _ in range(steps):
            f(x, t)
        return time.perf_counter() - began


def ready() -> float:
    "Seconds from the command to the line that says the page is there."
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "apps" / "explorer.py"), "--port", "7990"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if "ready at" in line:
            break
    spent = time.perf_counter() - began
    process.terminate()
    process.wait()
    return spent


def main():
    print(
        f"page ready {statistics.median(ready() for _ in range(3)):.1f} s after the command "
        "(median of 3)"
    )
    set_threads()
    with tempfile.TemporaryDirectory() as folder:
        import os

        os.environ["CUDLAB_RUNS_PATH"] = folder
        from cudlab.create import create_run
        from cudlab.training import train

        names = ["digits-cud"]
        try:
            list(
                train(
                    create_run(
                        Config(method="rf", data="mnist", net="mnist", steps=1, batch=2),
                        "bench-mnist",
                    )
                )
            )
            names.append("bench-mnist")
        except ValueError as e:
            print(f"without the MNIST network: {e}")
        form = asdict(SampleForm(amount=16, count=64))
        for name in names:
            first, last, whole, size = film(form | dict(run=name), 5 if name == "digits-cud" else 2)
            print(
                f"{name}: 64 samples x 16 steps of Euler: first picture {first:.3f} s, film "
                f"complete {last:.2f} s, charts too {whole:.2f} s; bare network calls "
                f"{bare(name, 64, 16):.2f} s; film {size / 1e6:.2f} MB; "
                f"{torch.get_num_threads()} threads"
            )


if __name__ == "__main__":
    main()
