"""The explorer without a browser: every callback in-process, a thousand bad inputs each, and a real
server under use.
"""

import base64
import html
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

gr = pytest.importorskip("gradio")

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from views import ask

from cudlab import cli, training
from cudlab import run as run_module
from cudlab.config import Config
from cudlab.plot import to_pixels

ROOT = Path(__file__).resolve().parent.parent
APP = ROOT / "apps" / "explorer.py"


def tiny(name, **config):
    "A run trained for a few steps."
    run = training.create_run(
        Config(
            **({} if config.get("method") == "dode" else dict(batch=32, warmup=1, ema=0.5))
            | dict(log_every=1)
            | config
        ),
        name,
    )
    list(training.train(run))
    return run_module.Run(run.dir)


def make_lab(folder):
    """A lab with a 2-D run, a solver learned for it, a conditional digits run and a damaged one;
    its environment.
    """
    env = {
        "CUDLAB_RUNS_PATH": str(folder / "runs"),
        "CUDLAB_CHECKPOINTS_PATH": str(folder / "shipped"),
        "CUDLAB_DEVICE": "cpu",
    }
    with pytest.MonkeyPatch.context() as patch:
        for key, value in env.items():
            patch.setenv(key, value)
        tiny("moons-run", method="rf", data="moons", steps=20)
        tiny(
            "moons-solver",
            method="dode",
            data="moons",
            args=dict(teacher="moons-run", samples=16, batches=2, moves=3),
        )
        tiny(
            "moons-short",
            method="distill",
            data="moons",
            args=dict(teacher="moons-run", pairs=64, moves=2, targets="2"),
            steps=4,
        )
        tiny("moons-jumps", method="shortcut", data="moons", steps=4)
        digits = tiny("digits-run", method="rf", data="digits", classes=True, steps=4)
        shutil.copytree(digits.dir, folder / "runs" / "damaged-run")
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


GOOD = dict(
    run="digits-run",
    weights="ema",
    head=1,
    solver="euler",
    by="steps",
    amount=4,
    grid="uniform",
    seed=0,
    count=3,
    label="any",
    guidance=1.0,
    lower_order_final="auto",
    denoise=True,
)
LEARNED = GOOD | dict(run="moons-run", solver="moons-solver", amount=3)


def sample(app, **change):
    return list(app.trajectory.sampled(*(GOOD | change).values()))


def film(text):
    "The header of a film and its lines."
    head, *lines = map(json.loads, text.splitlines())
    return head, lines


def opened(src):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(src.partition(",")[2]))))


def figure(html_text, name):
    return re.search(rf"<dt>{name}</dt><dd>([^<]*)</dd>", html_text).group(1)


def test_the_form_is_the_one_the_tests_fill(app):
    assert ask.NAMES == list(GOOD)


def test_importing_launches_nothing_and_only_the_app_needs_gradio(app):
    assert not gr.context.Context.root_block
    for module in (ROOT / "cudlab").glob("*.py"):
        assert "gradio" not in module.read_text().replace("gradio bundles", ""), module


# Trajectory


def test_the_film_grows_picture_by_picture(app, monkeypatch):
    monkeypatch.setattr(app.trajectory, "EVERY", 0)
    pages = sample(app)
    films = [page[0] for page in pages]
    assert len(films) == 7 and all(
        later.startswith(former) for former, later in zip(films, films[1:])
    )
    head, lines = film(films[-1])
    assert (head["count"], head["steps"], head["w"]) == (3, 4, 8)
    assert [(x["k"], x["i"]) for x in lines] == [("x", 0)] + [
        p for i in range(4) for p in (("hat", i), ("v", i), ("x", i + 1))
    ] + [("hat", 4)]
    _, plane, paths, ends, panels, schedule, numbers, table, code, words = pages[-1]
    assert (
        plane is None
        and figure(numbers, "NFE counted") == "4"
        and len(schedule.data) == 2
        and len(panels.data) >= 10
        and len(paths.data) >= 2
        and ends.count("<tr>") == 4
        and words == app.trajectory.HINT
    )
    assert table.count("<tr>") == 5
    space = {}
    exec(code, space)
    assert space["trajectory"].nfe == 4


def test_the_pictures_are_the_samplers(app):
    _, lines = film(sample(app, count=3, seed=5)[-1][0])
    tau = run_module.Run.open("digits-run").solve(seed=5, index=3, steps=4)
    states = {x["i"]: opened(x["src"]) for x in lines if x["k"] == "x"}
    for i, shown in states.items():
        assert np.array_equal(shown, to_pixels(tau.xs[i])[..., 0].reshape(-1, 8)), i
    hats = {x["i"]: opened(x["src"]) for x in lines if x["k"] == "hat"}
    assert np.array_equal(
        hats[2], to_pixels(tau.x0_hats[2])[..., 0].reshape(-1, 8)
    ) and np.array_equal(hats[4], states[4])
    speed = opened(next(x["src"] for x in lines if x["k"] == "v" and x["i"] == 1)).astype(float)
    v = tau.vs[1].reshape(-1, 8).numpy()
    red = speed[..., 0] - speed[..., 2]
    assert (red[v > 0.3] > 0).all() and (red[v < -0.3] < 0).all()


def test_updates_are_few_and_long_walks_keep_the_ends(app):
    pages = sample(app, amount=64, count=1)
    _, lines = film(pages[-1][0])
    steps = {x["i"] for x in lines}
    assert {0, 64} <= steps and len(steps) <= ask.MOST["columns"] and len(pages) < 30


def test_points_of_the_plane_move(app):
    text, plane, paths, *_ = sample(app, run="moons-run", count=20)[-1]
    assert (
        text == ""
        and paths is None
        and len(plane.frames) == 5
        and {"data", "velocity", "sample"} <= {t.name for t in plane.data}
    )
    assert len(plane.to_json()) < 600_000


def test_classes_and_guidance_change_the_picture(app):
    plain, two, guided = (
        film(sample(app, **c)[-1][0])[1][-1]["src"]
        for c in ({}, dict(label="2"), dict(label="2", guidance=3.0))
    )
    assert len({plain, two, guided}) == 3


def test_errors_extend_the_film_that_is_there(app):
    before = sample(app)[-1][0]
    *progress, (text, _, _, _, panels, _, numbers, table, _, words) = app.trajectory.errors(
        *GOOD.values()
    )
    assert text.startswith(before) and len(progress) == 5 + 4
    _, lines = film(text)
    assert {x["i"] for x in lines if x["k"] == "gap"} == set(range(5)) and {
        x["i"] for x in lines if x["k"] == "error"
    } == set(range(1, 5))
    assert (
        "digits-run" in words and "local error" in table and "error against the reference" in table
    )
    fine = list(app.trajectory.errors(*(GOOD | dict(solver="rk4", amount=16)).values()))[-1][9]
    apart = [float(re.search(r"end <b>([^<]+)</b>", w).group(1)) for w in (words, fine)]
    assert apart[1] < apart[0] / 5


def test_guidance_counts_every_call_twice(app):
    how = dict(label="3", guidance=3.0)
    assert "<b>4</b> steps <i>=</i> <b>8 NFE" in app.cost(
        "euler", "steps", 4, True, "digits-run", *how.values()
    )
    assert (
        figure(sample(app, **how)[-1][6], "NFE counted")
        == "8"
        == figure(sample(app, **how, by="NFE", amount=8)[-1][6], "NFE counted")
    )
    assert "counts twice; 6 or 8" in complains(lambda: sample(app, **how, by="NFE", amount=7))


def test_errors_show_the_walk_they_were_measured_on(app):
    sample(app)
    page = list(app.trajectory.errors(*(GOOD | dict(solver="heun", seed=9)).values()))[-1]
    assert (
        figure(page[6], "NFE counted") == "8"
        and "solver='heun'" in page[8]
        and page[0].startswith(sample(app, solver="heun", seed=9)[-1][0])
    )


def test_the_reference_of_a_student_is_its_teacher(app):
    ask_for = GOOD | dict(run="moons-short", amount=1)
    *_, (text, *_, table, _, words) = app.trajectory.errors(*ask_for.values())
    assert text == "" and "flow of <b>moons-run" in words and "Local error" not in words


def test_what_follows_no_flow_is_not_held_against_one(app):
    assert "follows no ODE" in complains(
        lambda: list(app.trajectory.errors(*(GOOD | dict(solver="renoise")).values()))
    )


def test_paths_of_chosen_samples(app):
    some, rows = app.trajectory.repathed("1, 3", "3-D", *GOOD.values())
    assert some.data[0].type == "scatter3d" and rows.count("<tr>") == 3
    assert len(app.trajectory.repathed("all", "2-D", *GOOD.values())[0].data[0].x) > len(
        app.trajectory.repathed("1", "2-D", *GOOD.values())[0].data[0].x
    )
    for chosen, dims in (
        ("4", "2-D"),
        ("0", "2-D"),
        ("x", "2-D"),
        ("1", "4-D"),
        ("1", None),
        ("9" * 500, "2-D"),
    ):
        complains(lambda: app.trajectory.repathed(chosen, dims, *GOOD.values()))  # noqa: B023


def test_files_of_what_is_on_screen(app):
    import csv

    for run, kinds in (("digits-run", ("png", "gif", "csv")), ("moons-run", ("png", "gif", "csv"))):
        for kind in kinds:
            url, name = app.trajectory.exported(kind, *(GOOD | dict(run=run)).values())
            data = base64.b64decode(url.partition(",")[2])
            assert name == f"{run}-euler-4-seed0.{kind}"
            if kind == "csv":
                rows = list(csv.DictReader(io.StringIO(data.decode())))
                assert len(rows) == 4 and float(rows[0]["speed"]) > 0
            else:
                image = Image.open(io.BytesIO(data))
                assert image.format == kind.upper() and (kind == "png" or image.n_frames == 5)
    assert "not one of" in complains(lambda: app.trajectory.exported("exe", *GOOD.values()))


def test_a_walk_that_was_asked_for_before_is_found_again(app, monkeypatch):
    sample(app, seed=77)
    monkeypatch.setattr(ask.SampleRequest, "states", lambda self: pytest.fail("walked again"))
    assert app.trajectory.exported("csv", *(GOOD | dict(seed=77)).values())[0]
    assert sum(t.xs.numel() * 8 for t in ask.WALKS.values()) <= ask.MOST["walks"]


def test_a_request_that_takes_too_long_is_stopped(app, monkeypatch):
    monkeypatch.setitem(ask.MOST, "seconds", 0)
    assert "stopped after 0 s" in complains(lambda: sample(app, amount=64))
    assert "stopped after" in complains(
        lambda: list(
            app.tradeoff.measured(
                ["digits-run"], ["euler"], "fd", "NFE", "uniform", "7", 100, "0", progress=still
            )
        )
    )


@pytest.mark.parametrize(
    "asked, said",
    [
        (("euler", "steps", 8), "8 NFE"),
        (("heun", "steps", 8), "16 NFE"),
        (("heun", "NFE", 8), "<b>4</b> steps"),
        (("rk45", "steps", 1), "as needed"),
        (("heun", "NFE", 7), "6 or 8"),
        (("rk4", "NFE", 3), "; 4 is"),
        (("rk45", "NFE", 8), "itself"),
        (("eulr", "steps", 8), "did you mean"),
        (("euler", "steps", None), "whole number"),
        (("dpmpp-2s", "steps", 4), "7 NFE"),
        (("dpmpp-2s", "steps", 4, False), "8 NFE"),
        (("dpmpp-2s", "NFE", 8), "7 or 9"),
        (("dpmpp-2m", "steps", 8), "order 2, native grid logsnr"),
        (("pndm", "NFE", 10), "9 or 13"),
        (("euler", "steps", 8, "no"), "True or False"),
        (("moons-solver", "steps", 3), "order 1, fitted for 3 steps on the uniform grid"),
        (("moons-solver", "NFE", 3), "<b>3</b> steps"),
        (("moons-solver", "NFE", 4), "; 3 is"),
        (("moons-solver", "steps", 4), "fitted for 3 steps, not for 4"),
        (("moons-solver", "steps", 3, False), "switch that on"),
        (("moons-solver", "steps", 3, True, "digits-run"), "for the network of moons-run"),
        (("moons-solvr", "steps", 3), "did you mean 'moons-solver'"),
        (("euler", "steps", 10**9), "out of range"),
        (("euler", "steps", float("nan")), "whole number"),
    ],
)
def test_both_counts_are_shown(app, asked, said):
    assert said in html.unescape(app.cost(*asked))


BAD = [
    dict(run="nope"),
    dict(run=None),
    dict(run=7),
    dict(run="../../etc/passwd"),
    dict(run="damaged-run"),
    dict(run="digits-rum"),
    dict(run="x" * 5000),
    dict(weights="best"),
    dict(weights=None),
    dict(head=2),
    dict(head=0),
    dict(head="one"),
    dict(head=float("nan")),
    dict(solver="dpm"),
    dict(solver=None),
    dict(solver=["euler"]),
    dict(by="calls"),
    dict(by="NFE", solver="heun", amount=7),
    dict(by="NFE", solver="rk45"),
    dict(amount=0),
    dict(amount=-1),
    dict(amount=10**12),
    dict(amount=float("inf")),
    dict(amount=float("nan")),
    dict(amount="abc"),
    dict(amount=None),
    dict(amount=2.5),
    dict(amount=300),
    dict(grid="cosine"),
    dict(grid=None),
    dict(seed=-1),
    dict(seed=2**70),
    dict(seed="abc"),
    dict(seed=None),
    dict(seed=float("nan")),
    dict(seed=0.5),
    dict(count=0),
    dict(count=65),
    dict(count=True),
    dict(count=None),
    dict(label="eleven"),
    dict(label=None),
    dict(label="<script>alert(1)</script>"),
    dict(run="moons-run", label="0"),
    dict(guidance=float("nan")),
    dict(guidance=1e9),
    dict(guidance="much"),
    dict(guidance=None),
    dict(lower_order_final="maybe"),
    dict(lower_order_final=None),
    dict(lower_order_final=True),
    dict(denoise="yes"),
    dict(denoise=None),
    dict(denoise=1),
    dict(solver="moons-run"),
    dict(solver="moons-solver", amount=3),
    dict(solver="../runs/moons-solver"),
    dict(solver="x" * 5000),
    dict(solver=""),
    dict(run="moons-solver", solver="moons-solver", amount=4),
    dict(run="moons-run", solver="moons-solver", amount=3, grid="logsnr"),
    dict(run="moons-run", solver="moons-solver", amount=3, denoise=False),
    dict(run="moons-run", solver="moons-solver", amount=3, weights="raw"),
    dict(run="moons-run", solver="moons-solver", amount=3, guidance=2.0),
]


def complains(call):
    with pytest.raises(gr.Error) as caught:
        call()
    words = caught.value.message
    assert (
        10 < len(words) <= 200
        and "\n" not in words
        and "Traceback" not in words
        and "<" not in words
        and "the explorer failed" not in words
    ), words
    return words


@pytest.mark.parametrize(
    "change", BAD, ids=lambda c: ",".join(f"{k}={str(v)[:20]}" for k, v in c.items())
)
def test_bad_input_is_answered_in_one_sentence(app, change):
    complains(lambda: sample(app, **change))


# Solvers and the controls they decide

still = lambda *a, **k: None


def test_every_solver_offered_samples(app):
    names = dict.fromkeys(ask.solver_names(ask.open_run("moons-run")))
    assert (
        len(names) == len(ask.SOLVERS) - 1 + 1
    )  # flow-map needs a network of two times; moons-solver fits
    for name in [*names, "flow-map"]:
        numbers = sample(
            app,
            run="moons-jumps" if name == "flow-map" else "moons-run",
            solver=name,
            amount=3,
            grid="native",
            count=2,
        )[-1][6]
        calls = ask.find_entry(name).nfe
        assert "not finite" not in numbers and (
            not calls or figure(numbers, "NFE counted") == str(calls(3))
        ), name


def test_the_last_moves_are_as_asked(app):
    how = dict(solver="dpmpp-2s", amount=4, grid="native")
    usual, short = (sample(app, **how, denoise=d)[-1] for d in (True, False))
    assert (
        figure(usual[6], "NFE counted") == "7"
        and figure(short[6], "NFE counted") == "8"
        and "denoise=False" in short[8]
    )
    films = {
        lower: sample(app, solver="ab3", lower_order_final=lower)[-1]
        for lower in ("auto", "yes", "no")
    }
    last = {lower: page[0].splitlines()[-1] for lower, page in films.items()}
    assert (
        last["auto"] == last["no"] != last["yes"]
        and "lower_order_final=True" in films["yes"][8]
        and "lower_order" not in films["auto"][8]
    )


def named(app, updates):
    "What `fitted` tells the controls, by name."
    return dict(
        zip(
            (
                "line",
                "label",
                "count",
                "plane",
                "film",
                "paths",
                "solver",
                *app.BOUND,
                "runs",
                "solvers",
                "n",
            ),
            updates,
        )
    )


def test_a_learned_solver_is_offered_for_its_network_only(app, lab):
    assert ask.learned_solvers() == ["moons-solver"]
    offers = {
        run: [name for _, name in named(app, app.fitted(run))["solver"]["choices"]]
        for run in ("moons-run", "moons-solver", "digits-run")
    }
    assert {run: "moons-solver" in names for run, names in offers.items()} == {
        "moons-run": True,
        "moons-solver": True,
        "digits-run": False,
    }
    said = complains(lambda: sample(app, solver="moons-solver", amount=3))
    assert (
        said
        == "moons-solver was fitted for the network of moons-run, not for the one of digits-run"
    )
    unfitted = Path(lab["CUDLAB_RUNS_PATH"]) / "unfitted"
    training.create_run(
        Config(method="dode", data="moons", args=dict(teacher="moons-run")), "unfitted"
    )
    assert "unfitted" not in ask.learned_solvers() and "not offered" in complains(
        lambda: sample(app, run="moons-run", solver="unfitted")
    )
    shutil.rmtree(unfitted)


def test_a_learned_solver_sets_and_locks_the_controls(app):
    want = dict(
        by="steps",
        amount=3,
        grid="uniform",
        weights="ema",
        lower_order_final="auto",
        denoise=True,
        head=1,
        guidance=1.0,
    )
    decided = dict(zip(app.BOUND, app.decided("moons-run", "moons-solver")))
    assert {k: u["value"] for k, u in decided.items()} == want and not any(
        u["interactive"] for u in decided.values()
    )
    free = dict(zip(app.BOUND, app.decided("moons-run", "heun")))
    assert (
        all(u["interactive"] for k, u in free.items() if k != "head")
        and "value" not in free["amount"]
    )
    own = named(app, app.fitted("moons-solver", "heun"))
    assert (
        own["solver"]["value"] == "moons-solver"
        and own["amount"]["value"] == 3
        and "network of <b>moons-run" in own["line"]
    )
    kept, gone = (
        named(app, app.fitted("moons-run", "moons-solver")),
        named(app, app.fitted("digits-run", "moons-solver")),
    )
    assert kept["solver"]["value"] == "moons-solver" and gone["solver"]["value"] == "euler"
    assert (
        sample(app, **LEARNED)[-1][6]
        and "solver='moons-solver'" in sample(app, **LEARNED | dict(run="moons-solver"))[-1][8]
    )


def test_a_one_step_student_locks_the_controls_and_refuses_the_rest(app):
    shown = named(app, app.fitted("moons-short", "heun", 8))
    assert (
        [name for _, name in shown["solver"]["choices"]] == ["euler"] == [shown["solver"]["value"]]
    )
    assert (
        shown["amount"]["value"] == 1
        and not shown["amount"]["interactive"]
        and not shown["grid"]["interactive"]
        and not shown["guidance"]["visible"]
    )
    back = named(app, app.fitted("moons-run", "euler", 1))
    assert (
        back["amount"]["interactive"]
        and back["amount"]["value"] == ask.open_run("moons-run").sampling_defaults["steps"]
    )
    how = dict(run="moons-short", solver="euler", amount=1)
    page = sample(app, **how)[-1]
    assert figure(page[6], "NFE counted") == "1" and "straight" not in page[6]
    for change in (dict(amount=3), dict(solver="heun"), dict(grid="edm"), dict(denoise=False)):
        assert "one call" in complains(lambda change=change: sample(app, **how | change)), change


def test_a_network_of_two_times_opens_with_its_jumps(app):
    assert named(app, app.fitted("moons-jumps", "heun"))["solver"]["value"] == "flow-map"
    assert (
        figure(sample(app, run="moons-jumps", solver="flow-map", amount=3)[-1][6], "NFE counted")
        == "3"
    )
    assert "one time only" in complains(lambda: sample(app, run="moons-run", solver="flow-map"))


def test_a_solver_without_its_teacher_is_a_sentence(app, lab):
    runs = Path(lab["CUDLAB_RUNS_PATH"])
    (runs / "moons-run").rename(runs / "hidden")
    try:
        assert "cannot be used" in complains(
            lambda: sample(app, **LEARNED | dict(run="moons-solver", solver="euler"))
        )
    finally:
        (runs / "hidden").rename(runs / "moons-run")


# Trade-off


def lines_of(chart):
    return [t.name for t in chart.data if t.name and t.name != "Pareto front"]


def measure(app, names, solvers, nfe, grid="uniform", seeds="0", n=80):
    return list(
        app.tradeoff.measured(names, solvers, "fd", "NFE", grid, nfe, n, seeds, progress=still)
    )


def test_missing_points_are_measured_one_by_one_and_kept(app):
    steps = measure(app, ["digits-run"], ["euler"], "2, 1 2")
    assert len(steps) == 3 and [
        len(t.x) for t in steps[-1][0].data if t.name == "digits-run · euler"
    ] == [2]
    assert (
        len(measure(app, ["digits-run"], ["euler"], "1,2")) == 1
        and len(ask.open_run("digits-run").scores) == 2
    )
    chart, caption, table = measure(app, ["digits-run"], ["euler", "ab2"], "2")[-1]
    assert lines_of(chart) == ["digits-run · euler", "digits-run · ab2"]
    assert (
        all(said in caption for said in ("digits-v2", "80", "seeds"))
        and table.count("<tr>") == 4
        and "<caption>" in table
    )


def test_scores_of_another_protocol_are_counted_and_not_drawn(app):
    measure(app, ["digits-run"], ["euler"], "1, 2")
    run = ask.open_run("digits-run")
    mine = [s for s in run.scores if s["solver"] == "euler"]
    run.add_score(mine[0] | dict(n=32, note="a <b>warning</b>"))
    chart, caption, table = app.tradeoff.scores(["digits-run"], ["euler"])
    assert (
        sum(len(t.x) for t in chart.data if t.name == "digits-run · euler") == len(mine)
        and "1 scores are not on this axis" in caption
        and "n is 80" in caption
    )
    assert "<b>warning" not in caption + table


def test_learned_solvers_students_and_teachers_share_an_axis(app):
    names, solvers = app.tradeoff.beside(ask.open_run("moons-short"))
    assert names == ["moons-short", "moons-run"] and {
        "euler",
        "ab2",
        "dpmpp-2m",
        "unipc2-bh2",
    } <= set(solvers)
    assert app.tradeoff.beside(ask.open_run("moons-solver"))[1][0] == "moons-solver"
    chart, _, _ = measure(
        app, ["moons-short", "moons-run", "moons-solver"], ["euler", "moons-solver"], "1, 3"
    )[-1]
    assert set(lines_of(chart)) >= {"moons-short · euler", "moons-run · euler"} and any(
        "moons-solver" in n for n in lines_of(chart)
    )
    native = measure(app, ["moons-run"], ["dpmpp-2m"], "2", "native")[-1][0]
    assert lines_of(native) == ["moons-run · dpmpp-2m · grid logsnr"]
    assert "Nothing measured yet" in app.tradeoff.scores(["moons-jumps"], ["euler"])[1]


def test_other_scores_and_the_time_axis(app):
    measure(app, ["digits-run"], ["euler"], "1, 2")
    for value in app.tradeoff.VALUES:
        chart, caption, _ = app.tradeoff.scores(["digits-run"], ["euler"], value, "wall time")
        assert "Protocol" in caption or "None of these scores" in caption, value
    assert "ms" in str(
        app.tradeoff.scores(["digits-run"], ["euler"], "fd", "wall time")[0].layout.xaxis.title.text
    )
    assert [
        "other work on the machine" in app.tradeoff.scores(["digits-run"], ["euler"], "fd", axis)[1]
        for axis in ("wall time", "NFE")
    ] == [True, False]


def test_the_job_measures_the_same(app):
    measure(app, ["digits-run"], ["euler"], "1, 2")
    command = app.tradeoff.job(["digits-run"], ["euler", "ab2"], "uniform", "1, 2", 80, "0 1")
    assert (
        command
        == "papermill nbs/evaluate.ipynb scores.ipynb -p run digits-run -p solvers 'euler ab2' -p "
        "nfes '1 2' -p seeds '0 1' -p n 80 -p grid uniform"
    )
    assert named(app, app.fitted("digits-run"))["n"] == 80, "a new point is to join those there are"
    url, name = app.tradeoff.exported(["digits-run"], ["euler"])
    assert name == "trade-off.csv" and b"extractor_hash" in base64.b64decode(url.partition(",")[2])
    assert "nothing to save" in complains(lambda: app.tradeoff.exported(["moons-jumps"], ["euler"]))
    form = GOOD | dict(solver="heun", seed=3)
    assert app.pointed(*form.values()).endswith(
        "-p run digits-run -p solvers heun -p nfes 8 -p seeds 3 -p n 80 -p grid uniform"
    )
    assert app.pointed(*(form | dict(weights="raw", denoise=False)).values()).endswith(
        "-p grid uniform -p weights raw -p denoise False"
    )
    assert (
        app.pointed(*(form | dict(run="nope")).values())
        == ""
        == app.pointed(*(form | dict(solver="rk45", by="NFE")).values())
    )


@pytest.mark.parametrize(
    "change",
    [
        dict(wanted=""),
        dict(wanted="1, two"),
        dict(wanted="0"),
        dict(wanted="99999"),
        dict(wanted=None),
        dict(wanted="1.5"),
        dict(n=3),
        dict(n=None),
        dict(n=10**9),
        dict(seeds="x"),
        dict(n=float("nan")),
        dict(seeds=""),
        dict(names=[]),
        dict(names="nope"),
        dict(names=None),
        dict(names=[3]),
        dict(solvers=["nope"]),
        dict(solvers=[]),
        dict(value="best"),
        dict(axis="cost"),
        dict(grid="cosine"),
        dict(names=["digits-run"] * 30),
        dict(solvers=["flow-map"]),
    ],
    ids=str,
)
def test_bad_measurements_are_answered_in_one_sentence(app, change):
    good = dict(
        names=["digits-run"],
        solvers=["euler"],
        value="fd",
        axis="NFE",
        grid="uniform",
        wanted="1",
        n=100,
        seeds="0",
    )
    complains(lambda: list(app.tradeoff.measured(**good | change, progress=still)))


# Compare

COLUMNS = [
    ("digits-run", "euler", 2, "uniform", "ema", 1),
    ("digits-run", "ab2", 4, "uniform", "raw", 1),
    ("none", "euler", 4, "uniform", "ema", 1),
    ("none", "euler", 4, "uniform", "ema", 1),
]
ROW = [v for column in COLUMNS for v in column]
POINTS = [
    v
    for column in [("moons-run", "euler", 2, "uniform", "ema", 1), *COLUMNS[2:3] * 3]
    for v in column
]


def test_columns_share_their_noise(app):
    *_, (text, _, numbers, table) = app.compare.compared(5, 4, *ROW)
    head, columns = film(text)
    assert [c["letter"] for c in columns] == ["A", "B"] and head["w"] == head["h"] == 17
    run = run_module.Run.open("digits-run")
    x = run.solve(seed=5, index=4, steps=4, solver="ab2", weights="raw").x
    assert np.array_equal(opened(columns[1]["src"])[9:, 9:, 0], to_pixels(x)[3, ..., 0])
    a, b = run.solve(seed=5, index=4, steps=2).x, x
    assert f"{float((b - a).flatten(1).square().mean(1).sqrt().mean()):.4f}" in table
    goal = run.solve(seed=5, index=4, solver="heun", steps=64).x
    assert f"{float((a - goal).flatten(1).square().mean(1).sqrt().mean()):.4f}" in table
    space = {}
    exec(app.compare.script(5, 4, *ROW), space)
    assert torch.equal(space["a"].x, a) and torch.equal(space["b"].x, b)
    space = {}
    exec(
        app.compare.script(5, 4, *COLUMNS[2], *COLUMNS[0], *COLUMNS[3], *COLUMNS[1]), space
    )  # the first columns may be empty
    assert torch.equal(space["b"].x, a) and torch.equal(space["d"].x, b)


def test_points_are_compared_too_and_a_student_with_its_teacher(app):
    row = [
        *("moons-short", "euler", 1, "uniform", "ema", 1),
        *("moons-run", "heun", 4, "uniform", "ema", 1),
        *COLUMNS[2],
        *COLUMNS[3],
    ]
    pages = list(app.compare.compared(0, 16, *row))
    assert (
        pages[-1][0] == ""
        and any(getattr(p[1], "data", None) for p in pages)
        and pages[-1][3].count("moons-run") >= 3
    )


@pytest.mark.parametrize(
    "at, value, said",
    [
        (0, "nope", "column A"),
        (0, "none", "column B"),
        (2, 0, "column A"),
        (2, None, "column A"),
        (1, "rk45", "column A"),
        (6, "moons-run", "samples of 2"),
        (6, "moons-short", "column B"),
        (3, "x", "grid"),
        (11, 7, "head"),
    ],
)
def test_a_bad_column_is_named(app, at, value, said):
    row = list(ROW)
    row[at] = value
    if value == "none":
        row[6] = "damaged-run"
    assert said in complains(lambda: list(app.compare.compared(0, 4, *row)))
    complains(lambda: app.compare.script(0, 4, *row))


def test_a_column_takes_what_its_run_decides(app):
    assert app.compare.seated("moons-short", "heun", 4) == (
        "euler",
        1,
        "uniform",
        1,
    ) and app.compare.seated("moons-run", "moons-solver", 4) == ("moons-solver", 3, "uniform", 1)
    assert (
        app.compare.seated("moons-run", "ab2", 4)[0] == "ab2"
        and app.compare.seated("none")[0] == gr.skip()
    )
    complains(lambda: app.compare.seated("nope"))


# Share


def test_the_address_is_checked_and_says_what_is_wrong(app):
    share = app.share
    found, wrong = share.understood(
        dict(
            run="digits-run",
            amount="4",
            seed="7",
            denoise="false",
            guidance="2.5",
            view="velocity",
            unknown="1",
        )
    )
    assert (
        found
        == dict(run="digits-run", amount=4, seed=7, denoise=False, guidance=2.5, view="velocity")
        and not wrong
    )
    found, wrong = share.understood(
        dict(amount="1e9", seed="-1", weights="best", view="nowhere", value="<b>", denoise="maybe")
    )
    assert not found and len(wrong) == 6 and all(len(w) < 200 for w in wrong)
    assert share.understood(dict(run="x" * 3000)) == (
        {},
        ["the address is longer than 2048 characters and was not read"],
    )
    for bad in (
        "digits-rf~euler~x~uniform~ema~1",
        "zzz",
        "a~b~1~nowhere~ema~1",
        "a~b~1~uniform~best~1",
        "~" * 5,
    ):
        assert "run~solver~NFE" in share.understood(dict(a=bad))[1][0]
    assert share.columns(dict(a="digits-run~euler~4~uniform~ema~1", b="broken"))[0]["amount"] == 4
    assert [
        c["run"] for c in share.columns(dict(a="digits-run~euler~4~uniform~ema~1", b="broken"))
    ] == ["digits-run", "none", "none", "none"]


class Asked:
    def __init__(self, **query):
        self.query_params = query


def test_a_link_opens_what_it_says(app):
    page = app.arrived(
        Asked(
            run="moons-run",
            solver="heun",
            amount="5",
            seed="9",
            count="12",
            view="compare",
            a="moons-run~ab2~3~uniform~ema~1",
            value="kd",
            runs="moons-run nope",
        )
    )
    assert page[0]["value"] == "moons-run" and page[1]["selected"] == "compare"
    shown = named(app, page[2 : 2 + app.FITS])
    assert (
        shown["solver"]["value"] == "heun"
        and shown["amount"]["value"] == 5
        and shown["count"]["value"] == 12
        and shown["runs"]["value"] == ["moons-run"]
        and shown["n"] in (80, 2000)
    )
    rest = page[2 + app.FITS :]
    assert (
        rest[0] == 9
        and rest[1] == "kd"
        and rest[8]["value"] == "moons-run"
        and rest[10] == 3
        and rest[14]["value"] == "none"
    )
    locked = named(
        app, app.arrived(Asked(run="moons-short", amount="7", n="300"))[2 : 2 + app.FITS]
    )
    assert locked["n"] == 300
    assert locked["amount"]["value"] == 1


def test_an_empty_lab_is_a_page_too(app, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "none"))
    full = len(app.arrived())
    monkeypatch.setenv("CUDLAB_CHECKPOINTS_PATH", str(tmp_path / "none"))
    page = app.arrived()
    assert "No run yet" in page[2] and len(page) == full


# Runs


def test_the_list_has_every_run_and_says_what_is_damaged(app):
    rows = {row[0]: dict(zip(app.browser.HEADERS, row)) for row in app.browser.browse()}
    assert set(rows) == {
        "digits-run",
        "damaged-run",
        "moons-run",
        "moons-solver",
        "moons-short",
        "moons-jumps",
    }
    assert (
        rows["damaged-run"]["state"].startswith("damaged: ema.safetensors")
        and rows["moons-run"]["steps"] == 20
    )
    assert [row[0] for row in app.browser.browse(method="distill")] == ["moons-short"] and {
        row[0] for row in app.browser.browse(data="digits", text="dam")
    } == {"damaged-run"}
    for bad in (dict(method="nope"), dict(data=3), dict(text=["x"]), dict(text="x" * 300)):
        complains(lambda bad=bad: app.browser.browse(**bad))
    assert "aim" not in app.browser.apart(
        ["moons-run", "moons-short"]
    ) and "method" in app.browser.apart(["moons-run", "moons-short"])
    assert "at most 6" in complains(lambda: app.browser.apart(["moons-run", *map(str, range(7))]))


def test_a_run_tells_everything(app):
    facts, loss, log, command, config = app.browser.about("digits-run")
    assert (
        "match their SHA-256" in facts
        and len(loss.data) == 2
        and "label_dropout" in config
        and log.count("<tr>") == 5
    )
    words = command.split()
    assert words[:4] == ["python", "-m", "cudlab.cli", "train"]
    assert (
        training.parse_parameters(cli.parse_words(words[4:]))[0]
        == ask.open_run("digits-run").config
    )
    for run in (None, "nope", 3, "damaged-run"):
        complains(lambda run=run: app.browser.about(run))


def test_a_run_that_holds_a_solver_tells_what_was_learned(app):
    facts, loss, _, command, _ = app.browser.about("moons-solver")
    held = run_module.Run.open("moons-solver").tensors("ema.safetensors")
    last = (
        f"{held['solver.lam'][-1, 0]:.3f}\u00a0±\u00a0{held['solver.by_batch'].std(0)[-1, 0]:.3f}"
    )
    assert (
        "<code>0.000, " in facts
        and last in facts
        and "over 2 batches" in facts
        and figure(facts, "fitted batches") == "2 of 2"
        and figure(facts, "parameters") == "3"
    )
    assert (
        "network of <b>moons-run</b>, step 20" in facts
        and run_module.Run.open("moons-run").network_hash()[:12] in facts
    )
    assert {t.name for t in loss.data if t.name} == {
        "solver",
        "euler",
    } and "args.teacher=moons-run" in command
    assert (
        replace(training.parse_parameters(cli.parse_words(command.split()[4:]))[0], log_every=1)
        == ask.open_run("moons-solver").config
    )


def test_the_newest_average_of_a_job_is_measured(app):
    pages = list(app.live.scored("moons-jumps", progress=still))
    assert (
        len(pages) == 13
        and "12 scores of the average of step 4" in pages[-1][1]
        and len(list(app.live.scored("moons-jumps", progress=still))) == 1
    )
    assert {s["solver"] for s in ask.open_run("moons-jumps").scores} == {"flow-map", "euler", "ab2"}
    for bad in ("nope", None, 3, "damaged-run", "../moons-jumps"):
        complains(lambda bad=bad: list(app.live.scored(bad, progress=still)))


# Under use

GOOD_MEASURE = dict(
    names=["moons-run"],
    solvers=["euler"],
    value="fd",
    axis="NFE",
    grid="uniform",
    wanted="2",
    n=16,
    seeds="0",
)
JUNK = st.one_of(
    st.none(),
    st.floats(),
    st.just(1e308),
    st.integers(),
    st.just(10**400),
    st.booleans(),
    st.text(max_size=40),
    st.just("x" * 5000),
    st.lists(st.text(max_size=5), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.sampled_from(
        [
            "../../etc/passwd",
            "/etc/passwd",
            "runs/moons-run",
            "<script>alert(1)</script>",
            "'; DROP TABLE runs; --",
            "\\u0000",
            "🦆" * 50,
            "nan",
            "",
            "damaged-run",
            "deleted",
        ]
    ),
)


def calls(app):
    "Every endpoint: name -> (function of a form, a good form)."
    moons = GOOD | dict(run="moons-run", amount=2, count=2)
    row = {
        f"{k}{i}": v for i, column in enumerate(COLUMNS) for k, v in zip(app.compare.COLUMN, column)
    }
    cheap = {
        f"{k}{i}": v
        for i, column in enumerate(
            [("moons-run", "euler", 2, "uniform", "ema", 1), *COLUMNS[2:3] * 3]
        )
        for k, v in zip(app.compare.COLUMN, column)
    }
    assert list(row) == list(cheap)
    return {
        "sample": (lambda **f: list(app.trajectory.sampled(*f.values())), moons),
        "errors": (lambda **f: list(app.trajectory.errors(*f.values())), moons),
        "paths": (
            lambda **f: app.trajectory.repathed(*f.values()),
            dict(chosen="1", dims="2-D") | moons,
        ),
        "export": (lambda **f: app.trajectory.exported(*f.values()), dict(kind="csv") | moons),
        "fit": (lambda **f: app.fitted(**f), dict(name="moons-run", solver="euler", amount=3)),
        "decide": (lambda **f: app.decided(**f), dict(name="moons-run", solver="euler", amount=3)),
        "scores": (
            lambda **f: app.tradeoff.scores(**f),
            dict(names=["moons-run"], solvers=["euler"], value="fd", axis="NFE", grid="uniform"),
        ),
        "measure": (lambda **f: list(app.tradeoff.measured(**f, progress=still)), GOOD_MEASURE),
        "job": (
            lambda **f: app.tradeoff.job(**f),
            dict(
                names=["moons-run"], solvers=["euler"], grid="uniform", wanted="2", n=100, seeds="0"
            ),
        ),
        "compare": (
            lambda **f: list(app.compare.compared(*f.values())),
            dict(seed=0, count=2) | cheap,
        ),
        "cost": (
            lambda **f: app.cost(**f),
            dict(solver="euler", by="steps", amount=3, denoise=True, run="moons-run"),
        ),
        "point": (lambda **f: app.pointed(*f.values()), moons),
        "browse": (lambda **f: app.browser.browse(**f), dict(method="all", data="all", text="")),
        "about": (lambda **f: app.browser.about(**f), dict(name="moons-run")),
        "differences": (
            lambda **f: app.browser.apart(**f),
            dict(names=["moons-run", "moons-short"]),
        ),
        "job_state": (lambda **f: app.live.state(**f), dict(name="moons-run")),
        "job_start": (lambda **f: app.live.start(**f), dict(text="method=nope")),
        "runs": (
            lambda **f: app.arrived(Asked(**f)),
            dict(
                run="moons-run",
                solver="euler",
                amount="3",
                view="runs",
                a="moons-run~ab2~3~uniform~ema~1",
            ),
        ),
    }


@pytest.mark.parametrize(
    "name",
    [
        "sample",
        "errors",
        "paths",
        "export",
        "fit",
        "decide",
        "scores",
        "measure",
        "job",
        "compare",
        "cost",
        "point",
        "browse",
        "about",
        "differences",
        "job_state",
        "job_start",
        "runs",
    ],
)
def test_a_thousand_bad_inputs_each_get_a_sentence(app, name):
    call, good = calls(app)[name]
    usual = lambda: (
        complains(lambda: call(**good)) if name == "job_start" else str(call(**good))[:3000]
    )
    before, complaints = usual(), []

    @settings(
        max_examples=1000,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.dictionaries(st.sampled_from(sorted(good)), JUNK, min_size=1, max_size=3))
    def attack(bad):
        if name == "runs":
            bad = {k: str(v) for k, v in bad.items()}
        try:
            call(**good | bad)
        except gr.Error as e:
            complaints.append(e.message)
            assert (
                10 < len(e.message) <= 200
                and "\n" not in e.message
                and "Traceback" not in e.message
                and "<" not in e.message
            ), e.message
            assert "the explorer failed" not in e.message, (bad, e.message)

    attack()
    assert len(complaints) > 300 or name in ("cost", "point", "runs", "job_start"), len(complaints)
    ignore = lambda text: re.sub(r"\d+ ms|'?took.*", "", text)
    assert name == "measure" or ignore(usual()) == ignore(
        before
    )  # a measurement adds to what is drawn


@pytest.mark.parametrize("name", ["fitted", "decided", "cost"])
@pytest.mark.parametrize("run", [None, "nope", 3, "damaged-run"])
def test_every_callback_answers_for_a_bad_run(app, name, run):
    if name == "cost":
        assert "bad" in app.cost("euler", "steps", 3, True, run) or not run
    else:
        complains(lambda: getattr(app, name)(run, "euler"))


def test_an_unforeseen_failure_is_a_sentence_too(app, monkeypatch, caplog):
    def broken(*a, **k):
        raise KeyError("secret detail")

    monkeypatch.setattr(ask, "open_run", broken)
    with pytest.raises(gr.Error) as caught:
        sample(app)
    assert (
        "KeyError" in caught.value.message
        and "secret" not in caught.value.message
        and "secret detail" in caplog.text
    )


def test_damaged_runs_are_not_offered(app):
    assert {i for _, i in ask.run_choices()} == {
        "digits-run",
        "moons-run",
        "moons-solver",
        "moons-short",
        "moons-jumps",
    }
    assert (
        ask.default_run() == "digits-run"
        and ask.default_run("moons-run") == "moons-run"
        and ask.default_run("damaged-run") == "digits-run"
    )


def test_a_run_deleted_meanwhile(app, lab):
    source, copy = (Path(lab["CUDLAB_RUNS_PATH"]) / n for n in ("moons-run", "short-lived"))
    shutil.copytree(source, copy)
    assert len(sample(app, run="short-lived")) >= 2
    shutil.rmtree(copy)
    assert "not here" in complains(lambda: sample(app, run="short-lived"))


def test_a_link_out_of_the_runs_is_refused(app, lab, tmp_path):
    runs = Path(lab["CUDLAB_RUNS_PATH"])
    shutil.copytree(runs / "moons-run", tmp_path / "outside")
    (runs / "linked").symlink_to(tmp_path / "outside")
    try:
        assert "linked" not in [i for _, i in ask.run_choices()]
        complains(lambda: sample(app, run="linked"))
    finally:
        (runs / "linked").unlink()


def test_open_runs_are_few_and_follow_their_manifest(app, lab):
    source = Path(lab["CUDLAB_RUNS_PATH"]) / "moons-run"
    copies = [source.parent / f"copy{k}" for k in range(6)]
    for copy in copies:
        shutil.copytree(source, copy)
        ask.open_run(copy.name)
    assert len(ask.OPENED) == 4
    first = ask.open_run("copy5")
    assert ask.open_run("copy5") is first
    later = time.time() + 5
    os.utime(copies[5] / "MANIFEST.json", (later, later))
    assert ask.open_run("copy5") is not first
    for copy in copies:
        shutil.rmtree(copy)


@pytest.mark.timeout(900)
def test_two_thousand_calls_leave_the_memory_where_it_was(app):
    import gc

    import psutil

    process = psutil.Process()

    def once(k):
        how = GOOD | dict(
            run="digits-run" if k % 50 < 10 else "moons-run", seed=k // 10, amount=2, count=2
        )
        match k % 10:
            case 0 | 1:
                list(app.trajectory.sampled(*how.values()))
            case 2:
                list(app.trajectory.errors(*how.values()))
            case 3:
                list(app.compare.compared(k, 2, *(ROW if k % 50 < 10 else POINTS)))
            case 4:
                app.fitted(how["run"], "euler", 8)
            case 5:
                complains(lambda: list(app.trajectory.sampled(*(how | dict(amount="x")).values())))
            case 6:
                app.trajectory.exported("gif", *how.values())
            case _:
                app.cost("heun", "NFE", 2 + k % 7 * 2, True, how["run"])

    for k in range(300):
        once(k)
    gc.collect()
    before = process.memory_info().rss
    for k in range(2000):
        once(k)
    gc.collect()
    assert process.memory_info().rss - before < 50 * 2**20


@pytest.fixture
def slow(app, monkeypatch):
    """The page served by this process, with walks that take a twentieth of a second a step and are
    counted.
    """
    seen, states = [], ask.SampleRequest.states

    def counted(self):
        for state in states(self):
            seen.append((self.ask.seed, state.i))
            time.sleep(0.05)
            yield state

    monkeypatch.setattr(ask.SampleRequest, "states", counted)
    page = app.build()
    _, address, _ = page.launch(server_port=free_port(), prevent_thread_lock=True, quiet=True)
    yield address, seen
    page.close()


def steady(seen):
    "Wait until nothing is added any more; how many there are."
    while True:
        count = len(seen)
        time.sleep(0.6)
        if len(seen) == count:
            return count


def test_a_cancelled_walk_stops_within_a_step(slow):
    from gradio_client import Client

    address, seen = slow
    job = Client(address, verbose=False, analytics_enabled=False).submit(
        *(GOOD | dict(amount=200, seed=31)).values(), api_name="/sample"
    )
    while len(seen) < 5:
        time.sleep(0.02)
    job.cancel()
    at = len(seen)
    assert steady(seen) <= at + 6 and len(seen) < 60  # the cancellation needs a moment to arrive


def test_a_closed_tab_stops_the_walk(slow, chromium):
    sync_api = pytest.importorskip("playwright.sync_api")
    address, seen = slow
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"],
        )
        page = browser.new_page()
        page.goto(f"{address}?run=digits-run&amount=200&seed=41")
        while len(seen) < 8:
            page.wait_for_timeout(50)
        page.close()
        at = len(seen)
        browser.close()
    assert steady(seen) <= at + 12 and len(seen) < 100


def test_a_full_queue_answers_at_once(slow, monkeypatch):
    from gradio_client import Client

    address, seen = slow
    states, go_on = ask.SampleRequest.states, threading.Event()

    def stuck(self):
        seen.append((self.ask.seed, 0))
        go_on.wait(300)
        yield from states(self)

    monkeypatch.setattr(ask.SampleRequest, "states", stuck)
    client = Client(address, verbose=False, analytics_enabled=False)
    asked = lambda k: client.submit(*(GOOD | dict(seed=100 + k)).values(), api_name="/sample")
    jobs = [asked(0)]
    try:
        deadline = time.time() + 60
        while (
            not seen and time.time() < deadline
        ):  # one at work, then 32 that wait; whichever come later are refused
            time.sleep(0.02)
        jobs += [asked(k) for k in range(1, 39)]
        while sum(job.done() for job in jobs) < 6 and time.time() < deadline:
            time.sleep(0.02)
        refused = [str(job.exception()) for job in jobs if job.done()]
        assert len(refused) == 6 and all("queue is full" in r.lower() for r in refused), refused
        assert len(seen) == 1
    finally:
        go_on.set()
        for job in jobs:
            job.cancel()


def test_every_endpoint_has_a_stable_name(app):
    page = app.build()
    names = {d.api_name for d in page.fns.values() if d.api_visibility == "public"}
    assert {
        "sample",
        "errors",
        "paths",
        "export_png",
        "export_gif",
        "export_csv",
        "export_scores",
        "browse",
        "about",
        "differences",
        "job_state",
        "job_start",
        "job_stop",
        "job_resume",
        "job_measure",
        "seed",
        "runs",
        "fit",
        "cost",
        "decide",
        "point",
        "scores",
        "measure",
        "job",
        "compare",
    } <= names
    assert not [n for n in names if isinstance(n, str) and re.search(r"_\d+$|lambda", n)], names
    solving = [d for d in page.fns.values() if d.concurrency_id == "solve"]
    assert len(solving) >= 7 and all(d.concurrency_limit == 1 for d in solving)
    page.close()


def test_only_safetensors_is_ever_loaded():
    for source in [*(ROOT / "apps").rglob("*.py"), *(ROOT / "cudlab").glob("*.py")]:
        text = source.read_text()
        assert not re.search(
            r"import pickle|pickle\.loads?\(|allow_pickle=True|weights_only=False|yaml\.load|(?<![.\w])eval\(|(?<![.\w])exec\(",
            text,
        ), source
        for line in text.splitlines():
            assert (
                not re.search(r"(?<!safetensors\.)torch\.load\(", line)
                or "weights_only=True" in line
            ), (source, line)


# A real server


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start_server(env, *more, port=None):
    "The app as a process: (process, address, seconds until ready, what it printed)."
    port = port or free_port()
    began = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, str(APP), "--port", str(port), *more],
        env=os.environ | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # a shell's background jobs are deaf to it
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
    spent = (
        sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13])) / os.sysconf("SC_CLK_TCK")
        if stat.exists()
        else 0
    )
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
    text, plane, paths, ends, panels, schedule, numbers, table, code, words = connect().predict(
        *GOOD.values(), api_name="/sample"
    )
    assert (
        text == sample(app)[-1][0]
        and plane is None
        and figure(numbers, "NFE counted") == "4"
        and "Run.open('digits-run')" in code
    )


def test_everything_the_page_does_can_be_called(connect):
    client = connect()
    *_, words = client.predict(*GOOD.values(), api_name="/errors")
    assert "digits-run" in words
    assert client.predict("1", "3-D", *GOOD.values(), api_name="/paths")[0]["type"] == "plotly"
    for kind in ("png", "gif", "csv"):
        url, name = client.predict(*GOOD.values(), api_name=f"/export_{kind}")
        assert url.startswith("data:") and name.endswith(kind)
    assert (
        "Protocol"
        in client.predict(
            ["moons-run"], ["euler"], "fd", "NFE", "uniform", "2", 100, "0", api_name="/measure"
        )[1]
    )
    assert (
        "Protocol"
        in client.predict(["moons-run"], ["euler"], "fd", "NFE", "uniform", api_name="/scores")[1]
    )
    assert client.predict(0, 4, *ROW, api_name="/compare")[3].count("<tr>") == 3
    assert client.predict(
        ["moons-run"], ["euler"], "uniform", "2", 100, "0", api_name="/job"
    ).startswith("papermill ")


def test_bad_input_through_a_server_leaves_it_alive(connect):
    client = connect()
    for change in (
        dict(run="nope"),
        dict(amount="abc"),
        dict(seed=None),
        dict(count=10**9),
        dict(label="<b>"),
    ):
        with pytest.raises(Exception) as caught:
            client.predict(*(GOOD | change).values(), api_name="/sample")
        assert "Traceback" not in str(caught.value) and len(str(caught.value)) <= 260, caught.value
    assert "4</b> steps" in client.predict("heun", "NFE", 8, api_name="/cost")


def test_two_clients_do_not_see_each_other(connect, app):
    want = {seed: sample(app, seed=seed, amount=12)[-1][0] for seed in (1, 2)}
    clients = {seed: connect() for seed in want}
    ask = lambda seed: [
        clients[seed].predict(*(GOOD | dict(seed=seed, amount=12)).values(), api_name="/sample")[0]
        for _ in range(3)
    ]
    with ThreadPoolExecutor(2) as pool:
        got = dict(zip(want, pool.map(ask, want)))
    assert got == {seed: [text] * 3 for seed, text in want.items()}


def test_nothing_but_the_page_is_served(server):
    from urllib.error import HTTPError
    from urllib.request import urlopen

    for path in (
        "gradio_api/file=/etc/passwd",
        f"gradio_api/file={APP}",
        "monitoring",
        "gradio_api/file=../settings.ini",
    ):
        with pytest.raises(HTTPError):
            urlopen(server[0] + path, timeout=5)


def test_a_busy_port_gives_way_and_says_so(lab):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process, address, _, said = start_server(lab, "--runs", "moons-run", port=port)
        try:
            assert (
                f":{port}/" not in address
                and len(said) == 2
                and said[0].startswith(f"port {port} is busy, using ")
            )
            from gradio_client import Client

            listed = Client(address, verbose=False, analytics_enabled=False).predict(
                api_name="/runs"
            )
            assert "moons-run" in str(listed) and "digits-run" not in str(listed)
        finally:
            stop_server(process)
    assert process.returncode == 0


def test_a_wrong_start_is_one_sentence(app, capsys):
    for argv, said in (
        (["--runs", "nope"], "unknown run 'nope'"),
        (["--port", "99999"], "out of range"),
        (["--host", "300.1.2.3"], "--auth"),
        (["--host", "0.0.0.0"], "give --auth"),
        (["--auth", "nobody"], "USER:PASSWORD"),
        (["--root-path", "lab"], "begin with /"),
    ):
        assert app.main(argv) == 2
        err = capsys.readouterr().err
        assert said in err and err.startswith("explorer: ") and err.count("\n") == 1


def test_another_address_asks_for_a_password_and_starts_no_jobs(lab):
    from urllib.error import HTTPError
    from urllib.request import urlopen

    from gradio_client import Client

    process, address, *_ = start_server(lab, "--host", "0.0.0.0", "--auth", "me:a-word")
    try:
        here = address.replace("0.0.0.0", "127.0.0.1")
        with pytest.raises(HTTPError) as refused:
            urlopen(here + "config", timeout=5)
        assert refused.value.code == 401
        client = Client(here, auth=("me", "a-word"), verbose=False, analytics_enabled=False)
        assert "4</b> steps" in client.predict("heun", "NFE", 8, True, "", api_name="/cost")
    finally:
        stop_server(process)


def test_the_page_opens_on_this_machine_only(app):
    import inspect

    source = inspect.getsource(app.main)
    assert (
        'default="127.0.0.1"' in source
        and "share=False" in source
        and os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    )
    assert [
        app.live.own(h)
        for h in (
            "127.0.0.1",
            "::1",
            "localhost",
            "127.5.5.5",
            "0.0.0.0",
            "192.168.1.2",
            "example.org",
            "",
        )
    ] == [True] * 4 + [False] * 4
