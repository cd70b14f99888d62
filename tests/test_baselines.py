"""The baselines: their job files can be run, and what the page says of them stands in the runs that
ship.
"""

import json
from pathlib import Path

import pytest

from cudlab.data import load_data
from cudlab.jobs import parse_parameters
from cudlab.run import Run

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "jobs").glob("*-h*.json"))  # hour and h200; tests/test_cud.py has others
TOLD = ROOT / "docs" / "baselines.json"


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_a_job_file_can_be_run_here_in_legs(file, tmp_path, monkeypatch):
    from cudlab.plan import is_finished, load_sweep

    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path))
    content = json.loads(file.read_text())
    try:
        load_data(content["train"]["data"])
    except ValueError as e:
        pytest.skip(str(e))
    sweep = load_sweep(file, {"minutes": 9})
    for task in sweep.tasks.values():  # what ships need not be trained again
        ships = task.dir.parent == ROOT / "checkpoints"
        assert not task.error and ships == (ROOT / "checkpoints" / task.dir.name).is_dir()
        assert is_finished(task) in (False, ships)
    trainings = [task.name for task in sweep.tasks.values() if task.kind == "train"]
    assert sorted(trainings) == sorted(job["name"] for job in content["jobs"])
    assert (
        list(sweep.tasks)[:2] == [trainings[0], f"{trainings[0]}.evaluate"]
        and trainings[0].endswith("-rf")
        and trainings[1].endswith("-cud")
    )
    for task in sweep.tasks.values():
        if task.kind == "train":
            config, _ = parse_parameters(task.params)
            assert config.method == "dode" or config.net == content["train"]["net"]
            assert (
                sum(
                    t.kind == "evaluate" and t.params["run"] == task.name
                    for t in sweep.tasks.values()
                )
                == 1
            ), task.name
        else:
            assert task.params["n"] == (5000 if file.stem.endswith("hour") else 50_000)


SHIPPED = sorted(f for f in (ROOT / "checkpoints").iterdir() if f.is_dir())


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_every_run_that_ships_verifies_and_samples(folder):
    run = Run(folder)
    assert run.verify() == 3 and run.step == run.num_steps and run.metrics and run.scores
    assert run.weights == ("ema",) and len(run.metadata["network"]) == 64
    assert run.solve(index=2, steps=run.sampling_defaults["steps"]).x.isfinite().all()


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_every_student_that_ships_knows_its_teacher(folder):
    known = Run(folder).info.get("teacher")
    if known:
        teacher = Run(ROOT / "checkpoints" / known["name"])
        assert teacher.network_hash() == known["network"]


def test_what_ships_is_small():
    sizes = {p: p.stat().st_size for p in (ROOT / "checkpoints").rglob("*") if p.is_file()}
    assert sum(sizes.values()) < 50_000_000 and max(sizes.values()) < 15_000_000


@pytest.mark.skipif(not TOLD.is_file(), reason="no baseline ships yet")
def test_every_number_of_the_baselines_was_measured_on_a_run_that_ships():
    told = json.loads(TOLD.read_text())
    jobs = {
        job["name"]: job | json.loads(file.read_text())["train"]
        for file in FILES
        for job in json.loads(file.read_text())["jobs"]
    }
    total = 0
    for table in told["tables"].values():
        for row in table["rows"]:
            run = Run(ROOT / "checkpoints" / row["run"])
            assert (
                run.config.method == jobs[run.name]["method"]
                and run.config.data == jobs[run.name]["data"]
                and run.config.seed == 0
            )
            assert (
                run.config.steps == jobs[run.name].get("steps", run.config.steps)
                and run.training_cost["cpu"] > 0
            )
            for nfe, score in row["scores"].items():
                found = [
                    s
                    for s in run.scores
                    if s["nfe"] == int(nfe)
                    and s["solver"] == score["solver"]
                    and s["n"] == score["n"]
                ]
                assert any(all(s[k] == v for k, v in score.items()) for s in found), (run.name, nfe)
                total += 1
    assert total >= 20
