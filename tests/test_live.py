"""The Live view: real jobs on points of the plane, started, stopped, killed and continued from
functions that know only the disk.
"""

import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest

gr = pytest.importorskip("gradio")
pytest.importorskip("papermill")

from small_lab import wait_for
from views import live

import jobs
from cudlab import catalog
from cudlab.config import Config
from cudlab.create import create_run
from cudlab.run import Run

ENDLESS = "--method rf --data moons --steps 1000000 --batch 16 --save_every 50 --log_every 20"
SHORT = ENDLESS.replace("1000000", "4000")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "An empty folder of runs, jobs allowed; whatever runs at the end is stopped."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    monkeypatch.setenv("CUDLAB_THREADS", "1")
    monkeypatch.setattr(jobs, "ALLOWED", True)
    yield tmp_path / "runs"
    for info in jobs.own_runs():
        if info.status == "running":
            (info.dir / "STOP").touch()
    wait_for(lambda: not jobs.is_job_alive())


def refusal(call, *args) -> str:
    with pytest.raises(gr.Error) as caught:
        call(*args)
    assert len(str(caught.value.message)) <= 200
    return caught.value.message


def wait_until(name, *states):
    "The job as soon as it is in one of these states."
    return wait_for(lambda: (job := jobs.read_job(name)).status in states and job)


def wait_until_saved(name, after: int = 0):
    "The job as soon as it runs and has saved a checkpoint after this step."

    def saved():
        job = jobs.read_job(name)
        return job.status == "running" and job.saved > after and job.pace and job

    return wait_for(saved)


def test_a_job_is_started_watched_and_stopped(lab):
    name = jobs.start_job(f"{ENDLESS} --name first")
    assert name == "first" and jobs.read_job(name).status in ("starting", "running")
    assert "a job is running" in refusal(jobs.start_job, f"{ENDLESS} --name second")
    assert not (lab / "second").exists()
    job = wait_until_saved(name)
    assert 0 < job.saved <= job.step < job.of == 1000000 and job.left > 0
    os.kill(job.pid, 0)
    figures, loss, samples, _, caption, _ = live.show_job(name)
    assert "running" in figures and len(json.loads(loss)["data"]) == 2
    assert "<circle" in samples and "Nothing is measured" in caption
    assert "being trained" in refusal(jobs.start_job, f"{ENDLESS} --name first")
    assert jobs.stop_job(name) == name
    wait_until(name, "stopped")
    wait_for(lambda: not jobs.busy_name())
    assert Run.open(name).verify() and jobs.job_state(name)["log"]
    assert jobs.read_job(name).is_resumable
    before = json.dumps([jobs.job_state(name), [str(part) for part in live.choose_job()[:-1]]])
    live.draw_samples_of.cache_clear()
    catalog._cache.clear()
    after = json.dumps([jobs.job_state(name), [str(part) for part in live.choose_job()[:-1]]])
    assert after == before, "all that is shown is on the disk"


@pytest.mark.long
def test_a_job_from_start_over_stop_to_the_end(lab):
    name = jobs.start_job(f"{SHORT} --name first")
    wait_until_saved(name)
    jobs.stop_job(name)
    wait_until(name, "stopped")
    wait_for(lambda: not jobs.busy_name())
    assert jobs.resume_job(name) == name
    wait_until(name, "done")
    wait_for(lambda: not jobs.busy_name())
    run = Run.open(name)
    assert run.step == 4000 and (run.dir / "train.ipynb").is_file()
    assert [row["step"] for row in run.metrics] == list(range(20, 4001, 20))
    assert "is done" in refusal(jobs.resume_job, name)
    assert "trained already" in refusal(jobs.start_job, f"{SHORT} --name first")


@pytest.mark.long
def test_a_killed_job_is_dead_and_can_go_on(lab):
    name = jobs.start_job(f"{ENDLESS} --name victim")
    os.kill(wait_until_saved(name).pid, signal.SIGKILL)
    job = wait_until(name, "dead")
    assert "gone" in live.describe_job(job) and catalog.get_run_info(name).status == "dead"
    wait_for(lambda: not jobs.busy_name())
    saved = catalog.get_run_info(name).step
    jobs.resume_job(name)
    wait_until_saved(name, after=saved)
    jobs.stop_job(name)
    wait_until(name, "stopped")
    assert Run.open(name).verify()


@pytest.mark.parametrize(
    "text, said",
    [
        ("--stpes 20", "did you mean"),
        ("--steps 0", "steps"),
        ("--steps", "steps"),
        ("steps 20", "steps"),
        ("--method cdu", "did you mean 'cud'"),
        ("--args.aim x", "aim"),
        ("--data 'moons", "cannot be read"),
        ("--name ../x", "looks like a path"),
        ("--method boot --args.teacher ../checkpoints/digits-rf", "looks like a path"),
        ("--method boot --args.teacher digits-fr", "did you mean 'digits-rf'"),
        ("--method boot --data moons --args.teacher digits-rf", "was trained with data"),
        ("--data folder:/etc@8", "looks like a path"),
        ("--name digits-rf", "ships with the lab"),
        ("--name ..", "looks like a path"),
        ("--seed nan", "seed"),
        ("--device cuda:77", "device"),
        ("x" * 3000, "at most 2,000"),
        (None, "not a text"),
        (["--steps 2"], "not a text"),
        ("--steps 5 --name a\x00b", "name"),
    ],
    ids=lambda value: str(value)[:60].replace("\x00", "0"),
)
def test_bad_parameters_are_a_sentence_and_start_nothing(lab, text, said):
    assert said in refusal(jobs.start_job, text)
    assert not lab.exists() or not [path for path in lab.rglob("*") if path.is_file()]


def test_a_name_that_is_taken_starts_nothing(lab):
    create_run(Config(method="rf", data="moons", steps=10, batch=16), "taken")
    text = "--method rf --data moons --steps 11 --batch 16 --name taken"
    assert "exists with steps" in refusal(jobs.start_job, text) and not jobs.started_name()
    shutil.rmtree(lab / "taken")


def make_request(**headers) -> SimpleNamespace:
    "A request with these headers."
    return SimpleNamespace(headers={key.replace("_", "-"): v for key, v in headers.items()})


@pytest.mark.parametrize(
    "headers",
    [
        dict(host="lab.example:7860"),
        dict(host="127.0.0.1:7860", origin="https://example.org"),
        dict(host="127.0.0.1:7860", x_forwarded_for="10.0.0.2"),
        dict(host="localhost:1", origin="null"),
    ],
    ids=str,
)
def test_only_a_page_of_this_machine_may_start(lab, headers):
    asked = make_request(**headers)
    for call, text in ((jobs.start_job, ENDLESS), (jobs.resume_job, "x"), (jobs.stop_job, "x")):
        assert "its own machine" in refusal(call, text, asked)
    jobs.check_permission(make_request(host="127.0.0.1:7860", origin="http://127.0.0.1:7860"))
    jobs.check_permission(make_request(host="[::1]:7860"))


def test_nothing_is_started_when_it_is_off(lab, monkeypatch):
    monkeypatch.setattr(jobs, "ALLOWED", False)
    for call in (jobs.start_job, jobs.resume_job, jobs.stop_job):
        assert "its own machine" in refusal(call, ENDLESS)
    assert not lab.exists()


def test_a_job_is_known_by_name_only(lab):
    names = ["", "..", "../runs/x", "/etc", "digits-rf", None, 3, ["x"], "\x00", "x" * 10_000]
    for name in names:
        for call in (jobs.job_state, jobs.resume_job, jobs.stop_job):
            refusal(call, name)


def test_the_page_is_off_by_itself():
    assert "\nALLOWED = False\n" in Path(jobs.__file__).read_text()


def test_a_lab_without_runs_has_an_empty_view(lab):
    assert "No job yet" in live.choose_job()[1] and not jobs.busy_name()


def test_the_example_can_be_started(lab):
    config, _, folder = jobs.parse_job(live.EXAMPLE)
    assert config.data == "moons" and not folder.exists()


def test_text_stays_text_on_the_way_to_the_notebook():
    config = Config(method="cud", args={"aim": 4}, lr=1e-5, classes=True)
    _, options, _ = jobs.parse_job("--data moons")
    words = jobs.papermill_flags(config, options, "123")
    assert words[words.index("name") - 1] == "-r"
    assert words[words.index("args") + 1] == '{"aim": 4}'
    assert words[words.index("lr") - 1] == "-p" and "steps" not in words
    assert Config(lr=float(words[words.index("lr") + 1])).lr == 1e-5
