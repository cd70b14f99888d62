"""The Live view: real jobs on points of the plane, started, stopped, killed and continued from
functions that know only the disk.
"""

import json
import os
import shutil
import signal
from pathlib import Path

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
TOKEN = "0123456789abcdef"
SHORT = ENDLESS.replace("1000000", "4000")


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "An empty folder of runs and a token; whatever runs at the end is stopped."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    monkeypatch.setenv("CUDLAB_THREADS", "1")
    monkeypatch.setattr(jobs, "TOKEN", TOKEN)
    yield tmp_path / "runs"
    for info in jobs.own_runs():
        if info.status == "running":
            (info.dir / "STOP").touch()
    wait_for(lambda: not jobs.is_job_alive())


def start(text) -> str:
    return jobs.start_job(text, TOKEN)


def resume(name) -> str:
    return jobs.resume_job(name, TOKEN)


def stop(name) -> str:
    return jobs.stop_job(name, TOKEN)


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
    name = start(f"{ENDLESS} --name first")
    assert name == "first" and jobs.read_job(name).status in ("starting", "running")
    assert "a job is running" in refusal(start, f"{ENDLESS} --name second")
    assert not (lab / "second").exists()
    job = wait_until_saved(name)
    assert 0 < job.saved <= job.step < job.of == 1000000 and job.left > 0
    os.kill(job.pid, 0)
    figures, loss, samples, _, caption, _ = live.show_job(name)
    assert "running" in figures and len(json.loads(loss)["data"]) == 2
    assert "<circle" in samples and "Nothing is measured" in caption
    assert "being trained" in refusal(start, f"{ENDLESS} --name first")
    assert stop(name) == name
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
    name = start(f"{SHORT} --name first")
    wait_until_saved(name)
    stop(name)
    wait_until(name, "stopped")
    wait_for(lambda: not jobs.busy_name())
    assert resume(name) == name
    wait_until(name, "done")
    wait_for(lambda: not jobs.busy_name())
    run = Run.open(name)
    assert run.step == 4000 and (run.dir / "train.ipynb").is_file()
    assert [row["step"] for row in run.metrics] == list(range(20, 4001, 20))
    assert "is done" in refusal(resume, name)
    assert "trained already" in refusal(start, f"{SHORT} --name first")


@pytest.mark.long
def test_a_killed_job_is_dead_and_can_go_on(lab):
    name = start(f"{ENDLESS} --name victim")
    os.kill(wait_until_saved(name).pid, signal.SIGKILL)
    job = wait_until(name, "dead")
    assert "gone" in live.describe_job(job) and catalog.get_run_info(name).status == "dead"
    wait_for(lambda: not jobs.busy_name())
    saved = catalog.get_run_info(name).step
    resume(name)
    wait_until_saved(name, after=saved)
    stop(name)
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
    assert said in refusal(start, text)
    assert not lab.exists() or not [path for path in lab.rglob("*") if path.is_file()]


def test_a_name_that_is_taken_starts_nothing(lab):
    create_run(Config(method="rf", data="moons", steps=10, batch=16), "taken")
    text = "--method rf --data moons --steps 11 --batch 16 --name taken"
    assert "exists with steps" in refusal(start, text) and not jobs.started_name()
    shutil.rmtree(lab / "taken")


@pytest.mark.parametrize(
    "given",
    ["", TOKEN[:-1], TOKEN + "0", TOKEN.upper(), None, 0, [TOKEN], "\ud800", "ключ"],
    ids=str,
)
def test_nothing_is_started_without_the_token(lab, given):
    for call, text in (
        (jobs.start_job, ENDLESS),
        (jobs.resume_job, "x"),
        (jobs.stop_job, "x"),
    ):
        said = refusal(call, text, given)
        assert "?token=" in said and TOKEN not in said
    assert not lab.exists()


def test_nothing_is_started_where_there_is_no_token(lab, monkeypatch):
    monkeypatch.setattr(jobs, "TOKEN", "")
    for call in (jobs.start_job, jobs.resume_job, jobs.stop_job):
        for given in ("", TOKEN):
            assert "?token=" in refusal(call, ENDLESS, given)
    assert not lab.exists()


@pytest.mark.parametrize(
    "text, said",
    [
        ("--data folder:~", "looks like a path"),
        ("--data folder:..", "looks like a path"),
        ("--data folder:pictures", "is not one of moons"),
        ("--data moons --steps 100000000", "steps = 1e+08 is more than"),
        ("--data moons --batch 65536", "at most 4,096"),
        ("--data moons --keep 1000", "at most 20"),
        ("--data moons --steps 1000 --keep_every 1", "keeps more than 20"),
        ("--method dode --data moons --args.teacher x --args.samples 10000000", "at most 100,000"),
        ("--method boot --data digits --args.teacher ~", "looks like a path"),
        ("--processes 1024", "processes"),
    ],
)
def test_a_page_may_ask_for_so_much(lab, text, said):
    assert said in refusal(start, text)
    assert not lab.exists()


def test_a_job_is_known_by_name_only(lab):
    names = ["", "..", "../runs/x", "/etc", "digits-rf", None, 3, ["x"], "\x00", "x" * 10_000]
    for name in names:
        for call in (jobs.job_state, resume, stop):
            refusal(call, name)


def test_the_page_is_off_by_itself():
    assert '\nTOKEN = ""\n' in Path(jobs.__file__).read_text()


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
