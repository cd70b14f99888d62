"""Images per second of a CUD training step against a plain eager loop: same MNIST network, batch
32, K = 1, 2, 3, same process.

The plain loop is what one would write first: float32, default memory layout, every forward run
separately (the stages, the target of each head, then
the training forward), the optimiser's default, a Python loop for the average. Ours is `fit` as it
stands. Blocks of steps alternate, so that both see the
same machine, and the median of their ratios is printed: by the clock, and by processor time,
which other work on the machine disturbs less. Beside them stand the ceilings of the same process, a
matrix product and a 3x3 convolution of this network, and the share of the convolution's that a
step reaches.
What each lever gave by itself is in bench/NOTES.md.

    python bench/train_step.py               seconds of a step
    python bench/train_step.py --float32     ours in float32 too; a CPU with neither AVX-512 nor
    bfloat16 is ONEDNN_MAX_CPU_ISA=AVX2 ATEN_CPU_CAPABILITY=avx2 before it
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
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cudlab.config import Config, set_threads
from cudlab.cud import CUD, lookahead_states, sample_times
from cudlab.data import load_data
from cudlab.fit import compute_dtype, fit
from cudlab.net import make_network
from cudlab.path import linear
from cudlab.rng import Rng

BATCH, BLOCK, ROUNDS, LOW = 32, 1, 9, 1e-5
DTYPE = "float32" if "--float32" in sys.argv else "auto"


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
    config = Config(batch=BATCH, steps=10**6, schedule="constant", seed=seed, dtype=DTYPE)
    net = make_network("mnist", data.shape, heads=heads)
    if "--compile" in sys.argv:
        net.compile()
    objective = CUD(heads=heads).bind(net, linear, config.steps)
    for tick in fit(objective, data, config):
        yield tick.losses["net"].item()


CLOCKS = {"clock": time.perf_counter, "processor": time.process_time}


def ceilings(dtype, clock):
    "GFLOP/s of a matrix product and of a 3x3 convolution of this network, by one of CLOCKS."
    a, x = torch.randn(1024, 1024).to(dtype), torch.randn(BATCH, 64, 28, 28).to(dtype)
    kernel = torch.randn(64, 64, 3, 3).to(dtype)
    work = {
        "matrix product": (partial(torch.matmul, a, a), 2 * 1024**3),
        "3x3 convolution": (partial(F.conv2d, x, kernel, padding=1), 2 * 9 * 64**2 * 784 * BATCH),
    }
    found = {}
    with torch.no_grad():
        for name, (action, operations) in work.items():
            seconds = []
            for _ in range(ROUNDS + 1):
                began = clock()
                action()
                seconds.append(clock() - began)
            found[name] = operations / statistics.median(seconds[1:]) / 1e9
    return found


def count_operations(loop):
    "Operations of a step, in GFLOP."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        next(loop)
    return counter.get_total_flops() / 1e9


def measure(loops):
    "Seconds of a step of each loop, a round each: by the clock, and of the processor."
    found = {name: [] for name in loops}
    for _ in range(ROUNDS + 1):
        for name, loop in loops.items():
            began = [clock() for clock in CLOCKS.values()]
            for _ in range(BLOCK):
                next(loop)
            ended = [clock() for clock in CLOCKS.values()]
            found[name].append([(b - a) / BLOCK for a, b in zip(began, ended)])
    return {name: rounds[1:] for name, rounds in found.items()}


def speed(heads):
    "The ratio for one K."
    data = Pictures()
    loops = {"plain": plain(data, heads), "cudlab": ours(data, heads)}
    operations = {name: count_operations(loop) for name, loop in loops.items()}
    seconds = measure(loops)
    dtype = compute_dtype(Config(dtype=DTYPE), torch.device("cpu"), data.shape)
    print(
        f"training step, K = {heads}, 2.16 M network, batch {BATCH}, {torch.get_num_threads()} "
        f"threads, {str(dtype).removeprefix('torch.')}"
    )
    for i, (name, clock) in enumerate(CLOCKS.items()):
        ceiling = ceilings(dtype, clock)["3x3 convolution"]
        pairs = zip(seconds["plain"], seconds["cudlab"])
        ratios = sorted(a[i] / b[i] for a, b in pairs)
        middle = {loop: statistics.median(r[i] for r in rounds) for loop, rounds in seconds.items()}
        reached = {loop: operations[loop] / middle[loop] / ceiling for loop in loops}
        print(
            f"  by the {name}: {BATCH / middle['cudlab']:.1f} img/s, plain loop "
            f"{BATCH / middle['plain']:.1f}, {statistics.median(ratios):.2f} x (rounds "
            f"{ratios[0]:.2f} to {ratios[-1]:.2f}); share of the convolution's ceiling "
            f"{reached['cudlab']:.0%}, plain loop {reached['plain']:.0%}",
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
        used = compute_dtype(Config(dtype=DTYPE), torch.device("cpu"), Pictures.shape)
        for what, rate in ceilings(used, time.perf_counter).items():
            print(f"ceiling, {what}, {used}: {rate:.0f} GFLOP/s")
        for heads in (1, 2, 3):
            speed(heads)
