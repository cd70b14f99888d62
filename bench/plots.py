"""What the larger plots cost: milliseconds of processor time to build them and to write them as
JSON, and the kilobytes a page receives.
"""

import statistics
import time

import torch

from cudlab.config import set_threads
from cudlab.motion import motion_chart
from cudlab.moves import moves_chart
from cudlab.path import make_grid
from cudlab.plane import path_chart, plane_chart
from cudlab.rng import draw_noise
from cudlab.tradeoff import tradeoff_chart


def milliseconds(action, rounds: int = 15) -> float:
    "Median of several rounds after a first one, which imports what Plotly imports late."
    times = []
    for _ in range(rounds + 1):
        began = time.process_time()
        action()
        times.append(1000 * (time.process_time() - began))
    return statistics.median(times[1:])


def cases() -> dict:
    "Name -> how to make the figure."
    ts, axis = make_grid("uniform", 16), torch.linspace(-2.6, 2.6, 15)
    at = torch.cartesian_prod(axis, axis)
    flat, solid = (
        torch.stack([draw_noise(0, 256, (d,)) * (0.2 + 0.8 * t) for t in ts]) for d in (2, 3)
    )
    field = torch.stack([at * (0.2 + t) for t in ts])
    values = draw_noise(1, 64, (16,)).abs().T
    scores = [
        dict(
            run=f"run {r}",
            solver="euler",
            nfe=n,
            fd=10 / n + r + 0.1 * s,
            seed=s,
            extractor="e",
            n=1000,
        )
        for r in range(12)
        for n in (1, 2, 3, 4, 6, 8, 16, 32)
        for s in range(3)
    ]
    return {
        "paths in 2-D, 256 x 17": lambda: path_chart(flat, torch.tensor([0.5, 0.3])),
        "paths in 3-D, 256 x 17": lambda: path_chart(solid, torch.tensor([0.5, 0.3, 0.1])),
        "plane, 256 x 17": lambda: plane_chart(flat, flat[0]),
        "motion, 128 x 17": lambda: motion_chart(flat[:, :128], ts, flat[0]),
        "motion, 128 x 17, field of 15 x 15": lambda: motion_chart(
            flat[:, :128], ts, flat[0], field, at
        ),
        "moves, 6 panels of 16 x 64": lambda: moves_chart(
            {f"panel {k} (unit)": values for k in range(6)}, ts
        ),
        "tradeoff, 12 lines of 8 points, 3 seeds": lambda: tradeoff_chart(scores),
    }


if __name__ == "__main__":
    set_threads()
    for name, make in cases().items():
        fig = make()
        print(
            f"{name:42} {milliseconds(make):6.1f} ms to build {milliseconds(fig.to_json):6.1f} ms "
            f"to write {len(fig.to_json()) / 1000:7.1f} kB"
        )
