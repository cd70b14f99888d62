"Distances: against closed forms, against scipy and torchmetrics, and by their intervals."

import math
import statistics

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

from cudlab.config import error_of
from cudlab.data import load_data
from cudlab.distances import (
    Reference,
    covariance_matrix,
    density_coverage,
    frechet_distance,
    frechet_jackknife,
    frechet_limit,
    kernel_distance,
    mean_interval,
    precision_recall,
    sliced_wasserstein,
)
from cudlab.memory import memorization_rate, nearest_neighbours
from cudlab.rng import draw_noise

DISTANCES = [
    frechet_distance,
    frechet_jackknife,
    frechet_limit,
    kernel_distance,
    precision_recall,
    density_coverage,
    sliced_wasserstein,
]

# Fréchet


@given(st.integers(1, 12), st.integers(0, 10_000))
@budget(max_examples=30, deadline=None)
def test_frechet_is_the_closed_form_of_the_fitted_gaussians(dim, seed):
    from scipy.linalg import sqrtm

    a = draw_noise(seed, 300, (dim,)) @ draw_noise(seed + 1, dim, (dim,))
    a = a + draw_noise(seed + 2, 1, (dim,))
    b = draw_noise(seed + 3, 200, (dim,)) @ draw_noise(seed + 4, dim, (dim,))
    ca, cb = (np.cov(f.double().numpy().T).reshape(dim, dim) for f in (a, b))
    gap = a.double().mean(0) - b.double().mean(0)
    expected = gap.square().sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet_distance(a, b) == pytest.approx(expected.item(), rel=1e-5, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-7)


def test_frechet_of_two_gaussians():
    a = draw_noise(0, 50_000, (3,)) * torch.tensor([1.0, 2.0, 3.0])
    b = draw_noise(1, 50_000, (3,)) + torch.tensor([1.0, 0.0, 2.0])
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 0 + 1 + 4, rel=0.02)


def test_frechet_matches_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(nn.Flatten):
        num_features = 16

    oracle = FrechetInceptionDistance(feature=Flat(), input_img_size=(1, 4, 4), normalize=True)
    oracle.set_dtype(torch.float64)
    a, b = draw_noise(0, 500, (1, 4, 4)).sigmoid(), draw_noise(1, 500, (1, 4, 4)).mul(0.7).sigmoid()
    oracle.update(a.double(), real=True)
    oracle.update(b.double(), real=False)
    found = frechet_distance(a.flatten(1), b.flatten(1))
    assert found == pytest.approx(oracle.compute().item(), rel=1e-4)


@pytest.mark.parametrize("n, dim", [(5001, 513), (12, 1), (700, 300)])
def test_the_covariance_in_strips_and_chunks_is_the_covariance(n, dim):
    f = draw_noise(0, n, (dim,)).double() + 30
    expected = torch.cov(f.T).reshape(dim, dim)
    assert torch.allclose(covariance_matrix(f), expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("n, dim", [(403, 5), (60, 1), (900, 40)])
def test_the_jackknife_is_what_leaving_out_gives(n, dim):
    a, b = draw_noise(0, n, (dim,)) * 1.3 + 5, draw_noise(1, 1000, (dim,)) + 5
    parts = a.tensor_split(10)
    left = [frechet_distance(torch.cat([p for p in parts if p is not out]), b) for out in parts]
    half = 2.2622 * math.sqrt(9 * statistics.pvariance(left))
    value, low, high = frechet_jackknife(a, b)
    assert value == pytest.approx(frechet_distance(a, b), rel=1e-9)
    assert (value - low, high - value) == pytest.approx((half, half), rel=1e-6)
    few = draw_noise(0, dim + 1, (dim,))
    value, low, high = frechet_jackknife(few, b)
    assert value == pytest.approx(frechet_distance(few, b), rel=1e-9)
    assert math.isnan(low) and math.isnan(high)


def test_frechet_with_dead_dimensions():
    a = torch.cat([draw_noise(0, 100, (3,)), torch.zeros(100, 2)], 1)
    assert frechet_distance(a, a) < 1e-9
    assert frechet_distance(a, a + torch.tensor([0, 0, 0, 2.0, 0])) == pytest.approx(4)


@pytest.mark.parametrize("dim, scale", [(16, 1.0), (16, 1.2), (64, 1.0)])
def test_the_limit_of_infinitely_many_samples(dim, scale):
    data, truth = Reference(draw_noise(999, 20_000, (dim,))), dim * (scale - 1) ** 2
    sets = [draw_noise(seed, 25 * dim, (dim,)) * scale for seed in range(40)]
    limits = [frechet_limit(a, data) for a in sets]
    bias = statistics.fmean(frechet_distance(a, data) for a in sets) - truth
    assert abs(statistics.fmean(value for value, _, _ in limits) - truth) < 0.25 * bias
    assert sum(low <= truth <= high for _, low, high in limits) >= 34
    assert frechet_limit(sets[0][: 12 * dim - 1], data) == (None, None, None)


# kernel


def test_kernel_distance_matches_its_definition_and_torchmetrics():
    from torchmetrics.image.kid import poly_mmd

    a, b, other = (
        draw_noise(0, 700, (16,)),
        draw_noise(1, 600, (16,)) * 1.1,
        draw_noise(2, 700, (16,)),
    )
    kaa, kbb, kab = ((x.double() @ y.double().T / 16 + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (kaa, kbb)]
    expected = sum(within) - 2 * kab.mean()
    assert kernel_distance(a, b)[0] == pytest.approx(expected.item(), rel=1e-9)
    expected = poly_mmd(a.double(), other.double()).item()
    assert kernel_distance(a, other)[0] == pytest.approx(expected, rel=1e-6)


def test_kernel_distance_is_unbiased():
    pairs = [(draw_noise(2 * k, 50, (4,)), draw_noise(2 * k + 1, 60, (4,))) for k in range(200)]
    _, low, high = mean_interval(kernel_distance(a, b, resamples=2)[0] for a, b in pairs)
    assert low < 0 < high


def test_kernel_interval_covers():
    truth = kernel_distance(draw_noise(9001, 5000, (4,)), draw_noise(9002, 5000, (4,)) * 1.2 + 0.2)
    hits = 0
    for k in range(60):
        a, b = draw_noise(2 * k, 300, (4,)), draw_noise(2 * k + 1, 300, (4,)) * 1.2 + 0.2
        _, low, high = kernel_distance(a, b)
        hits += low <= truth[0] <= high
    assert hits >= 51


def exact_kernel_distance(a: np.ndarray, b: np.ndarray) -> float:
    "The unbiased MMD of the cubic kernel in numbers of 64 binary places."
    a, b = np.asarray(a, np.longdouble), np.asarray(b, np.longdouble)
    aa, bb, ab = ((x @ y.T / a.shape[1] + 1) ** 3 for x, y in ((a, a), (b, b), (a, b)))
    within = [(k.sum() - k.trace()) / (len(k) * (len(k) - 1)) for k in (aa, bb)]
    return float(sum(within) - 2 * ab.mean())


@pytest.mark.parametrize("offset", [0, 1000])
def test_the_kernel_distance_of_features_far_from_the_origin(offset):
    "The kernel has an origin, so its values differ; they are those of the definition."
    widths, values = [], []
    for k in range(30):
        a = draw_noise(2 * k, 120, (4,)).double() + offset
        b = draw_noise(2 * k + 1, 120, (4,)).double() * 1.2 + 0.2 + offset
        value, low, high = kernel_distance(a, b)
        values.append(value)
        widths.append(high - low)
    assert value == pytest.approx(exact_kernel_distance(a.numpy(), b.numpy()), rel=1e-6)
    assert 0.6 < statistics.fmean(widths) / (2 * 1.96 * statistics.stdev(values)) < 1.5


# manifolds


def test_density_and_coverage_against_the_definition():
    a, b, k = draw_noise(0, 130, (3,)).double() * 1.3, draw_noise(1, 90, (3,)).double(), 5
    gaps = (b[:, None] - b[None]).norm(dim=2).sort(1)[0][:, k]
    within = (b[:, None] - a[None]).norm(dim=2) <= gaps[:, None]
    expected = within.sum().item() / (k * 130), within.any(1).double().mean().item()
    assert density_coverage(a, b) == pytest.approx(expected)
    big = draw_noise(2, 2300, (3,))  # several chunks
    assert density_coverage(big, big) == (pytest.approx(1.2, abs=1e-3), 1.0)
    assert density_coverage(big + 1000, big) == (0.0, 0.0)


def test_density_and_coverage_of_equal_distributions():
    pairs = [(draw_noise(2 * s, 300, (6,)), draw_noise(2 * s + 1, 200, (6,))) for s in range(40)]
    densities, coverages = zip(*(density_coverage(a, b) for a, b in pairs))
    expected = 1 - math.prod((200 - j) / (500 - j) for j in range(1, 6))
    for found, value in ((densities, 1), (coverages, expected)):
        _, low, high = mean_interval(found)
        assert low - 0.003 <= value <= high + 0.003 and high - low < 0.05


def test_precision_and_recall_of_known_cases():
    a, far = draw_noise(0, 300, (4,)), draw_noise(1, 300, (4,)) + 100
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(far, a) == (0.0, 0.0)
    collapsed = a[:1] + 1e-3 * draw_noise(3, 300, (4,))
    precision, recall = precision_recall(collapsed, a)
    assert precision == 1 and recall < 0.05


def test_sliced_distance_of_known_cases():
    a = draw_noise(0, 2000, (3,))
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, a + 1) == pytest.approx(1, rel=0.1)
    assert sliced_wasserstein(a, 2 * a) == pytest.approx(1, rel=0.1)
    assert sliced_wasserstein(a, a[:500]) < 0.15


def test_copies_are_found_and_fresh_pictures_are_not():
    data = load_data("digits")
    fresh = load_data("digits", "test").all()[0]
    index = torch.arange(0, 1500, 50)
    copies = data.take(index)[0]
    found, gap = nearest_neighbours(copies, data)
    assert (found == index).all() and gap.max() < 1e-6
    assert memorization_rate(copies, data, fresh[::2]) == 1
    assert memorization_rate(fresh[1::2], data, fresh[::2]) < 0.12


class Rows:
    "Points as a data set that can be searched."

    def __init__(self, x: torch.Tensor):
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index) -> tuple:
        return self.x[index], None


def test_the_nearest_points_far_from_the_origin_are_the_nearest():
    x, known = draw_noise(0, 50, (3,)).double(), draw_noise(1, 2100, (3,)).double()
    (index, gap), (far_index, far_gap) = (
        nearest_neighbours(x + offset, Rows(known + offset)) for offset in (0, 1000)
    )
    assert (index == far_index).all()
    assert torch.allclose(far_gap, gap, rtol=1e-6, atol=0)
    assert gap[0].item() == pytest.approx((x[0] - known).square().mean(1).sqrt().min().item())


# what every distance keeps to


@pytest.mark.parametrize("distance", [d for d in DISTANCES if d is not kernel_distance])
def test_features_far_from_the_origin_lose_no_digits(distance):
    a, b = draw_noise(0, 400, (6,)).double() * 0.8, draw_noise(1, 500, (6,)).double()
    for offset in (1000, torch.tensor([1000.0, -300.0, 0.0, 50.0, 2000.0, 1.0])):
        assert distance(a + offset, b + offset) == pytest.approx(distance(a, b), rel=1e-6)


@pytest.mark.parametrize("distance", DISTANCES)
def test_unusable_features_are_named(distance):
    x = draw_noise(0, 50, (4,))
    one = torch.cat([x[:49], torch.full((1, 4), math.inf)])
    for a, b, words in (
        (x[:1], x, ("at least", "first set")),
        (x[:0], x, ("first set",)),
        (x, x[:0], ("second set",)),
        (x, one, ("NaN or infinite features in 1 of 50",)),
        (x * math.nan, x, ("NaN or infinite features in 50 of 50",)),
        (x[:, 0], x, ("(50,)",)),
        (x, x[0, 0], ("()",)),
        (x, x[:, :3], ("4 dimensions, the second 3",)),
    ):
        said = error_of(distance, a, b)
        assert all(word in said for word in words), said
        assert said.count(". ") == 0 and "\n" not in said


@pytest.mark.parametrize("distance", DISTANCES[:3])
def test_a_covariance_needs_more_samples_than_dimensions(distance):
    x = draw_noise(0, 50, (4,))
    for a, b in ((x[:4], x), (x, x[:4])):
        assert "4 samples of 4 dimensions; at least 5" in error_of(distance, a, b)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_reference_changes_nothing_but_the_time(distance):
    a, b = draw_noise(0, 400, (4,)) * 1.2, draw_noise(1, 300, (4,))
    known = Reference(b)
    assert distance(a, known) == distance(a, b) == distance(a, known)
    assert distance(a[:300], known) == distance(a[:300], b)


# intervals


@pytest.mark.parametrize("count", [2, 3, 5, 10, 11, 20, 60])
def test_interval_is_students(count):
    from scipy.stats import t

    values = draw_noise(0, count, ()).double().numpy()
    low, high = t.interval(0.95, count - 1, values.mean(), values.std(ddof=1) / math.sqrt(count))
    assert mean_interval(values) == pytest.approx((values.mean(), low, high), rel=2e-4)


def test_interval_of_one_and_of_none():
    mean, low, high = mean_interval([2.0])
    assert mean == 2 and math.isnan(low) and math.isnan(high)
    for values in ([], [1.0, math.nan]):
        assert "finite" in error_of(mean_interval, values)
