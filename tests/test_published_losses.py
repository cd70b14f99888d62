"""Losses against what was published: each beside a transcription in the source's own variables."""

import torch
from torch import nn

from cudlab.boot import BOOT
from cudlab.config import Config, error_of
from cudlab.consistency import Consistency, measure_distance
from cudlab.meanflow import MeanFlow
from cudlab.net import make_network
from cudlab.path import linear
from cudlab.rng import Rng
from cudlab.shortcut import Shortcut

SHAPE = (1, 8, 8)
X0 = Rng(7).normal("x0", 64, SHAPE).double().clamp(-1, 1)


class Small(nn.Module):
    "A network of a state and one or two times, in float64 throughout."

    shape = SHAPE

    def __init__(self, dropout: float = 0.0):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.outer = nn.Linear(64 + 2, 48), nn.Linear(48, 64)
        self.drop = nn.Dropout(dropout)
        self.double()

    def forward(self, x, t, y=None, r=None):
        times = torch.stack([t, t if r is None else r], 1)
        hidden = torch.tanh(self.inner(torch.cat([x.flatten(1), times], 1)))
        return self.outer(self.drop(hidden)).view(x.shape)


def gradient(loss: torch.Tensor, net: nn.Module) -> torch.Tensor:
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(net.parameters()))])


def assert_same(ours: torch.Tensor, theirs: torch.Tensor, net: nn.Module) -> None:
    "Value and gradient to 1e-6 of the largest."
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
    a, b = gradient(ours, net), gradient(theirs, net)
    assert b.abs().max() > 0
    torch.testing.assert_close(a, b, rtol=0, atol=1e-6 * b.abs().max().item())


def ect_loss(net, x0, sigma, n, stage: int, mask: int) -> torch.Tensor:
    "ECT in EDM's variables: y = x0 + sigma n, a denoiser D(y, sigma), its schedule with q = 2."

    def denoise(y, sigma):
        torch.manual_seed(mask)
        return y / (1 + sigma) - sigma / (1 + sigma) * net(
            y / (1 + sigma), (sigma / (1 + sigma)).flatten(), None
        )

    sigma = sigma.view(-1, 1, 1, 1)
    ratio = 1 - 0.5 ** (stage + 1) * (1 + 8 / (1 + sigma.exp()))
    r = sigma * ratio.clamp(min=0)
    upper = denoise(x0 + sigma * n, sigma)
    with torch.no_grad():
        lower = torch.where(r > 0, denoise(x0 + r * n, r), x0)
    lengths = (upper - lower).flatten(1).norm(dim=1)
    return (lengths / (sigma - r).flatten()).mean()


def mask_of(rng: Rng) -> int:
    return rng.start + Rng(rng.seed, rng.step).integers("dropout", 1, 2**40).item()


def test_consistency_training_left_alone_is_ect():
    "Loss and gradient in three stages; the same noise and the same dropout for both predictions."
    net = Small(dropout=0.3)
    method = Consistency(kind="train", top=0).bind(net, linear, 900)
    ends = set()
    for step in (0, 500, 899):
        rng = Rng(0, step)
        sigma = (-1.1 + 2.0 * rng.normal("sigma", len(X0))).exp().double()
        n, stage = rng.normal("eps", len(X0), SHAPE).double(), method.stage(step)
        theirs = ect_loss(net, X0, sigma, n, stage, mask_of(rng))
        assert_same(method(X0, None, rng)["net"], theirs, net)
        ends |= set((method.pair(X0, None, rng)[3] == 0).tolist())
    assert ends == {True, False}  # both kinds of targets took part: the data, and a prediction


def test_pure_noise_stands_for_sigma_80_in_the_weight_too():
    net = Small()
    method = Consistency(kind="train", top=1).bind(net, linear, 900)
    x, t, near, s = method.pair(X0, None, Rng(0, 899))
    ends = x - net(x, t, None)
    lengths = (ends - (near - s.view(-1, 1, 1, 1) * net(near, s, None)).detach()).flatten(1)
    r = 80 * (1 - 2.0**-9 * (1 + 8 * torch.sigmoid(torch.tensor(-80.0).double())))
    theirs = (lengths.norm(dim=1) / (80 - r)).mean()
    assert (t == 1).all()
    assert_same(method(X0, None, Rng(0, 899))["net"], theirs, net)


def test_consistency_training_computes_in_float32():
    "In the last stage bfloat16 keeps little of the difference of two neighbouring predictions."
    torch.manual_seed(0)
    net = make_network("digits", SHAPE)
    with torch.no_grad():
        for p in net.parameters():
            p.add_(0.05 * torch.randn_like(p))
    method, losses = Consistency(kind="train").bind(net, linear, 900), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            losses.append(method(X0[:8].float(), None, Rng(0, 899))["net"])
    assert torch.equal(*losses)


def test_distance_and_weight_can_be_chosen_and_distillation_has_its_own():
    assert [Consistency().settle(key) for key in ("loss", "weight")] == ["square", "plain"]
    train = Consistency(kind="train", loss="huber", weight="plain")
    assert [train.settle(key) for key in ("loss", "weight")] == ["huber", "plain"]
    assert "kind=distill" in error_of(Consistency(weight="sigma").check, Config())
    Consistency(weight="sigma", kind="train").check(Config())


def test_huber_turns_where_the_constant_of_improved_techniques_says():
    "0.00054 sqrt(d) of a norm is 0.00054 of a root mean square, for every number of elements."
    assert Consistency().c == 0.00054
    for d in (4, 64, 3072):
        gap = Rng(d).normal("gap", 16, (d,)).double()
        gap = gap * torch.logspace(-5, 0, 16).double()[:, None]
        c = 0.00054 * d**0.5
        theirs = ((gap**2).sum(1) + c**2).sqrt() - c
        ours = measure_distance(gap, "huber", Consistency().c)
        torch.testing.assert_close(ours * d**0.5, theirs, rtol=1e-9, atol=0)


class Table(nn.Module):
    "A student that keeps one number for each time: U(x1, s) = table(s) x1."

    shape = (1,)

    def __init__(self, cells: int):
        super().__init__()
        self.values = torch.zeros(cells + 1, dtype=torch.float64)
        self.cells = cells

    def cell(self, t):
        return (t * self.cells).round().long()

    def forward(self, x, t, y=None):
        return self.values[self.cell(t)][:, None] * x

    def learn(self, s, goal):
        where = self.cell(s)
        count = torch.bincount(where, minlength=len(self.values))
        total = torch.bincount(where, goal.flatten(), minlength=len(self.values))
        self.values = torch.where(count > 0, total / count.clamp(min=1), self.values)


def flow_of_gaussian(x, t):
    "The exact velocity for data N(0, 1/4)."
    t = t.view(-1, 1)
    return (t - (1 - t) / 4) / ((1 - t) ** 2 / 4 + t**2) * x


def test_bootstrapping_reaches_every_time_between_noise_and_data():
    "From a table of zeros; samples have the standard deviation of the data if no time is left out."
    method = BOOT(delta=1 / 8, curriculum=0).bind(Table(512), linear, 1, lambda y: flow_of_gaussian)
    table, noise, one = method.net, torch.ones(40_000, 1).double(), torch.ones(1).double()
    table.values[-1] = flow_of_gaussian(noise[:1], one).item()  # what the boundary loss teaches
    for step in range(10):  # a chain has eight links
        t, s = (z.double() for z in method.times_of(Rng(0, step), len(noise)))
        table.learn(s, method.targets(noise, t, s, None))
    assert abs(1 - table.values[0].item() - 0.4998) < 0.001
    assert (table.values != 0).float().mean() > 0.98


def shortcut_loss(net, average, x0, eps, t, size, count: int) -> torch.Tensor:
    "Shortcut models' loss: `count` rows of self-consistency first, then velocities."

    def s(network, x, t, d):
        return network(x, t, None, t - d)

    def wide(z):
        return z.view(-1, 1, 1, 1)

    xt = (1 - wide(t)) * x0 + wide(t) * eps
    half = size[:count] / 2
    label = torch.where(half > 1 / 128, half, torch.zeros_like(half))
    with torch.no_grad():
        start, now = xt[:count], t[:count]
        first = s(average, start, now, label)
        moved = (start - wide(half) * first).clamp(-4, 4)
        second = s(average, moved, now - half, label)
        jumps = ((first + second) / 2).clamp(-4, 4)
    goal = torch.cat([jumps, (eps - x0)[count:]])
    return ((s(net, xt, t, size) - goal) ** 2).mean()


def test_shortcut_left_alone_is_the_published_loss():
    "An eighth of the batch, targets of the averaged weights, the half-way state cut as well."
    net = Small()
    method, rng = Shortcut().bind(net, linear, 100), Rng(0, 3)
    with torch.no_grad():
        for p in method.ema["net"].parameters():
            p.mul_(1.5)  # the average is another network, and it overshoots: the cuts matter
    noise = rng.normal("eps", len(X0), SHAPE).double()
    x, t, size = {}, {}, {}

    def watch(module, inputs):
        x["t"], t["t"], size["d"] = inputs[0], inputs[1], inputs[1] - inputs[3]

    handle = net.register_forward_pre_hook(watch)
    ours = method(X0, None, rng)["net"]
    handle.remove()
    times, sizes = t["t"].double(), size["d"].double()
    assert (sizes > 0).sum() == len(X0) // 8
    theirs = shortcut_loss(net, method.ema["net"], X0, noise, times, sizes, len(X0) // 8)
    assert_same(ours, theirs, net)


def meanflow_loss(net, x0, eps, t, r) -> torch.Tensor:
    "Mean flows' loss with p = 0.75 and c = 1e-3, the squared error summed over a sample."
    wide_t, gap = t.view(-1, 1, 1, 1), (t - r).view(-1, 1, 1, 1)
    z, v = (1 - wide_t) * x0 + wide_t * eps, eps - x0
    tangents = v, torch.ones_like(t), torch.zeros_like(r)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        u, slope = torch.func.jvp(lambda z, t, r: net(z, t, None, r), (z, t, r), tangents)
    error = ((u - (v - gap * slope).detach()) ** 2).sum((1, 2, 3))
    return (error / (error.detach() + 1e-3) ** 0.75).mean()


def test_meanflow_left_alone_is_the_published_loss():
    "r = min(t, second draw) on three quarters of the batch, sums over pixels, exact derivative."
    net = Small()
    method, rng = MeanFlow(h=0).bind(net, linear, 100), Rng(0, 3)
    count = 3 * len(X0) // 4
    t = 1e-5 + (1 - 1e-5) * torch.sigmoid(-0.6 + 1.6 * rng.normal("t", len(X0)))
    second = 1e-5 + (1 - 1e-5) * torch.sigmoid(-4.0 + 1.6 * rng.normal("r", count))
    r = torch.cat([torch.minimum(t[:count], second), t[count:]])
    assert 0 < (r[:count] == t[:count]).sum() < count  # some second draws lie beyond t
    theirs = meanflow_loss(
        net, X0, rng.normal("eps", len(X0), SHAPE).double(), t.double(), r.double()
    )
    assert_same(method(X0, None, rng)["net"], theirs, net)
