"""The explorer without a browser: every callback in-process, bad input, and a real server with two clients."""
import html
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio")

import torch

from cudlab import run as run_module
from cudlab.core import Config

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "apps" / "explorer.py"


def tiny(name, **config):
    "A run trained for a few steps."
    run = run_module.create(Config(**({} if config.get("method") == "dode" else dict(batch=32, warmup=1, ema=0.5)) | dict(log_every=1) | config), name)
    list(run_module.train(run))
    return run_module.Run(run.path)


def make_lab(folder):
    "A lab with a 2-D run, a solver learned for it, a conditional digits run and a damaged one; its environment."
    env = {"CUDLAB_RUNS_PATH": str(folder / "runs"), "CUDLAB_CHECKPOINTS_PATH": str(folder / "shipped"), "CUDLAB_DEVICE": "cpu"}
    with pytest.MonkeyPatch.context() as patch:
        for key, value in env.items():
            patch.setenv(key, value)
        tiny("moons-run", method="rf", data="moons", steps=20)
        tiny("moons-solver", method="dode", data="moons", args=dict(teacher="moons-run", samples=16, batches=2, moves=3))
        tiny("moons-short", method="distill", data="moons", args=dict(teacher="moons-run", pairs=64, moves=2, targets="2"), steps=4)
        tiny("moons-jumps", method="shortcut", data="moons", steps=4)
        digits = tiny("digits-run", method="rf", data="digits", classes=True, steps=4)
        shutil.copytree(digits.path, folder / "runs" / "damaged-run")
        weights = folder / "runs" / "damaged-run" / "ema.safetensors"
        weights.write_bytes(weights.read_bytes()[:1000])
    return env


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    env = make_lab(tmp_path_factory.mktemp("lab"))
    with pytest.MonkeyPatch.context() as patch:
        for key, value in env.items():
            patch.setenv(key, value)
        yield env


@pytest.fixture(scope="module")
def app(lab):
    spec = importlib.util.spec_from_file_location("explorer", APP)
    module = importlib.util.module_from_spec(spec)
    sys.modules["explorer"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["explorer"]


GOOD = dict(run="digits-run", weights="ema", head=1, solver="euler", by="steps", amount=4, grid="uniform", seed=0, count=3, label="any", guidance=1.0,
            lower_order_final="auto", denoise=True)
LEARNED = GOOD | dict(run="moons-run", solver="moons-solver", amount=3)


def sample(app, **change):
    return list(app.sampled(*(GOOD | change).values()))


def figure(html_text, name):
    return re.search(rf"<dt>{name}</dt><dd>([^<]*)</dd>", html_text).group(1)


def test_the_form_is_the_one_the_tests_fill(app):
    assert app.NAMES == list(GOOD)


def test_importing_launches_nothing_and_only_the_app_needs_gradio(app):
    assert not gr.context.Context.root_block
    for module in (ROOT / "cudlab").glob("*.py"):
        assert "gradio" not in module.read_text(), module


def test_film_fills_step_by_step(app, monkeypatch):
    monkeypatch.setattr(app, "EVERY", 0)
    pages = sample(app)
    films = [page[0] for page in pages]
    assert len(films) == 6 and all(later.startswith(former) for former, later in zip(films, films[1:]))
    assert [film.count("<img") for film in films] == [1, 3, 5, 7, 9, 10]
    alts = re.findall("<img[^>]*alt='([^']+)'", films[-1])
    assert len(alts) == 10 and len(set(alts)) == 10
    _, plane, velocity, schedule, numbers, code = pages[-1]
    assert plane is None and figure(numbers, "NFE counted") == "4" and len(velocity.data) == 4 and len(schedule.data) == 2
    space = {}
    exec(code, space)
    assert space["trajectory"].nfe == 4


def test_the_picture_is_the_samplers(app):
    import base64
    import io

    import numpy as np
    from PIL import Image

    from cudlab.plot import pixels
    film = sample(app, count=3, seed=5)[-1][0]
    last = re.findall(r"grid-row:2'[^>]*src='data:image/png;base64,([^']+)'", film)[-1]
    shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(last))))
    x = run_module.Run.open("digits-run").solve(seed=5, index=3, steps=4).x
    assert np.array_equal(shown[:8, :, 0], pixels(x)[0, :, :, 0]) and np.array_equal(shown[9:17, :, 0], pixels(x)[1, :, :, 0])
    assert (shown[8, :, 1] == 0).all()


def test_updates_are_few_and_long_walks_keep_the_ends(app):
    pages = sample(app, amount=64, count=1)
    film = pages[-1][0]
    assert "step 0 of 64" in film and "step 64 of 64" in film and film.count("<img") <= 2 * app.MOST["columns"]
    assert len(pages) < 30


def test_points_of_the_plane_are_paths(app):
    film, plane, *_ = sample(app, run="moons-run", count=20)[-1]
    assert film == "" and [t.name for t in plane.data] == ["data", "path", "noise", "sample"] and len(plane.to_json()) < 100_000


def test_classes_and_guidance_change_the_picture(app):
    plain, two, guided = (sample(app, **c)[-1][0] for c in ({}, dict(label="2"), dict(label="2", guidance=3.0)))
    assert len({plain, two, guided}) == 3


@pytest.mark.parametrize("asked, said", [
    (("euler", "steps", 8), "8 NFE"), (("heun", "steps", 8), "16 NFE"), (("heun", "NFE", 8), "<b>4</b> steps"), (("rk45", "steps", 1), "as needed"),
    (("heun", "NFE", 7), "6 or 8"), (("rk4", "NFE", 3), "; 4 is"), (("rk45", "NFE", 8), "itself"), (("eulr", "steps", 8), "did you mean"),
    (("euler", "steps", None), "whole number"), (("dpmpp-2s", "steps", 4), "7 NFE"), (("dpmpp-2s", "steps", 4, False), "8 NFE"), (("dpmpp-2s", "NFE", 8), "7 or 9"),
    (("dpmpp-2m", "steps", 8), "order 2, native grid logsnr"), (("pndm", "NFE", 10), "9 or 13"), (("euler", "steps", 8, "no"), "True or False"),
    (("moons-solver", "steps", 3), "order 1, fitted for 3 steps on the uniform grid"), (("moons-solver", "NFE", 3), "<b>3</b> steps"), (("moons-solver", "NFE", 4), "; 3 is"),
    (("moons-solver", "steps", 4), "fitted for 3 steps, not for 4"), (("moons-solver", "steps", 3, False), "switch that on"),
    (("moons-solver", "steps", 3, True, "digits-run"), "for the network of moons-run"), (("moons-solvr", "steps", 3), "did you mean 'moons-solver'"), (("euler", "steps", 10**9), "out of range"), (("euler", "steps", float("nan")), "whole number"),
])
def test_both_counts_are_shown(app, asked, said):
    assert said in html.unescape(app.cost(*asked))


BAD = [
    dict(run="nope"), dict(run=None), dict(run=7), dict(run="../../etc/passwd"), dict(run="damaged-run"), dict(run="digits-rum"), dict(run="x" * 5000),
    dict(weights="best"), dict(weights=None), dict(head=2), dict(head=0), dict(head="one"), dict(head=float("nan")),
    dict(solver="dpm"), dict(solver=None), dict(solver=["euler"]), dict(by="calls"), dict(by="NFE", solver="heun", amount=7), dict(by="NFE", solver="rk45"),
    dict(amount=0), dict(amount=-1), dict(amount=10**12), dict(amount=float("inf")), dict(amount=float("nan")), dict(amount="abc"), dict(amount=None), dict(amount=2.5), dict(amount=300),
    dict(grid="cosine"), dict(grid=None), dict(seed=-1), dict(seed=2**70), dict(seed="abc"), dict(seed=None), dict(seed=float("nan")), dict(seed=0.5),
    dict(count=0), dict(count=65), dict(count=True), dict(count=None), dict(label="eleven"), dict(label=None), dict(label="<script>alert(1)</script>"),
    dict(run="moons-run", label="0"), dict(guidance=float("nan")), dict(guidance=1e9), dict(guidance="much"), dict(guidance=None),
    dict(lower_order_final="maybe"), dict(lower_order_final=None), dict(lower_order_final=True), dict(denoise="yes"), dict(denoise=None), dict(denoise=1),
    dict(solver="moons-run"), dict(solver="moons-solver", amount=3), dict(solver="../runs/moons-solver"), dict(solver="x" * 5000), dict(solver=""),
    dict(run="moons-solver", solver="moons-solver", amount=4), dict(run="moons-run", solver="moons-solver", amount=3, grid="logsnr"),
    dict(run="moons-run", solver="moons-solver", amount=3, denoise=False), dict(run="moons-run", solver="moons-solver", amount=3, weights="raw"),
    dict(run="moons-run", solver="moons-solver", amount=3, guidance=2.0),
]


def complains(call):
    with pytest.raises(gr.Error) as caught:
        call()
    words = caught.value.message
    assert 10 < len(words) <= 200 and "\n" not in words and "Traceback" not in words and "<" not in words and "the explorer failed" not in words, words
    return words


@pytest.mark.parametrize("change", BAD, ids=lambda c: ",".join(f"{k}={str(v)[:20]}" for k, v in c.items()))
def test_bad_input_is_answered_in_one_sentence(app, change):
    complains(lambda: sample(app, **change))


@pytest.mark.parametrize("nfe, n, seed", [("", 100, 0), ("1, two", 100, 0), ("0", 100, 0), ("99999", 100, 0), (None, 100, 0), ("1.5", 100, 0), ("1", 3, 0), ("1", None, 0),
                                          ("1", 10**9, 0), ("1", 100, "x"), ("1", float("nan"), 0)])
def test_bad_measurements_are_answered_in_one_sentence(app, nfe, n, seed):
    complains(lambda: list(app.measured("digits-run", "euler", nfe, n, seed, progress=lambda *a, **k: None)))


# Solvers

def test_every_solver_offered_samples(app):
    names = dict.fromkeys(app.possible(app.opened("moons-run")))
    assert len(names) == len(app.SOLVERS) - 1 + 1 # flow-map needs a network of two times; moons-solver fits
    for name in [*names, "flow-map"]:
        numbers = sample(app, run="moons-jumps" if name == "flow-map" else "moons-run", solver=name, amount=3, grid="native", count=2)[-1][4]
        calls = app.entry(name).calls
        assert "not finite" not in numbers and (not calls or figure(numbers, "NFE counted") == str(calls(3))), name


def test_the_last_moves_are_as_asked(app):
    ask = dict(solver="dpmpp-2s", amount=4, grid="native")
    usual, short = (sample(app, **ask, denoise=d)[-1] for d in (True, False))
    assert figure(usual[4], "NFE counted") == "7" and figure(short[4], "NFE counted") == "8" and "denoise=False" in short[5]
    assert (usual[0].count("<img"), short[0].count("<img")) == (10, 9)
    films = {lower: sample(app, solver="ab3", lower_order_final=lower)[-1] for lower in ("auto", "yes", "no")}
    assert films["auto"][0] == films["no"][0] != films["yes"][0] and "lower_order_final=True" in films["yes"][5] and "lower_order" not in films["auto"][5]


def test_a_learned_solver_is_offered_for_its_network_only(app, lab):
    assert app.learned() == ["moons-solver"]
    offers = {run: [name for _, name in app.fitted(run)[6]["choices"]] for run in ("moons-run", "moons-solver", "digits-run")}
    assert {run: "moons-solver" in names for run, names in offers.items()} == {"moons-run": True, "moons-solver": True, "digits-run": False}
    said = complains(lambda: sample(app, solver="moons-solver", amount=3))
    assert said == "moons-solver was fitted for the network of moons-run, not for the one of digits-run"
    unfitted = Path(lab["CUDLAB_RUNS_PATH"]) / "unfitted"
    run_module.create(Config(method="dode", data="moons", args=dict(teacher="moons-run")), "unfitted")
    assert "unfitted" not in app.learned() and "Nothing is learned yet" in app.about("unfitted")[0]
    assert "not offered" in complains(lambda: sample(app, run="moons-run", solver="unfitted"))
    shutil.rmtree(unfitted)


def test_a_learned_solver_sets_the_controls(app):
    want = dict(by="steps", amount=3, grid="uniform", weights="ema", lower_order_final="auto", denoise=True, head=1, guidance=1.0)
    assert dict(zip(app.BOUND, app.decided("moons-run", "moons-solver"))) == want
    assert all(update == gr.skip() for update in app.decided("moons-run", "heun"))
    own = app.fitted("moons-solver", "heun", "heun")
    assert (own[6]["value"], own[7]["value"], own[8], own[9]) == ("moons-solver", "moons-solver", "uniform", "3")
    assert own[10:16] == tuple(want[k] for k in app.BOUND[:6]) and (own[16]["value"], own[17]["value"]) == (1, 1.0) and "network of <b>moons-run" in own[0]
    kept, gone = app.fitted("moons-run", "moons-solver", "heun"), app.fitted("digits-run", "moons-solver", "rk45")
    assert (kept[6]["value"], kept[7]["value"], gone[6]["value"], gone[7]["value"]) == ("moons-solver", "heun", "euler", "euler")
    assert app.budgeted("moons-run", "moons-solver") == ("uniform", "3")
    assert app.budgeted("moons-run", "euler", "3")[1] == app.BUDGETS and app.budgeted("moons-run", "euler", "1, 5")[1] != app.BUDGETS
    assert sample(app, **LEARNED)[-1][4] and "solver='moons-solver'" in sample(app, **LEARNED | dict(run="moons-solver"))[-1][5]


def test_a_one_step_student_sets_the_controls_and_refuses_the_rest(app):
    shown = app.fitted("moons-short", "heun", "heun", "1, 2, 4")
    assert [name for _, name in shown[6]["choices"]] == ["euler"] == [shown[6]["value"]] and (shown[8], shown[9]) == ("uniform", "1")
    assert dict(zip(app.BOUND, app.decided("moons-short", "euler")))["amount"] == 1
    ask = dict(run="moons-short", solver="euler", amount=1)
    assert figure(sample(app, **ask)[-1][4], "NFE counted") == "1"
    for change in (dict(amount=3), dict(solver="heun"), dict(grid="edm"), dict(denoise=False)):
        assert "one call" in complains(lambda change=change: sample(app, **ask | change)), change
    still = lambda *a, **k: None
    assert "one call" in complains(lambda: list(app.measured("moons-short", "euler", "2", 80, 0, progress=still)))
    *_, (chart, _, table) = app.measured("moons-short", "euler", "1", 80, 0, progress=still)
    assert list(chart.data[0].x) == [1] and "moons-run" in table


def test_a_network_of_two_times_opens_with_its_jumps(app):
    assert app.fitted("moons-jumps", "heun", "heun")[6]["value"] == "flow-map"
    assert figure(sample(app, run="moons-jumps", solver="flow-map", amount=3)[-1][4], "NFE counted") == "3"
    assert "one time only" in complains(lambda: sample(app, run="moons-run", solver="flow-map"))


def test_a_solver_without_its_teacher_is_a_sentence(app, lab):
    runs = Path(lab["CUDLAB_RUNS_PATH"])
    (runs / "moons-run").rename(runs / "hidden")
    try:
        assert app.fitted("moons-solver")[6]["value"] == "euler" and "Learned numbers" in app.about("moons-solver")[0]
        assert "cannot be used" in complains(lambda: sample(app, **LEARNED | dict(run="moons-solver", solver="euler")))
    finally:
        (runs / "hidden").rename(runs / "moons-run")


def test_a_learned_solver_is_measured_on_its_run(app):
    still = lambda *a, **k: None
    own = [name for _, name in app.fitted("moons-solver")[7]["choices"]]
    assert own == [n for n in app.SOLVERS if app.SOLVERS[n].calls and n != "flow-map"] + ["moons-solver"]
    *_, (chart, caption, table) = app.measured("moons-solver", "moons-solver", "3", 80, 0, progress=still)
    assert [t.name for t in chart.data] == ["moons-solver"] and list(chart.data[0].x) == [3] and "80" in caption and table.count("<tr>") == 2
    *_, (chart, _, _) = app.measured("moons-solver", "dpmpp-2m", "2", 80, 0, None, "native", progress=still)
    assert [t.name for t in chart.data] == ["moons-solver", "moons-solver · dpmpp-2m · grid logsnr"]
    list(app.measured("moons-run", "euler", "3", 80, 0, None, "uniform", progress=still))
    drawn = lambda *ask: [t.name for t in app.curve("moons-solver", ["moons-run"], *ask)[0].data]
    assert "moons-run · euler" in drawn("moons-solver", "uniform") and "moons-run · euler" not in drawn("euler", "edm")
    assert "not offered" in complains(lambda: list(app.measured("digits-run", "nope", "3", 80, 0, progress=still)))
    assert "; 3 is" in complains(lambda: list(app.measured("moons-run", "moons-solver", "4", 80, 0, progress=still)))
    assert "on grid" in complains(lambda: list(app.measured("moons-run", "moons-solver", "3", 80, 0, None, "edm", progress=still)))
    assert "grid" in complains(lambda: list(app.measured("moons-run", "euler", "3", 80, 0, None, "cosine", progress=still)))


def test_the_run_tab_tells_what_was_learned(app):
    facts, loss, command, _ = app.about("moons-solver")
    held = run_module.Run.open("moons-solver").tensors("ema.safetensors")
    last = f"{held['solver.lam'][-1, 0]:.3f}\u00a0±\u00a0{held['solver.by_batch'].std(0)[-1, 0]:.3f}"
    assert "<code>0.000, " in facts and last in facts and "over 2 batches" in facts and figure(facts, "fitted batches") == "2 of 2" and figure(facts, "parameters") == "3"
    assert "network of <b>moons-run</b>, step 20" in facts and run_module.Run.open("moons-run").network_hash()[:12] in facts
    assert {t.name for t in loss.data if t.name} == {"solver", "euler"} and "args.teacher=moons-run" in command
    again, _ = run_module.parameters(run_module.from_words(command.split()[4:]))
    assert replace(again, log_every=1) == app.opened("moons-solver").config


@pytest.mark.parametrize("name", ["fitted", "about", "curve"])
@pytest.mark.parametrize("run", [None, "nope", 3, "damaged-run"])
def test_every_callback_answers_for_a_bad_run(app, name, run):
    complains(lambda: getattr(app, name)(run))


def test_an_unforeseen_failure_is_a_sentence_too(app, monkeypatch, caplog):
    def broken(*a, **k):
        raise KeyError("secret detail")
    monkeypatch.setattr(app, "opened", broken)
    with pytest.raises(gr.Error) as caught:
        sample(app)
    assert "KeyError" in caught.value.message and "secret" not in caught.value.message and "secret detail" in caplog.text


def test_damaged_runs_are_listed_with_the_reason_but_not_offered(app):
    assert {i for _, i in app.menu()} == {"digits-run", "moons-run", "moons-solver", "moons-short", "moons-jumps"}
    assert "damaged-run" in app.shelf() and "ema.safetensors" in app.shelf()
    assert app.preferred() == "digits-run" and app.preferred("moons-run") == "moons-run" and app.preferred("damaged-run") == "digits-run"


def test_a_run_deleted_meanwhile(app, lab):
    source, copy = (Path(lab["CUDLAB_RUNS_PATH"]) / n for n in ("moons-run", "short-lived"))
    shutil.copytree(source, copy)
    assert len(sample(app, run="short-lived")) >= 2
    shutil.rmtree(copy)
    assert "not here" in complains(lambda: sample(app, run="short-lived"))


def test_open_runs_are_few_and_follow_their_manifest(app, lab):
    source = Path(lab["CUDLAB_RUNS_PATH"]) / "moons-run"
    copies = [source.parent / f"copy{k}" for k in range(6)]
    for copy in copies:
        shutil.copytree(source, copy)
        app.opened(copy.name)
    assert len(app.OPENED) == 4
    first = app.opened("copy5")
    assert app.opened("copy5") is first
    later = time.time() + 5
    os.utime(copies[5] / "MANIFEST.json", (later, later))
    assert app.opened("copy5") is not first
    for copy in copies:
        shutil.rmtree(copy)


def test_missing_points_are_measured_one_by_one_and_kept(app):
    seen = []
    steps = list(app.measured("digits-run", "euler", "2, 1 2", 80, 0, progress=lambda at, **k: seen.append(at)))
    assert [len(chart.data[0].x) for chart, _, _ in steps] == [1, 2, 2] and seen
    again = list(app.measured("digits-run", "euler", "1,2", 80, 0, progress=lambda *a, **k: None))
    assert len(again) == 1 and len(app.opened("digits-run").scores) == 2
    chart, caption, table = again[-1]
    for said in ("digits-v2", "80", "seeds"):
        assert said in caption
    assert table.count("<tr>") == 3 and "<caption>" in table


def test_scores_of_another_protocol_are_listed_and_not_drawn(app):
    run = app.opened("digits-run")
    scores = list(run.scores)
    run.add_score(scores[0] | dict(n=32, note="a <b>warning</b>"))
    chart, caption, table = app.curve("digits-run")
    assert sum(len(t.x) for t in chart.data) == len(scores) and "1 scores measured under another protocol" in caption
    assert table.count("<tr>") == len(scores) + 2 and "<b>warning" not in caption + table


def test_the_run_tab_tells_everything(app, lab):
    facts, loss, command, config = app.about("digits-run")
    assert "match their SHA-256" in facts and len(loss.data) == 2 and "label_dropout" in config
    words = command.split()
    assert words[:4] == ["python", "-m", "cudlab.run", "train"]
    again, _ = run_module.parameters(run_module.from_words(words[4:]))
    assert replace(again, save_every=0 or 500) == replace(app.opened("digits-run").config, save_every=500)


def test_every_button_has_a_stable_name(app):
    page = app.build()
    names = {d.api_name for d in page.fns.values() if d.api_visibility == "public"}
    assert {"sample", "seed", "runs", "fit", "cost", "scores", "measure", "about", "decide", "budget"} <= names
    solving = [d for d in page.fns.values() if d.concurrency_id == "solve"]
    assert len(solving) == 5 and all(d.concurrency_limit == 1 for d in solving)
    page.close()


# A real server

def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_server(env, *more, port=None):
    "The app as a process: (process, address, seconds until ready, what it printed)."
    port = port or free_port()
    began = time.monotonic()
    process = subprocess.Popen([sys.executable, str(APP), "--port", str(port), *more], env=os.environ | env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = []
    for line in process.stdout:
        said.append(line.strip())
        if "ready at" in line:
            return process, re.search(r"http\S+/", line).group(), time.monotonic() - began, said
    raise AssertionError(f"the explorer ended with {process.wait()}: {said}")


def stop_server(process):
    process.send_signal(signal.SIGINT)
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(lab):
    process, address, *_ = start_server(lab)
    stat = Path(f"/proc/{process.pid}/stat")
    spent = sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK") if stat.exists() else 0
    yield address, spent
    stop_server(process)


@pytest.fixture(scope="module")
def connect(server):
    from gradio_client import Client
    return lambda: Client(server[0], verbose=False, analytics_enabled=False)


def test_starting_costs_little(server):
    "Processor seconds until ready: unlike wall seconds, the same on a busy machine."
    assert server[1] < 15


def test_round_trip_through_a_server(connect, app):
    film, plane, velocity, schedule, numbers, code = connect().predict(*GOOD.values(), api_name="/sample")
    assert film == sample(app)[-1][0] and plane is None and figure(numbers, "NFE counted") == "4" and "Run.open('digits-run')" in code


def test_bad_input_through_a_server_leaves_it_alive(connect):
    client = connect()
    for change in (dict(run="nope"), dict(amount="abc"), dict(seed=None), dict(count=10**9), dict(label="<b>")):
        with pytest.raises(Exception) as caught:
            client.predict(*(GOOD | change).values(), api_name="/sample")
        assert "Traceback" not in str(caught.value) and len(str(caught.value)) <= 260, caught.value
    assert "4</b> steps" in client.predict("heun", "NFE", 8, api_name="/cost")


def test_two_clients_do_not_see_each_other(connect, app):
    want = {seed: sample(app, seed=seed, amount=12)[-1][0] for seed in (1, 2)}
    clients = {seed: connect() for seed in want}
    ask = lambda seed: [clients[seed].predict(*(GOOD | dict(seed=seed, amount=12)).values(), api_name="/sample")[0] for _ in range(3)]
    with ThreadPoolExecutor(2) as pool:
        got = dict(zip(want, pool.map(ask, want)))
    assert got == {seed: [film] * 3 for seed, film in want.items()}


def test_nothing_but_the_page_is_served(server):
    from urllib.error import HTTPError
    from urllib.request import urlopen
    for path in ("gradio_api/file=/etc/passwd", f"gradio_api/file={APP}", "monitoring", "gradio_api/file=../settings.ini"):
        with pytest.raises(HTTPError):
            urlopen(server[0] + path, timeout=5)


def test_a_busy_port_gives_way_and_says_so(lab):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process, address, _, said = start_server(lab, "--runs", "moons-run", port=port)
        try:
            assert f":{port}/" not in address and len(said) == 2 and said[0].startswith(f"port {port} is busy, using ")
            from gradio_client import Client
            listed = Client(address, verbose=False, analytics_enabled=False).predict(api_name="/runs")
            assert "moons-run" in str(listed) and "digits-run" not in str(listed)
        finally:
            stop_server(process)
    assert process.returncode == 0


def test_a_wrong_start_is_one_sentence(app, capsys):
    for argv, said in ((["--runs", "nope"], "unknown run 'nope'"), (["--port", "99999"], "out of range"), (["--host", "300.1.2.3"], "")):
        assert app.main(argv) == 2
        err = capsys.readouterr().err
        assert said in err and err.startswith("explorer: ") and err.count("\n") == 1


def test_the_page_opens_on_this_machine_only(app):
    import inspect
    source = inspect.getsource(app.main)
    assert 'default="127.0.0.1"' in source and "share=False" in source and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    assert torch.get_num_threads() >= 1
