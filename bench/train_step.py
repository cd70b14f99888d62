"""Images per second of a CUD training step against a plain eager loop: same MNIST network, batch 32, K = 1, same process.

The plain loop is what one would write first: float32, default memory layout, every forward run separately (first stage, target, training), the
optimiser's default, a Python loop for the average. Ours is `fit` as it stands. Blocks of steps alternate, so that both see the same machine.
"""
import copy
import statistics
import time

import torch

from cudlab.core import Config
from cudlab.core import use_threads
from cudlab.cud import CUD
from cudlab.fit import arithmetic
from cudlab.fit import fit
from cudlab.net import network
from cudlab.path import linear

BATCH, BLOCK, ROUNDS = 32, 4, 8


class Pictures:
    "A resident set of 28x28 images; the speed does not depend on what they show."
    shape = (1, 28, 28)
    pixels = torch.randint(0, 256, (4096, 1, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def batch(self, seed, step, n):
        start = step * n % (len(self.pixels) - n)
        return self.pixels[start : start + n].float().div_(127.5).sub_(1), None


def plain(data):
    "One step at a time of the loop one would write first."
    torch.manual_seed(0)
    net = network("mnist", data.shape)
    ema, optim, step = copy.deepcopy(net), torch.optim.Adam(net.parameters(), 1e-3), 0
    while True:
        x0, _ = data.batch(0, step, BATCH)
        eps, t = torch.randn_like(x0), torch.rand(BATCH)
        h = torch.rand(BATCH) / 16
        s = t[:, None, None, None]
        xt, g = (1 - s) * x0 + s * eps, eps - x0
        with torch.no_grad():
            k1 = net(xt, t)
            later = net(xt - h[:, None, None, None] * k1, (t - h).clamp(1e-5, 1))
            target = torch.where((t >= h)[:, None, None, None], later, g)
        out = net(xt, t)
        loss = (out - target).square().mean() + (out - g).square().mean()
        optim.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optim.step()
        with torch.no_grad():
            for a, p in zip(ema.parameters(), net.parameters()):
                a.mul_(0.999).add_(p, alpha=0.001)
        step += 1
        yield loss.item()


def ours(data):
    "The same training through `fit`."
    torch.manual_seed(0)
    config = Config(batch=BATCH, steps=10**6, schedule="constant")
    net = network("mnist", data.shape)
    objective = CUD().bind(net, linear, config.steps)
    for tick in fit(objective, data, config):
        yield tick.losses["net"].item()


def main():
    use_threads()
    data = Pictures()
    loops = {"plain": plain(data), "cudlab": ours(data)}
    seconds = {name: [] for name in loops}
    for _ in range(ROUNDS + 1):
        for name, loop in loops.items():
            began = time.perf_counter()
            for _ in range(BLOCK):
                next(loop)
            seconds[name].append((time.perf_counter() - began) / BLOCK)
    best = {name: statistics.median(s[1:]) for name, s in seconds.items()}
    ratios = sorted(a / b for a, b in zip(seconds["plain"][1:], seconds["cudlab"][1:]))
    dtype = str(arithmetic(Config(), torch.device("cpu"), data.shape)).removeprefix("torch.")
    for name, s in best.items():
        print(f"{name:7} {BATCH / s:7.1f} img/s")
    print(f"training step, 2.16 M network, batch {BATCH}, {torch.get_num_threads()} threads, {dtype}: "
          f"{best['plain'] / best['cudlab']:.2f} x the plain loop (rounds {ratios[0]:.2f} to {ratios[-1]:.2f})")


if __name__ == "__main__":
    main()
