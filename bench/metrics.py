"""Seconds of the distances at the size of a published score, 50,000 samples of 2,048 features a
side, beside torchmetrics and numpy with scipy.

Everything runs in one process on the same features, random ones with the falling spectrum of
trained ones. The data's own part (`fit_gaussian`) is computed once for all scores; the others print
what each score costs. Without a GPU the ratios are those of processor seconds, which other work on
the machine hardly changes.
"""

import argparse
import functools
import resource
import time

import numpy as np
import torch
from torch import nn

from cudlab.config import find_device, set_threads
from cudlab.distances import (
    Reference,
    density_coverage,
    fit_gaussian,
    frechet_distance,
    frechet_jackknife,
    frechet_limit,
    kernel_distance,
    precision_recall,
)
from cudlab.provenance import describe_machine
from cudlab.rng import Rng


def drawn(name: str, n: int, dim: int, where: torch.device, scale: float = 1.0) -> torch.Tensor:
    "Features with a falling spectrum and a mean, (n, dim)."
    mix = (
        Rng(0, device=where).normal("mix", dim, (dim,))
        * torch.linspace(0, -4, dim, device=where).exp()[:, None]
        / dim**0.5
    )
    out = torch.empty(n, dim, device=where)
    for at in range(0, n, 1000):
        index = torch.arange(at, min(at + 1000, n))
        out[at : at + 1000] = scale * Rng(0, device=where).normal(name, index, (dim,)) @ mix + 0.4
    return out


def clock(name: str, action, note: str = "") -> tuple:
    "(cost, value) of an action, printed: seconds of the GPU, or of the processor."
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    began, cpu = time.perf_counter(), time.process_time()
    value = action()
    wait()
    took, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(
        f"{name:44} {took:7.1f} s, {cpu:6.1f} s of processor; peak so far {peak:.2f} GB{note}",
        flush=True,
    )
    return took if torch.cuda.is_available() else cpu, value


class Flat(nn.Module):
    "torchmetrics asks for a network; the features are there already."

    def __init__(self, dim: int):
        super().__init__()
        self.num_features = dim

    def forward(self, x):
        return x.flatten(1)


def torchmetrics_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    "The same distance by torchmetrics in float64."
    from torchmetrics.image.fid import FrechetInceptionDistance

    dim = a.shape[1]
    oracle = (
        FrechetInceptionDistance(feature=Flat(dim), input_img_size=(1, 1, dim), normalize=True)
        .set_dtype(torch.float64)
        .to(a.device)
    )
    for features, real in ((b, True), (a, False)):
        for rows in features.split(1000):
            oracle.update(rows[:, None, None].double(), real=real)
    return oracle.compute().item()


def scipy_fid(a: torch.Tensor, b: torch.Tensor) -> float:
    "The same distance as it was first published: numpy's covariance and scipy's matrix root."
    from scipy.linalg import sqrtm

    a, b = (x.cpu().numpy().astype(np.float64) for x in (a, b))
    ca, cb = np.cov(a, rowvar=False), np.cov(b, rowvar=False)
    return float(
        ((a.mean(0) - b.mean(0)) ** 2).sum()
        + np.trace(ca)
        + np.trace(cb)
        - 2 * np.trace(sqrtm(ca @ cb).real)
    )


def ours(a: torch.Tensor, b: torch.Tensor) -> tuple:
    "(cost of the value, cost of value and interval, value), data's part included."
    real = Reference(b)
    shared, _ = clock("fit_gaussian of the data, once", lambda: real.cached(fit_gaussian))
    each, value = clock("frechet_distance", lambda: frechet_distance(a, real))
    held, (same, low, high) = clock(
        "frechet_jackknife (value and interval)", lambda: frechet_jackknife(a, real)
    )
    print(f"  {value:.6f}, with its interval {same:.6f} [{low:.6f}, {high:.6f}]")
    clock("frechet_limit", lambda: frechet_limit(a, real))
    for distance in (kernel_distance, precision_recall, density_coverage):
        clock(f"{distance.__name__} (first 5,000 rows)", functools.partial(distance, a, real))
    return shared + each, shared + held, value


def main(words: list = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ask.add_argument("--n", type=int, default=50_000, help="samples a side")
    ask.add_argument("--dim", type=int, default=2048, help="features a sample")
    ask.add_argument("--device", default="auto", help="auto, cpu, cuda")
    ask.add_argument("--ours", action="store_true", help="leave the other implementations out")
    told = ask.parse_args(words)
    set_threads()
    where = find_device(told.device)
    print(
        f"{told.n:,} x {told.dim:,} features a side, float64, {describe_machine(where)}, torch "
        f"{torch.__version__}"
    )
    a, b = drawn("a", told.n, told.dim, where, 1.1), drawn("b", told.n, told.dim, where)
    each, both, value = ours(a, b)
    for name, theirs in (
        () if told.ours else (("torchmetrics", torchmetrics_fid), ("numpy and scipy", scipy_fid))
    ):
        took, other = clock(f"{name}, value alone", functools.partial(theirs, a, b))
        print(
            f"  {other:.6f}, apart from ours by {abs(other - value) / value:.1e}; "
            f"{took / each:.2f} x our time for the value, {took / both:.2f} x for value "
            "and interval"
        )


if __name__ == "__main__":
    main()
