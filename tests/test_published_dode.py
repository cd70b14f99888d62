"""The published calibration of D-ODE solvers, written out in its own variables, against the lab's
`faithful` fit on an exact flow; and bases that say nothing.
"""

import math

import pytest
import torch

from cudlab.config import Config
from cudlab.dode import DODE, fit_greedy, learned_solver
from cudlab.path import PATHS, GaussianMixture, linear, make_grid, to_denoiser, to_noise_predictor
from cudlab.rng import Rng
from cudlab.solver import SOLVERS, solve
from cudlab.targets import adjustable_times, published_states, teacher_states

MEANS, STDS = torch.tensor([[-1.0], [0.2], [1.1]]), torch.tensor([0.25, 0.2, 0.3])
FLOW = GaussianMixture(MEANS.double(), STDS.double())
NOISE = Rng(3).normal("x1", 100, (1,)).double()
C = 10  # teacher moves for each call


def fit_line(gap, basis):
    "The published least squares of one number: the whole batch as one column."
    column = basis.flatten()[:, None]
    return torch.linalg.lstsq(column, gap.flatten()[:, None]).solution.item()


def near(ours, published):
    "Whether all numbers agree to 1e-6; the published ones may be large, then relatively."
    published = torch.tensor(published, dtype=torch.float64)
    return ((ours - published).abs() <= 1e-6 * published.abs().clamp_min(1)).all()


# D-EDM: y = x0 + sigma eps, differences of the denoiser's output


def noise_levels(ts):
    return (ts.double() / (1 - ts.double())).tolist()


def denoise(y, sigma):
    return to_denoiser(FLOW)(y, torch.full((len(y),), sigma, dtype=torch.float64))


def slope(y, sigma):
    "EDM's dy / dsigma."
    return (y - denoise(y, sigma)) / sigma


def published_edm(moves):
    "One number after each Euler move and each Heun correction: 2 N - 1, the first one 0, and y."
    calls = 2 * moves - 1
    sigmas = noise_levels(make_grid("edm", C * calls))
    y, goals = NOISE * sigmas[0], []
    for sigma, after in zip(sigmas, sigmas[1:]):  # the teacher: DDIM, that is Euler in sigma
        y = y + (after - sigma) * slope(y, sigma)
        goals.append(y)
    goals = goals[C - 1 :: C]
    assert len(goals) == calls
    sigmas = noise_levels(make_grid("edm", moves))
    y, before, lam = NOISE * sigmas[0], None, []

    def corrected(y, data):
        "The state after its correction."
        k = len(lam)
        lam.append(0.0 if before is None else fit_line(goals[k] - y, data - before))
        return y if before is None else y + lam[k] * (data - before)

    for sigma, after in zip(sigmas, sigmas[1:]):
        data = denoise(y, sigma)
        here = (y - data) / sigma
        guess = corrected(y + (after - sigma) * here, data)
        before = data
        if after > 0:
            data = denoise(guess, after)
            there = (guess - data) / after
            guess = corrected(y + (after - sigma) * (here + there) / 2, data)
            before = data
        y = guess
    return lam, y


@pytest.mark.parametrize("moves", [2, 3, 5])
def test_d_edm_is_the_published_calibration(moves):
    lam, end = published_edm(moves)
    base, ts = SOLVERS["edm-heun"], make_grid("edm", moves, finite=True)
    x = NOISE * ts[0].double()
    goals = published_states(FLOW, x, ts, linear, "edm-heun", "edm", C)
    ours = fit_greedy(FLOW, x, ts, linear, base, goals, basis="x0")[:, 0]
    assert len(lam) == 2 * moves - 1 and lam[0] == 0
    assert near(ours, lam)
    learned = learned_solver(base, ours[:, None], ts, basis="x0", source="")
    torch.testing.assert_close(solve(FLOW, x, ts, learned).x, end, rtol=1e-6, atol=1e-6)


# D-DDIM and D-DPM-Solver-2: a x0 + b eps with a^2 + b^2 = 1, differences of eps


def levels(ts):
    "(a, b) of each time."
    a, b = 1 - ts.double(), ts.double()
    return [*zip((a / torch.hypot(a, b)).tolist(), (b / torch.hypot(a, b)).tolist())]


def predict_noise(x, level):
    a, b = (torch.full((len(x),), v, dtype=torch.float64) for v in level)
    return to_noise_predictor(FLOW)(x, a, b)


def ddim_goals(start, ts, calls):
    "Every C-th state of DDIM on the finer grid."
    x, goals = start, []
    for (a, b), (a2, b2) in zip(levels(ts), levels(ts)[1:]):
        x = a2 / a * x + (b2 - b * a2 / a) * predict_noise(x, (a, b))
        goals.append(x)
    assert len(goals) == C * calls
    return goals[C - 1 :: C]


@pytest.mark.parametrize("moves", [4, 10])
@pytest.mark.parametrize("grid", ["leading", "vp"])
def test_d_ddim_is_the_published_calibration(moves, grid):
    "eps of no call is x_T; lam absorbs the coefficient, so it is divided out of the published one."
    ts, fine = (make_grid(grid, n, finite=True) for n in (moves, C * moves))
    x, before, lam = NOISE * levels(ts[:1])[0][1], NOISE, []
    goals = ddim_goals(x, fine, moves)
    for k, ((a, b), (a2, b2)) in enumerate(zip(levels(ts), levels(ts)[1:])):
        eps, gain = predict_noise(x, (a, b)), b2 - b * a2 / a
        x = a2 / a * x + gain * eps
        number = fit_line(goals[k] - x, eps - before)
        lam.append(number / gain)
        x, before = x + number * (eps - before), eps
    states = NOISE * ts[0].double()
    goals = published_states(FLOW, states, ts, linear, "ddim", grid, C)
    ours = fit_greedy(FLOW, states, ts, linear, SOLVERS["ddim"], goals, start=True)[:, 0]
    assert near(ours, lam)
    learned = learned_solver(SOLVERS["ddim"], ours[:, None], ts, start=True, source="")
    assert (solve(FLOW, states, ts, learned).x - x).abs().max() < 1e-6  # a = 1, b = 0


def test_d_dpm_solver_2_is_the_published_calibration():
    "Two numbers a move, weighted as the solver weighs the call; the teacher is DDIM."
    moves = 4
    ts = make_grid("logsnr", moves, finite=True)
    base = SOLVERS["dpm-2s"]
    marks = adjustable_times(base, ts, linear)
    goals = ddim_goals(
        NOISE * levels(ts[:1])[0][1], make_grid("logsnr", C * len(marks)), len(marks)
    )
    x, before, lam = NOISE * levels(ts[:1])[0][1], NOISE, []

    def corrected(x, gain, eps):
        basis = gain * (eps - before)
        lam.append(fit_line(goals[len(lam)] - x, basis))
        return x + lam[-1] * basis

    inner = iter(marks[::2])
    for (a, b), (a2, b2) in zip(levels(ts), levels(ts)[1:]):
        eps = predict_noise(x, (a, b))
        if b2 == 0:  # the last move is one call
            x = corrected(a2 / a * x - b * a2 / a * eps, -b * a2 / a, eps)
            break
        ((a1, b1),) = levels(torch.tensor([next(inner)], dtype=torch.float64))
        half, whole = (math.log(p / q) - math.log(a / b) for p, q in ((a1, b1), (a2, b2)))
        assert abs(half - whole / 2) < 1e-9
        gain = -b1 * math.expm1(half)
        middle = corrected(a1 / a * x + gain * eps, gain, eps)
        before, eps = eps, predict_noise(middle, (a1, b1))
        gain = -b2 * math.expm1(whole)
        x = corrected(a2 / a * x + gain * eps, gain, eps)
        before = eps
    states = NOISE * ts[0].double()
    ours = fit_greedy(
        FLOW,
        states,
        ts,
        linear,
        base,
        published_states(FLOW, states, ts, linear, "dpm-2s", "logsnr", C),
        start=True,
    )[:, 0]
    assert near(ours, lam)


# Bases that say nothing, and numbers that say too much


class OneNet(torch.nn.Module):
    "The exact flow as a network."

    shape = (1,)

    def __init__(self, flow):
        super().__init__()
        self.still = torch.nn.Parameter(torch.zeros(1))
        self.flow = flow

    def forward(self, x, t):
        return self.flow(x.double(), t.double()).to(x)


def last_step(path=linear, **args):
    "The method and its last step on the exact flow."
    net = OneNet(GaussianMixture(MEANS.double(), STDS.double(), path=path))
    method = DODE(**dict(samples=100, batches=2) | args).bind(net, path, 1, lambda y: net)
    *_, last = method.fit(None, Config())
    return method, last


def test_a_move_of_a_thousandth_gets_no_number():
    "EDM's grid ends with the move from 0.002 to 0, where eps asks for numbers of 1,000 and more."
    method, last = last_step(base="edm-heun", moves=5)
    lam = method.players["solver"].lam[:, 0]
    assert lam[-1] == 0 and lam[0] == 0 and (lam[1:-1] != 0).all() and lam.abs().max() < 50
    assert "no number at call 9, whose change weighs too little" in last.note
    method, last = last_step(base="euler", moves=5)
    assert "no number" not in last.note and "wild" not in last.note


def test_in_the_published_basis_the_last_move_has_a_number_of_the_size_of_one():
    method, last = last_step(base="edm-heun", moves=5, faithful=True)
    lam = method.players["solver"].lam[:, 0]
    assert method.leans_on == "x0" and 0 < abs(lam[-1]) < 10
    assert last.losses["solver"] < 0.5 * last.losses["edm-heun"]


def test_wild_numbers_are_told():
    method, last = last_step(base="euler", moves=10, grid="leading", faithful=True)
    lam = method.players["solver"].lam[:, 0].abs()
    (k,) = (lam == lam.max()).nonzero()[0].tolist()
    assert lam.max() > 10 and f"{lam.max():.3g} at call {k + 1}" in last.note.split("wild:")[1]


@pytest.mark.parametrize("args", [{}, dict(base="edm-heun", faithful=True), dict(target="rk45")])
def test_a_solver_is_learned_on_the_vp_path(args):
    "Its accurate solve goes to t = 0, where the velocity is infinite."
    method, last = last_step(PATHS["vp"], moves=4, **args)
    base = args.get("base", "euler")
    assert math.isfinite(last.losses["solver"]) and last.losses["solver"] < last.losses[base]


def test_changes_of_predicted_data_serve_any_base_and_the_joint_fit():
    errors = {}
    for fit_by in ("greedy", "joint"):
        for base in ("euler", "dpmpp-2m"):
            method, last = last_step(base=base, moves=4, basis="x0", fit_by=fit_by)
            errors[base, fit_by] = last.losses["solver"]
            assert last.losses["solver"] < 0.8 * last.losses[base], base
    assert errors["euler", "joint"] <= errors["euler", "greedy"]


def test_our_own_goals_are_the_same_in_every_variable():
    "At one time all states have one factor, so the numbers do not depend on it."
    ts = make_grid("edm", 3, finite=True)
    x = NOISE * ts[0].double()
    goals = teacher_states(FLOW, x, ts, linear, "edm-heun")
    marks = adjustable_times(SOLVERS["edm-heun"], ts, linear)
    ours = fit_greedy(FLOW, x, ts, linear, SOLVERS["edm-heun"], goals, basis="x0")[:, 0]
    y = [goal / (1 - t) for goal, t in zip(goals, marks)]
    sigmas, state, before = noise_levels(ts), NOISE * noise_levels(ts)[0], denoise
    data = denoise(state, sigmas[0])
    guess = state + (sigmas[1] - sigmas[0]) * (state - data) / sigmas[0]
    before, data = data, denoise(guess, sigmas[1])
    there = (slope(state, sigmas[0]) + (guess - data) / sigmas[1]) / 2
    assert (
        abs(fit_line(y[1] - state - (sigmas[1] - sigmas[0]) * there, data - before) - ours[1])
        < 1e-8
    )
