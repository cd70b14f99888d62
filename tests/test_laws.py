"""Laws that span modules, on real networks and on the runs that ship."""
import json
from pathlib import Path

import pytest
import torch

from cudlab.core import Config
from cudlab.core import Rng
from cudlab.core import noise
from cudlab.cud import CUD
from cudlab.fit import fit
from cudlab.net import network
from cudlab.path import GRIDS
from cudlab.path import linear
from cudlab.run import METHODS
from cudlab.run import Run
from cudlab.run import build
from cudlab.solver import SOLVERS

SHIPPED = sorted(p.parent for p in (Path(__file__).parents[1] / "checkpoints").glob("*/config.json"))


def test_every_kind_of_run_ships():
    kinds = {(r.config.method, r.heads, r.config.classes, len(r.shape)) for r in map(Run, SHIPPED)}
    assert kinds >= {("rf", 1, False, 3), ("cud", 1, False, 3), ("cud", 2, False, 3), ("cud", 3, False, 3), ("cud", 1, True, 3), ("cud", 1, False, 1)}


@pytest.mark.parametrize("folder", SHIPPED, ids=[p.name for p in SHIPPED])
def test_shipped_runs_are_whole_small_and_measured(folder):
    run = Run(folder)
    assert run.verify() == 4 and run.step == run.config.steps and run.scores and run.metrics
    assert sum(p.stat().st_size for p in folder.iterdir()) < 5_000_000
    assert run.name in (folder.parent / "README.md").read_text()


@pytest.mark.parametrize("folder", SHIPPED, ids=[p.name for p in SHIPPED])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_sample_does_not_depend_on_its_company(folder, solver):
    run = Run(folder)
    steps = 2 if SOLVERS[solver].calls else 1
    y = torch.arange(16) % 10 if run.config.classes else None
    company = run.solve(seed=3, index=16, steps=steps, solver=solver, y=y)
    alone = run.solve(seed=3, index=torch.tensor([5]), steps=steps, solver=solver, y=None if y is None else y[5:6])
    reach = max(1, company.xs.abs().max().item()) # two moves are too few for Runge-Kutta in eps: the states leave the data by orders of magnitude
    torch.testing.assert_close(alone.x[0], company.x[5], rtol=0, atol=2e-2 if solver == "rk45" else 1e-4 * reach)
    if SOLVERS[solver].calls:
        assert company.nfe == SOLVERS[solver].calls(steps)


@pytest.mark.parametrize("grid", GRIDS)
def test_every_grid_ends_in_pictures(grid):
    run = Run(next(p for p in SHIPPED if p.name == "digits-rf"))
    out = run.solve(index=8, steps=12, solver="heun", grid=grid)
    assert out.x.abs().max() < 2 and out.x.std() > 0.4


def test_guidance_costs_two_calls_and_makes_the_class():
    run = Run(next(p for p in SHIPPED if Run(p).config.classes))
    plain, guided = (run.solve(index=16, steps=8, y=7, guidance=g) for g in (1.0, 2.0))
    assert (plain.nfe, guided.nfe) == (8, 16)
    from cudlab.features import load_classifier
    judge = load_classifier(next((Path(__file__).parents[1] / "cudlab/weights").glob("digits-v2-*")))
    assert (judge(guided.x).argmax(1) == 7).float().mean() >= 0.75


def test_the_published_cifar10_network_trains_one_step():
    torch.manual_seed(0)
    config = Config(net="cifar10", steps=1, batch=2, warmup=1, lr=2e-4, dropout=0.13)

    class Noise:
        def batch(self, seed, step, n):
            return noise(seed, n, (3, 32, 32)).clamp(-1, 1), None

    objective = CUD().bind(network("cifar10", (3, 32, 32), dropout=0.13, phi0=0.75), linear, 1)
    before = [p.clone() for p in objective.net.parameters()]
    (tick,) = fit(objective, Noise(), config)
    assert tick.skipped == 0 and any((p != q).any() for p, q in zip(before, objective.net.parameters()))


def test_players_that_share_a_loss_are_both_trained_and_nothing_else_moves():
    objective, data = build(Config(args={"coupling": True}, steps=2, batch=8, warmup=1), "cpu")
    start = {name: [p.clone() for p in m.parameters()] for name, m in objective.players.items()}
    pixels = data.all(4)[0].clone()
    list(fit(objective, data, Config(args={"coupling": True}, steps=2, batch=8, warmup=1)))
    for name, module in objective.players.items():
        assert any((p != q).any() for p, q in zip(start[name], module.parameters())), name
    assert torch.equal(pixels, data.all(4)[0])


@pytest.mark.parametrize("method", [m for m, made in METHODS.items() if made.product == "net"])
def test_every_network_method_learns_the_mean_of_one_picture(method):
    "On a data set of one point the velocity is (x - x0) / t and one Euler step lands on it."
    point = torch.tensor([0.4, -0.7])

    class One:
        shape, classes = (2,), []

        def batch(self, seed, step, n):
            return point.expand(n, 2).clone(), None

    torch.manual_seed(0)
    config = Config(method=method, steps=400, batch=256, lr=3e-3, ema=0.99)
    objective = METHODS[method]().bind(network("mlp", (2,), **METHODS[method]().needs()), linear, config.steps)
    list(fit(objective, One(), config))
    x = noise(0, 256, (2,))
    with torch.no_grad():
        landed = x - objective.ema["net"](x, torch.ones(256))
    assert (landed - point).square().mean().sqrt() < 0.1


def test_the_streams_of_a_step_do_not_collide():
    rng = Rng(0, 1)
    words = [rng.bits(s, 64, 4).flatten() for s in ("eps", "t", "h", "label", "noise", "order", "flip")]
    assert len(set(torch.cat(words).tolist())) > 0.99 * 64 * 4 * 7


def test_scores_in_the_readme_come_from_the_study():
    root = Path(__file__).parents[1]
    table = (root / "docs/aim.md").read_text().strip()
    assert table in (root / "README.md").read_text()
    assert json.loads((root / "docs/aim.json").read_text())["protocol"].startswith("digits")
