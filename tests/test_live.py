"""The Live view: real jobs on points of the plane, started, stopped, killed and continued from
functions that know only the disk.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio")
pytest.importorskip("papermill")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "apps"))

from views import live  # noqa: E402

from cudlab.catalog import _cache, get_run_info
from cudlab.run import Run

LONG = "method=rf data=moons steps=1000000 batch=16 save_every=50 log_every=20"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    "An empty folder of runs, jobs allowed; whatever runs at the end is killed."
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "runs"))
    monkeypatch.setenv("CUDLAB_DEVICE", "cpu")
    monkeypatch.setenv("CUDLAB_THREADS", "1")
    monkeypatch.setattr(live, "ALLOWED", True)
    yield tmp_path / "runs"
    for r in live.mine():
        if r.status == "running":
            (r.dir / "STOP").touch()
    wait(lambda: not live.is_locked(live.jobs() / "page.lock"))


def wait(met, seconds: float = 120):
    "Wait until something holds."
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := met():
            return found
        time.sleep(0.1)
    raise AssertionError(
        f"{live.started()}: {live.state(live.started()) if live.started() else 'nothing was started'}"
    )


def reached(name, *states) -> dict:
    "Wait until a job is in one of these states."
    return wait(lambda: (at := live.state(name))["status"] in states and at)


def refusal(call, *args) -> str:
    with pytest.raises(gr.Error) as e:
        call(*args)
    assert len(str(e.value.message)) <= 200
    return e.value.message


@pytest.mark.long
def test_a_job_from_start_over_stop_to_the_end(lab):
    name = live.start(f"{LONG.replace('1000000', '4000')} name=first")
    assert name == "first" and live.state(name)["status"] in ("starting", "running")
    assert (
        "a job is running" in refusal(live.start, f"{LONG} name=second")
        and not (lab / "second").exists()
    )
    at = wait(
        lambda: (
            (at := live.state(name))["status"] == "running"
            and at["saved"] >= 50
            and at["pace"]
            and at
        )
    )
    assert 0 < at["saved"] <= at["step"] < at["of"] == 4000 and at["left"] > 0
    os.kill(at["pid"], 0)
    figures, loss, drawn, _, caption, _ = live.view(name)
    assert (
        "running" in figures
        and len(json.loads(loss)["data"]) == 2
        and "<circle" in drawn
        and "Nothing is measured" in caption
    )
    assert "being trained" in refusal(live.start, f"{LONG.replace('1000000', '4000')} name=first")
    assert live.stop(name) == name
    at = reached(name, "stopped")
    wait(lambda: not live.busy())
    assert (
        Run.open(name).verify()
        and live.state(name)["pid"] is None
        and any("continues it" in line for line in live.state(name)["log"])
    )
    before = json.dumps([live.state(name), [str(part) for part in live.chosen()[:-1]]])
    live.samples.cache_clear()
    _cache.clear()
    assert json.dumps([live.state(name), [str(part) for part in live.chosen()[:-1]]]) == before
    assert live.resume(name) == name
    reached(name, "done")
    wait(lambda: not live.busy())
    run = Run.open(name)
    assert (
        run.step == 4000
        and [row["step"] for row in run.metrics] == list(range(20, 4001, 20))
        and (run.dir / "train.ipynb").is_file()
    )
    assert "is done" in refusal(live.resume, name) and "trained already" in refusal(
        live.start, f"{LONG.replace('1000000', '4000')} name=first"
    )


@pytest.mark.long
def test_a_killed_job_is_dead_and_can_go_on(lab):
    name = live.start(f"{LONG} name=victim")
    at = wait(lambda: (at := live.state(name))["status"] == "running" and at["saved"] >= 50 and at)
    os.kill(at["pid"], signal.SIGKILL)
    at = reached(name, "dead")
    assert "gone" in live.told(at) and get_run_info(name).status == "dead"
    wait(lambda: not live.busy())
    saved = get_run_info(name).step
    live.resume(name)
    wait(lambda: (now := live.state(name))["status"] == "running" and now["saved"] > saved)
    live.stop(name)
    reached(name, "stopped")
    assert Run.open(name).verify()


@pytest.mark.parametrize(
    "text, said",
    [
        ("stpes=20", "did you mean"),
        ("steps=0", "steps"),
        ("steps", "not key=value"),
        ("method=cdu", "did you mean 'cud'"),
        ("args.aim=x", "aim"),
        ("data='moons", "cannot be read"),
        ("name=../x", "looks like a path"),
        ("method=boot args.teacher=../checkpoints/digits-rf", "looks like a path"),
        ("method=boot args.teacher=digits-fr", "did you mean 'digits-rf'"),
        ("method=boot data=moons args.teacher=digits-rf", "was trained with data"),
        ("data=folder:/etc@8", "looks like a path"),
        ("name=digits-rf", "ships with the lab"),
        ("name=..", "looks like a path"),
        ("seed=nan", "seed"),
        ("device=cuda:77", "device"),
        ("x" * 3000, "at most 2,000"),
        (None, "not a text"),
        (["steps=2"], "not a text"),
        ("steps=5 name=a\x00b", "name"),
    ],
)
def test_bad_parameters_are_a_sentence_and_start_nothing(lab, text, said):
    assert said in refusal(live.start, text)
    assert not lab.exists() or not [p for p in lab.rglob("*") if p.is_file()]


def test_a_name_that_is_taken_starts_nothing(lab):
    from cudlab.config import Config
    from cudlab.training import create_run

    create_run(Config(method="rf", data="moons", steps=10, batch=16), "taken")
    assert (
        "exists with steps"
        in refusal(live.start, "method=rf data=moons steps=11 batch=16 name=taken")
        and not live.started()
    )


class Asked:
    "A request with these headers."

    def __init__(self, **headers):
        self.headers = {k.replace("_", "-"): v for k, v in headers.items()}


@pytest.mark.parametrize(
    "headers",
    [
        dict(host="lab.example:7860"),
        dict(host="127.0.0.1:7860", origin="https://example.org"),
        dict(host="127.0.0.1:7860", x_forwarded_for="10.0.0.2"),
        dict(host="localhost:1", origin="null"),
    ],
)
def test_only_a_page_of_this_machine_may_start(lab, headers):
    for call in (
        lambda r: live.start(LONG, r),
        lambda r: live.resume("x", r),
        lambda r: live.stop("x", r),
    ):
        assert "this machine" in refusal(call, Asked(**headers)) or "its own machine" in refusal(
            call, Asked(**headers)
        )
    live.permitted(Asked(host="127.0.0.1:7860", origin="http://127.0.0.1:7860"))
    live.permitted(Asked(host="[::1]:7860"))


def test_nothing_is_started_when_it_is_off(lab, monkeypatch):
    monkeypatch.setattr(live, "ALLOWED", False)
    for call in (live.start, live.resume, live.stop):
        assert "its own machine" in refusal(call, LONG)
    assert not lab.exists()


@pytest.mark.parametrize(
    "name", ["", "..", "../runs/x", "/etc", "digits-rf", None, 3, ["x"], "\x00", "x" * 10_000]
)
def test_a_job_is_known_by_name_only(lab, name):
    for call in (live.state, live.resume, live.stop):
        refusal(call, name)


def test_the_page_is_off_by_itself():
    import importlib

    assert (
        importlib.util.find_spec("views.live")
        and "ALLOWED = False" in Path(live.__file__).read_text()
    )


def test_a_lab_without_runs_has_an_empty_view(lab):
    assert "No job yet" in live.chosen()[1] and not live.busy()


def test_text_stays_text_on_the_way_to_the_notebook():
    from cudlab.config import Config
    from cudlab.training import parse_parameters

    config, job = parse_parameters(dict(method="cud", args={"aim": 4}, lr=1e-5, classes=True))
    words = live.flags(config, job, "123")
    assert (
        words[words.index("name") - 1] == "-r"
        and words[words.index("args") + 1] == '{"aim": 4}'
        and words[words.index("lr") - 1] == "-p"
    )
    assert "steps" not in words and Config(lr=float(words[words.index("lr") + 1])).lr == 1e-5
