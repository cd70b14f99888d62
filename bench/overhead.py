"""What `solve` and the run around it cost beyond the bare network calls, what it costs to read a
network from elsewhere as a velocity, and how long the package takes to import.
"""

import statistics
import subprocess
import sys
import time

import torch
from diffusers import UNet2DModel

from cudlab.borrowed import wrap_network
from cudlab.config import set_threads
from cudlab.foreign import Reading
from cudlab.net import Velocity, make_network
from cudlab.path import make_grid
from cudlab.rng import draw_noise
from cudlab.schedule import NoiseTable, kept_variance
from cudlab.solver import SOLVERS, solve


def seconds(action) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def overhead(
    name: str, shape: tuple, batch: int, solvers: tuple, steps: int = 8, rounds: int = 15
) -> None:
    "Ratio of a solve to as many bare calls, measured in turn."
    net = make_network(name, shape).eval()
    x = draw_noise(0, batch, shape)
    t, ts = (
        torch.full((batch,), 0.5),
        {finite: make_grid("uniform", steps, finite=finite) for finite in (False, True)},
    )

    def bare(calls):
        for _ in range(calls):
            net(x, t)

    with torch.no_grad():
        bare(4 * steps)
        for solver in solvers:
            calls, times = SOLVERS[solver].nfe(steps), ts[SOLVERS[solver].needs_finite_logsnr]
            ratios = sorted(
                seconds(lambda s=solver, at=times: solve(Velocity(net), x, at, s))
                / seconds(lambda n=calls: bare(n))
                for _ in range(rounds)
            )
            print(
                f"solve {solver:11} {steps} steps, {name} network, batch {batch}: "
                f"{statistics.median(ratios):.3f} x {calls} bare calls "
                f"(quartiles {ratios[rounds // 4]:.3f} to {ratios[3 * rounds // 4]:.3f})"
            )


def reading(batch: int = 16, rounds: int = 25) -> None:
    "Ratio of a UNet2DModel read as a velocity to the bare one, measured in turn."
    torch.manual_seed(0)
    bare = UNet2DModel(
        sample_size=32,
        block_out_channels=(64, 128),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()
    told = {"num_train_timesteps": 1000, "beta_schedule": "linear"}
    low, top = NoiseTable(kept_variance(told)).ends
    net = wrap_network(bare, "UNet2DModel", Reading(low=low, top=top), (3, 32, 32), table=told)
    x, t = draw_noise(0, batch, (3, 32, 32)), torch.full((batch,), 0.5)
    row = torch.full((batch,), 300)
    with torch.no_grad():
        ratios = sorted(
            seconds(lambda: net(x, t)) / seconds(lambda: bare(x, row)) for _ in range(rounds)
        )
    print(
        f"read as a velocity: {statistics.median(ratios):.3f} x a bare UNet2DModel, batch {batch} "
        f"(quartiles {ratios[rounds // 4]:.3f} to {ratios[3 * rounds // 4]:.3f})"
    )


def run_once(code: str) -> float:
    "The number that a fresh process prints."
    command = [sys.executable, "-c", code]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def imports(rounds: int = 7) -> None:
    "Seconds that `import cudlab.run` takes beyond `import torch`, fresh processes in turn."
    clock = "import time; a = time.perf_counter(); import {}; print(time.perf_counter() - a)"
    for module in ("cudlab", "cudlab.run"):
        extra = [run_once("import torch;" + clock.format(module)) for _ in range(rounds)]
        print(
            f"import {module}: {statistics.median(extra):.3f} s beyond import torch (median of "
            f"{rounds})"
        )


if __name__ == "__main__":
    set_threads()
    overhead("digits", (1, 8, 8), 64, ("euler", "ab2", "ab4", "heun"))
    overhead(
        "mnist",
        (1, 28, 28),
        32,
        tuple(name for name, entry in SOLVERS.items() if entry.nfe and entry.nfe(9) == 9),
        rounds=5,
    )
    reading()
    imports()
