"""Learned solvers as runs: made by a job, found by name, bound to their network and grid."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cudlab.catalog import strip_run
from cudlab.cli import run_main
from cudlab.config import Config, error_of
from cudlab.evaluate import evaluate, parse_evaluation, score_many
from cudlab.rng import Rng, draw_noise
from cudlab.run import Run, find_solver
from cudlab.scoring import endpoint_error, score
from cudlab.training import create_run, train

ROOT = Path(__file__).parents[1]
SMALL = dict(samples=24, batches=3, moves=4)


@pytest.fixture(autouse=True)
def own_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))


def fitted(name="learned", **args) -> Run:
    run = create_run(Config(method="dode", args=SMALL | args), name)
    lines = list(train(run))
    assert lines[-1].startswith(f"run {name}: done")
    return run


def test_a_learned_solver_is_nearer_to_the_flow_than_its_base():
    run, teacher = fitted(samples=64), Run.open("digits-rf")
    truth = teacher.solve(index=200, seed=5, steps=64, solver="heun").x
    ends = {
        name: endpoint_error(teacher.solve(index=200, seed=5, steps=4, solver=name).x, truth)
        for name in ("euler", run.name)
    }
    assert ends[run.name] < 0.7 * ends["euler"]


@pytest.mark.parametrize("dtype", ["", "float32", "float16"])
def test_a_learned_solver_that_was_cut_samples_the_same(dtype, tmp_path):
    run = fitted()
    copy = strip_run(run, tmp_path / "cut", dtype)
    torch.testing.assert_close(
        copy.solve(index=3).x,
        run.solve(index=3).x,
        rtol=0,
        atol=1e-6 if dtype != "float16" else 5e-3,
    )


def test_the_run_samples_like_its_teacher_with_it():
    run = fitted()
    assert run.sampling_defaults == {
        "solver": "learned",
        "steps": 4,
        "grid": "uniform",
        "head": 1,
        "guidance": 1.0,
    }
    mine, theirs = (
        run.solve(index=4, seed=1),
        Run.open("digits-rf").solve(index=4, seed=1, solver="learned", steps=4, grid="native"),
    )
    assert torch.equal(mine.x, theirs.x) and mine.nfe == 4
    assert run.verify() == 5 and find_solver("learned").ts[0] == 1.0


@pytest.mark.parametrize(
    "base, calls",
    [
        ("ddim", 4),
        ("ipndm", 4),
        ("deis-tab3", 4),
        ("dpm-2s", 7),
        ("dpm-3s", 10),
        ("edm-heun", 7),
        ("dpmpp-2m", 4),
    ],
)
def test_every_base_of_the_paper_is_made_by_a_run(base, calls):
    run = fitted(base=base)
    assert (
        run.tensors("ema.safetensors")["solver.lam"].shape == (calls, 1)
        and run.solve(index=3).nfe == calls
    )


def test_it_is_refused_where_it_was_not_fitted_for():
    fitted()
    teacher, other = Run.open("digits-rf"), Run.open("digits-cud")
    for run, choice, said in (
        (other, {}, "weights of 'digits-rf' as they were"),
        (teacher, dict(steps=5), "steps = 4"),
        (teacher, dict(grid="shifted"), "grid = 'uniform'"),
        (teacher, dict(weights="raw"), "averaged"),
        (teacher, dict(guidance=2.0), "guidance = 1.0"),
        (teacher, dict(denoise=False), "denoise = True"),
    ):
        with pytest.raises(ValueError, match=said):
            run.solve(**dict(index=2, steps=4, solver="learned", grid="uniform") | choice)
    assert "learned" in error_of(find_solver, "digits-rf-learned") or "unknown solver" in error_of(
        find_solver, "digits-rf-learned"
    )
    assert "holds a network" in error_of(find_solver, "digits-rf")


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(data="moons"), "use data=digits"),
        (dict(classes=True), "use classes=False"),
        (dict(path="vp"), "use path=linear"),
        (dict(args={"teacher": "nobody"}), "unknown run 'nobody'"),
        (dict(args={"head": 2}), "head = 2"),
        (dict(args={"base": "heun"}), "base = 'heun'"),
        (dict(args={"teacher": ""}), "teacher"),
        (dict(args={"faithful": True, "fit_by": "joint"}), "faithful"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        create_run(Config(method="dode", **change))


def test_a_solver_is_no_teacher():
    fitted()
    with pytest.raises(ValueError, match="holds a solver"):
        create_run(Config(method="dode", args={"teacher": "learned"}))


def test_a_teacher_that_changed_is_noticed(tmp_path):
    import shutil

    folder = tmp_path / "runs" / "mine"
    shutil.copytree(ROOT / "checkpoints/digits-rf", folder)
    run = fitted(teacher="mine")
    manifest = json.loads((folder / "MANIFEST.json").read_text())
    manifest["files"]["ema.safetensors"]["sha256"] = "0" * 64
    (folder / "MANIFEST.json").write_text(json.dumps(manifest))
    assert "another network" in error_of(run.solve, index=2)
    shutil.rmtree(folder)
    assert "'mine', which cannot be used" in error_of(run.solve, index=2)
    assert "cannot be used" in error_of(lambda: list(train(run)))


@pytest.mark.parametrize("args", [{}, dict(base="dpm-2s", fit_by="joint", target="heun", moves=2)])
def test_it_resumes_bit_for_bit(args):
    whole, parts = (
        fitted("whole", **args),
        create_run(Config(method="dode", args=SMALL | args), "parts"),
    )
    for until in (1, 2, 0):
        words = [
            sys.executable,
            "-m",
            "cudlab.cli",
            "train",
            "method=dode",
            "name=parts",
            f"until={until}",
            *(f"args.{k}={v}" for k, v in (SMALL | args).items()),
        ]
        done = subprocess.run(
            words,
            cwd=ROOT,
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == (3 if until else 0), done.stderr
    a, b = whole.tensors("ema.safetensors"), Run(parts.dir).tensors("ema.safetensors")
    assert a.keys() == b.keys()
    for key in a:
        torch.testing.assert_close(
            a[key], b[key], rtol=0, atol=0 if torch.get_num_threads() == 1 else 1e-3
        )


def test_no_score_draws_the_noise_of_a_calibration():
    scored = draw_noise(0, 2000, (1, 8, 8)).flatten(1)
    for step in range(5):
        for stream in ("calibration", "held-out"):
            calibrated = Rng(0, step).normal(stream, 100, (1, 8, 8)).flatten(1)
            assert torch.cdist(calibrated, scored).min() > 1


def test_classes_and_guidance_are_fitted_for():
    run = create_run(
        Config(
            method="dode",
            classes=True,
            args=SMALL | dict(teacher="digits-cud-aim8-classes", guidance=2.0),
        ),
        "guided",
    )
    list(train(run))
    teacher = Run.open("digits-cud-aim8-classes")
    assert (
        teacher.solve(index=4, steps=4, solver="guided", grid="uniform", y=7, guidance=2.0).nfe == 8
    )
    with pytest.raises(ValueError, match="guidance = 2.0, not for 1.0"):
        teacher.solve(index=4, steps=4, solver="guided", grid="uniform", y=7)
    assert run.sampling_defaults["guidance"] == 2.0 and run.solve(index=4, y=7).nfe == 8


def test_a_solver_of_the_second_head_is_sampled_with_it():
    run = fitted(teacher="digits-cud-heads2", head=2)
    assert torch.equal(
        run.solve(index=3).x,
        Run.open("digits-cud-heads2").solve(index=3, solver=run.name, head=2).x,
    )


def test_another_solver_under_the_same_name_is_measured_anew():
    import shutil

    teacher = create_run(Config(data="moons", method="rf", steps=3, batch=8), "plane")
    list(train(teacher))
    for scale in (5, 10):
        run = create_run(
            Config(data="moons", method="dode", args=SMALL | dict(teacher="plane", scale=scale)),
            "learned",
        )
        list(train(run))
        ask = parse_evaluation(dict(solvers="learned", nfes="4", n=100))
        assert "measured before" not in list(evaluate(Run.open("plane"), ask))[-1]
        assert "measured before" in list(evaluate(Run.open("plane"), ask))[-1]
        shutil.rmtree(run.dir)


@pytest.mark.parametrize(
    "change, said",
    [
        (dict(steps=7), "steps = 7"),
        (dict(lr=0.1), "lr = 0.1"),
        (dict(compile=True), "compile = True"),
    ],
)
def test_what_means_nothing_to_it_is_refused(change, said):
    with pytest.raises(ValueError, match=said):
        create_run(Config(method="dode", **change))


def test_it_is_scored_like_any_solver():
    run = fitted()
    lines = list(
        evaluate(
            run, parse_evaluation(dict(run="learned", solvers="learned euler", nfes="4 5", n=200))
        )
    )
    assert len(lines) == 4 and [(s["solver"], s["nfe"]) for s in run.scores] == [
        ("learned", 4),
        ("euler", 4),
        ("euler", 5),
    ]
    assert (
        run.scores[0]["endpoint"] < run.scores[1]["endpoint"]
        and run.scores[0]["fd_low"] < run.scores[0]["fd"] < run.scores[0]["fd_high"]
    )
    again = list(
        evaluate(
            run, parse_evaluation(dict(run="learned", solvers="learned euler", nfes="4 5", n=200))
        )
    )
    assert sum("measured before" in line for line in again) == 3
    fewer = list(
        evaluate(
            run, parse_evaluation(dict(run="learned", solvers="learned euler", nfes="5", n=200))
        )
    )
    assert (
        fewer[1] == "learned left out: no number of steps makes exactly 5 calls" and len(fewer) == 3
    )


@pytest.mark.parametrize("workers", [1, 2])
def test_a_sweep_says_what_single_measurements_say(workers):
    run = Run.open("digits-rf")
    points = [
        dict(solver=s, steps=k, grid=g, n=250)
        for s, k, g in (
            ("euler", 3, "uniform"),
            ("ab2", 3, "uniform"),
            ("dpmpp-2m", 3, "native"),
            ("edm-heun", 2, "edm"),
        )
    ]
    goal = run.solve(index=100, steps=64, solver="heun").x
    for row, point in zip(score_many(run, points, goal=goal, workers=workers), points):
        entry = score(run, **point)
        assert abs(row["fd"] - entry["fd"]) < 1e-2 * entry["fd"] and row["nfe"] == entry["nfe"]
        assert (
            abs(
                row["endpoint"]
                - endpoint_error(
                    run.solve(
                        index=100, steps=point["steps"], solver=point["solver"], grid=point["grid"]
                    ).x,
                    goal,
                )
            )
            < 1e-4
        )


def test_the_command_line_lists_it(capsys):
    fitted()
    assert (
        run_main(["list"]) == 0
        and "learned" in capsys.readouterr().out
        and run_main(["verify", "learned"]) == 0
    )
