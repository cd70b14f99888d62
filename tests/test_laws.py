"""Laws that span modules, on real networks and on the runs that ship."""

import json

import pytest
import torch
from conftest import ROOT

from cudlab.config import Config
from cudlab.cud import CUD
from cudlab.features import get_classifier
from cudlab.fit import fit
from cudlab.methods import METHODS, NoiseData, build_objective
from cudlab.net import MLP, UNet, Velocity, make_network
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
from cudlab.solver import SOLVERS, solve

CHECKPOINTS = ROOT / "checkpoints"
SHIPPED = sorted(p.parent for p in CHECKPOINTS.glob("*/config.json"))


def close(a, b, share=1e-5):
    "Whether two results differ by rounding alone, measured against the largest sample."
    return (a - b).abs().max() <= share * max(1, b.abs().max().item())


def tiny(kind):
    "A small network whose every output counts, as a velocity, and the shape of its samples."
    torch.manual_seed(0)
    shape = (2,) if kind == "points" else (1, 8, 8)
    if kind == "points":
        net = MLP(shape, width=16, depth=2, classes=4, times=2)
    else:
        net = UNet(shape, 8, (1, 2), 1, (), classes=4, heads=2, phi0=0.75)
    for p in net.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    head = 1 if kind == "points" else 2
    return Velocity(net.eval(), torch.arange(16) % 4, head, guidance=1.5), shape


@pytest.fixture(scope="module")
def digits():
    "The rectified flow of the digits that ships, as a velocity."
    return Run(CHECKPOINTS / "digits-rf").velocity()


# Solvers


@pytest.mark.parametrize("kind", ["points", "pictures"])
def test_a_sample_does_not_depend_on_its_company(kind):
    velocity, shape = tiny(kind)
    x, some = draw_noise(3, 16, shape), torch.tensor([5, 11, 2])
    with torch.no_grad():
        for name, entry in SOLVERS.items():
            if name == "rk45":
                continue  # single precision decides about its steps; the next test has it
            ts = make_grid(entry.grid, 6, finite=entry.needs_finite_logsnr)
            company = solve(velocity, x, ts, name)
            alone = solve(velocity.at(some), x[some], ts, name)
            assert close(alone.xs, company.xs[:, some]), name
            assert not entry.nfe or company.nfe == alone.nfe == 2 * entry.nfe(6), name


def test_a_sample_of_adaptive_steps_does_not_depend_on_its_company():
    velocity, shape = tiny("points")
    velocity.net.double()
    x, some = draw_noise(3, 16, shape).double(), torch.tensor([5, 11, 2])
    ts = make_grid("uniform", 6).double()
    with torch.no_grad():
        company = solve(velocity, x, ts, "rk45")
        alone = solve(velocity.at(some), x[some], ts, "rk45")
    assert company.xs.dtype == torch.float64
    assert close(alone.xs, company.xs[:, some], 1e-9)


@pytest.mark.long
@pytest.mark.parametrize("folder", SHIPPED, ids=lambda p: p.name)
def test_a_sample_of_a_shipped_run_does_not_depend_on_its_company(folder):
    run = Run(folder)
    jumps = run.method.network_options().get("times", 1) == 2
    for name in SOLVERS:
        if run.sampling_fixed.get("solver", name) != name or (name == "flow-map" and not jumps):
            continue
        choices = {"seed": 3, "solver": name, "steps": run.sampling_fixed.get("steps", 2)}
        y = torch.arange(16) % 10 if run.config.classes else None
        company = run.solve(index=16, y=y, **choices).x
        y = None if y is None else y[5:6]
        alone = run.solve(index=torch.tensor([5]), y=y, **choices).x
        if name == "rk45":  # with many pixels one of them may jump with a step
            assert (alone[0] - company[5]).square().mean().sqrt() < 5e-3, name
        else:  # in two moves Runge-Kutta in eps leaves the data by orders of magnitude
            assert close(alone[0], company[5], 1e-4), name


def test_every_solver_makes_the_calls_it_states():
    def still(x, t):
        return torch.zeros_like(x)

    for name, entry in SOLVERS.items():
        for n in range(1, 13) if entry.nfe else ():
            for denoise in (True, False):
                ts = make_grid(entry.grid, n, finite=entry.needs_finite_logsnr, denoise=denoise)
                for lower in (None, True, False):
                    nfe = solve(still, torch.ones(3, 1), ts, name, lower_order_final=lower).nfe
                    assert nfe == entry.nfe(n, denoise), (name, n, denoise, lower)


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_every_solver_lands_on_a_data_set_of_one_point(path):
    point = torch.tensor([0.3, -1.2], dtype=torch.float64)
    noise = Rng(0).normal("x1", 32, (2,)).double()
    asks_at_end = ("heun", "kutta3", "rk4", "rk45", "ab2-heun", "ab3-rk3", "ab4-rk4", "pndm-v")

    def velocity(x, t):
        share = path.sigma(t)[:, None].clamp_min(1e-12)
        eps = (x - path.alpha(t)[:, None] * point) / share
        return path.dalpha(t)[:, None] * point + path.dsigma(t)[:, None] * eps

    for name, entry in SOLVERS.items():
        if path.name != "linear" and not entry.needs_finite_logsnr:
            continue  # a straight line in v is straight on the linear path alone
        for n in (1, 2, 3, 4, 7):
            for grid in {"uniform", "edm", "shifted", entry.grid}:
                ts = make_grid(grid, n, path, finite=entry.needs_finite_logsnr).double()
                if name in asks_at_end:
                    ts[-1] = 1e-4  # at t = 0 this field is 0/0
                start, goal = (
                    path(point.expand(32, 2), noise, t.expand(32))[0] for t in ts[[0, -1]]
                )
                found = solve(velocity, start, ts, name, path).x
                assert (found - goal).abs().max() < 2e-7, (name, n, grid)


def test_a_solver_in_eps_or_x0_makes_the_same_samples_on_every_path(digits):
    "A network as it is, and as one of the variance-preserving path walked on the mapped grid."
    x1, vp = draw_noise(0, 8, (1, 8, 8)), PATHS["vp"]
    ts, ts_vp = (make_grid("logsnr", 5, path).double() for path in (linear, vp))
    mapped = change_path(digits, linear, vp)
    for name, entry in SOLVERS.items():
        if not entry.needs_finite_logsnr or name.startswith(("deis-tab", "pndm")):
            continue  # solvers in v, and those with a clock of their own path
        with torch.no_grad():
            here = solve(digits, x1 * ts[0], ts, name).x
            there = solve(mapped, x1 * vp.sigma(ts_vp[0]), ts_vp, name, vp).x
        assert close(there, here, 1e-3), name


def test_every_solver_runs_on_networks_that_predict_noise_or_data(digits):
    "The same network as DDPM's eps(x, a, b) and as EDM's D(y; sigma), wrapped into a velocity."
    x1, ts = draw_noise(0, 4, (1, 8, 8)), make_grid("edm", 4, finite=True, denoise=False)
    wrapped = (
        from_denoiser(to_denoiser(digits)),
        from_noise_predictor(to_noise_predictor(digits), t_max=1.0),
    )
    for name in SOLVERS:
        with torch.no_grad():
            plain, *others = (solve(f, x1 * ts[0], ts, name).x for f in (digits, *wrapped))
        for other in others:
            assert close(other, plain, 2e-2 if name == "rk45" else 2e-3), name


# Runs that ship


def test_every_kind_of_run_ships():
    runs = [Run(p) for p in SHIPPED]
    assert {run.config.method for run in runs} == set(METHODS)
    kinds = {(r.config.method, r.heads, r.config.classes, len(r.shape)) for r in runs}
    assert kinds >= {
        ("rf", 1, False, 3),
        ("cud", 1, False, 3),
        ("cud", 2, False, 3),
        ("cud", 3, False, 3),
        ("cud", 1, True, 3),
        ("cud", 1, False, 1),
    }


def test_shipped_runs_are_whole_small_and_measured():
    listed = (CHECKPOINTS / "README.md").read_text()
    for run in map(Run, SHIPPED):
        assert run.verify() and run.step == run.num_steps, run.name
        assert run.scores and run.metrics, run.name
        size = sum(p.stat().st_size for p in run.dir.rglob("*") if p.is_file())
        assert size < 8_000_000, run.name  # progressive distillation keeps its last teacher
        assert run.name in listed


def test_every_grid_ends_in_pictures():
    run = Run(CHECKPOINTS / "digits-rf")
    for name in GRIDS:
        x = run.solve(index=8, steps=12, solver="heun", grid=name).x
        assert x.abs().max() < 2 and x.std() > 0.4, name


def test_guidance_costs_two_calls_and_makes_the_class():
    run = Run(CHECKPOINTS / "digits-cud-aim8-classes")
    plain, guided = (run.solve(index=16, steps=8, y=7, guidance=g) for g in (1.0, 2.0))
    assert (plain.nfe, guided.nfe) == (8, 16)
    assert (get_classifier("digits-v2")(guided.x).argmax(1) == 7).float().mean() >= 0.75


def test_the_shipped_learned_solver_is_for_the_shipped_network():
    learned, network = (Run(CHECKPOINTS / name) for name in ("digits-dode-euler5", "digits-rf"))
    assert learned.info["teacher"]["network"] == network.network_hash()
    best = {s["solver"]: s["endpoint"] for s in learned.scores if s["nfe"] == 5}
    assert best[learned.name] < best["ab2"] < best["euler"]


@pytest.mark.parametrize("study", ["aim", "solvers", "compare"])
def test_scores_in_the_results_come_from_the_study(study):
    page = (ROOT / f"docs/{study}.md").read_text()
    table = page[page.index("\n| ") :].strip()
    assert table in (ROOT / "docs/results.md").read_text()
    assert json.loads((ROOT / f"docs/{study}.json").read_text())["protocol"].startswith("digits")


# Methods


@pytest.mark.long
def test_the_published_cifar10_network_trains_one_step():
    torch.manual_seed(0)
    config = Config(net="cifar10", steps=1, batch=2, warmup=1, lr=2e-4, dropout=0.13)

    class Noise:
        def batch(self, seed, step, n):
            return draw_noise(seed, n, (3, 32, 32)).clamp(-1, 1), None

    objective = CUD().bind(make_network("cifar10", (3, 32, 32), dropout=0.13, phi0=0.75), linear, 1)
    before = [p.clone() for p in objective.net.parameters()]
    (tick,) = fit(objective, Noise(), config)
    moved = [(p != q).any() for p, q in zip(before, objective.net.parameters())]
    assert tick.skipped == 0 and any(moved)


def test_players_that_share_a_loss_are_both_trained_and_nothing_else_moves():
    config = Config(args={"coupling": True}, steps=2, batch=8, warmup=1)
    objective, data = build_objective(config, device="cpu")
    start = {name: [p.clone() for p in m.parameters()] for name, m in objective.players.items()}
    pixels = data.all(4)[0].clone()
    list(fit(objective, data, config))
    for name, module in objective.players.items():
        assert any((p != q).any() for p, q in zip(start[name], module.parameters())), name
    assert torch.equal(pixels, data.all(4)[0])


POINT = torch.tensor([0.4, -0.7])


class OnePoint:
    "A data set of one point."

    shape, classes = (2,), []

    def batch(self, seed, step, n):
        return POINT.expand(n, 2).clone(), None


ON_POINTS = [m for m, made in METHODS.items() if made.trains == "net" and m != "gdd"]


@pytest.mark.parametrize("method", ON_POINTS)  # gdd needs pictures
def test_every_network_method_learns_the_mean_of_one_picture(method):
    "On a data set of one point the velocity is (x - x0) / t and one Euler step lands on it."
    torch.manual_seed(0)
    config = Config(method=method, steps=400, batch=256, lr=3e-3, ema=0.99)
    stable = {"step": "euler", "intervals": 4, "grid": "uniform"}  # at t = 0 the field is 0/0
    made = METHODS[method](**stable if method == "consistency" else {})

    def exact(y):
        return lambda x, t: (x - POINT) / t[:, None].clamp_min(1e-4)

    data = OnePoint() if "data" in made.supervision else NoiseData("", "", (2,), [])
    net = make_network("mlp", (2,), **made.network_options())
    objective = made.bind(net, linear, config.steps, exact)
    list(objective.fit(data, config))
    velocity = objective.velocity(objective.ema["net"])
    with torch.no_grad():
        x1, ts = draw_noise(0, 256, (2,)), make_grid("uniform", 1)
        landed = solve(velocity, x1, ts, made.sampling()["solver"]).x
    assert (landed - POINT).square().mean().sqrt() < 0.15


def test_the_streams_of_a_step_do_not_collide():
    streams = ("eps", "t", "h", "label", "noise", "order", "flip")
    words = torch.cat([Rng(0, 1).bits(name, 64, 4).flatten() for name in streams])
    assert len(set(words.tolist())) > 0.99 * len(words)
