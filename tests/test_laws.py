"""Laws that span modules, on real networks and on the runs that ship."""

import json
from pathlib import Path

import pytest
import torch

from cudlab.config import Config
from cudlab.cud import CUD
from cudlab.fit import fit
from cudlab.methods import METHODS
from cudlab.multistep import SOLVERS, solve
from cudlab.net import make_network
from cudlab.path import (
    GRIDS,
    PATHS,
    change_path,
    from_denoiser,
    from_noise_predictor,
    linear,
    make_grid,
    to_denoiser,
    to_noise_predictor,
)
from cudlab.rng import Rng, draw_noise
from cudlab.run import Run
from cudlab.training import NoiseData, build_objective

SHIPPED = sorted(
    p.parent for p in (Path(__file__).parents[1] / "checkpoints").glob("*/config.json")
)
POSSIBLE = [(p, solver) for p in SHIPPED for solver in SOLVERS if not Run(p).refuses(solver=solver)]


def test_every_kind_of_run_ships():
    methods = {Run(p).config.method for p in SHIPPED}
    assert methods == set(METHODS)
    kinds = {(r.config.method, r.heads, r.config.classes, len(r.shape)) for r in map(Run, SHIPPED)}
    assert kinds >= {
        ("rf", 1, False, 3),
        ("cud", 1, False, 3),
        ("cud", 2, False, 3),
        ("cud", 3, False, 3),
        ("cud", 1, True, 3),
        ("cud", 1, False, 1),
    }


@pytest.mark.parametrize("folder", SHIPPED, ids=[p.name for p in SHIPPED])
def test_shipped_runs_are_whole_small_and_measured(folder):
    run = Run(folder)
    assert (
        run.verify() == (4 if "raw" in run.weights else 3)
        and run.step == run.num_steps
        and run.scores
        and run.metrics
    )
    assert (
        sum(p.stat().st_size for p in folder.iterdir()) < 8_000_000
    )  # progressive distillation keeps its last teacher
    assert run.name in (folder.parent / "README.md").read_text()


@pytest.mark.parametrize(
    "folder, solver", POSSIBLE, ids=[f"{p.name}-{solver}" for p, solver in POSSIBLE]
)
def test_a_sample_does_not_depend_on_its_company(folder, solver):
    run = Run(folder)
    steps = run.sampling_fixed.get("steps", 2) if SOLVERS[solver].nfe else 1
    y = torch.arange(16) % 10 if run.config.classes else None
    company = run.solve(seed=3, index=16, steps=steps, solver=solver, y=y)
    alone = run.solve(
        seed=3, index=torch.tensor([5]), steps=steps, solver=solver, y=None if y is None else y[5:6]
    )
    reach = max(
        1,
        company.xs.abs().max().item(),
        # two moves are too few for Runge-Kutta in eps: the states leave the data by orders of
        # magnitude
    )
    if (
        solver == "rk45" and run.shape[-1] > 8
    ):  # its next step hangs on rounding: with many pixels one of them may jump
        assert (alone.x[0] - company.x[5]).square().mean().sqrt() < 5e-3
    else:
        torch.testing.assert_close(
            alone.x[0], company.x[5], rtol=0, atol=2e-2 if solver == "rk45" else 1e-4 * reach
        )
    if SOLVERS[solver].nfe:
        assert company.nfe == SOLVERS[solver].nfe(steps)


@pytest.mark.parametrize("name", GRIDS)
def test_every_grid_ends_in_pictures(name):
    run = Run(next(p for p in SHIPPED if p.name == "digits-rf"))
    out = run.solve(index=8, steps=12, solver="heun", grid=name)
    assert out.x.abs().max() < 2 and out.x.std() > 0.4


def test_guidance_costs_two_calls_and_makes_the_class():
    run = Run(next(p for p in SHIPPED if Run(p).config.classes))
    plain, guided = (run.solve(index=16, steps=8, y=7, guidance=g) for g in (1.0, 2.0))
    assert (plain.nfe, guided.nfe) == (8, 16)
    from cudlab.features import load_classifier

    judge = load_classifier(
        next((Path(__file__).parents[1] / "cudlab/weights").glob("digits-v2-*"))
    )
    assert (judge(guided.x).argmax(1) == 7).float().mean() >= 0.75


def test_the_published_cifar10_network_trains_one_step():
    torch.manual_seed(0)
    config = Config(net="cifar10", steps=1, batch=2, warmup=1, lr=2e-4, dropout=0.13)

    class Noise:
        def batch(self, seed, step, n):
            return draw_noise(seed, n, (3, 32, 32)).clamp(-1, 1), None

    objective = CUD().bind(make_network("cifar10", (3, 32, 32), dropout=0.13, phi0=0.75), linear, 1)
    before = [p.clone() for p in objective.net.parameters()]
    (tick,) = fit(objective, Noise(), config)
    assert tick.skipped == 0 and any(
        (p != q).any() for p, q in zip(before, objective.net.parameters())
    )


def test_players_that_share_a_loss_are_both_trained_and_nothing_else_moves():
    objective, data = build_objective(
        Config(args={"coupling": True}, steps=2, batch=8, warmup=1), "cpu"
    )
    start = {name: [p.clone() for p in m.parameters()] for name, m in objective.players.items()}
    pixels = data.all(4)[0].clone()
    list(fit(objective, data, Config(args={"coupling": True}, steps=2, batch=8, warmup=1)))
    for name, module in objective.players.items():
        assert any((p != q).any() for p, q in zip(start[name], module.parameters())), name
    assert torch.equal(pixels, data.all(4)[0])


@pytest.mark.parametrize(
    "method", [m for m, made in METHODS.items() if made.trains == "net" and m != "gdd"]
)  # which needs pictures
def test_every_network_method_learns_the_mean_of_one_picture(method):
    "On a data set of one point the velocity is (x - x0) / t and one Euler step lands on it."
    point = torch.tensor([0.4, -0.7])

    class One:
        shape, classes = (2,), []

        def batch(self, seed, step, n):
            return point.expand(n, 2).clone(), None

    torch.manual_seed(0)
    config = Config(method=method, steps=400, batch=256, lr=3e-3, ema=0.99)
    made = METHODS[method](
        **{"step": "euler", "intervals": 4, "grid": "uniform"} if method == "consistency" else {}
    )  # at t = 0 the field is 0/0
    exact = lambda y: lambda x, t: (x - point) / t[:, None].clamp_min(1e-4)  # the teacher's flow
    data = One() if "data" in made.supervision else NoiseData("", "", (2,), [])
    objective = made.bind(
        make_network("mlp", (2,), **made.network_options()), linear, config.steps, exact
    )
    list(objective.fit(data, config))
    x = draw_noise(0, 256, (2,))
    with torch.no_grad():
        landed = solve(
            objective.velocity(objective.ema["net"]),
            x,
            make_grid("uniform", 1),
            made.sampling()["solver"],
        ).x
    assert (landed - point).square().mean().sqrt() < 0.1


def test_the_streams_of_a_step_do_not_collide():
    rng = Rng(0, 1)
    words = [
        rng.bits(s, 64, 4).flatten() for s in ("eps", "t", "h", "label", "noise", "order", "flip")
    ]
    assert len(set(torch.cat(words).tolist())) > 0.99 * 64 * 4 * 7


@pytest.mark.parametrize("study", ["aim", "solvers", "compare"])
def test_scores_in_the_readme_come_from_the_study(study):
    root = Path(__file__).parents[1]
    table = (root / f"docs/{study}.md").read_text().strip()
    assert table in (root / "README.md").read_text()
    assert json.loads((root / f"docs/{study}.json").read_text())["protocol"].startswith("digits")


def test_the_shipped_learned_solver_is_for_the_shipped_network():
    learned, network = (
        Run(next(p for p in SHIPPED if p.name == name))
        for name in ("digits-dode-euler5", "digits-rf")
    )
    assert learned.info["teacher"]["network"] == network.network_hash()
    best = {s["solver"]: s["endpoint"] for s in learned.scores if s["nfe"] == 5}
    assert best[learned.name] < best["ab2"] < best["euler"]


FREE = [
    name
    for name, entry in SOLVERS.items()
    if entry.needs_finite_logsnr and not name.startswith(("deis-tab", "pndm"))
]  # these two have a clock of their own path


@pytest.mark.parametrize("solver", FREE)
def test_a_solver_in_eps_or_x0_makes_the_same_samples_on_every_path(solver):
    """A trained network as it is, and as a network of the variance-preserving path walked on the
    mapped grid.
    """
    f, x1, vp = (
        Run(next(p for p in SHIPPED if p.name == "digits-rf")).velocity(),
        draw_noise(0, 8, (1, 8, 8)),
        PATHS["vp"],
    )
    ts = make_grid("logsnr", 5, linear).double()
    ts_vp = make_grid("logsnr", 5, vp).double()
    with torch.no_grad():
        here = solve(f, x1 * ts[0], ts, solver).x
        there = solve(change_path(f, linear, vp), x1 * vp.sigma(ts_vp[0]), ts_vp, solver, vp).x
    torch.testing.assert_close(here, there, rtol=0, atol=1e-3 * max(1, here.abs().max().item()))


@pytest.mark.parametrize("solver", SOLVERS)
def test_every_solver_runs_on_networks_that_predict_noise_or_data(solver):
    """The same network as DDPM's eps(x, a, b) and as EDM's D(y; sigma), wrapped back into a
    velocity.
    """
    f, x1 = (
        Run(next(p for p in SHIPPED if p.name == "digits-rf")).velocity(),
        draw_noise(0, 8, (1, 8, 8)),
    )
    ts = make_grid("edm", 4, finite=True, denoise=False)
    with torch.no_grad():
        plain, *wrapped = (
            solve(g, x1 * ts[0], ts, solver).x
            for g in (
                f,
                from_denoiser(to_denoiser(f)),
                from_noise_predictor(to_noise_predictor(f), t_max=1.0),
            )
        )
    for other in wrapped:
        torch.testing.assert_close(
            other,
            plain,
            rtol=0,
            atol=2e-2 if solver == "rk45" else 2e-3 * max(1, plain.abs().max().item()),
        )
