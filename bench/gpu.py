"""What one GPU makes of the lab: training, sampling and scoring at full size, beside the machine's
own ceilings.

Training is CUD with K = 1, 2, 3 through `fit`, on the 2.16 M network of MNIST and the 55.7 M
network of CIFAR-10, with the images on the device, in bfloat16,
compiled and not. The batch doubles until a doubling gains less than a twentieth or does not fit.
FLOPs are counted for one step, backward
included, by torch's counter; bytes are those that the operators of an uncompiled step read and
write. The ceilings are those of a large product of matrices
and of a copy, measured in the same process. Weights are untrained: the speed is the same.

    python bench/gpu.py                        # needs CUDA; some minutes
    python bench/gpu.py --device cpu --small   # the same code on little
"""

import argparse
import gc
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from metrics import drawn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from cudlab.config import Config, set_threads
from cudlab.cud import CUD
from cudlab.distances import Reference, fit_gaussian, frechet_distance, frechet_jackknife
from cudlab.features import get_features
from cudlab.fit import compute_dtype, fit
from cudlab.net import Velocity, make_network
from cudlab.path import linear, make_grid
from cudlab.provenance import describe_machine
from cudlab.rng import draw_noise
from cudlab.solver import solve

SHAPES = {"mnist": (1, 28, 28), "cifar10": (3, 32, 32)}


class Pictures:
    "A set of random images on the device; the speed does not depend on what they show."

    def __init__(self, shape: tuple, where: torch.device, count: int = 10_000):
        self.shape, self.pixels = (
            shape,
            torch.randint(0, 256, (count, *shape), dtype=torch.uint8, device=where),
        )

    def batch(self, seed, step, n):
        at = torch.arange(step * n, (step + 1) * n, device=self.pixels.device) % len(self.pixels)
        return self.pixels[at].float().div_(127.5).sub_(1).contiguous(
            memory_format=torch.channels_last
        ), None


def wait(where: torch.device) -> None:
    "Until the device has done what it was given."
    if where.type == "cuda":
        torch.cuda.synchronize(where)


def seconds(action, where: torch.device, rounds: int = 1) -> float:
    "Median of the rounds, by the wall clock."
    times = []
    for _ in range(rounds):
        wait(where)
        began = time.perf_counter()
        action()
        wait(where)
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def ceilings(where: torch.device, small: bool) -> dict:
    """TFLOP/s of a product of matrices in bfloat16 and in float32, GB/s of a copy (bytes read and
    written).
    """
    found, size, repeats = {}, 512 if small else 8192, 2 if small else 20
    for dtype in (torch.bfloat16, torch.float32):
        a, b = (
            torch.randn(size, size, device=where).to(dtype),
            torch.randn(size, size, device=where).to(dtype),
        )
        took = seconds(lambda a=a, b=b: [a @ b for _ in range(repeats)], where, 4)
        found[str(dtype).removeprefix("torch.")] = repeats * 2 * size**3 / took / 1e12
    source = torch.empty(2**24 if small else 2**30, dtype=torch.uint8, device=where)
    target = torch.empty_like(source)
    found["copy"] = (
        repeats
        * 2
        * len(source)
        / seconds(lambda: [target.copy_(source) for _ in range(repeats)], where, 4)
        / 1e9
    )
    return found


class Traffic(TorchDispatchMode):
    "Counts the bytes that operators read and write."

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.bytes += sum(
                t.numel() * t.element_size()
                for t in tree_leaves((args, kwargs, out))
                if isinstance(t, torch.Tensor)
            )
        return out


def training(name: str, heads: int, batch: int, where: torch.device, compiled: bool = False):
    "The ticks of an endless training."
    torch.manual_seed(0)
    config = Config(batch=batch, steps=10**6, schedule="constant", dtype="bfloat16")
    net = make_network(name, SHAPES[name], heads=heads).to(where, memory_format=torch.channels_last)
    objective = CUD(heads=heads).bind(net, linear, config.steps)
    if compiled:
        net.compile()
    return fit(objective, Pictures(SHAPES[name], where), config)


def counted(name: str, heads: int, batch: int, where: torch.device) -> tuple:
    "(FLOPs, bytes) of one training step, uncompiled."
    ticks = training(name, heads, batch, where)
    next(ticks)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as flops:
        next(ticks)
    with Traffic() as traffic:
        next(ticks)
    return flops.get_total_flops(), traffic.bytes


def speed(
    name: str, heads: int, batch: int, where: torch.device, compiled: bool, steps: int
) -> float:
    "Images per second in the steady state."
    ticks = training(name, heads, batch, where, compiled)
    for _ in range(3):
        next(ticks)
    return batch * steps / seconds(lambda: [next(ticks) for _ in range(steps)], where)


def fresh(where: torch.device) -> None:
    "Forget compiled code and cached memory."
    torch._dynamo.reset()
    gc.collect()
    if where.type == "cuda":
        torch.cuda.empty_cache()


def best_batch(name: str, heads: int, where: torch.device, first: int, most: int) -> int:
    "The batch after which a doubling gains less than a twentieth, or does not fit."
    best, rate = first, 0.0
    while best <= most:
        try:
            now = speed(name, heads, best, where, False, 3)
        except torch.OutOfMemoryError:
            fresh(where)
            break
        fresh(where)
        if now < 1.05 * rate:
            break
        best, rate = 2 * best, now
    return max(first, best // 2)


def train_speeds(where: torch.device, small: bool, roof: dict) -> list:
    "One row for every network, K, and compiled or not."
    rows = []
    for name in SHAPES if not small else ("mnist",):
        for heads in (1, 2, 3) if not small else (1, 2):
            batch = best_batch(name, heads, where, 4 if small else 64, 8 if small else 8192)
            unit = 2 if small else 32
            flops, moved = (v * batch / unit for v in counted(name, heads, unit, where))
            fresh(where)
            for compiled in (False, True):
                if compiled and small and heads > 1:
                    continue
                rate = speed(name, heads, batch, where, compiled, 2 if small else 20)
                fresh(where)
                row = dict(
                    net=name,
                    K=heads,
                    compiled=compiled,
                    batch=batch,
                    images_per_s=rate,
                    gflop_per_image=flops / batch / 1e9,
                    tflops=flops / batch * rate / 1e12,
                    matmul_share=flops / batch * rate / 1e12 / roof["bfloat16"],
                    gb_per_s=moved / batch * rate / 1e9,
                    copy_share=moved / batch * rate / 1e9 / roof["copy"],
                )
                rows.append(row)
                print(
                    f"train {name:8} K={heads} {'compiled' if compiled else 'eager':8} batch "
                    f"{batch:5}: {rate:10,.1f} img/s, {row['gflop_per_image']:7.2f} GFLOP an "
                    f"image, {row['tflops']:7.2f} TFLOP/s, "
                    f"{row['matmul_share']:.1%} of the matrix ceiling; {row['copy_share']:.1%} of "
                    f"the copy ceiling{' (by the bytes of the eager step)' if compiled else ''}",
                    flush=True,
                )
    return rows


@torch.no_grad()
def sampling(where: torch.device, small: bool) -> list:
    """Seconds for a set of MNIST samples and their features, in float32 as scores are measured, and
    in bfloat16.
    """
    n, batch = (64, 32) if small else (50_000, 2000)
    net = make_network("mnist", SHAPES["mnist"]).to(where, memory_format=torch.channels_last).eval()
    f, eyes, rows = Velocity(net), get_features("mnist-v2"), []

    def made(steps: int, dtype: torch.dtype) -> torch.Tensor:
        found = []
        for at in range(0, n, batch):
            x = draw_noise(
                0, torch.arange(at, min(at + batch, n)), SHAPES["mnist"], where
            ).contiguous(memory_format=torch.channels_last)
            with torch.autocast(where.type, dtype, enabled=dtype != torch.float32):
                x = solve(f, x, make_grid("uniform", steps).to(where), "euler").x
            found.append(eyes(x.float()))
        return torch.cat(found)

    for dtype in (torch.float32, torch.bfloat16):
        made(1, dtype)
        for steps in (1, 4) if small else (1, 16):
            took, name = (
                seconds(lambda k=steps, d=dtype: made(k, d), where),
                str(dtype).removeprefix("torch."),
            )
            rows.append(dict(n=n, nfe=steps, dtype=name, seconds=took))
            print(
                f"sample {n:,} images of MNIST, {steps:2} NFE, {name:8} with features: {took:.2f} "
                f"s, {n / took:,.0f} img/s",
                flush=True,
            )
    return rows


def scoring(where: torch.device, small: bool) -> dict:
    "Seconds of the Fréchet distance at full size: the data's part, the value, value and interval."
    n, dim = (2000, 128) if small else (50_000, 2048)
    a, b = drawn("a", n, dim, where, 1.1), drawn("b", n, dim, where)
    frechet_distance(a[: 2 * dim], b[: 2 * dim])
    real = Reference(b)
    found = {
        "n": n,
        "dim": dim,
        "data": seconds(lambda: real.cached(fit_gaussian), where),
        "value": seconds(lambda: frechet_distance(a, real), where),
        "jackknife": seconds(lambda: frechet_jackknife(a, real), where),
    }
    print(
        f"Fréchet distance of {n:,} x {dim:,} features: data's part {found['data']:.2f} s, value "
        f"{found['value']:.2f} s, value and interval {found['jackknife']:.2f} s",
        flush=True,
    )
    return found


def main(words: list = None) -> int:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--device", default="cuda", help="cuda, cuda:1; cpu with --small")
    ask.add_argument(
        "--small", action="store_true", help="little of everything, to see that it runs"
    )
    ask.add_argument("--out", default="", help="JSON file for the figures")
    told = ask.parse_args(words)
    where = torch.device(told.device)
    if where.type == "cuda" and not torch.cuda.is_available():
        print(
            "No CUDA here, so nothing was measured; --device cpu --small runs a small version of "
            "the same code."
        )
        return 0
    set_threads()
    if where.type == "cuda":
        torch.backends.cudnn.benchmark = True
    roof = ceilings(where, told.small)
    print(
        f"{describe_machine(where)}, torch {torch.__version__}, CUDA {torch.version.cuda}; "
        f"arithmetic auto is {compute_dtype(Config(), where, SHAPES['mnist'])}\n"
        f"ceilings: {roof['bfloat16']:.2f} TFLOP/s in bfloat16, {roof['float32']:.2f} in float32, "
        f"copy {roof['copy']:,.1f} GB/s read and written",
        flush=True,
    )
    found = {
        "machine": describe_machine(where),
        "torch": torch.__version__,
        "ceilings": roof,
        "training": train_speeds(where, told.small, roof),
        "sampling": sampling(where, told.small),
        "frechet": scoring(where, told.small),
    }
    if told.out:
        Path(told.out).write_text(json.dumps(found, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
