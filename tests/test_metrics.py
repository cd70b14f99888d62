"""Features and metrics: against closed forms, against scipy and torchmetrics, and through a run whose flow is known exactly."""
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

from cudlab import metrics
from cudlab.core import complaint
from cudlab.core import noise
from cudlab.data import load
from cudlab.features import FEATURES
from cudlab.features import Classifier
from cudlab.features import Extractor
from cudlab.features import accuracy
from cudlab.features import default_features
from cudlab.features import features
from cudlab.features import load_classifier
from cudlab.features import save_classifier
from cudlab.features import shifted
from cudlab.features import train_classifier
from cudlab.metrics import PROTOCOL
from cudlab.metrics import Evaluation
from cudlab.metrics import comparable
from cudlab.metrics import curve
from cudlab.metrics import endpoint_error
from cudlab.metrics import evaluate
from cudlab.metrics import evaluation
from cudlab.metrics import frechet
from cudlab.metrics import interval
from cudlab.metrics import kernel_distance
from cudlab.metrics import measure
from cudlab.metrics import plan
from cudlab.metrics import precision_recall
from cudlab.metrics import reference_features
from cudlab.metrics import sliced
from cudlab.metrics import straightness
from cudlab.metrics import summary
from cudlab.path import Mixture
from cudlab.path import grid
from cudlab.path import linear
from cudlab.solver import Trajectory
from cudlab.solver import solve
from cudlab.solver import walk

# features


@pytest.fixture(autouse=True)
def fresh():
    metrics.KEPT.clear()


SHIPPED = [name for name in FEATURES if (ROOT / "cudlab" / "weights").exists() and list((ROOT / "cudlab" / "weights").glob(f"{name}-*"))]


@pytest.mark.parametrize("name, source, least", [("digits-v1", "digits", 0.98), ("digits-v2", "digits", 0.98), ("mnist-v1", "mnist", 0.99), ("fashion-v1", "fashion_mnist", 0.9)])
def test_shipped_classifiers_know_their_data(name, source, least):
    if name not in FEATURES:
        pytest.skip(f"{name} is not shipped")
    try:
        test = load(source, "test")
    except ValueError as e:
        pytest.skip(str(e))
    (file,) = (ROOT / "cudlab" / "weights").glob(f"{name}-*.safetensors")
    assert file.stat().st_size < 2_000_000
    assert accuracy(load_classifier(file), test) >= least


@pytest.mark.parametrize("name", FEATURES)
def test_every_extractor_keeps_its_word(name):
    found = features(name)
    assert found.name == name and features(name) is found and features(found) is found
    shape = (2,) if name == "points" else (3 if "rgb" in name else 1, 28, 28)
    x = noise(0, 5, shape)
    assert found(x).shape == (5, found.dim) and found(x).dtype == torch.float32 and not found(x).requires_grad
    assert torch.allclose(found(x)[2:4], found(x[2:4]), atol=1e-5)


def test_default_features_exist():
    for data in ("digits", "mnist", "fashion_mnist", "moons", "cifar10", "folder:x"):
        for channels in (1, 3):
            assert default_features(data, channels) in FEATURES


def test_grey_classifier_takes_colour():
    x = noise(0, 3, (1, 8, 8))
    assert torch.allclose(features("digits-v1")(x.expand(3, 3, 8, 8)), features("digits-v1")(x), atol=1e-5)


def test_your_own_extractor_is_checked():
    mine = Extractor("mine", "none", 4, lambda x: x.flatten(1)[:, :4])
    assert mine(noise(0, 3, (1, 8, 8))).shape == (3, 4)
    assert "gave shape (3, 4) for 3 pictures; (3, 5) is needed" in complaint(Extractor("mine", "none", 5, mine.fn), noise(0, 3, (1, 8, 8)))
    assert "did you mean 'digits-v" in complaint(features, "digits-v9")


def test_damaged_or_missing_weights(tmp_path):
    file = save_classifier(Classifier(1, (4, 8), 3).eval(), "toy-v1", tmp_path)
    assert load_classifier(file).head.out_features == 3
    for change in (lambda b: b[:-1] + bytes([b[-1] ^ 1]), lambda b: b[:-50], lambda b: b""):
        (tmp_path / "x").mkdir(exist_ok=True)
        damaged = tmp_path / "x" / file.name
        damaged.write_bytes(change(file.read_bytes()))
        assert "is damaged" in complaint(load_classifier, damaged)
    assert "cannot be read" in complaint(load_classifier, tmp_path / "none-00000000.safetensors")


def test_training_is_a_function_of_the_seed():
    data = load("digits")
    a, b = (train_classifier(data, (8, 8), epochs=0.5, seed=3) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))
    assert not a.training


def test_shift_moves_pictures_and_fills_with_black():
    from cudlab.core import Rng

    x = torch.full((200, 1, 4, 4), 1.0)
    moved = shifted(x, 1, Rng(0))
    black = (moved == -1).flatten(1).sum(1)
    assert set(black.tolist()) == {0, 4, 7}


# distances


@given(st.integers(1, 12), st.integers(0, 10_000))
@budget(max_examples=30, deadline=None)
def test_frechet_is_the_closed_form_of_the_fitted_gaussians(dim, seed):
    from scipy.linalg import sqrtm

    a = noise(seed, 300, (dim,)) @ noise(seed + 1, dim, (dim,)) + noise(seed + 2, 1, (dim,))
    b = noise(seed + 3, 200, (dim,)) @ noise(seed + 4, dim, (dim,))
    x, y = a.double().numpy(), b.double().numpy()
    ca, cb = np.cov(x.T).reshape(dim, dim), np.cov(y.T).reshape(dim, dim)
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(ca + cb - 2 * sqrtm(ca @ cb).real)
    assert frechet(a, b) == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert frechet(a, b) == pytest.approx(frechet(b, a), rel=1e-6, abs=1e-7)


def test_frechet_of_two_gaussians():
    a, b = noise(0, 200_000, (3,)) * torch.tensor([1.0, 2.0, 3.0]), noise(1, 200_000, (3,)) + torch.tensor([1.0, 0.0, 2.0])
    assert frechet(a, b) == pytest.approx(1 + 4 + 0 + 1 + 4, rel=0.01)


def test_frechet_matches_torchmetrics():
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Flat(nn.Module):
        num_features = 16

        def forward(self, x):
            return x.flatten(1)

    oracle = FrechetInceptionDistance(feature=Flat(), input_img_size=(1, 4, 4), normalize=True).set_dtype(torch.float64)
    a, b = noise(0, 500, (1, 4, 4)).sigmoid(), noise(1, 500, (1, 4, 4)).mul(0.7).sigmoid()
    oracle.update(a.double(), real=True)
    oracle.update(b.double(), real=False)
    assert frechet(a.flatten(1), b.flatten(1)) == pytest.approx(oracle.compute().item(), rel=1e-4)


def test_frechet_with_dead_dimensions():
    a = torch.cat([noise(0, 100, (3,)), torch.zeros(100, 2)], 1)
    assert frechet(a, a) < 1e-9
    assert frechet(a, a + torch.tensor([0, 0, 0, 2.0, 0])) == pytest.approx(4)


def test_kernel_distance_matches_torchmetrics_and_is_unbiased():
    from torchmetrics.image.kid import poly_mmd

    a, b = noise(0, 700, (16,)), noise(1, 600, (16,)) * 1.1
    kernel = lambda x, y: (x.double() @ y.double().T / 16 + 1) ** 3
    n, m = 700, 600
    kaa, kbb, kab = kernel(a, a), kernel(b, b), kernel(a, b)
    expected = (kaa.sum() - kaa.trace()) / (n * (n - 1)) + (kbb.sum() - kbb.trace()) / (m * (m - 1)) - 2 * kab.mean()
    assert kernel_distance(a, b)[0] == pytest.approx(expected.item(), rel=1e-9)
    square = noise(2, 700, (16,))
    from torchmetrics.image.kid import poly_mmd

    assert kernel_distance(a, square)[0] == pytest.approx(poly_mmd(a.double(), square.double()).item(), rel=1e-6)
    values = [kernel_distance(noise(2 * k, 50, (4,)), noise(2 * k + 1, 60, (4,)), resamples=2)[0] for k in range(200)]
    mean, low, high = interval(values)
    assert low < 0 < high


def test_kernel_interval_covers():
    truth = kernel_distance(noise(9001, 5000, (4,)), noise(9002, 5000, (4,)) * 1.2 + 0.2)[0]
    hits = 0
    for k in range(60):
        _, low, high = kernel_distance(noise(2 * k, 300, (4,)), noise(2 * k + 1, 300, (4,)) * 1.2 + 0.2)
        hits += low <= truth <= high
    assert hits >= 51


@pytest.mark.parametrize("distance", [frechet, kernel_distance, precision_recall])
def test_unusable_features_are_named(distance):
    x = noise(0, 50, (4,))
    assert "at least" in complaint(distance, x[:2], x) and "first set" in complaint(distance, x[:2], x)
    assert "second set" in complaint(distance, x, x[:0])
    assert "NaN or infinite features in 1 of 50" in complaint(distance, x, torch.cat([x[:49], torch.full((1, 4), math.inf)]))
    assert "(50,)" in complaint(distance, x[:, 0], x)


def test_sets_of_different_dimensions():
    assert "4 dimensions, the second 3" in complaint(frechet, noise(0, 50, (4,)), noise(0, 50, (3,)))
    assert "4 dimensions, the second 3" in complaint(kernel_distance, noise(0, 50, (4,)), noise(0, 50, (3,)))


def test_precision_and_recall_of_known_cases():
    a, far = noise(0, 300, (4,)), noise(1, 300, (4,)) + 100
    assert precision_recall(a, a) == (1.0, 1.0)
    assert precision_recall(far, a) == (0.0, 0.0)
    collapsed = a[:1] + 1e-3 * noise(3, 300, (4,))
    precision, recall = precision_recall(collapsed, a)
    assert precision == 1 and recall < 0.05


@pytest.mark.parametrize("count", [2, 3, 5, 10, 11, 20, 60])
def test_interval_is_students(count):
    from scipy.stats import t

    values = noise(0, count, ()).double().numpy()
    low, high = t.interval(0.95, count - 1, values.mean(), values.std(ddof=1) / math.sqrt(count))
    assert interval(values) == pytest.approx((values.mean(), low, high), rel=2e-4)


def test_interval_of_one_and_of_none():
    assert interval([2.0])[0] == 2 and math.isnan(interval([2.0])[1])
    assert "finite" in complaint(interval, []) and "finite" in complaint(interval, [1.0, math.nan])


# the sampler against its flow


def test_straightness_of_known_flows():
    ts = torch.linspace(1, 0, 201)
    x = noise(0, 8, (2,)).double()
    assert straightness(solve(lambda x, t: torch.ones_like(x), x, ts, "heun")) < 1e-8
    circle = solve(lambda x, t: math.pi * torch.stack([-x[:, 1], x[:, 0]], 1), x, ts, "rk4")
    assert straightness(circle) == pytest.approx((x.square().mean() * (math.pi**2 - 4)).item(), rel=0.02)


def test_end_point_error_of_a_gaussian_flow():
    flow = Mixture(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64))
    x1 = noise(0, 64, (2,)).double()
    errors = [endpoint_error(solve(flow, x1, grid("uniform", n), "euler").x, 0.5 * x1) for n in (16, 32)]
    assert 1.7 < errors[0] / errors[1] < 2.3


class Exact:
    "A run of eight Gaussians whose velocity is known in closed form: what `measure` needs of a Run, no more."

    name, step, path, shape, noise_path = "exact", 0, "nowhere", (2,), linear
    config, classes, method = SimpleNamespace(data="gaussians", classes=False), [], SimpleNamespace(flows=True, sees=())
    root = source = property(lambda self: self)

    def refuses(self, **choices):
        return ""

    def __init__(self):
        self.scores, self.asked = [], []
        angles = torch.arange(8) * math.pi / 4
        means = math.sqrt(2 * (1 - 0.01)) * torch.stack([angles.cos(), angles.sin()], 1)
        self.flow = Mixture(means, torch.full((8,), 0.1))

    def walk(self, seed, index, steps, solver, grid: str, weights, head, y, guidance, lower_order_final=None, denoise=True):
        from cudlab.path import grid as times

        self.asked.append((index, y))
        return walk(self.flow, noise(seed, index, (2,)), times(grid, steps), solver)

    def solve(self, **choices):
        states = list(self.walk(**choices))
        return Trajectory(torch.tensor([s.t for s in states]), torch.stack([s.x for s in states]), torch.stack([s.v for s in states[1:]]), states[-1].nfe)

    def add_score(self, score):
        self.scores.append(score)


def test_measure_of_an_exact_flow():
    run = Exact()
    one, many = (measure(run, solver="euler", steps=k, n=2000) for k in (1, 32))
    assert many["fd"] < 0.01 < one["fd"] and many["kd_low"] < 0.02
    assert many["precision"] > 0.9 and many["recall"] > 0.9
    assert (one["nfe"], many["nfe"], measure(run, solver="heun", steps=4, n=500)["nfe"]) == (1, 32, 8)
    assert one["endpoint"] > 10 * many["endpoint"] and one["straightness"] == many["straightness"] > 0
    assert json.loads(json.dumps(one)) == one
    assert (one["extractor"], one["data"], one["split"], one["n"], one["step"]) == ("points", "gaussians", "train", 2000, 0)


def test_the_batch_size_does_not_change_the_score():
    a, b = (measure(Exact(), n=1000, batch=k) for k in (1000, 77))
    for key in ("fd", "kd", "endpoint", "straightness", "nfe", "precision"):
        assert a[key] == pytest.approx(b[key], rel=1e-5, abs=1e-7), key


def test_samples_of_a_score_are_the_first_n_of_the_seed():
    run = Exact()
    measure(run, n=150, batch=64)
    assert torch.cat([index for index, _ in run.asked[:3]]).tolist() == list(range(150))
    run.config, run.classes = SimpleNamespace(data="gaussians", classes=True), ["a", "b", "c"]
    measure(run, n=16)
    assert run.asked[-1][1].tolist() == [k % 3 for k in range(16)]


def test_progress_sees_every_batch_and_may_stop():
    seen = []
    measure(Exact(), n=250, batch=100, progress=lambda done, n: seen.append((done, n)))
    assert seen == [(100, 250), (200, 250), (250, 250)]
    with pytest.raises(KeyboardInterrupt):
        measure(Exact(), n=250, batch=100, progress=lambda done, n: (_ for _ in ()).throw(KeyboardInterrupt))


def test_measure_refuses_what_makes_no_sense():
    for bad in (dict(n=3), dict(steps=0), dict(solver="eulr"), dict(stps=3), dict(seed=-1), dict(guidance=math.nan)):
        assert next(iter(bad)) in complaint(measure, Exact(), **bad)
    assert "unknown feature extractor" in complaint(measure, Exact(), "inception")


def test_a_diverged_run_is_named():
    run = Exact()
    run.flow = lambda x, t: x * math.nan
    assert "did the sampler diverge" in complaint(measure, run, n=100)


def test_any_protocol_field_that_differs_turns_comparison_off():
    score = measure(Exact(), n=100)
    assert comparable(score, score | dict(run="other", solver="heun", steps=4, seed=5, seconds=1.0, step=9)) == ""
    for key in PROTOCOL:
        message = comparable(score, score | {key: "another"})
        assert f"not comparable: {key}" in message
        assert comparable(score, score | {key: "another"}, but=(key,)) == ""
        missing = {k: v for k, v in score.items() if k != key}
        assert key in comparable(score, missing)


def test_plan_counts_calls():
    assert plan(("euler", "heun", "kutta3", "rk45"), (1, 2, 3, 6)) == [
        ("euler", 1), ("euler", 2), ("euler", 3), ("euler", 6), ("heun", 1), ("heun", 3), ("kutta3", 1), ("kutta3", 2), ("rk45", 1)]
    assert "did you mean 'euler'" in complaint(plan, ("eulr",), (1,))


def test_curve_measures_each_point_once():
    run = Exact()
    for score in curve(run, ("euler",), (1, 2), n=100):
        run.add_score(score)
    assert [s["nfe"] for s in run.scores] == [1, 2]
    assert [s["nfe"] for s in curve(run, ("euler",), (1, 2, 3), n=100)] == [3]
    assert [s["nfe"] for s in curve(run, ("euler",), (1,), n=101)] == [1]
    assert [s["seed"] for s in curve(run, ("euler",), (1,), n=100, seed=1)] == [1]
    run.step = 5
    assert len(list(curve(run, ("euler",), (1,), n=100))) == 1


def test_reference_features_are_kept_in_the_process_and_on_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_CACHE_PATH", str(tmp_path))
    data, extractor = load("digits", "test"), features("digits-v1")
    first = reference_features(data, extractor)
    assert reference_features(data, extractor) is first
    metrics.KEPT.clear()
    monkeypatch.setattr(type(data), "take", lambda *a: pytest.fail("computed twice"))
    assert torch.equal(reference_features(data, extractor), first)


def test_your_own_extractor_is_never_read_from_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_CACHE_PATH", str(tmp_path))
    for scale in (1, 2):
        mine = Extractor("digits-v1", "dbcacab2", 64, lambda x, scale=scale: scale * x.flatten(1))
        assert reference_features(load("digits", "test"), mine).abs().max() == scale
    assert not list(tmp_path.glob("*.npz"))


def test_real_digits_are_near_and_noise_is_far():
    real = reference_features(load("digits"), features("digits-v1"))
    held_out = reference_features(load("digits", "test"), features("digits-v1"))
    assert frechet(held_out, real) < 0.2 * frechet(features("digits-v1")(noise(0, 300, (1, 8, 8)).clamp(-1, 1)), real)


def test_sliced_distance_of_known_cases():
    a = noise(0, 2000, (3,))
    assert sliced(a, a) == 0
    assert sliced(a, a + 1) == pytest.approx(1, rel=0.1)
    assert sliced(a, 2 * a) == pytest.approx(1, rel=0.1)
    assert sliced(a, a[:500]) < 0.15


# a real run


@pytest.fixture(scope="module")
def moons(runs_path):
    "A small class-conditional run on the plane."
    from cudlab.core import Config
    from cudlab.run import create
    from cudlab.run import train

    run = create(Config(method="rf", data="moons", steps=40, batch=64, classes=True), "metrics-moons")
    list(train(run))
    return run


def test_measure_of_a_real_run(moons):
    score = measure(moons, n=200, steps=2, guidance=1.5)
    assert (score["run"], score["step"], score["nfe"], score["guidance"]) == ("metrics-moons", 40, 4, 1.5)
    assert json.loads(json.dumps(score)) == score
    assert measure(moons, n=200, steps=2, guidance=1.5, batch=31)["fd"] == pytest.approx(score["fd"], rel=1e-4)
    assert measure(moons, n=200, steps=2, weights="raw")["fd"] != score["fd"]


def test_measure_says_what_the_run_does_not_have(moons):
    assert "head" in complaint(measure, moons, n=100, head=2)
    assert "unknown weights 'avg'" in complaint(measure, moons, n=100, weights="avg")
    assert "unknown grid" in complaint(measure, moons, n=100, grid="log")


def test_the_job_writes_each_score_once(moons):
    job = evaluation(dict(run="metrics-moons", solvers="euler heun", nfes=[2, 3], seeds="0 1", n=100))
    lines = list(evaluate(job.target(), job))
    assert len(lines) == 7 and len(moons.scores) == 6
    assert all("measured before" in line for line in list(evaluate(job.target(), job))[1:]) and len(moons.scores) == 6
    assert len(job.mine(moons)) == 6 and not evaluation(dict(n=101)).mine(moons)
    rows = summary(job.mine(moons))
    assert [(r["solver"], r["nfe"], r["seeds"]) for r in rows] == [("euler", 2, 2), ("euler", 3, 2), ("heun", 2, 2)]
    assert all(r["low"] < r["mean"] < r["high"] for r in rows)
    mixed = moons.scores[:1] + [moons.scores[1] | {"n": 7}]
    assert "n is 100 for one and 7 for the other" in complaint(summary, mixed)
    assert summary(mixed, but=("n",))


@pytest.mark.parametrize("bad, says", [
    (dict(nfe=8), "did you mean 'nfes'"), (dict(nfes="1 two"), "nfes"), (dict(nfes=0), "nfes"), (dict(nfes=""), "nfes"), (dict(seeds="-1"), "seeds"),
    (dict(solvers="eulr"), "did you mean 'euler'"), (dict(solvers="heun", nfes="3"), "no solver"), (dict(solvers="heun", nfes=1), "whole number of steps"), (dict(n=1), "n = 1"),
    (dict(n="many"), "n = 'many'"), (dict(weights="best"), "weights"), (dict(seeds=True), "seeds"), (dict(run=3), "run"),
])
def test_the_job_refuses_wrong_parameters(bad, says):
    assert says in complaint(evaluation, bad)


@pytest.mark.slow
def test_the_job_as_a_notebook(moons, tmp_path):
    papermill = pytest.importorskip("papermill")
    book = str(ROOT / "nbs" / "evaluate.ipynb")
    before = len(moons.scores)
    done = papermill.execute_notebook(book, str(tmp_path / "out.ipynb"), dict(run="metrics-moons", nfes=5, n=60), cwd=str(ROOT / "nbs"), progress_bar=False)
    assert len(moons.scores) == before + 2
    text = json.dumps(done)
    assert "fd@points" in text and "image/png" in text
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'nfes'"):
        papermill.execute_notebook(book, str(tmp_path / "bad.ipynb"), dict(run="metrics-moons", nfe=5), cwd=str(ROOT / "nbs"), progress_bar=False)


def test_the_notebook_and_the_dataclass_have_the_same_parameters():
    import ast
    from dataclasses import fields

    book = json.loads((ROOT / "nbs" / "evaluate.ipynb").read_text())
    (cell,) = (c for c in book["cells"] if "parameters" in c["metadata"].get("tags", []))
    source = "".join(cell["source"])
    given = {n.target.id: ast.literal_eval(n.value) for n in ast.parse(source).body}
    assert given == {f.name: f.default for f in fields(Evaluation)}
    assert all("#" in line for line in source.splitlines())
