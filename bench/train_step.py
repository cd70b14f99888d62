"""Images per second of a CUD training step against a plain eager loop: same MNIST network, batch
32, K = 1, 2, 3, same process.

The plain loop is what one would write first: float32, default memory layout, every forward run
separately (the stages, the target of each head, then
the training forward), the optimiser's default, a Python loop for the average. Ours is `fit` as it
stands. Blocks of steps alternate, so that both see the
same machine, and the median of their ratios is printed. What each lever gave by itself is in
bench/NOTES.md.

    python bench/train_step.py               seconds of a step
    python bench/train_step.py --compile     ours with torch.compile, a minute of set-up for each K
    python bench/train_step.py --loss        both loops for 200 steps on the same batches: mean loss
    of the last 50, three seeds (an hour)
"""

import copy
import statistics
import sys
import time
from functools import partial

import torch

from cudlab.config import Config, set_threads
from cudlab.cud import CUD, lookahead_states, sample_times
from cudlab.data import load_data
from cudlab.fit import compute_dtype, fit
from cudlab.net import make_network
from cudlab.path import linear
from cudlab.rng import Rng

BATCH, BLOCK, ROUNDS, LOW = 32, 3, 7, 1e-5


def clamped_velocity(net, x, t):
    "The network, whose time is at least LOW."
    return net(x, t.clamp(LOW, 1))


class Pictures:
    "A resident set of 28x28 images; the speed does not depend on what they show."

    shape = (1, 28, 28)
    pixels = torch.randint(
        0, 256, (4096, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )

    def batch(self, seed, step, n):
        start = step * n % (len(self.pixels) - n)
        return self.pixels[start : start + n].float().div_(127.5).sub_(1), None


def plain(data, heads, seed=0):
    "The loop one would write first, on the same random numbers."
    torch.manual_seed(seed)
    net = make_network("mnist", data.shape, heads=heads)
    ema, optim, step = copy.deepcopy(net), torch.optim.Adam(net.parameters(), 1e-3), 0
    while True:
        x0, _ = data.batch(seed, step, BATCH)
        rng = Rng(seed, step)
        eps = rng.normal("eps", BATCH, data.shape)
        t, h = sample_times(rng, BATCH, 16, "uniform", "continuous", heads, LOW)
        s = t[:, None, None, None]
        xt, g = (1 - s) * x0 + s * eps, eps - x0
        with torch.no_grad():
            w = partial(clamped_velocity, net)
            states = lookahead_states(w, xt, t, h, w(xt, t), heads, "corrected")
            targets = [
                torch.where((t - j * h >= LOW - 1e-6)[:, None, None, None], w(z, t - j * h), g)
                for j, z in enumerate(states, 1)
            ]
        loss = sum(
            (out - target).square().mean() + (out - g).square().mean()
            for out, target in zip(net.heads(xt, t), targets)
        )
        for group in optim.param_groups:
            group["lr"] = 1e-3 * min(1, (step + 1) / 100)
        optim.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
        with torch.no_grad():
            for a, p in zip(ema.parameters(), net.parameters()):
                a.mul_(0.999).add_(p, alpha=0.001)
        step += 1
        yield loss.item()


def ours(data, heads, seed=0):
    "The same training through `fit`."
    torch.manual_seed(seed)
    config = Config(batch=BATCH, steps=10**6, schedule="constant", seed=seed)
    net = make_network("mnist", data.shape, heads=heads)
    if "--compile" in sys.argv:
        net.compile()
    objective = CUD(heads=heads).bind(net, linear, config.steps)
    for tick in fit(objective, data, config):
        yield tick.losses["net"].item()


def speed(heads):
    "The ratio for one K."
    data = Pictures()
    loops = {"plain": plain(data, heads), "cudlab": ours(data, heads)}
    seconds = {name: [] for name in loops}
    for _ in range(ROUNDS + 1):
        for name, loop in loops.items():
            began = time.perf_counter()
            for _ in range(BLOCK):
                next(loop)
            seconds[name].append((time.perf_counter() - began) / BLOCK)
    ratios = sorted(a / b for a, b in zip(seconds["plain"][1:], seconds["cudlab"][1:]))
    best = {name: BATCH / statistics.median(s[1:]) for name, s in seconds.items()}
    dtype = str(compute_dtype(Config(), torch.device("cpu"), data.shape)).removeprefix("torch.")
    print(
        f"training step, K = {heads}, 2.16 M network, batch {BATCH}, {torch.get_num_threads()} "
        f"threads, {dtype}: {best['cudlab']:.1f} img/s, plain loop {best['plain']:.1f}, "
        f"{statistics.median(ratios):.2f} x (rounds {ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


def losses(steps=200, last=50):
    "Mean loss of the last steps of both loops, on MNIST."
    data = load_data("mnist")
    for seed in range(3):
        for heads in (1, 2, 3):
            ends = {}
            for name, loop in (("plain", plain), ("cudlab", ours)):
                values = [value for value, _ in zip(loop(data, heads, seed), range(steps))]
                ends[name] = statistics.fmean(values[-last:])
            print(
                f"K = {heads}, seed {seed}: mean loss of steps {steps - last + 1} to {steps}: "
                f"plain loop {ends['plain']:.4f}, cudlab {ends['cudlab']:.4f}",
                flush=True,
            )


if __name__ == "__main__":
    set_threads()
    if "--loss" in sys.argv:
        losses()
    else:
        for heads in (1, 2, 3):
            speed(heads)
