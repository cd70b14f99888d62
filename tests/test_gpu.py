"""What only a machine with CUDA can show; skipped elsewhere."""

import pytest
import torch

from cudlab.config import Config
from cudlab.methods import build_objective

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA here")
CONFIG = Config(args={"heads": 2}, steps=12, batch=32, dtype="float32")


def train(device, config=CONFIG, watch=False):
    "The objective and every step of a training; `watch` forbids waiting for the device."
    objective, data = build_objective(config, device=device)
    steps = []
    for done in objective.fit(data, config):
        steps.append(done)
        if watch and done.step == 3:  # the first steps may allocate and choose algorithms
            torch.cuda.set_sync_debug_mode("error")
    torch.cuda.set_sync_debug_mode("default")
    return objective, steps


def test_no_step_waits_for_the_gpu():
    config = Config(args={"heads": 2}, steps=4, batch=32, dtype="float32")
    train("cuda", config, watch=True)  # every fifth step asks for divergence


def test_a_gpu_trains_like_a_cpu():
    for a, b in zip(train("cpu")[1], train("cuda")[1], strict=True):
        assert a.losses["net"].item() == pytest.approx(b.losses["net"].item(), rel=1e-3)


def test_two_trainings_on_a_gpu_are_alike():
    (a, one), (b, two) = train("cuda"), train("cuda")
    for p, q in zip(one, two, strict=True):
        assert p.losses["net"].item() == pytest.approx(q.losses["net"].item(), rel=1e-6)
    assert all(
        torch.allclose(p, q, rtol=1e-4, atol=1e-6)
        for p, q in zip(a.net.parameters(), b.net.parameters())
    )
