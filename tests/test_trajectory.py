"""What a walk did, as numbers: against closed forms, at the edges (one move, points of the plane,
NaN), and what each costs in calls.
"""

import csv
import io
import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from cudlab.config import error_of
from cudlab.net import Velocity, make_network
from cudlab.path import PATHS, GaussianMixture, linear, make_grid
from cudlab.rng import draw_noise
from cudlab.solver import SOLVERS, NFECounter, solve
from cudlab.trajectory import (
    angle_between,
    catch_up_gap,
    chord_angle,
    fit_projection,
    head_gaps,
    head_speeds,
    head_velocities,
    local_error,
    move_curvature,
    move_speed,
    move_turning,
    reference_states,
    root_mean_square,
    summarize_moves,
    velocity_field,
)

MEAN = torch.tensor([0.3, -0.8])
TWO = GaussianMixture(torch.tensor([[-1.0, 0.5], [1.0, 0.0]]), torch.tensor([0.4, 0.5]))
close = torch.testing.assert_close


def gaussian(std, path=linear):
    "The exact velocity of one Gaussian, and its exact flow (x, t, s) -> x."

    def width(t):
        return torch.sqrt((path.alpha(t) * std) ** 2 + path.sigma(t) ** 2)

    def flow(x, t, s):
        t, s = torch.tensor(t).double(), torch.tensor(s).double()
        z = (x.double() - path.alpha(t) * MEAN) / width(t)
        return (path.alpha(s) * MEAN + z * width(s)).float()

    return GaussianMixture(MEAN[None], torch.tensor([std]), path=path), flow


def walked(moves=6, count=5, solver="euler", f=TWO, shape=(2,)):
    return solve(f, draw_noise(0, count, shape), make_grid("uniform", moves), solver)


def still(x, t):
    return torch.zeros_like(x)


def ones(x, t):
    return torch.ones_like(x)


def largest_error(tau, f):
    return max(size.max() for _, _, size, _ in local_error(tau, f))


# the local error


@given(
    st.floats(0.3, 1.5),
    st.sampled_from([n for n in SOLVERS if n not in ("rk45", "renoise")]),
    st.integers(8, 24),
    st.sampled_from(["uniform", "shifted"]),
)
@budget(max_examples=40, deadline=None)
def test_local_error_is_the_closed_form(std, solver, steps, times):
    f, flow = gaussian(std)
    tau = solve(f, draw_noise(0, 16, (2,)), make_grid(times, steps) * 0.99, solver)
    ts = tau.ts.tolist()
    for i, error, size, accuracy in local_error(tau, f, parts=2):
        exact = tau.xs[i + 1] - flow(tau.xs[i], ts[i], ts[i + 1])
        close(error, exact, rtol=0, atol=1e-5)
        close(size, root_mean_square(exact), rtol=0, atol=1e-5)
        assert accuracy.max() < 1e-5


@pytest.mark.parametrize("name", PATHS)
def test_local_error_on_every_path(name):
    f, flow = gaussian(0.6, PATHS[name])
    tau = solve(f, draw_noise(0, 16, (2,)), torch.linspace(0.95, 0.05, 13), "euler", PATHS[name])
    ts = tau.ts.tolist()
    for i, error, _, _ in local_error(tau, f, parts=4):
        close(error, tau.xs[i + 1] - flow(tau.xs[i], ts[i], ts[i + 1]), rtol=0, atol=1e-5)


def test_accuracy_bounds_the_deviation_of_long_moves():
    f, flow = gaussian(0.3)
    tau = solve(f, draw_noise(0, 64, (2,)), torch.tensor([1.0, 0.5]))
    exact = tau.x - flow(tau.xs[0], 1.0, 0.5)
    for parts in (1, 2, 4):
        ((_, error, _, accuracy),) = local_error(tau, f, parts)
        deviation = root_mean_square(error - exact).mean()
        assert 0.2 * accuracy.mean() < deviation + 1e-6
        assert deviation < 5 * accuracy.mean() + 1e-6


def test_local_error_comes_move_by_move():
    counted = NFECounter(TWO, 5)
    items = local_error(walked(6), counted)
    for move in range(2):
        assert next(items)[0] == move and counted.nfe == 11 * (move + 1)
    items.close()
    counted = NFECounter(TWO, 5)
    assert [i for i, *_ in local_error(walked(6), counted, parts=3)] == list(range(6))
    assert counted.nfe == 6 * 35
    assert "parts = '0' is not a whole number" in error_of(list, local_error(walked(6), TWO, 0))


def test_an_exact_solver_has_no_local_error():
    assert largest_error(walked(8, solver="rk4"), TWO) < 2e-4 < largest_error(walked(8), TWO) / 10


# the flow


def test_the_flow_of_the_vp_path_is_followed_to_its_end():
    "Its exact velocity is NaN at t = 0, where Heun and the classical method would ask."
    vp = PATHS["vp"]
    flow = GaussianMixture(torch.tensor([[-1.0], [0.8]]), torch.tensor([0.5, 0.4]), path=vp)
    x = draw_noise(0, 7, (1,))
    tau = solve(flow, x, make_grid("uniform", 20), "rk4", vp)
    *_, (_, end) = reference_states(flow, x, tau.ts, 200, path=vp)
    close(end, solve(flow, x, make_grid("uniform", 200), "rk4", vp).x, rtol=0, atol=1e-3)
    assert torch.stack([size for _, _, size, _ in local_error(tau, flow)]).max() < 1e-3


def test_reference_is_heun_on_the_divided_grid():
    x, counted = draw_noise(0, 7, (2,)), NFECounter(TWO, 7)
    states = list(reference_states(counted, x, make_grid("uniform", 4)))
    assert [i for i, _ in states] == [0, 1, 2, 3, 4] and counted.nfe == 128
    assert torch.equal(states[0][1], x)
    close(states[-1][1], solve(TWO, x, make_grid("uniform", 64), "heun").x, rtol=0, atol=1e-5)


@given(
    st.integers(1, 80),
    st.sampled_from(["uniform", "edm", "logsnr", "shifted"]),
    st.integers(1, 100),
)
@budget(max_examples=30, deadline=None)
def test_reference_makes_at_least_the_moves_asked_for(steps, times, least):
    counted, ts = NFECounter(still, 1), make_grid(times, steps)
    assert len(list(reference_states(counted, torch.ones(1, 2), ts, least))) == steps + 1
    assert max(least, steps) <= counted.nfe / 2 <= least + steps


def test_reference_follows_the_flow_at_every_time():
    f, flow = gaussian(0.5)
    x, ts = draw_noise(0, 9, (2,)), make_grid("edm", 6)
    for i, state in reference_states(f, x, ts, 800):
        close(state, flow(x, ts[0].item(), ts[i].item()), rtol=0, atol=1e-5)


# sizes and angles


def test_numbers_of_a_walk_are_their_definitions():
    tau = walked(5)
    close(move_speed(tau), tau.vs.norm(dim=2) / math.sqrt(2))
    cosines = cosine_similarity(tau.vs[1:], tau.vs[:-1], dim=2)
    close(move_turning(tau), cosines, rtol=0, atol=1e-5)
    cosines = cosine_similarity(tau.vs, (tau.xs[0] - tau.xs[-1]).expand_as(tau.vs), dim=2)
    close(torch.deg2rad(chord_angle(tau)).cos(), cosines, rtol=0, atol=1e-5)
    gaps = tau.vs - torch.cat([tau.vs[1:], TWO(tau.x, torch.zeros(5))[None]])
    close(catch_up_gap(tau, TWO), gaps.square().mean(2).sqrt())
    assert move_speed(tau).shape == (5, 5) and move_curvature(tau).shape == (4, 5)


def test_numbers_of_a_circle_are_known():
    "A flow that turns the plane once around its origin."

    def circle(x, t):
        return 2 * math.pi * torch.stack([-x[:, 1], x[:, 0]], 1)

    radii = torch.tensor([1.0, 3.0])
    tau = solve(circle, torch.diag(radii), torch.linspace(0.75, 0.25, 101), "rk4")
    speeds = (radii * 2 * math.pi / math.sqrt(2)).expand(100, 2)
    close(move_speed(tau), speeds, rtol=1e-4, atol=0)
    close(move_turning(tau), torch.full((99, 2), math.cos(math.pi / 100)))
    close(move_curvature(tau), (math.sqrt(2) / radii).expand(99, 2), rtol=1e-3, atol=0)
    halves = torch.tensor([[90.0, 90.0], [0.0, 0.0]])
    close(chord_angle(tau)[[0, 50]], halves, rtol=0, atol=0.02)


def test_catch_up_costs_one_call():
    counted = NFECounter(TWO, 5)
    catch_up_gap(walked(9), counted)
    assert counted.nfe == 1


def test_a_straight_flow_has_nothing_to_show():
    tau = walked(6, f=ones)
    assert chord_angle(tau).max() < 0.01 and move_curvature(tau).max() < 1e-4
    assert catch_up_gap(tau, ones).max() == 0


def test_no_direction_is_not_a_number():
    tau = walked(3, f=still)
    assert move_speed(tau).max() == 0
    assert chord_angle(tau).isnan().all() and move_turning(tau).isnan().all()
    opposite = angle_between(torch.ones(1, 1, 3), -torch.ones(1, 1, 3))
    assert opposite.item() == pytest.approx(math.pi)


@pytest.mark.parametrize("shape", [(2,), (1, 8, 8), (3, 4, 4)])
@pytest.mark.parametrize("count", [1, 3])
def test_one_move(shape, count):
    def f(x, t):
        return x * (1 + t.view(-1, *[1] * (x.ndim - 1)))

    tau = walked(1, count, f=f, shape=shape)
    for quantity in (move_speed(tau), chord_angle(tau), catch_up_gap(tau, f)):
        assert quantity.shape == (1, count)
    assert move_turning(tau).shape == move_curvature(tau).shape == (0, count)
    assert chord_angle(tau).max() < 0.1
    ((i, error, size, accuracy),) = local_error(tau, f)
    assert i == 0 and error.shape == (count, *shape) and size.shape == accuracy.shape == (count,)
    points = fit_projection(tau.xs).points
    assert points.shape == (2, count, 2) and points.isfinite().all()
    (row,) = summarize_moves(tau, catch_up=catch_up_gap(tau, f))
    assert row["turning"] is row["curvature_high"] is None and row["catch_up"] > 0


def test_a_sample_that_diverged_spoils_no_other():
    x = draw_noise(0, 4, (2,))
    x[2] = float("nan")
    kept = [0, 1, 3]
    bad = solve(TWO, x, make_grid("uniform", 5), "heun")
    good = solve(TWO, x[kept], make_grid("uniform", 5), "heun")
    for quantity in (
        move_speed,
        move_turning,
        chord_angle,
        move_curvature,
        lambda tau: catch_up_gap(tau, TWO),
        lambda tau: torch.stack([size for _, _, size, _ in local_error(tau, TWO)]),
    ):
        assert quantity(bad)[:, 2].isnan().all()
        close(quantity(bad)[:, kept], quantity(good))
    rows, expected = summarize_moves(bad), summarize_moves(good)
    assert [row["finite"] for row in rows] == [3] * 5
    for key in ("speed", "curvature_low"):
        close(*(torch.tensor([row[key] for row in found[:4]]) for found in (rows, expected)))
    points = fit_projection(bad.xs).points
    close(points[:, kept], fit_projection(good.xs).points)
    assert points[:, 2].isnan().all()


def test_results_are_float32_and_leave_gradients_as_they_are():
    f = GaussianMixture(TWO.means.double(), TWO.stds.double())
    tau = solve(f, draw_noise(0, 3, (2,)).double(), make_grid("uniform", 4))
    found = [quantity(tau) for quantity in (move_speed, move_turning, chord_angle, move_curvature)]
    found += [catch_up_gap(tau, f), fit_projection(tau.xs).points]
    found += [tensor for item in local_error(tau, f) for tensor in item[1:]]
    assert all(tensor.dtype == torch.float32 for tensor in found)
    scale = torch.ones((), requires_grad=True)

    def g(x, t):
        return scale * TWO(x, t)

    tau = walked(3)
    for item in local_error(tau, g):
        assert torch.is_grad_enabled() and not item[1].requires_grad
    assert not any(x.requires_grad for _, x in reference_states(g, tau.xs[0], tau.ts))
    assert not catch_up_gap(tau, g).requires_grad


# heads


@pytest.mark.parametrize("name, shape", [("mlp", (2,)), ("digits", (1, 8, 8))])
def test_heads_at_the_states_of_the_walk(name, shape):
    torch.manual_seed(0)
    net = make_network(name, shape, heads=3, classes=4).eval().requires_grad_(False)
    for p in net.parameters():
        p.add_(0.05 * torch.randn_like(p))
    y = torch.tensor([0, 3, 1])
    tau = solve(Velocity(net, y), draw_noise(0, 3, shape), make_grid("uniform", 4))
    speeds, gaps = head_speeds(tau, net, y), head_gaps(tau, net, y)
    assert speeds.shape == gaps.shape == (3, 4, 3) and not gaps[0].any()
    close(speeds[0], move_speed(tau), rtol=1e-4, atol=1e-5)
    third = Velocity(net, y, head=3)(tau.xs[2], tau.ts[2].expand(3))
    close(speeds[2, 2], root_mean_square(third), rtol=1e-4, atol=1e-5)
    close(gaps[2, 2], root_mean_square(third - tau.vs[2]), rtol=1e-4, atol=1e-5)
    assert len(list(head_velocities(tau, net, y))) == 4


def test_one_head_differs_from_itself_by_nothing():
    net = make_network("mlp", (2,)).eval().requires_grad_(False)
    gaps = head_gaps(walked(2, 3, f=Velocity(net)), net)
    assert gaps.shape == (1, 2, 3) and not gaps.any()


# projection


@given(
    st.integers(1, 9),
    st.integers(1, 6),
    st.sampled_from([(2,), (3,), (1, 4, 4)]),
    st.integers(1, 3),
)
@budget(max_examples=60, deadline=None)
def test_projection_is_the_best_of_all_planes(steps, count, shape, dims):
    xs = draw_noise(steps, (steps + 1) * count, shape).unflatten(0, (steps + 1, count))
    found, rows = fit_projection(xs, dims), xs.flatten(2).flatten(0, 1).double()
    values = torch.linalg.svdvals(rows - rows.mean(0)).square()
    expected = torch.nn.functional.pad(values / values.sum(), (0, dims))[:dims].float()
    close(found.share, expected, rtol=1e-5, atol=1e-6)
    spread = found.points.flatten(0, 1).double()
    close(spread.square().sum(0), found.share.double() * values.sum(), rtol=1e-4, atol=1e-4)
    assert found.points.shape == (steps + 1, count, dims) and spread.mean(0).abs().max() < 1e-5
    close(found(xs), found.points)
    axes = found.axes[found.share > 1e-6]
    close(axes @ axes.T, torch.eye(len(axes)).double(), rtol=0, atol=1e-6)


def test_projection_of_the_plane_is_a_rotation():
    xs = walked(6).xs
    found = fit_projection(xs)
    expected = torch.cdist(xs[0], xs[-1])
    close(torch.cdist(found.points[0], found.points[-1]), expected, rtol=1e-4, atol=1e-5)
    assert found.share.sum().item() == pytest.approx(1)


@pytest.mark.parametrize(
    "xs",
    [
        torch.zeros(2, 1, 2),
        torch.ones(5, 3, 1, 8, 8),
        torch.arange(3.0).reshape(3, 1, 1),
        draw_noise(0, 2, (1, 1, 8, 8)),
    ],
    ids=["zeros", "still", "one element", "one sample, one move"],
)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_projection_without_directions(xs, dims):
    found = fit_projection(xs, dims)
    assert found.points.shape == (*xs.shape[:2], dims) and found.points.isfinite().all()
    assert found.share.isfinite().all() and found.share.sum() <= 1 + 1e-6
    assert found(xs + 1).isfinite().all()


def test_projection_of_nothing_finite_and_of_wrong_dims():
    assert not fit_projection(torch.full((3, 2, 4), float("nan"))).share.any()
    for dims in (0, 17, 1.5, True, "2"):
        assert "dims" in error_of(fit_projection, torch.ones(3, 2, 4), dims)


def test_projection_does_not_flip():
    xs = walked(6).xs
    moved = xs + 1e-6 * draw_noise(3, 7 * 5, (2,)).unflatten(0, (7, 5))
    close(fit_projection(xs).points, fit_projection(moved).points, rtol=0, atol=1e-3)


# the field and the table


def test_field_of_the_plane():
    points, vs = velocity_field(TWO, torch.tensor([1.0, 0.5, 0.25]), 2.0, 7)
    assert points.shape == (49, 2) and vs.shape == (3, 49, 2) and points.abs().max() == 2
    close(vs[1], TWO(points, torch.full((49,), 0.5)))
    assert points[:7, 1].unique().tolist() == [-2.0] and points[:7, 0].diff().min() > 0
    assert "side = '1'" in error_of(velocity_field, TWO, torch.ones(1), 2.0, 1)


def test_moves_as_json_and_csv():
    tau = walked(4, 9)
    errors = torch.stack([size for _, _, size, _ in local_error(tau, TWO)])
    rows = summarize_moves(tau, local_error=errors[:3])
    assert json.loads(json.dumps(rows, allow_nan=False)) == rows
    assert [row["move"] for row in rows] == [1, 2, 3, 4]
    assert [row["t"] for row in rows[1:]] == [row["t_next"] for row in rows[:-1]]
    assert rows[2]["local_error"] == pytest.approx(errors[2].median().item())
    assert rows[3]["local_error"] is None
    assert rows[1]["speed_low"] == pytest.approx(move_speed(tau)[1].quantile(0.25).item())
    out = io.StringIO()
    table = csv.DictWriter(out, rows[0])
    table.writeheader()
    table.writerows(rows)  # every row has the same keys
    assert len(list(csv.DictReader(io.StringIO(out.getvalue())))) == 4


@pytest.mark.parametrize("shape", [(5, 9), (4, 8), (4,), (2, 4, 9)])
def test_moves_refuses_what_is_not_a_number_a_move(shape):
    said = error_of(summarize_moves, walked(4, 9), gap=torch.ones(shape))
    assert said.startswith("gap has the shape")
