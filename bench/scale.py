"""The arithmetic behind docs/scale.md: ImageNet-64 on 8 to 64 GPUs, counted on the lab's own
networks and methods without computing anything.

Parameters, FLOPs and what a step keeps for its backward are counted on tensors without data
(torch's `meta` device). Everything that is assumed stands in
`ASSUMED`; change it there or on the command line, and the tables follow: `python bench/scale.py
--peak 312 --use 0.3 --price 1.5 2.5`.
"""

import argparse
import contextlib
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from cudlab.boot import BOOT
from cudlab.cud import CUD
from cudlab.gdd import GDD
from cudlab.net import UNet, Velocity
from cudlab.path import linear
from cudlab.rng import Rng

SHAPE, CLASSES, PICTURES = (3, 64, 64), 1000, 1_281_167
ASSUMED = {
    "peak": 989.0,  # TFLOP/s in bfloat16 of one GPU: the data sheet of an H100 or H200
    "use": [0.15, 0.30, 0.40],  # share of it that training reaches
    "memory": 80.0,  # GB of one GPU
    "inside": 450.0,  # GB/s a GPU sends to the others of its machine
    "between": 50.0,  # GB/s a GPU sends to other machines
    "price": [2.0, 4.0],  # dollars an hour and GPU
}
BUDGETS = {
    "CUD K=1": 512e6,
    "CUD K=2": 512e6,
    "CUD K=3": 512e6,
    "BOOT": 300e6,
    "GDD-I": 6e6,
}  # images, as published: docs/scale.md


def wide(**options) -> UNet:
    "The lab's UNet at the size of ADM's network for 64 x 64 pixels."
    return UNet(SHAPE, 192, (1, 2, 3, 4), 3, (32, 16, 8), classes=CLASSES, **options)


def objective(name: str):
    "A method bound to fresh networks."
    if name in ("BOOT", "GDD-I"):
        made = BOOT() if name == "BOOT" else GDD()
    else:
        made = CUD(heads=int(name[-1]))
    teacher = wide() if name == "BOOT" else None
    return made.bind(
        wide(**made.network_options()),
        linear,
        10**6,
        (lambda y: Velocity(teacher, y)) if teacher else None,
    ), teacher


def step(made, batch: int, number: int) -> None:
    "One training step without its optimiser: losses, and the gradients of every player."
    rng = Rng(0, number, "meta")
    losses = made(torch.empty(batch, *SHAPE), torch.zeros(batch, dtype=torch.long), rng)
    for name, loss in losses.items():
        loss.backward(inputs=[p for p in made.players[name].parameters() if p.requires_grad])


def flops(action) -> float:
    "GFLOP of an action."
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        action()
    return counter.get_total_flops() / 1e9


def kept(net, batch: int) -> float:
    """Bytes an image one forward in float32 keeps for its backward, weights left out; bfloat16
    autocast keeps between half of it and all.
    """
    found, weights = {}, {p.untyped_storage()._cdata for p in net.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            found[storage._cdata] = (
                storage,
                storage.nbytes(),
            )  # holding it keeps its address from being given away again
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(
            torch.empty(batch, *SHAPE), torch.empty(batch), torch.zeros(batch, dtype=torch.long)
        )
    del out
    return sum(size for _, size in found.values()) / batch


def count() -> dict:
    """What is counted: the network, and for each method parameters, GFLOP an image and the state it
    holds.
    """
    with (
        torch.device("meta"),
        mock.patch("torch.autocast", lambda *given, **more: contextlib.nullcontext()),
    ):  # which the meta device does not know
        net = wide()
        x, t, y = torch.empty(1, *SHAPE), torch.empty(1), torch.zeros(1, dtype=torch.long)
        with torch.no_grad():
            forward = flops(lambda: net(x, t, y))
        found = {
            "parameters": sum(p.numel() for p in net.parameters()),
            "forward": forward,
            "kept": kept(net, 2),
            "methods": {},
        }
        for name in BUDGETS:
            made, teacher = objective(name)
            gflop = (
                flops(lambda m=made: step(m, 4, 1)) / 4
            )  # a step without GDD's R1, which comes every sixteenth
            trained = {
                id(p): p.numel()
                for m in made.players.values()
                for p in m.parameters()
                if p.requires_grad
            }
            everything = sum(
                p.numel()
                for m in (
                    *made.players.values(),
                    *made.ema.values(),
                    *made.frozen.values(),
                    *filter(None, [teacher]),
                )
                for p in m.parameters()
            )
            found["methods"][name] = {
                "gflop": gflop,
                "trained": sum(trained.values()),
                "state": 4 * everything + 12 * sum(trained.values()),
                "sums": 4 * sum(trained.values()),
            }
    return found


def main(words: list = None) -> None:
    ask = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for key, value in ASSUMED.items():
        ask.add_argument(
            f"--{key}", type=float, nargs="+" if isinstance(value, list) else None, default=value
        )
    told, found = ask.parse_args(words), count()
    print(
        f"network: {found['parameters'] / 1e6:.1f} M parameters, forward {found['forward']:.1f} "
        f"GFLOP an image; keeps {found['kept'] / 1e6:.0f} MB an image for the backward in "
        "float32, at least half of it in bfloat16\n"
    )
    print("method   GFLOP/image  in forwards  trained M  state GB  images a GPU holds  sums GB")
    for name, m in found["methods"].items():
        fits = (told.memory * 0.9e9 - m["state"] - 2 * found["parameters"]) / found["kept"]
        print(
            f"{name:8} {m['gflop']:11.0f} {m['gflop'] / found['forward']:12.2f} "
            f"{m['trained'] / 1e6:10.1f} {m['state'] / 1e9:9.1f} {fits:19.0f} "
            f"{m['sums'] / 1e9:8.2f}"
        )
    print(
        "\nmethod   share of peak  img/s a GPU   GPU-hours"
        + "".join(f"{f'{n} GPUs, h':>12}" for n in (8, 16, 32, 64))
        + "        dollars"
    )
    for name, m in found["methods"].items():
        for use in told.use:
            rate = told.peak * use * 1000 / m["gflop"]
            hours = BUDGETS[name] / rate / 3600
            cost = " to ".join(f"{hours * p:,.0f}" for p in told.price)
            print(
                f"{name:8} {use:13.0%} {rate:12.0f} {hours:11,.0f}"
                + "".join(f"{hours / n:12,.1f}" for n in (8, 16, 32, 64))
                + f"  {cost:>14}"
            )
    middle = told.use[len(told.use) // 2]
    print(
        f"\none step of global batch 1024 at {middle:.0%} of peak: seconds of arithmetic, and of "
        "adding gradients up afterwards"
    )
    print("method   " + "".join(f"{f'{n} GPUs':>22}" for n in (8, 16, 32, 64)))
    for name, m in found["methods"].items():
        cells = []
        for n in (8, 16, 32, 64):
            link = told.inside if n <= 8 else told.between
            cells.append(
                f"{1024 / n * m['gflop'] / (told.peak * middle * 1000):.2f} + "
                f"{2 * (n - 1) / n * m['sums'] / 1e9 / link:.3f}"
            )
        print(f"{name:8} " + "".join(f"{c:>22}" for c in cells))
    print(
        f"\ndata: {PICTURES:,} pictures of 64 x 64 are {PICTURES * 3 * 64 * 64 / 1e9:.1f} GB as "
        "bytes; one checkpoint of CUD K=1 with its average and optimiser "
        f"{16 * found['parameters'] / 1e9:.1f} GB"
    )
    for nfe in (1, 8, 16, 35):
        print(
            f"50,000 samples at NFE {nfe:2}: "
            f"{50_000 * nfe * found['forward'] / (told.peak * middle * 1000) / 60:6.1f} "
            f"GPU-minutes at {middle:.0%} of peak"
        )


if __name__ == "__main__":
    main()
