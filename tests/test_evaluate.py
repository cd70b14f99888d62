"The evaluation job: points, events, going on, and several processes."

import ast
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import fields
from pathlib import Path

import pandas
import pytest
from conftest import ROOT
from processes import end_processes, evaluate_run, run_processes, start_processes

from cudlab.catalog import get_run_info
from cudlab.config import Config, error_of
from cudlab.create import create_run
from cudlab.evaluate import (
    Evaluation,
    evaluate,
    find_fd,
    parse_evaluation,
    plan_points,
    score_curve,
    summarize,
)
from cudlab.run import Run
from cudlab.score_many import score_many
from cudlab.scoring import TIMED, score, why_incomparable
from cudlab.training import train


@pytest.fixture(scope="module")
def moons(runs_path):
    "A small class-conditional run on the plane."
    config = Config(method="rf", data="moons", steps=20, batch=32, classes=True)
    list(train(create_run(config, "evaluate-moons")))
    return Run.open("evaluate-moons")


@pytest.fixture
def copied(moons, runs_path, tmp_path):
    "A function that copies the run, without scores: copied() -> Run."

    def copy(folder: Path = tmp_path / "copy") -> Run:
        shutil.copytree(moons.dir, folder, ignore=shutil.ignore_patterns("scores.jsonl"))
        return Run(folder)

    return copy


def points_of(events: list) -> list:
    "The events of points alone."
    return [event for event in events if event.entry]


# points


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


def test_curve_measures_each_point_once(copied):
    run = copied()
    for entry in score_curve(run, ("euler",), (1, 2), n=100):
        run.add_score(entry)
    assert [s["nfe"] for s in run.scores] == [1, 2]
    for asked, found in (
        (dict(nfes=(1, 2, 3), n=100), [3]),
        (dict(nfes=(1,), n=101), [1]),
        (dict(nfes=(1,), n=100, seed=1), [1]),
    ):
        assert [s["nfe"] for s in score_curve(run, ("euler",), **asked)] == found
    run.step = 5  # another checkpoint
    assert len(list(score_curve(run, ("euler",), (1,), n=100))) == 1


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.long)])
def test_many_points_at_once_are_what_they_are_alone(moons, workers):
    points = [{"solver": name, "steps": 3, "n": 300} for name in ("euler", "ab2")]
    rows = score_many(moons, points, workers=workers)
    alone = score_curve(moons, ("euler", "ab2"), (3,), n=300)
    for row, entry in zip(rows, alone, strict=True):
        assert (row["nfe"], row["solver"]) == (entry["nfe"], entry["solver"])
        assert row["fd"] == pytest.approx(entry["fd"], rel=1e-4)


# the job


def test_the_job_writes_each_score_once(copied):
    run = copied()
    job = parse_evaluation(
        dict(run=str(run.dir), solvers="euler heun", nfes=[2, 3], seeds="0 1", n=100)
    )
    events = list(evaluate(job.targets(), job))
    assert len(events) == 8 and len(run.scores) == 6
    assert [event.entry for event in points_of(events)] == run.scores
    assert all(event.new and " NFE " in str(event) for event in points_of(events))
    assert str(events[0]).startswith("run copy: step 20, 6 points of 100 samples, points (none)")
    assert str(events[1]) == "heun left out: no number of steps makes exactly 3 calls"
    again = list(evaluate(job.targets(), job))
    assert [event.entry for event in points_of(again)] == run.scores
    assert not any(event.new for event in again) and str(again[2]).endswith(
        f"measured before: fd {run.scores[0]['fd']:.4f}"
    )
    assert job.existing_scores(run) == run.scores
    assert not parse_evaluation(dict(n=101)).existing_scores(run)


def test_the_fd_of_a_way_of_sampling_is_that_of_the_most_samples(copied):
    run = copied()
    how = parse_evaluation(dict(solvers="ab2", nfes="2")).points()[0]
    assert find_fd(run, how) is None
    way = dict(solver="ab2", steps=2, extractor="points", step=run.step, n=500)
    odd = [
        dict(fd=math.nan, seed=3),
        dict(fd=0.1, n=100),
        dict(fd=0.1, step=1),
        dict(fd=0.1, head=2),
    ]
    for entry in (*odd, dict(fd=0.1, extractor="other"), dict(fd=3.0, fd_low=2.0, fd_high=4.0)):
        run.add_score(way | entry)
    found = dict(fd=3.0, low=2.0, high=4.0, seeds=1, n=500, extractor="points")
    assert find_fd(run, how) == found
    run.add_score(way | dict(fd=5.0, seed=1))
    found = find_fd(run, how)
    assert (found["fd"], found["seeds"]) == (4.0, 2) and found["low"] < 3 < 5 < found["high"]


def test_seeds_are_summed_up_and_unlike_scores_refused(copied):
    run = copied()
    job = parse_evaluation(dict(solvers="euler heun", nfes="2 3", seeds="0 1", n=60))
    list(evaluate(run, job))
    rows = summarize(job.existing_scores(run))
    expected = [("euler", 2, 2), ("euler", 3, 2), ("heun", 2, 2)]
    assert [(r["solver"], r["nfe"], r["seeds"]) for r in rows] == expected
    assert all(r["low"] < r["mean"] < r["high"] for r in rows)
    mixed = run.scores[:1] + [run.scores[1] | {"n": 7}]
    assert "n is 60 for one and 7 for the other" in error_of(summarize, mixed)
    assert summarize(mixed, but=("n",))


def test_the_job_takes_several_runs_and_goes_on_where_it_stopped(moons, runs_path):
    for name in ("one", "two"):
        shutil.copytree(moons.dir, runs_path / name, ignore=shutil.ignore_patterns("scores.jsonl"))
    job = parse_evaluation(
        dict(run=["one", "two", "one"], solvers="euler heun euler", nfes="2", n=60)
    )
    targets = job.targets()
    assert [run.name for run in targets] == ["one", "two"]
    stopped = evaluate(targets, job)
    for _ in range(3):
        event = next(stopped)
    stopped.close()
    assert (event.done, event.total) == (2, 4) and [len(r.scores) for r in targets] == [2, 0]
    events = list(evaluate(targets, job))
    assert [len(run.scores) for run in targets] == [2, 2]
    assert [(e.run.name, e.done, e.new) for e in points_of(events)] == [
        ("one", 1, False),
        ("one", 2, False),
        ("two", 3, True),
        ("two", 4, True),
    ]
    assert [str(event).split()[0] for event in events] == ["run", "1/4", "2/4", "run", "3/4", "4/4"]
    assert str(events[-1]).endswith("0:00 left")
    assert job.existing_scores(targets[1]) == targets[1].scores
    assert "unknown run 'three'" in error_of(parse_evaluation(dict(run="one three")).targets)


def test_a_folder_with_a_space_is_one_run(copied, tmp_path):
    run = copied(tmp_path / "with a space")
    assert [r.dir for r in parse_evaluation(dict(run=str(run.dir))).targets()] == [run.dir]


def test_what_a_run_cannot_do_is_left_out_and_said(copied):
    job = parse_evaluation(dict(solvers="euler heun flow-map", nfes="1", n=60))
    events = list(evaluate(copied(), job))
    said = [str(event) for event in events if not event.entry]
    assert "1 points of 60 samples" in said[0]
    assert said[1].startswith("1 points left out: solver = 'flow-map' is not possible")
    assert said[2] == "heun left out: no number of steps makes exactly 1 calls"
    assert [(event.done, event.total) for event in points_of(events)] == [(1, 1)]


def test_guidance_without_labels_is_refused_and_stored_nowhere(runs_path):
    "Scores of before that name it are read as they are."
    shutil.copytree(ROOT / "checkpoints" / "digits-rf", runs_path / "unlabelled")
    run = Run.open("unlabelled")
    wanted = dict(run=run.name, solvers="euler", nfes="2", n=100)
    before = len(run.scores)
    for guidance in (0, 2):
        job = parse_evaluation(wanted | dict(guidance=guidance))
        words = f"guidance = {guidance} means nothing to run 'unlabelled'"
        assert words in error_of(list, evaluate(run, job))
        assert words in error_of(score, run, n=100, guidance=guidance)
    assert len(run.scores) == before
    entry = next(s for s in run.scores if (s["solver"], s["steps"]) == ("euler", 2))
    run.add_score(entry | dict(n=100, seed=0, guidance=2.0))
    (known,) = job.existing_scores(run)
    assert known["guidance"] == 2.0 and get_run_info(run.name).best


def test_existing_scores_leave_out_other_spaces_and_earlier_steps(copied):
    run = copied()
    job = parse_evaluation(dict(solvers="euler", nfes="6", n=80))
    list(evaluate(run, job))
    (entry,) = job.existing_scores(run)
    for other in (dict(step=1), dict(extractor="another"), dict(data_hash="another"), dict(seed=9)):
        run.add_score(entry | other)
    assert job.existing_scores(run) == [entry]


def test_scores_from_before_are_still_read(runs_path):
    "Scores without the newest keys are found, summed up and compared."
    shutil.copytree(ROOT / "checkpoints" / "digits-rf", runs_path / "before")
    run = Run.open("before")
    new = {"density", "coverage", "fd_inf", "fd_inf_low", "fd_inf_high", "classes", *TIMED, "ms"}
    old = [{k: v for k, v in entry.items() if k not in new - {"device"}} for entry in run.scores]
    (run.dir / "scores.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in old))
    job = parse_evaluation(dict(run="before", solvers="euler", nfes="1 2"))
    found = job.existing_scores(run)
    assert [s["nfe"] for s in found] == [1, 2] and len(summarize(found)) == 2
    assert not summarize(found, "density") and not why_incomparable(*found)
    assert "not recorded" in why_incomparable(*found, also=TIMED)
    assert not any(event.new for event in evaluate(run, job))


def test_scores_are_a_table_for_pandas(copied):
    run = copied()
    list(evaluate(run, parse_evaluation(dict(solvers="euler", nfes="2 3", n=64))))
    table = pandas.read_json(run.dir / "scores.jsonl", lines=True)
    keys = "fd fd_low kd density coverage nfe ms machine extractor_hash seed"
    assert len(table) == 2 and set(keys.split()) <= set(table.columns)
    assert table.fd.dtype == float


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
        (dict(run={"name": 3}), "run"),
    ],
)
def test_the_job_refuses_wrong_parameters(bad, says):
    assert says in error_of(parse_evaluation, bad)


def test_the_notebook_and_the_dataclass_have_the_same_parameters():
    book = json.loads((ROOT / "nbs" / "evaluate.ipynb").read_text())
    (cell,) = (c for c in book["cells"] if "parameters" in c["metadata"].get("tags", []))
    source = "".join(cell["source"])
    given = {n.target.id: ast.literal_eval(n.value) for n in ast.parse(source).body}
    assert given == {f.name: f.default for f in fields(Evaluation)}


@pytest.mark.long
def test_the_job_as_a_notebook(copied, tmp_path):
    papermill = pytest.importorskip("papermill")
    run = copied()
    book = str(ROOT / "nbs" / "evaluate.ipynb")
    setup = dict(cwd=str(ROOT / "nbs"), progress_bar=False)
    params = dict(run=str(run.dir), n=60)
    done = papermill.execute_notebook(
        book, str(tmp_path / "out.ipynb"), params | {"nfes": 5}, **setup
    )
    assert len(run.scores) == 2
    text = json.dumps(done)
    assert "fd@points" in text and "image/png" in text
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'nfes'"):
        papermill.execute_notebook(book, str(tmp_path / "bad.ipynb"), params | {"nfe": 5}, **setup)


# several processes

TIMES = {"seconds", "ms", "machine"}


def test_a_team_measures_what_one_process_measures(copied, tmp_path):
    "Three batches of samples: of two processes one has more, of four one has none."
    asked = dict(solvers="euler heun", nfes="4", n=1203)
    scores = {}
    for size in (1, 2, 4):
        run = copied(tmp_path / str(size) / "same")
        run_processes(size, evaluate_run, str(run.dir), asked)
        scores[size] = run.scores
    alone = scores.pop(1)
    assert len(alone) == 2
    for size, found in scores.items():
        for one, many in zip(alone, found, strict=True):
            assert many["machine"] == f"{size} x {one['machine']}"
            for key in one.keys() - TIMES:
                same = (
                    pytest.approx(one[key], rel=1e-5) if isinstance(one[key], float) else one[key]
                )
                assert many[key] == same, key
    run_processes(2, evaluate_run, str(run.dir), asked)
    assert run.scores == found  # nothing was measured again


@pytest.mark.parametrize("victim", [0, 1])
def test_a_lost_process_ends_the_team_and_leaves_whole_scores(copied, victim):
    run = copied()
    asked = dict(solvers="euler", nfes=list(range(20, 320)), n=100)
    started = start_processes(2, evaluate_run, str(run.dir), asked)
    while not run.scores and all(process.is_alive() for process in started):
        time.sleep(0.05)
    os.kill(started[victim].pid, signal.SIGKILL)
    codes = end_processes(started)
    assert codes[victim] == -signal.SIGKILL and codes[1 - victim] > 0
    text = (run.dir / "scores.jsonl").read_text()
    assert text.endswith("\n") and len(run.scores) == text.count("\n") > 0


def start_command(*words: str, processes: int = 1) -> subprocess.Popen:
    "`cudlab WORDS` as a shell starts it, or torchrun, which needs -- or takes --n for its own."
    team = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    start = [*team, "-m", "--"] if processes > 1 else ["-m"]
    return subprocess.Popen(
        [sys.executable, *start, "cudlab", *words],
        env=os.environ | {"CUDLAB_THREADS": "1", "CUDLAB_DEVICE": "cpu", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.long
@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM], ids=["interrupt", "terminate"])
def test_the_command_can_be_stopped_and_keeps_its_scores(copied, sign):
    run = copied()
    nfes = " ".join(map(str, range(100, 400)))
    process = start_command(
        "evaluate", str(run.dir), "--solvers", "euler", "--nfes", nfes, "--n", "90"
    )
    for _ in range(2):
        process.stdout.readline()
    process.send_signal(sign)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 3 and "the same command continues it" in out + err
    assert run.scores and (run.dir / "scores.jsonl").read_text().endswith("\n")


@pytest.mark.long
def test_torchrun_measures_and_the_first_process_speaks(copied):
    run = copied()
    words = ("evaluate", str(run.dir), "--solvers", "euler heun", "--nfes", "4", "--n", "1203")
    for said in (" NFE ", "measured before"):
        process = start_command(*words, processes=2)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.count(said) == 2 and out.count("run copy") == 1
    assert len(run.scores) == 2
