"""GDD's discriminator: what it looks at, how it is built, and how much R1 holds it back."""

import sys
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from cudlab.config import Config
from cudlab.data import load_data
from cudlab.discriminator import BACKBONES, Discriminator, PublishedProjection
from cudlab.gdd import GDD, gradient_penalty, logistic_loss
from cudlab.path import PATHS
from cudlab.rng import Rng, draw_noise
from cudlab.run import Run

# Backbones and heads


def vgg_row(widths: tuple = (4, 4, 6, 6, 8)) -> nn.Sequential:
    "Layers of the kinds and in the order of VGG16's, thin: five blocks that each end in a pool."
    layers, channels = [], 3
    for count, width in zip((2, 2, 3, 3, 3), widths):
        for _ in range(count):
            conv = nn.Conv2d(channels, width, 3, padding=1)
            layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
            channels = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers)


def test_vgg_is_looked_at_before_its_pools(monkeypatch):
    torch.manual_seed(0)
    row = vgg_row()
    models = SimpleNamespace(vgg16_bn=lambda weights: SimpleNamespace(features=row))
    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=models))
    monkeypatch.setitem(sys.modules, "torchvision.models", models)
    eye = BACKBONES["vgg16-bn"](None).eval()
    x, before = draw_noise(0, 2, (3, 32, 32)), []
    with torch.no_grad():
        (levels,) = eye(x, None)
        h = eye.shown(x)
        for layer in row:
            if isinstance(layer, nn.MaxPool2d):
                before.append(h)
            h = layer(h)
    assert [m.shape[-1] for m in levels] == [112, 56, 28, 14]
    assert all(torch.equal(m, b) for m, b in zip(levels, before[1:], strict=True))


def empty_pyramids() -> list:
    "Maps of the sizes that VGG16 and EfficientNet-Lite0 give at 224 pixels, of few channels."
    sizes = (112, 56, 28, 14), (56, 28, 14, 7)
    return [[torch.zeros(1, 4 + k, side, side) for k, side in enumerate(row)] for row in sizes]


def test_the_published_discriminator_has_its_logits_and_layers():
    torch.manual_seed(0)
    pyramids, width = empty_pyramids(), 4
    disc = Discriminator(pyramids, width, published=True)
    mixed = [[s.out_channels for s in p.scales] for p in disc.projections]
    assert mixed == 2 * [[4, 4, 8, 16]]
    filled = [[draw_noise(0, 3, m.shape[1:]) for m in levels] for levels in pyramids]
    logits = disc(filled)
    assert [h.shape[1] for h in logits] == 4 * [121] + 4 * [16]  # 548
    for k, head in enumerate(disc.heads):
        for layer, kind in zip(head.body, (4 - k % 4) * [nn.Conv2d, nn.BatchNorm2d, nn.LeakyReLU]):
            assert isinstance(layer, kind)
        assert len(head.body) == 3 * (4 - k % 4)
        assert head.last.in_channels == 8 * width and head.last.bias is None
    lab = Discriminator(pyramids, width)
    assert not [m for m in lab.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not [p for p in lab.projections.parameters() if p.requires_grad]
    assert not [p for p in disc.projections.parameters() if p.requires_grad]


def test_the_published_projection_adds_from_coarse_to_fine():
    "Written out for two levels: 1x1, added, enlarged twofold with aligned corners, 1x1."
    torch.manual_seed(0)
    mixing = PublishedProjection([3, 5], 2)
    fine, coarse = draw_noise(0, 2, (3, 6, 6)), draw_noise(1, 2, (5, 3, 3))
    found = mixing([fine, coarse])

    def enlarged(m):
        return F.interpolate(m, scale_factor=2, mode="bilinear", align_corners=True)

    low = mixing.scales[1](enlarged(mixing.across[1](coarse)))
    high = mixing.scales[0](enlarged(mixing.across[0](fine) + low))
    assert [m.shape[1:] for m in found] == [(2, 12, 12), (2, 6, 6)]
    assert torch.allclose(found[1], low, atol=1e-5) and torch.allclose(found[0], high, atol=1e-5)


# R1


def test_r1_is_the_gradient_of_the_sum_or_of_the_mean_logit():
    "Linear logits, whose gradients are known."
    a, b = draw_noise(0, 3, (5,)), draw_noise(1, 2, (5,))
    x = draw_noise(2, 4, (5,)).requires_grad_()
    logits = [x @ a.T, x @ b.T]
    total, mean = a.sum(0) + b.sum(0), (a.mean(0) + b.mean(0)) / 2
    for unit, slope in (("sum", total), ("mean", mean)):
        assert torch.allclose(gradient_penalty(logits, x, unit), slope.square().sum())


def test_the_published_weight_of_r1_in_the_unit_of_the_mean():
    "548 logits of two backbones and 64 pictures: what 1e-4 is worth beside a mean of the losses."
    x = draw_noise(0, 64, (2,)).requires_grad_()
    found = []
    for other in (0, 1):  # the second backbone's gradient is parallel, or orthogonal
        heads = 4 * [x[:, [0] * 121]] + 4 * [x[:, [other] * 16]]
        total, mean = (gradient_penalty(heads, x, unit) for unit in ("sum", "mean"))
        found.append(1e-4 * float(total / mean) / (64 * 2))
    assert found == pytest.approx([0.235, 0.372], abs=0.001)
    assert found[0] < GDD().gamma < found[1]


def make_player(**options) -> GDD:
    "A bound objective on the digits, with a discriminator that costs little."
    torch.manual_seed(0)
    chosen = {"features": "digits-v1", "width": 8} | options
    return GDD(**chosen).bind(Run.open("digits-rf").net(), PATHS["linear"], 100)


def test_the_published_loss_of_the_discriminator():
    "Added up over samples and backbones, R1 of all logits' sum: ours, up to one factor."
    options = {"discriminator": "published", "r1": "sum", "gamma": 1e-4}
    gdd, n = make_player(features="digits-v1 digits-v2", **options), 6
    disc, x0, rng = gdd.players["disc"].eval(), load_data("digits").all(6)[0], Rng(0, step=16)
    ours = gdd(x0, None, rng)["disc"]
    fake = gdd.generate(rng.normal("eps", n, x0.shape[1:]), None).detach()
    real = x0.clone().requires_grad_()
    with sdpa_kernel(SDPBackend.MATH):
        fakes, reals = (disc(gdd.extract(x, torch.zeros_like(x))) for x in (fake, real))
        (slope,) = torch.autograd.grad(sum(h.sum() for h in reals), real, create_graph=True)
    half = len(disc.heads) // 2
    published = 16 * 1e-4 / 2 * slope.square().sum((1, 2, 3)).mean()
    for heads in (slice(0, half), slice(half, None)):  # of one backbone
        for sign, logits in ((1, fakes), (-1, reals)):
            joined = torch.cat(logits[heads], 1)
            published = published + F.softplus(sign * joined).mean(1).sum()
    assert torch.allclose(ours * 2 * n, published, rtol=1e-5)
    trained = [p for p in disc.parameters() if p.requires_grad]
    for mine, theirs in zip(*(torch.autograd.grad(v, trained) for v in (ours, published))):
        assert torch.allclose(mine * 2 * n, theirs, rtol=1e-3, atol=1e-4)


def norm_of(loss: torch.Tensor, trained: list) -> float:
    "The norm of a loss's gradient on what is trained."
    grads = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None]).norm().item()


def test_r1_is_felt_beside_the_adversarial_loss():
    "Both gradients on the discriminator's parameters, after some steps, are of one order."
    gdd, digits = make_player(), load_data("digits")
    steps = {"steps": 20, "batch": 8, "warmup": 1, "lr": 3e-4}
    list(gdd.fit(digits, Config(method="gdd", **steps)))
    disc = gdd.players["disc"]
    trained = [p for p in disc.parameters() if p.requires_grad]
    real = digits.batch(1, 0, 32)[0].requires_grad_()
    n = draw_noise(1, 32, (1, 8, 8))
    with sdpa_kernel(SDPBackend.MATH):
        with torch.no_grad():
            maps = gdd.extract(gdd.generate(draw_noise(0, 32, (1, 8, 8)), None), n)
        fakes, reals = disc(maps), disc(gdd.extract(real, n))
        adversarial = logistic_loss(fakes, 1) + logistic_loss(reals, -1)
        r1 = gdd.lazy * gdd.gamma / 2 * gradient_penalty(reals, real, gdd.r1)
        ratio = norm_of(r1, trained) / norm_of(adversarial, trained)
    assert 0.05 < ratio < 20, ratio
