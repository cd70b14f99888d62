"""What each lever on a training step gives by itself: MNIST network (2.16 M), batch 32, one
process, variants in turn, medians.

python bench/levers.py                   some minutes; the outcome is kept in bench/NOTES.md
python bench/levers.py --compile         with torch.compile too, about two minutes more
"""

import copy
import functools
import statistics
import sys
import time

import torch

from cudlab.config import set_threads
from cudlab.net import make_network
from cudlab.provenance import cpu_name

BATCH, ROUNDS = 32, 7


def seconds(variants):
    "Median milliseconds of each variant; all take turns, the first round is left out."
    found = {name: [] for name in variants}
    for _ in range(ROUNDS + 1):
        for name, once in variants.items():
            began = time.perf_counter()
            once()
            found[name].append(1000 * (time.perf_counter() - began))
    return {name: statistics.median(times[1:]) for name, times in found.items()}


def passes(compiled=False):
    """Training pass (forward and backward) and forward without gradient, for arithmetic, layout,
    size of the parts, compilation.
    """
    x, t, g = torch.randn(BATCH, 1, 28, 28), torch.rand(BATCH), torch.randn(BATCH, 1, 28, 28)
    variants = {}
    for name, dtype, layout, parts, compile_it in [
        ("float32", None, torch.contiguous_format, 1, False),
        ("float32, channels last", None, torch.channels_last, 1, False),
        ("bfloat16", torch.bfloat16, torch.contiguous_format, 1, False),
        ("bfloat16, channels last", torch.bfloat16, torch.channels_last, 1, False),
        ("bfloat16, in 4 parts", torch.bfloat16, torch.contiguous_format, 4, False),
        *(
            [
                ("float32, compiled", None, torch.contiguous_format, 1, True),
                ("bfloat16, compiled", torch.bfloat16, torch.contiguous_format, 1, True),
            ]
            if compiled
            else []
        ),
    ]:
        torch.manual_seed(0)
        net, data = (
            make_network("mnist", (1, 28, 28)).to(memory_format=layout),
            x.contiguous(memory_format=layout),
        )
        if compile_it:
            net.compile()

        def whole(train, net=net, data=data, dtype=dtype, parts=parts):
            for xs, ts, gs in zip(data.chunk(parts), t.chunk(parts), g.chunk(parts)):
                with (
                    torch.set_grad_enabled(train),
                    torch.autocast("cpu", dtype, enabled=dtype is not None),
                ):
                    loss = (net(xs, ts) - gs).square().mean() / parts
                if train:
                    loss.backward()
            net.zero_grad(set_to_none=True)

        variants[f"{name}: training pass"], variants[f"{name}: forward"] = (
            (lambda once=whole: once(True)),
            (lambda once=whole: once(False)),
        )
    return seconds(variants)


def targets():
    "Two targets one after the other, and in one call."
    net, x, t = (
        make_network("mnist", (1, 28, 28)),
        torch.randn(2 * BATCH, 1, 28, 28),
        torch.rand(2 * BATCH),
    )

    @torch.no_grad()
    def once(parts):
        with torch.autocast("cpu", torch.bfloat16):
            for xs, ts in zip(x.chunk(parts), t.chunk(parts)):
                net(xs, ts)

    return seconds(
        {"two targets, two calls": lambda: once(2), "two targets, one call": lambda: once(1)}
    )


def updates():
    "Optimiser and average: one call for all tensors, or Python for each."
    net = make_network("mnist", (1, 28, 28))
    average, variants = copy.deepcopy(net), {}
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    for name, options in (
        ("Adam, a loop", {"foreach": False}),
        ("Adam, foreach", {"foreach": True}),
        ("Adam, fused", {"fused": True}),
    ):
        variants[name] = torch.optim.Adam(net.parameters(), 1e-4, **options).step
    live, mean = [p.detach() for p in net.parameters()], [p.detach() for p in average.parameters()]
    variants["average, a loop"] = lambda: [
        a.mul_(0.999).add_(p, alpha=0.001) for a, p in zip(mean, live)
    ]
    variants["average, foreach"] = lambda: torch._foreach_lerp_(mean, live, 0.001)
    grads = [p.grad for p in net.parameters()]
    variants["is it finite?, asked in Python"] = lambda: all(
        bool(torch.isfinite(v).all()) for v in grads
    )
    variants["is it finite?, of the norm"] = lambda: torch.isfinite(
        torch.stack(torch._foreach_norm(grads))
    ).all()
    return seconds(variants)


def ceilings():
    "GFLOP/s of a convolution of this network and of a matrix product, in both arithmetics."
    found = {}
    for dtype in (torch.float32, torch.bfloat16):
        conv, x = (
            torch.nn.Conv2d(64, 64, 3, padding=1).to(dtype),
            torch.randn(BATCH, 64, 28, 28, dtype=dtype),
        )
        a = torch.randn(2048, 2048, dtype=dtype)
        with torch.no_grad():
            ms = seconds(
                {
                    "conv": functools.partial(conv, x),
                    "matmul": functools.partial(torch.matmul, a, a),
                }
            )
        found |= {
            f"convolution 3x3, 64 channels, {dtype}": 2
            * BATCH
            * 784
            * 64
            * 64
            * 9
            / ms["conv"]
            / 1e6,
            f"matrix product 2048, {dtype}": 2 * 2048**3 / ms["matmul"] / 1e6,
        }
    return found


if __name__ == "__main__":
    set_threads()
    print(
        f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}, batch {BATCH}"
    )
    for title, rows, unit in (
        ("passes", passes("--compile" in sys.argv), "ms"),
        ("targets", targets(), "ms"),
        ("updates", updates(), "ms"),
        ("ceilings", ceilings(), "GFLOP/s"),
    ):
        print(f"-- {title}")
        for name, value in rows.items():
            print(f"{name:46} {value:9.2f} {unit}")
