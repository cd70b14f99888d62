"""Whether cost grows as it should: training time in steps and in the heads of CUD, sampling time in
network calls; and whether memory stands still.

Prints slope, intercept and R^2 of every straight line with the machine and the protocol, and writes
docs/cost.json and docs/cost.png. On a CPU times are
processor seconds of one thread, which other work on the machine hardly changes; on a GPU they are
seconds of the wall clock. About two minutes on the digits;
`--full` adds the 2.16 M network of MNIST.
"""

import argparse
import copy
import ctypes
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch

from cudlab.config import Config, find_device, get_settings, set_threads
from cudlab.cud import CUD
from cudlab.data import load_data
from cudlab.fit import fit
from cudlab.net import Velocity, make_network
from cudlab.path import linear, make_grid
from cudlab.provenance import describe_machine
from cudlab.rf import RF
from cudlab.rng import draw_noise
from cudlab.solver import SOLVERS, find_steps, solve

METHODS = {
    "RF": RF,
    "CUD K=1": lambda: CUD(heads=1),
    "CUD K=2": lambda: CUD(heads=2),
    "CUD K=3": lambda: CUD(heads=3),
}
SAMPLERS = ("euler", "ab2", "heun", "dpmpp-2m", "unipc2-bh2")
CALLS = (1, 2, 4, 8, 16, 32)


def seconds(action, where: torch.device) -> float:
    "What an action takes: processor seconds, or those of the wall clock where a GPU does the work."
    if where.type == "cpu":
        began = time.process_time()
        action()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    action()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def line(points: list) -> dict:
    "Slope, intercept and R^2 of the straight line through (x, y)."
    x, y = zip(*points)
    fitted = statistics.linear_regression(x, y)
    return {
        "slope": fitted.slope,
        "intercept": fitted.intercept,
        "r2": statistics.correlation(x, y) ** 2,
        "points": points,
    }


def training(name: str, method: str, batch: int, where: torch.device):
    "The ticks of an endless training; its network; its data on the device."
    data = load_data(name, device=str(where))
    config = Config(
        data=data.name,
        batch=batch,
        steps=10**6,
        schedule="constant",
        dtype="float32" if where.type == "cpu" else "auto",
    )
    objective = METHODS[method]()
    torch.manual_seed(0)
    objective.bind(
        make_network(name, data.shape, **objective.network_options()).to(where),
        linear,
        config.steps,
    )
    return fit(objective, data, config), objective


def forwards(name: str, method: str, where: torch.device) -> float:
    "Image-forwards a training sample costs, counted where they happen."
    batch, seen = 8, []
    ticks, objective = training(name, method, batch, where)
    objective.net.register_forward_hook(lambda net, given, out: seen.append(len(given[0])))
    next(ticks)
    return sum(seen) / batch


def in_steps(name: str, batch: int, counts: tuple, rounds: int, where: torch.device) -> dict:
    """Training time of CUD, K = 1, over the number of steps; each count is a training of its own,
    from its first step; medians of the rounds.
    """
    found = {count: [] for count in counts}
    for _ in range(rounds):
        for count, times in found.items():
            ticks, _ = training(name, "CUD K=1", batch, where)
            times.append(seconds(lambda run=ticks, n=count: [next(run) for _ in range(n)], where))
    return line([(count, statistics.median(times)) for count, times in found.items()])


def in_heads(name: str, batch: int, block: int, rounds: int, where: torch.device) -> dict:
    """Time of a training step over the image-forwards it makes; blocks of steps in turn, medians of
    the rounds.
    """
    loops = {method: training(name, method, batch, where)[0] for method in METHODS}
    found = {method: [] for method in METHODS}
    for _ in range(rounds + 1):
        for method, ticks in loops.items():
            found[method].append(
                seconds(lambda run=ticks: [next(run) for _ in range(block)], where) / block
            )
    return line(
        [
            (forwards(name, method, where), statistics.median(times[1:]))
            for method, times in found.items()
        ]
    ) | {"names": list(METHODS)}


def in_calls(name: str, batch: int, calls: tuple, rounds: int, where: torch.device) -> dict:
    "Time of a solve over its network calls, for every sampler: medians of the rounds."
    shape = load_data(name).shape
    f, x, found = (
        Velocity(make_network(name, shape).to(where).eval()),
        draw_noise(0, batch, shape, where),
        {},
    )
    with torch.no_grad():
        for _ in range(rounds + 1):
            for solver in SAMPLERS:
                for nfe in calls:
                    if steps := find_steps(SOLVERS[solver], nfe):
                        ts = make_grid(
                            "uniform", steps, finite=SOLVERS[solver].needs_finite_logsnr
                        ).to(where)
                        found.setdefault((solver, nfe), []).append(
                            seconds(lambda s=solver, at=ts: solve(f, x, at, s), where)
                        )
    return {
        solver: line(
            [
                (nfe, statistics.median(times[1:]))
                for (name, nfe), times in found.items()
                if name == solver
            ]
        )
        for solver in SAMPLERS
    }


def held(where: torch.device) -> float:
    """Megabytes this process holds: resident memory without what is free to be given back, or what
    the GPU has allocated.
    """
    gc.collect()
    if where.type == "cuda":
        return torch.cuda.memory_allocated(where) / 1e6
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)  # else a leak could hide in what earlier work has freed
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 1e6


def memory(action, count: int, where: torch.device, every: int = 10) -> dict:
    """Memory over `count` calls of an action: what each adds, and how far it moves, after the first
    tenth.
    """
    action()
    points = []
    for k in range(count):
        action()
        if k % every == every - 1:
            points.append((k + 1, held(where)))
    late = [p for p in points if p[0] > count / 10]
    values = [mb for _, mb in late]
    return {
        "slope": statistics.linear_regression(*zip(*late)).slope,
        "spread": max(values) - min(values),
        "points": points,
    }


def chart(found: dict, file: Path) -> None:
    "Every line on one page."
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    fig, axes = plt.subplots(
        len(found["nets"]),
        4,
        figsize=(13, 3.1 * len(found["nets"])),
        layout="constrained",
        squeeze=False,
    )
    for (name, laws), row in zip(found["nets"].items(), axes):
        panels = (
            (f"{name}: training, CUD K=1", "steps", {"": laws["steps"]}),
            (
                f"{name}: a step of RF and CUD K=1, 2, 3",
                "image-forwards a sample",
                {"": laws["heads"]},
            ),
            (f"{name}: a solve", "network calls", laws["calls"]),
        )
        for ax, (title, axis, lines) in zip(row, panels):
            for which, fitted in lines.items():
                x, y = zip(*fitted["points"])
                dots = ax.plot(x, y, "o", ms=3.5, label=f"{which} R² {fitted['r2']:.4f}".strip())
                for label, at in zip(fitted.get("names", ()), zip(x, y)):
                    ax.annotate(label, at, (4, -9), textcoords="offset points", fontsize=7)
                ax.plot(
                    [0, max(x)],
                    [fitted["intercept"], fitted["intercept"] + fitted["slope"] * max(x)],
                    lw=1,
                    color=dots[0].get_color(),
                )
            ax.set(title=title, xlabel=axis, ylabel="seconds", ylim=(0, None))
            ax.legend(frameon=False, fontsize=7)
        for which, fitted in laws["memory"].items():
            row[3].plot(
                *zip(*fitted["points"]), lw=1.2, label=f"{which}: {fitted['spread']:.1f} MB apart"
            )
        row[3].set(title=f"{name}: memory", xlabel="steps, or solves", ylabel="MB", ylim=(0, None))
        row[3].legend(frameon=False, fontsize=7)
    fig.savefig(file, dpi=100)


def laws(
    name: str,
    batch: int,
    counts: tuple,
    block: int,
    rounds: int,
    calls: tuple,
    steps: int,
    solves: int,
    where: torch.device,
) -> dict:
    "All laws of one network, printed as they are found."

    def say(what: str, law: dict, unit: str) -> None:
        print(
            f"{name:6} {what:28} {1000 * law['slope']:8.3f} ms {unit}, "
            f"{1000 * law['intercept']:+8.2f} ms at none, R^2 {law['r2']:.5f}",
            flush=True,
        )

    found = {
        "batch": batch,
        "parameters": sum(
            p.numel() for p in make_network(name, load_data(name).shape).parameters()
        ),
    }
    ticks, objective = training(name, "CUD K=1", batch, where)
    f, x, ts = (
        Velocity(copy.deepcopy(objective.net).eval()),
        draw_noise(0, batch, objective.net.shape, where),
        make_grid("uniform", 8).to(where),
    )
    with torch.no_grad():
        sampled = memory(lambda: solve(f, x, ts, "euler"), solves, where)
    found["memory"] = {
        f"{steps} training steps": memory(lambda: next(ticks), steps, where),
        f"{solves} solves of 8 calls": sampled,
    }
    for what, law in found["memory"].items():
        print(
            f"{name:6} memory over {what:26} {1000 * law['slope']:+8.2f} kB each, "
            f"{law['spread']:.2f} MB between least and most",
            flush=True,
        )
    found["steps"] = in_steps(name, batch, counts, rounds, where)
    say("training, CUD K=1", found["steps"], "a step")
    found["heads"] = in_heads(name, batch, block, rounds, where)
    say("a step of RF, CUD K=1,2,3", found["heads"], "an image-forward a sample")
    print(
        "       "
        + ", ".join(
            f"{method} {count:g} image-forwards {1000 * spent:.1f} ms"
            for method, (count, spent) in zip(METHODS, found["heads"]["points"])
        )
    )
    found["calls"] = in_calls(name, batch, calls, rounds, where)
    for solver, law in found["calls"].items():
        say(f"a solve with {solver}", law, "a call")
    return found


def main(words: list = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--full", action="store_true", help="the 2.16 M network of MNIST too")
    ask.add_argument("--device", default="auto", help="auto, cpu, cuda")
    told = ask.parse_args(words)
    where = find_device(told.device)
    set_threads(1 if where.type == "cpu" else None)
    found = {
        "machine": describe_machine(where),
        "torch": torch.__version__,
        "clock": "processor seconds of one thread" if where.type == "cpu" else "wall seconds",
        "protocol": "float32 on a CPU, auto on a GPU; untrained weights; medians of rounds that "
        "take turns",
        "nets": {},
    }
    print(f"{found['machine']}, torch {found['torch']}, {found['clock']}; {found['protocol']}")
    found["nets"]["digits"] = laws("digits", 32, (15, 30, 60, 120), 10, 5, CALLS, 300, 200, where)
    if told.full:
        found["nets"]["mnist"] = laws("mnist", 8, (4, 8, 16, 32), 2, 3, CALLS[:4], 60, 20, where)
    file = get_settings().root / "docs" / "cost.json"
    file.write_text(json.dumps(found, indent=1) + "\n")
    chart(found, file.with_suffix(".png"))
    print(f"written to {file} and {file.with_suffix('.png').name}")


if __name__ == "__main__":
    main()
