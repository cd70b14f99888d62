"""The baselines: their job files can be run, and what the page says of them stands in the runs that
ship.
"""

import json
from pathlib import Path

import pytest

from cudlab.data import load_data
from cudlab.run import Run
from cudlab.sweep import is_finished, load_sweep
from cudlab.training import parse_parameters

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "jobs").glob("*.json"))
TOLD = ROOT / "docs" / "baselines.json"


@pytest.mark.parametrize("file", FILES, ids=[f.stem for f in FILES])
def test_a_job_file_can_be_run_here_in_legs(file, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path))
    content = json.loads(file.read_text())
    try:
        load_data(content["train"]["data"])
    except ValueError as e:
        pytest.skip(str(e))
    sweep = load_sweep(str(file), ["minutes=9"])
    for task in sweep.tasks.values():  # what ships need not be trained again
        assert (Path(task.folder).parent == ROOT / "checkpoints") == (
            ROOT / "checkpoints" / Path(task.folder).name
        ).is_dir() and is_finished(task) in (
            False,
            Path(task.folder).parent == ROOT / "checkpoints",
        )
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


@pytest.mark.parametrize(
    "folder",
    sorted(f for f in (ROOT / "checkpoints").iterdir() if f.is_dir()),
    ids=lambda f: f.name,
)
def test_every_run_that_ships_verifies_and_samples(folder):
    run = Run(folder)
    assert run.verify() and run.step == run.num_steps
    assert (
        run.solve(
            index=2, steps=run.sampling_defaults["steps"], solver=run.sampling_defaults["solver"]
        )
        .x.isfinite()
        .all()
    )


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
    assert total >= 20 and all(
        sum(f.stat().st_size for f in (ROOT / "checkpoints" / name).iterdir()) < 15_000_000
        for name in told["training"]
    )
