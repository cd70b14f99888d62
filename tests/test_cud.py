"""Catch-Up Distillation: a step as published, switch by switch; look-aheads; heads; averages."""

import copy
import math
from dataclasses import fields, replace

import pytest
import torch
from conftest import ROOT
from torch import nn

from cudlab.config import Config
from cudlab.create import create_run
from cudlab.cud import (
    CUD,
    aim_weights,
    lookahead_states,
    mean_lookahead,
    valid_lookaheads,
)
from cudlab.fit import fit
from cudlab.jobs import parse_parameters
from cudlab.methods import make_method
from cudlab.net import Attention, UNet, make_network
from cudlab.path import linear
from cudlab.plan import load_sweep
from cudlab.reflow import Distill
from cudlab.rf import RF
from cudlab.rng import Rng, draw_noise
from cudlab.run import Run

SHAPE = (1, 8, 8)
JOBS = ROOT / "jobs" / "cud-published.json"
PUBLISHED = dict(coupling=True, tableau="faithful", mask="all", target="train", reuse=False)


# One step of the published loop, transcribed for these tests from its equations


def over(values, x):
    "One value a sample, (B,), as wide as x."
    return values.view(-1, *[1] * (x.dim() - 1))


def published_times(rng, count, heads, discrete, TN=16, eps=1e-5):
    "t and h of the released commands (h uniform), and the floor of the times."
    if discrete:
        t = (rng.integers("t", count, TN) + 1) / TN
        h = torch.full((count,), 1 / TN)
        if heads == 1:
            h = (rng.uniform("h", count) * t * TN).floor() / TN
        return t, h, 1 / TN
    return eps + (1 - eps) * rng.uniform("t", count), rng.uniform("h", count) / TN, eps


def published_targets(net, x, t, h, heads, low):
    "What the network itself says j h later, for every head; each forward by itself."
    d = over(h, x)

    def w(state, time):
        return net(state, time.clamp(low, 1))

    k1 = w(x, t)
    if heads == 1:
        slope = k1
    elif heads == 2:
        slope = (k1 + net(x - d * k1, t - h)) / 2  # the time of this stage is not clamped
    else:
        k2 = w(x - d * k1, t - h)
        k3 = w(x - d * (7 * k1 + k2) / 4, t - 2 * h)
        slope = (5 * k1 + 8 * k2 - k3) / 12
    return [w(x - j * d * slope, t - j * h) for j in range(1, heads + 1)]


def published_loss(net, encoder, x0, rng, heads, discrete=False):
    "The loss of one step, and where its catch-up targets hold, (B,)."
    mean, logvar = encoder(x0, torch.ones(len(x0))).chunk(2, 1)
    x1 = mean + (logvar / 2).exp() * rng.normal("eps", len(x0), SHAPE)
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar)
    t, h, low = published_times(rng, len(x0), heads, discrete)
    x = (1 - over(t, x0)) * x0 + over(t, x0) * x1
    truth, guesses = x1 - x0, net.heads(x, t)
    with torch.no_grad():
        later = published_targets(net, x, t, h, heads, low)
    holds = t - heads * h >= (0 if discrete else low)
    loss = 20 * kl.mean()
    for guess, target in zip(guesses, later):
        target = torch.where(over(holds, x), target, truth.detach())
        loss = loss + nn.functional.mse_loss(guess, target) + nn.functional.mse_loss(guess, truth)
    return loss, holds


def small_objective(heads, **args):
    "CUD as published on a small network and encoder whose every output counts."
    torch.manual_seed(0)
    look = dict(heads=heads, phi0=0.75, init="ddpmpp", time_scale=1.0)
    net = UNet(SHAPE, 8, (1, 2), 1, (4,), **look)
    objective = CUD(heads=heads, **PUBLISHED | args).bind(net, linear, 100)
    for name, module in objective.players.items():
        for p in module.parameters():
            p.data.add_((0.2 if name == "net" else 0.02) * torch.randn_like(p))
        module.train()
    return objective


def difference(ours, theirs, objective):
    "How far two losses and their gradients are apart, of the largest gradient of each player."
    found = [abs(ours - theirs).item() / theirs.item()]
    for module in objective.players.values():
        params = [p for p in module.parameters() if p.requires_grad]
        two = (torch.autograd.grad(v, params, retain_graph=True) for v in (ours, theirs))
        a, b = (torch.cat([g.flatten() for g in grads]) for grads in two)
        found.append(((a - b).abs().max() / b.abs().max()).item())
    return found


def compare_steps(heads, times="continuous", **switch):
    "How far a step of ours is from the published one, and where the catch-up targets hold."
    rng = Rng(0, 4)
    x0 = rng.normal("x0", 40, SHAPE).clamp(-1, 1)
    objective = small_objective(heads, times=times, **switch)
    net, encoder = (objective.players[name] for name in ("net", "encoder"))
    theirs, holds = published_loss(net, encoder.net, x0, rng, heads, times == "discrete")
    return difference(objective(x0, None, rng)["net"], theirs, objective), holds


@pytest.mark.parametrize("times", ["continuous", "discrete"])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_step_is_the_published_one(heads, times):
    found, holds = compare_steps(heads, times)
    assert max(found) < 1e-6
    if (heads, times) != (1, "discrete"):  # there every look-ahead ends within the interval
        assert 0 < holds.sum() < len(holds)


@pytest.mark.parametrize(
    "switch",
    [
        dict(tableau="corrected"),
        dict(mask="head"),
        dict(rule="origin"),
        dict(TN=15),
        dict(beta=19),
        dict(w1=1.1),
        dict(t_min=0.01),
        dict(mask="head", times="discrete"),
    ],
    ids=str,
)
def test_the_comparison_sees_every_switch(switch):
    assert max(compare_steps(2, **switch)[0]) > 1e-5


def test_a_discrete_look_ahead_of_length_zero_keeps_the_own_output_as_published():
    net = make_network("mlp", (2,))
    t, h = torch.tensor([0.25, 0.5, 1.0]), torch.tensor([0.0, 0.5, 0.25])
    x, line = draw_noise(0, 3, (2,)), draw_noise(1, 3, (2,))
    discrete = CUD(TN=4, times="discrete", mask="all").bind(net, linear, 10)
    (target,) = discrete.targets(x, t, h, line, None, None)
    assert torch.equal(target[0], net(x, t)[0])
    z = x - h[:, None] * net(x, t)
    assert torch.allclose(target[1:], net(z, (t - h).clamp(0.25, 1))[1:], atol=1e-6)
    discrete.mask = "head"
    (target,) = discrete.targets(x, t, h, line, None, None)
    assert torch.equal(target[:2], line[:2]) and not torch.equal(target[2], line[2])


@pytest.mark.parametrize("target", ["train", "eval"])
def test_targets_come_from_the_network_as_it_trains_or_without_dropout(target):
    objective, seen = small_objective(3, target=target), []
    objective.net.register_forward_hook(
        lambda m, x, out: seen.append((m.training, torch.is_grad_enabled()))
    )
    x0 = Rng(0).normal("x0", 4, SHAPE)
    objective(x0, None, Rng(0, 1))
    assert seen[0] == (True, True) and set(seen[1:]) == {(target == "train", False)}
    assert objective.net.training and len(seen) >= 5  # training, three stages, the targets


def test_the_encoder_has_the_dropout_and_first_weights_of_its_network():
    net = make_network("mnist-published", (1, 28, 28), dropout=0.13, phi0=0.75)
    encoder = CUD(coupling=True).bind(net, linear, 10).players["encoder"].net
    assert encoder.companion_options == net.companion_options
    assert {b.dropout for b in [*encoder.down, *encoder.middle, *encoder.up]} == {0.13}
    assert encoder.condition.scale == 1 and encoder.middle[0].affine.bias.abs().max() == 0


# The job file


def published_tasks(monkeypatch, tmp_path):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path))
    return load_sweep(JOBS, {"minutes": 9}).tasks


def test_the_job_file_holds_the_published_recipes(monkeypatch, tmp_path):
    tasks = published_tasks(monkeypatch, tmp_path)
    assert not [task.error for task in tasks.values() if task.error]
    per_data = {
        "mnist": dict(net="mnist-published", batch=256, lr=3e-4, steps=50_000),
        "cifar10": dict(net="cifar10-published", batch=128, lr=2e-4, steps=500_000),
    }
    shared = dict(phi0=0.75, dropout=0.13, schedule="constant", warmup=5000, clip=0, ema=0.9999)
    shared |= dict(ema_warmup=False, path="linear", classes=False, dtype="float32")
    seen = []
    for task in tasks.values():
        config = parse_parameters(task.params)[0] if task.kind == "train" else None
        if config is None or config.method != "cud":
            continue
        method = make_method(config)
        wanted = shared | per_data[config.data]
        assert {key: getattr(config, key) for key in wanted} == wanted, task.name
        loop = PUBLISHED | dict(beta=20, TN=16, rule="uniform", times="continuous", aim=0)
        loop |= dict(w1=1, w2=1, adaptive=False, t_min=1e-5, main_head=method.heads)
        assert {key: getattr(method, key) for key in loop} == loop, task.name
        assert set(loop) | {"heads", "ratio_cap"} == {f.name for f in fields(CUD)}
        seen.append((config.data, method.heads))
    assert sorted(seen) == [(data, k) for data in ("cifar10", "mnist") for k in (1, 2, 3)]
    heads = {t.run: t.params.get("head", 1) for t in tasks.values() if t.kind == "evaluate"}
    assert heads["mnist-published-rk34"] == 3 and heads["cifar10-published-rk23"] == 2


class Noise:
    "Pictures that show nothing."

    def __init__(self, shape):
        self.shape, self.classes = shape, []

    def batch(self, seed, step, n):
        return draw_noise(seed, n, self.shape).clamp(-1, 1), None


def test_the_first_step_of_the_published_mnist_recipe_runs_here(monkeypatch, tmp_path):
    task = published_tasks(monkeypatch, tmp_path)["mnist-published-rk34"]
    config = replace(parse_parameters(task.params)[0], batch=2)
    torch.manual_seed(0)
    shape = (1, 28, 28)
    net = make_network(config.net, shape, heads=3, dropout=config.dropout, phi0=config.phi0)
    assert abs(sum(p.numel() for p in net.parameters()) - 2.16e6) < 1e4
    objective = make_method(config).bind(net, linear, config.steps)
    start = copy.deepcopy(net)
    step = next(objective.fit(Noise(shape), config))
    assert step.skipped == 0 and step.lr == pytest.approx(3e-4 / 5000)
    for first, now, mean in zip(*(m.parameters() for m in (start, net, objective.ema["net"]))):
        assert torch.allclose(mean, 0.9999 * first + 0.0001 * now, rtol=0, atol=1e-7)
    assert any((p != q).any() for p, q in zip(start.parameters(), net.parameters()))


# aim


def gaussian_slope(t, std=0.5):
    "a(t) of the exact velocity a(t) x for data N(0, std^2)."
    return (t - (1 - t) * std**2) / ((1 - t) ** 2 * std**2 + t**2)


def as_velocity(a):
    "The velocity of a table of a(t)."

    def velocity(x, t):
        place = t * (len(a) - 1)
        low = place.long().clamp(0, len(a) - 2)
        return (a[low] + (place - low) * (a[low + 1] - a[low]))[:, None] * x

    return velocity


def optimum(ratio, head, TN, knots=1024, shares=16):
    "Where the regression of a head ends, as a table: head 1 from t = 0 on, head j from head 1."
    ts = torch.linspace(0, 1, knots + 1).double()
    exact, a = gaussian_slope(ts), gaussian_slope(ts)
    h = (torch.arange(shares).double() + 0.5) / shares / TN
    for i in range(1, knots + 1):
        ahead, place = ts[i] >= h, (ts[i] - h).clamp(min=0) * knots
        low = place.long().clamp(max=i - 1)
        a[i] = a[i - 1] + exact[i] - exact[i - 1]
        for _ in range(2):  # the shortest look-aheads end between a[i - 1] and a[i] itself
            value = a[low] + (place - low) * (a[low + 1] - a[low])
            known = torch.where(ahead, value, exact[i]).mean()
            a[i] = (exact[i] + ratio * known) / (1 + ratio + ratio * (h * value * ahead).mean())
    if head == 1:
        return a
    t, hs = ts.repeat_interleave(shares), h.repeat(knots + 1)
    w, x = as_velocity(a), torch.ones(len(t), 1).double()
    z = lookahead_states(w, x, t, hs, w(x, t), 3, "corrected")[head - 1]
    target = torch.where(t >= head * hs, w(z, t - head * hs)[:, 0], gaussian_slope(t))
    return (exact + ratio * target.view(-1, shares).mean(1)) / (1 + ratio)


@pytest.mark.parametrize("head", [1, 2, 3])
def test_aim_makes_its_head_look_half_a_step_ahead(head):
    TN, aim = 256, 200
    w1, w2 = aim_weights(aim, mean_lookahead(TN, "uniform"), head)
    assert w1 + w2 == pytest.approx(2)
    ts = torch.linspace(0, 1, 1025).double()
    exact = gaussian_slope(ts)
    change = torch.gradient(exact, spacing=(ts,))[0] + exact**2
    ahead = ((exact - optimum(w1 / w2, head, TN)) / change)[400:950].median().item()
    assert ahead == pytest.approx(1 / (2 * aim), rel=0.03)


def test_the_weights_of_a_run_are_those_of_its_main_head():
    found = {h: CUD(heads=3, aim=8, main_head=h).weights(0) for h in (1, 2, 3)}
    for head, (w1, w2) in found.items():
        r = w1 / w2  # looks r / (1 + r) (j + r) E[h] ahead, with E[h] = 1/32
        assert r / (1 + r) * (head + r) / 32 == pytest.approx(1 / 16)
    assert found[1] == CUD(aim=8).weights(0) == pytest.approx((4 / 3, 2 / 3))


@pytest.mark.parametrize(
    "args, said",
    [
        (dict(aim=8, rule="rule"), "rule = 'rule'"),
        (dict(aim=8, times="discrete"), "times = 'discrete'"),
        (dict(aim=8, adaptive=True), "adaptive = True"),
        (dict(heads=2, main_head=3), "main_head = 3"),
        (dict(aim=8, heads=2, main_head=3), "main_head = 3"),
    ],
    ids=str,
)
def test_aim_is_refused_where_no_number_of_steps_is_best(args, said):
    with pytest.raises(ValueError, match=said) as caught:
        make_method(Config(args=args))
    assert "\n" not in str(caught.value)


def test_a_run_is_sampled_with_its_main_head_and_those_that_ship_with_the_first():
    usual = dict(method="cud", data="moons", steps=2, batch=8)
    run = create_run(Config(args={"heads": 2, "main_head": 2}, **usual))
    from cudlab.training import train

    list(train(run))
    run = Run(run.dir)
    assert run.sampling_defaults["head"] == 2
    own, second, first = (run.solve(index=4, steps=2, head=head).x for head in (None, 2, 1))
    assert torch.equal(own, second) and not torch.equal(own, first)
    assert run.solve(index=4, steps=2, solver="euler").nfe == 2
    for name in ("digits-cud", "digits-cud-heads2", "digits-cud-heads3"):
        assert Run(ROOT / "checkpoints" / name).sampling_defaults["head"] == 1


# Averages


class Points:
    "Points in the plane."

    shape, classes = (2,), []

    def batch(self, seed, step, n):
        return draw_noise(seed + step, n, (2,)), None


@pytest.mark.parametrize("warm", [True, False])
def test_the_average_is_the_recursion_with_and_without_warm_up(warm):
    torch.manual_seed(0)
    config = Config(steps=6, batch=8, ema=0.9, ema_warmup=warm, warmup=1)
    objective = RF().bind(make_network("mlp", (2,)), linear, 6)
    weight = objective.net.first.weight
    mean = weight.detach().clone()
    for n, _ in enumerate(fit(objective, Points(), config)):
        decay = min(0.9, (1 + n) / (10 + n)) if warm else 0.9
        mean = decay * mean + (1 - decay) * weight.detach()
        assert torch.allclose(objective.ema["net"].first.weight, mean, atol=1e-6)


def test_without_warm_up_the_final_stage_is_pulled_towards_the_teacher():
    still = dict(steps=30, batch=16, warmup=1, lr=1e-2, ema=0.9999)
    ends = {}
    for warm in (True, False):
        torch.manual_seed(0)
        made = Distill(pairs=64, moves=2, targets="2")
        objective = made.bind(make_network("mlp", (2,)), linear, 30, lambda y: lambda x, t: x)
        start = objective.net.first.weight.detach().clone()
        list(objective.fit(Points(), Config(method="distill", ema_warmup=warm, **still)))
        moved = (objective.net.first.weight - start).abs().mean()
        ends[warm] = ((objective.ema["net"].first.weight - start).abs().mean() / moved).item()
    assert ends[False] < 0.01 and ends[True] > 0.3


# First weights


def test_the_published_networks_start_as_ddpmpp_does():
    torch.manual_seed(0)
    net = make_network("mnist-published", (1, 28, 28), heads=2)
    assert net.condition.scale == 1
    silent = {id(b.conv1) for b in [*net.down, *net.middle, *net.up]}
    silent |= {id(head[-1]) for head in net.outs}
    attention = [m for m in net.modules() if isinstance(m, Attention)]
    silent |= {id(m.proj) for m in attention}
    smaller = {id(m.qkv) for m in attention}
    assert attention
    for name, layer in net.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            rows = layer.weight.flatten(1)
            area = rows.shape[1] // layer.weight.shape[1]
            spread = math.sqrt(2 / (rows.shape[1] + area * rows.shape[0]))
            spread *= 1e-5 if id(layer) in silent else 1
            spread *= math.sqrt(0.2) if id(layer) in smaller else 1
            assert layer.weight.std().item() == pytest.approx(spread, rel=0.15), name
            assert layer.bias.abs().max() == 0, name
    assert net(torch.zeros(1, 1, 28, 28), torch.ones(1)).abs().max() < 1e-3


@pytest.mark.parametrize(
    "name, shape, total",
    [("digits", (1, 8, 8), 16798.55646), ("mnist", (1, 28, 28), 56493.31395)],
)
def test_the_first_weights_of_a_seed_stay_what_they_were(name, shape, total):
    torch.manual_seed(0)
    net = make_network(name, shape, heads=2, classes=3)
    found = sum(p.double().abs().sum().item() for p in net.parameters())
    assert found == pytest.approx(total, rel=1e-6)


# Targets in parts


def test_targets_are_the_same_in_parts_whole_and_without_the_rows_nobody_wants(monkeypatch):
    objective, sizes = small_objective(3, target="eval", mask="head"), []
    x, line = draw_noise(0, 40, SHAPE), draw_noise(1, 40, SHAPE)
    t, h = Rng(0).uniform("t", 40), torch.full((40,), 1 / 16)
    wanted = sum(ok.sum().item() for ok in valid_lookaheads(t, h, 3, "head", "continuous", 1e-5))
    assert 0 < wanted < 120
    objective.net.register_forward_hook(lambda m, args, out: sizes.append(len(args[0])))
    whole = torch.cat(objective.targets(x, t, h, line, line, None))
    assert sizes == [40, 40, wanted]  # two stages, then every target that counts
    sizes.clear()
    monkeypatch.setattr("cudlab.cud.TRAINED", 10 * 64)
    parts = torch.cat(objective.targets(x, t, h, line, line, None))
    assert max(sizes) <= 10 and sum(sizes) == 80 + wanted
    assert (whole - parts).abs().max() <= 1e-5 * whole.abs().max()
    sizes.clear()
    objective.net._compiled_call_impl = objective.net._call_impl  # one shape for the compiler
    fixed = torch.cat(objective.targets(x, t, h, line, line, None))
    assert sum(sizes) == 200 and (whole - fixed).abs().max() <= 1e-5 * whole.abs().max()
