"""Solvers against independent numerics: SciPy's Dormand-Prince of the eighth order on exact flows,
published loops written out, and the end of the variance-preserving path.
"""

import math

import numpy
import pytest
import torch

from cudlab.path import (
    PATHS,
    GaussianMixture,
    change_path,
    linear,
    make_grid,
    make_vp_path,
    schedule_points,
)
from cudlab.rng import Rng
from cudlab.solver import SOLVERS, find_steps, solve
from cudlab.step import OPEN, heun, is_singular

integrate = pytest.importorskip("scipy.integrate")
VP = PATHS["vp"]
NOISE = Rng(5).normal("x1", 24, (1,)).double()
AT_THE_END = ("heun", "kutta3", "rk4", "ab2-heun", "ab3-rk3", "ab4-rk4", "pndm-v")


def mixture(path):
    "Three clusters with the exact velocity; on the vp path it is NaN at t = 0."
    means, stds = torch.tensor([[-1.0], [0.2], [1.1]]), torch.tensor([0.5, 0.4, 0.6])
    return GaussianMixture(means.double(), stds.double(), path=path)


def scipy_end(path, begin=1.0, end=1e-13):
    "Where the flow of the mixture leads from NOISE, to 1e-11."
    flow, noise = mixture(path), NOISE * path.sigma(torch.tensor(begin).double())

    def slope(t, x):
        at = torch.full((len(x),), t, dtype=torch.float64)
        return flow(torch.from_numpy(x)[:, None], at)[:, 0].numpy()

    how = dict(method="DOP853", rtol=1e-12, atol=1e-13)
    found = integrate.solve_ivp(slope, (begin, end), noise[:, 0].numpy(), **how)
    return torch.from_numpy(numpy.ascontiguousarray(found.y[:, -1:]))


@pytest.fixture(scope="module")
def ends():
    "Ends of the flow at t = 0, from noise at the first time of a grid, by path and time."
    return {(p, t): scipy_end(PATHS[p], t) for p in ("linear", "vp") for t in (1.0, START[p])}


# solvers of the log signal-to-noise ratio start at a finite one
START = {p: make_grid("uniform", 1, PATHS[p], finite=True)[0].item() for p in ("linear", "vp")}


def end_error(ends, name, path, steps):
    "Rms distance from the flow's end, of a walk to t = 0 on the uniform grid."
    finite = SOLVERS[name].needs_finite_logsnr
    ts = make_grid("uniform", steps, path, finite=finite).double()
    start = NOISE * path.sigma(ts[0])
    found = solve(mixture(path), start, ts, name, path).x
    truth = ends[path.name, ts[0].item()]
    return (found - truth).square().mean().sqrt().item()


@pytest.mark.parametrize("name", [name for name in SOLVERS if SOLVERS[name].order])
def test_every_solver_reaches_the_end_of_every_path(ends, name):
    for path in (linear, VP):
        few, many = (end_error(ends, name, path, steps) for steps in (30, 120))
        if SOLVERS[name].nfe:
            assert math.isfinite(few) and many < 0.4 * few and many < 0.02, (path.name, few, many)
        else:  # its own tolerance
            assert few < 1e-4 and many < 1e-4, (path.name, few, many)


@pytest.mark.parametrize(
    "name, order",
    [("heun", 2), ("heun-final-euler", 2), ("midpoint", 2), ("kutta3", 3), ("rk4", 4)],
)
def test_runge_kutta_keeps_its_order_to_the_end_of_the_vp_path(ends, name, order):
    coarse, fine = (end_error(ends, name, VP, steps) for steps in (80, 160))
    assert math.log2(coarse / fine) > order - 0.3


@pytest.mark.parametrize("name", [*AT_THE_END, "rk45"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_a_walk_never_asks_where_the_velocity_is_infinite(name, steps):
    "Its starting moves, one of which may be the last, included."
    asked = []

    def velocity(x, t):
        asked.append(t.min().item())
        return mixture(VP)(x, t)

    entry, ts = SOLVERS[name], make_grid("uniform", steps, VP).double()
    done = solve(velocity, NOISE, ts, name, VP)
    assert min(asked) > 0 and done.xs.isfinite().all() and done.x.abs().max() < 6
    assert not entry.nfe or done.nfe == len(asked) == entry.nfe(steps)


def test_a_network_of_the_linear_path_is_walked_to_the_end_of_the_vp_path():
    "Its noise prediction at t = 0 is not exactly 0, so its velocity there is infinite."

    def rough(x, t):
        return mixture(linear)(x, t) + 0.05

    served = change_path(rough, linear, VP)
    assert not served(NOISE, torch.zeros(24).double()).isfinite().all()
    truth = solve(rough, NOISE * START["linear"], torch.linspace(START["linear"], 0, 101), "rk4").x
    start = VP.time(linear.lam(torch.tensor(START["linear"]).double())).item()
    for name in ("heun", "kutta3", "rk4", "rk45"):
        ts = torch.linspace(start, 0, 2 if name == "rk45" else 61, dtype=torch.float64)
        found = solve(served, NOISE * VP.sigma(ts[0]), ts, name, VP).x
        assert (found - truth).abs().max() < 0.02, name


def test_the_end_is_the_predicted_data_for_the_adaptive_solver():
    "On one point the velocity grows without bound; the walk still ends on the point."

    def one_point(x, t):
        share = VP.sigma(t)[:, None]
        return VP.v(torch.full_like(x, 0.7), (x - 0.7 * VP.alpha(t)[:, None]) / share, t)

    for dtype, close in ((torch.float64, 1e-9), (torch.float32, 1e-4)):
        found = solve(one_point, NOISE.to(dtype), torch.tensor([1.0, 0.4, 0.0]), "rk45", VP)
        assert (found.x - 0.7).abs().max() < close
    short = solve(one_point, NOISE, torch.tensor([1.0, 1e-9, 0.0]).double(), "rk45", VP).x
    assert (short - 0.7).abs().max() < 1e-9


def test_open_tableaus_are_consistent_and_of_their_order():
    "The conditions of order two and three, and integrals exact to t^3 for four calls."
    for calls, (rows, b) in OPEN.items():
        c = torch.tensor([0.0, *(sum(row) for row in rows)], dtype=torch.float64)
        b = torch.tensor(b, dtype=torch.float64)
        assert len(b) == len(c) == calls and c.max() < 1
        for power in range(calls):
            assert abs((b * c**power).sum() - 1 / (power + 1)) < 1e-14
        stages = [sum(a * c[j] for j, a in enumerate(row)) for row in rows]
        if calls > 2:
            assert abs(sum(w * s for w, s in zip(b[1:], stages)) - 1 / 6) < 1e-14


def test_only_the_end_of_the_vp_path_is_singular():
    zero = torch.zeros(2, dtype=torch.float64)
    found = {name: is_singular(path, zero) for name, path in PATHS.items()}
    assert found == {"linear": False, "vp": True, "cosine": False}
    assert is_singular(make_vp_path(low=0.0), zero) and not is_singular(VP, zero + 1e-6)
    assert not any(is_singular(path, zero + 1) for path in PATHS.values())


# Heun whose last move is Euler's


def published_heun(velocity, x, calls):
    "The published sampler of an odd number of calls: (calls + 1) / 2 intervals, the last by Euler."
    intervals = (calls + 1) // 2
    width = 1 / intervals
    for i in range(intervals):
        t = torch.full((len(x),), 1 - i * width, dtype=x.dtype)
        v = velocity(x, t)
        guess = x - width * v
        if i < intervals - 1:
            guess = x - width * (v + velocity(guess, t - width)) / 2
        x = guess
    return x


@pytest.mark.parametrize("calls", [1, 3, 15])
def test_heun_with_a_last_euler_move_is_the_published_sampler(calls):
    flow = mixture(linear)
    ts = torch.linspace(1, 0, (calls + 1) // 2 + 1, dtype=torch.float64)
    ours = solve(flow, NOISE, ts, "heun-final-euler")
    assert ours.nfe == SOLVERS["heun-final-euler"].nfe(len(ts) - 1) == calls
    assert (ours.x - published_heun(flow, NOISE, calls)).abs().max() < 1e-13


def test_heun_with_a_last_euler_move_takes_odd_budgets():
    steps = [find_steps("heun-final-euler", nfe) for nfe in range(1, 17)]
    assert steps == [n // 2 + 1 if n % 2 else None for n in range(1, 17)]


def test_the_step_alone_is_closed_without_a_path():
    "Training steps per sample, between times where the velocity is finite."
    flow, t = mixture(linear), torch.full((24,), 0.5).double()
    v = flow(NOISE, t)
    by_hand = NOISE - 0.25 * (v + flow(NOISE - 0.5 * v, t - 0.5)) / 2 * 2
    assert (heun(flow, NOISE, t, t - 0.5) - by_hand).abs().max() < 1e-14
    assert schedule_points(VP, torch.zeros(1))[0].dsigma == math.inf


@pytest.mark.parametrize("path", PATHS.values(), ids=PATHS)
def test_the_time_of_a_noise_level_is_found_in_single_precision_too(path):
    "Down to a millionth, where the difference of two near numbers would lose half the digits."
    t = torch.logspace(-6, -0.01, 60)
    assert (path.time(path.lam(t)) / t - 1).abs().max() < 3e-6
    assert (path.time(path.lam(t.double())) / t.double() - 1).abs().max() < 1e-12
