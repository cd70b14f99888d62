"""Learned solvers as runs: made by a training, found by name, bound to their network and grid."""

import shutil

import pytest
import torch

from cudlab.catalog import list_runs, strip_run
from cudlab.config import Config, error_of
from cudlab.create import create_run
from cudlab.evaluate import evaluate, parse_evaluation
from cudlab.jobs import TrainingStopped
from cudlab.recipe import apply_recipe, max_weight, sampling_recipe
from cudlab.rng import Rng, draw_noise
from cudlab.run import Run, find_solver
from cudlab.score_many import score_many
from cudlab.scoring import endpoint_error, score
from cudlab.training import train

SMALL = dict(samples=24, batches=3, moves=4)
DIGITS = dict(data="digits", teacher="digits-rf")


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))


def flow(name="plane", **changes) -> Run:
    "A small flow in the plane, trained for some steps."
    run = create_run(Config(data="moons", method="rf", steps=20, batch=32, **changes), name)
    list(train(run, device="cpu"))
    return run


def config(data="moons", **args) -> Config:
    return Config(data=data, method="dode", args=dict(teacher="plane") | SMALL | args)


def fitted(name="learned", **args) -> Run:
    "A learned solver of a network in the plane, or of the one that `teacher` names."
    if "teacher" not in args:
        flow()
    run = create_run(config(**args), name)
    list(train(run, device="cpu"))
    assert run.step == run.num_steps == args.get("batches", 3)
    return run


def measure(name, **choices) -> list:
    "What an evaluation says of a run."
    return list(evaluate(Run.open(name), parse_evaluation(dict(n=80) | choices)))


def test_a_learned_solver_is_nearer_to_the_flow_than_its_base():
    run, teacher = fitted(**DIGITS, samples=48, batches=1), Run.open("digits-rf")
    truth = teacher.solve(index=64, seed=5, steps=32, solver="heun").x
    ends = {
        name: endpoint_error(teacher.solve(index=64, seed=5, steps=4, solver=name).x, truth)
        for name in ("euler", run.name)
    }
    assert ends[run.name] < 0.75 * ends["euler"]


def test_a_learned_solver_that_was_cut_samples_the_same(tmp_path):
    run = fitted()
    x = run.solve(index=3).x
    for dtype in ("", "float32", "float16"):
        copy = strip_run(run, tmp_path / f"cut{dtype}", dtype)
        close = 5e-3 if dtype == "float16" else 1e-5 * x.abs().max().item()
        torch.testing.assert_close(copy.solve(index=3).x, x, rtol=0, atol=close)


def test_the_run_samples_like_its_teacher_with_it():
    run = fitted()
    same = {"solver": "learned", "steps": 4, "head": 1, "guidance": 1.0}
    assert run.sampling_defaults == same | {"grid": "uniform"}
    theirs = Run.open("plane").solve(index=4, seed=1, solver="learned", steps=4, grid="native")
    mine = run.solve(index=4, seed=1)
    assert torch.equal(mine.x, theirs.x) and mine.nfe == 4
    run.verify()
    assert find_solver("learned").ts[0] == 1.0
    assert "learned" in [info.name for info in list_runs()]


def test_every_base_of_the_paper_is_made_by_a_run():
    calls = {"ddim": 4, "ipndm": 4, "deis-tab3": 4, "dpmpp-2m": 4}
    flow()
    for base, count in (calls | {"dpm-2s": 7, "dpm-3s": 10, "edm-heun": 7}).items():
        run = fitted(base, teacher="plane", base=base, samples=8, batches=1)
        assert run.tensors("ema.safetensors")["solver.lam"].shape == (count, 1)
        assert run.solve(index=3).nfe == count


def test_a_solver_that_adds_changes_of_predicted_data_is_a_recipe_too():
    run = fitted(base="edm-heun", faithful=True, samples=32)
    assert run.method.leans_on == "x0" and "basis_x0" in "".join(run.tensors("ema.safetensors"))
    net = Run.open("plane").net(device="cpu")
    rows = sampling_recipe(run, steps=4)
    found = apply_recipe(rows, lambda x, t, r: net(x, t), draw_noise(0, 5, (2,)))
    tolerance = 1e-5 * max_weight(rows)
    torch.testing.assert_close(found, run.solve(index=5).x, rtol=0, atol=tolerance)


def test_it_is_refused_where_it_was_not_fitted_for():
    fitted()
    plane, other = Run.open("plane"), flow("other", seed=1)
    for run, choice, words in (
        (other, {}, "weights of 'plane' as they were"),
        (plane, dict(steps=5), "steps = 4"),
        (plane, dict(grid="shifted"), "grid = 'uniform'"),
        (plane, dict(weights="raw"), "averaged"),
        (plane, dict(guidance=2.0), "guidance = 2 means nothing to run 'plane'"),
        (plane, dict(denoise=False), "denoise = True"),
    ):
        with pytest.raises(ValueError, match=words):
            run.solve(**dict(index=2, steps=4, solver="learned", grid="uniform") | choice)
    assert "unknown solver" in error_of(find_solver, "nobody-learned")
    assert "holds a network" in error_of(find_solver, "digits-rf")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(data="moons"), "use data=digits"),
        (dict(classes=True), "use classes=False"),
        (dict(path="vp"), "use path=linear"),
        (dict(args={"teacher": "nobody"}), "unknown run 'nobody'"),
        (dict(args={"head": 2}), "head = 2"),
        (dict(args={"base": "heun"}), "base = 'heun'"),
        (dict(args={"teacher": ""}), "teacher"),
        (dict(args={"faithful": True, "fit_by": "joint"}), "faithful"),
        (dict(steps=7), "steps = 7"),
        (dict(lr=0.1), "lr = 0.1"),
        (dict(compile=True), "compile = True"),
    ],
)
def test_what_does_not_go_with_it_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        create_run(Config(method="dode", **change))


def test_a_solver_is_no_teacher():
    fitted()
    with pytest.raises(ValueError, match="holds a solver"):
        create_run(config(teacher="learned"))


def test_a_teacher_that_changed_is_noticed():
    run = fitted()
    shutil.rmtree(Run.open("plane").dir)
    assert "'plane', which cannot be used" in error_of(run.solve, index=2)
    assert "cannot be used" in error_of(lambda: list(train(run)))
    flow(seed=1)
    assert "which is another now" in error_of(Run.open("learned").solve, index=2)


@pytest.mark.parametrize("args", [{}, dict(base="dpm-2s", fit_by="joint", target="heun", moves=2)])
def test_it_resumes_bit_for_bit(args):
    whole = fitted("whole", **args)
    create_run(config(**args), "legs")
    for until in (1, 2, 0):
        try:
            list(train(Run.open("legs"), until=until, device="cpu"))
        except TrainingStopped:
            assert until
    a, b = (Run.open(name).tensors("ema.safetensors") for name in (whole.name, "legs"))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_no_score_draws_the_noise_of_a_calibration():
    scored = draw_noise(0, 2000, (1, 8, 8)).flatten(1)
    for step in range(5):
        for stream in ("calibration", "held-out"):
            calibrated = Rng(0, step).normal(stream, 100, (1, 8, 8)).flatten(1)
            assert torch.cdist(calibrated, scored).min() > 1


def test_classes_and_guidance_are_fitted_for():
    few = SMALL | dict(samples=10, batches=1, teacher="digits-cud-aim8-classes", guidance=2.0)
    run = create_run(Config(method="dode", classes=True, args=few), "guided")
    list(train(run))
    teacher = Run.open("digits-cud-aim8-classes")
    choice = dict(index=2, steps=4, solver="guided", grid="uniform", y=7)
    assert teacher.solve(**choice, guidance=2.0).nfe == 8
    with pytest.raises(ValueError, match="guidance = 2.0, not for 1.0"):
        teacher.solve(**choice)
    assert run.sampling_defaults["guidance"] == 2.0 and run.solve(index=4, y=7).nfe == 8


def test_a_solver_of_the_second_head_is_sampled_with_it():
    few = dict(data="digits", samples=8, batches=1)
    run = fitted(teacher="digits-cud-heads2", head=2, **few)
    teacher = Run.open("digits-cud-heads2")
    assert torch.equal(run.solve(index=3).x, teacher.solve(index=3, solver=run.name, head=2).x)


def test_another_solver_under_the_same_name_is_measured_anew():
    flow()
    counts = []
    for scale in (5, 10):
        run = fitted(teacher="plane", scale=scale)
        for _ in range(2):
            measure("plane", solvers="learned", nfes="4")
            counts.append(len(Run.open("plane").scores))
        shutil.rmtree(run.dir)
    assert counts == [1, 1, 2, 2]


def test_it_is_scored_like_any_solver():
    fitted(**DIGITS, batches=1, samples=48)
    for _ in range(2):  # the second time everything has been measured
        told = measure("learned", solvers="learned euler", nfes="4 5", n=100)
        scores = Run.open("learned").scores
        assert [(s["solver"], s["nfe"]) for s in scores] == [
            ("learned", 4),
            ("euler", 4),
            ("euler", 5),
        ]
        assert len(told) >= 4
    assert scores[0]["endpoint"] < scores[1]["endpoint"]
    assert scores[0]["fd_low"] < scores[0]["fd"] < scores[0]["fd_high"]
    fewer = measure("learned", solvers="learned euler", nfes="5", n=100)
    assert any("no number of steps makes exactly 5 calls" in str(line) for line in fewer)


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_sweep_says_what_single_measurements_say(workers):
    run = Run.open("digits-rf")
    ways = [("euler", 3, "uniform"), ("dpmpp-2m", 3, "native"), ("edm-heun", 2, "edm")]
    points = [dict(solver=s, steps=k, grid=g, n=100) for s, k, g in ways]
    goal = run.solve(index=50, steps=16, solver="heun").x
    for row, point in zip(score_many(run, points, goal=goal, workers=workers), points):
        entry = score(run, **point)
        assert abs(row["fd"] - entry["fd"]) < 1e-2 * entry["fd"] and row["nfe"] == entry["nfe"]
        choice = {key: point[key] for key in ("steps", "solver", "grid")}
        single = endpoint_error(run.solve(index=50, **choice).x, goal)
        assert abs(row["endpoint"] - single) < 1e-4
