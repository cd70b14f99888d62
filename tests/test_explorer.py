"The explorer without a browser: every callback in-process, bad inputs, and a server under use."

import ast
import base64
import csv
import html
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from http.client import HTTPConnection
from pathlib import Path
from types import SimpleNamespace
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

gr = pytest.importorskip("gradio")

import guard
import numpy as np
import offer
import request
import server
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from small_lab import APP, ROOT, make_lab, start_explorer, stop_explorer, wait_for
from views import compare, film, form, live, runs, scores, share, tradeoff, trajectory

import jobs
from cudlab import disk
from cudlab.config import Config
from cudlab.create import create_run
from cudlab.plot import to_pixels
from cudlab.run import Run
from cudlab.solver import SOLVERS

GOOD = asdict(request.SampleForm(run="digits-run", amount=4, count=3))
LEARNED = GOOD | dict(run="moons-run", solver="moons-solver", amount=3)
SOUND = {"digits-run", "moons-run", "moons-solver", "moons-short", "moons-jumps"}


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


def no_progress(*args, **kwargs):
    pass


def named(values) -> dict:
    "What a stream yields, by name."
    return dict(zip(trajectory.SHOWN, values))


def sample(**change) -> list:
    return [named(page) for page in trajectory.stream_sample(*(GOOD | change).values())]


def errors(**change) -> list:
    return [named(page) for page in trajectory.stream_errors(*(GOOD | change).values())]


def fit(name, *args, **kwargs) -> dict:
    return dict(zip(form.FITTED, form.on_run(name, *args, **kwargs)))


def choose(name) -> dict:
    return dict(zip(("runs", "solvers", "n"), tradeoff.update_choice(name)))


def measure(names, solvers, nfes, grid="uniform", seeds="0", n=80) -> list:
    choice = (names, solvers, "fd", "NFE", grid, nfes, n, seeds)
    return list(tradeoff.stream_scores(*choice, progress=no_progress))


def parse_film(text) -> tuple:
    "The header of a film and its lines."
    head, *lines = map(json.loads, text.splitlines())
    return head, lines


def decode(url) -> bytes:
    return base64.b64decode(url.partition(",")[2])


def decode_image(url) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(decode(url))))


def figure(text, name) -> str:
    return re.search(rf"<dt>{name}</dt><dd>([^<]*)</dd>", text).group(1)


def check_sentence(words: str) -> None:
    assert 10 < len(words) <= 200, words
    for bad in ("\n", "Traceback", "<", "the explorer failed"):
        assert bad not in words, words


def complaint(call) -> str:
    with pytest.raises(gr.Error) as caught:
        call()
    check_sentence(caught.value.message)
    return caught.value.message


def test_importing_launches_nothing_and_only_the_app_needs_gradio(app):
    assert not gr.context.Context.root_block
    for module in (ROOT / "cudlab").glob("*.py"):
        assert "gradio" not in module.read_text().replace("gradio bundles", ""), module


# Trajectory


def test_the_film_grows_picture_by_picture(app, monkeypatch):
    monkeypatch.setattr(trajectory, "EVERY", 0)
    pages = sample()
    films = [page["film"] for page in pages]
    assert len(films) == 7
    assert all(later.startswith(former) for former, later in zip(films, films[1:]))
    head, lines = parse_film(films[-1])
    assert (head["count"], head["steps"], head["w"]) == (3, 4, 8)
    moves = [line for i in range(4) for line in (("hat", i), ("v", i), ("x", i + 1))]
    assert [(x["k"], x["i"]) for x in lines] == [("x", 0), *moves, ("hat", 4)]
    last = pages[-1]
    assert last["plane"] is None and last["checked"] == trajectory.HINT
    assert figure(last["numbers"], "NFE counted") == "4"
    assert len(last["schedule"].data) == 2 and len(last["panels"].data) >= 10
    assert len(last["paths"].data) >= 2 and last["ends"].count("<tr>") == 4
    assert last["moves"].count("<tr>") == 5
    space = {}
    exec(last["code"], space)
    assert space["trajectory"].nfe == 4


def test_the_pictures_are_the_samplers(app):
    _, lines = parse_film(sample(seed=5)[-1]["film"])
    tau = Run.open("digits-run").solve(seed=5, index=3, steps=4)
    shown = {(x["k"], x["i"]): decode_image(x["src"]) for x in lines}
    pictures = {("x", i): tau.xs[i] for i in range(5)} | {("hat", 2): tau.x0_hats[2]}
    for place, x in pictures.items():
        assert np.array_equal(shown[place], to_pixels(x)[..., 0].reshape(-1, 8)), place
    assert np.array_equal(shown["hat", 4], shown["x", 4])
    red = shown["v", 1][..., 0].astype(float) - shown["v", 1][..., 2]
    v = tau.vs[1].reshape(-1, 8).numpy()
    assert (red[v > 0.3] > 0).all() and (red[v < -0.3] < 0).all()


def test_updates_are_few_and_long_walks_keep_the_ends(app):
    pages = sample(amount=64, count=1)
    steps = {x["i"] for x in parse_film(pages[-1]["film"])[1]}
    assert {0, 64} <= steps and len(steps) <= request.LIMITS["columns"] and len(pages) < 60


def test_points_of_the_plane_move(app):
    page = sample(run="moons-run", count=20)[-1]
    plane = page["plane"]
    assert page["film"] == "" and page["paths"] is None and len(plane.frames) == 5
    assert {"data", "velocity", "sample"} <= {trace.name for trace in plane.data}
    assert len(plane.to_json()) < 600_000


def test_classes_and_guidance_change_the_picture(app):
    changes = ({}, dict(label="2"), dict(label="2", guidance=3.0))
    films = [sample(**change)[-1]["film"] for change in changes]
    assert len({text.splitlines()[-1] for text in films}) == 3


def test_errors_extend_the_film_that_is_there(app):
    before = sample()[-1]["film"]
    *progress, last = errors()
    assert last["film"].startswith(before) and len(progress) == 5 + 4
    _, lines = parse_film(last["film"])
    assert {x["i"] for x in lines if x["k"] == "gap"} == set(range(5))
    assert {x["i"] for x in lines if x["k"] == "error"} == set(range(1, 5))
    assert "digits-run" in last["checked"] and "local error" in last["moves"]
    assert "error against the reference" in last["moves"]
    fine = errors(solver="rk4", amount=16)[-1]
    ends = [re.search(r"end <b>([^<]+)</b>", page["checked"]).group(1) for page in (last, fine)]
    assert float(ends[1]) < float(ends[0]) / 5


def test_guidance_counts_every_call_twice(app):
    how = dict(label="3", guidance=3.0)
    cost = form.describe_cost("euler", "steps", 4, True, "digits-run", *how.values())
    assert "<b>4</b> steps <i>=</i> <b>8 NFE" in cost
    for change in ({}, dict(by="NFE", amount=8)):
        assert figure(sample(**how | change)[-1]["numbers"], "NFE counted") == "8"
    assert "counts twice; 6 or 8" in complaint(lambda: sample(**how, by="NFE", amount=7))


def test_errors_show_the_walk_they_were_measured_on(app):
    page = errors(solver="heun", seed=9)[-1]
    assert figure(page["numbers"], "NFE counted") == "8" and "solver='heun'" in page["code"]
    assert page["film"].startswith(sample(solver="heun", seed=9)[-1]["film"])


def test_the_reference_of_a_student_is_its_teacher(app):
    page = errors(run="moons-short", amount=1)[-1]
    assert page["film"] == "" and "flow of <b>moons-run" in page["checked"]
    assert "Local error" not in page["checked"]


def test_what_follows_no_flow_is_not_held_against_one(app):
    assert "follows no ODE" in complaint(lambda: errors(solver="renoise"))


def test_paths_of_chosen_samples(app):
    values = GOOD.values()
    paths, table = trajectory.redraw_paths("1, 3", "3-D", *values)
    assert paths.data[0].type == "scatter3d" and table.count("<tr>") == 3
    lengths = [
        len(trajectory.redraw_paths(chosen, "2-D", *values)[0].data[0].x) for chosen in ("1", "all")
    ]
    assert lengths[0] < lengths[1]
    bad = (("4", "2-D"), ("0", "2-D"), ("x", "2-D"), ("1", "4-D"), ("1", None), ("9" * 500, "2-D"))
    for choice in bad:
        complaint(lambda choice=choice: trajectory.redraw_paths(*choice, *values))


@pytest.mark.parametrize("run", ["digits-run", "moons-run"])
def test_files_of_what_is_on_screen(app, run):
    values = (GOOD | dict(run=run)).values()
    data = {}
    for kind in ("png", "gif", "csv"):
        url, name = film.export_file(kind, *values)
        assert name == f"{run}-euler-4-seed0.{kind}"
        data[kind] = io.BytesIO(decode(url))
    rows = list(csv.DictReader(io.StringIO(data["csv"].read().decode())))
    assert len(rows) == 4 and float(rows[0]["speed"]) > 0
    assert Image.open(data["png"]).format == "PNG" and Image.open(data["gif"]).n_frames == 5
    assert "not one of" in complaint(lambda: film.export_file("exe", *values))


def test_a_walk_that_was_asked_for_before_is_found_again(app, monkeypatch):
    sample(seed=77)
    monkeypatch.setattr(request.SampleRequest, "states", lambda self: pytest.fail("walked again"))
    assert film.export_file("csv", *(GOOD | dict(seed=77)).values())[0]
    assert sum(map(request.size_in_bytes, request.solved.values())) <= request.SOLVED_BYTES


def test_a_request_that_takes_too_long_is_stopped(app, monkeypatch):
    monkeypatch.setattr(request, "SECONDS", 0)
    assert "stopped after 0 s" in complaint(lambda: sample(amount=64))
    assert "stopped after" in complaint(lambda: measure(["digits-run"], ["euler"], "7", n=100))


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
    assert said in html.unescape(form.describe_cost(*asked))


NAN = float("nan")
JSON = {"content-type": "application/json"}
BAD_RUNS = ["nope", None, 7, "../../etc/passwd", "damaged-run", "digits-rum", "x" * 5000]
BAD_VALUES = dict(
    run=BAD_RUNS,
    weights=["best", None],
    head=[2, 0, "one", NAN],
    solver=["dpm", None, ["euler"], "moons-run", "../runs/moons-solver", "x" * 5000, ""],
    by=["calls"],
    amount=[0, -1, 10**12, float("inf"), NAN, "abc", None, 2.5, 300],
    grid=["cosine", None],
    seed=[-1, 2**70, "abc", None, NAN, 0.5],
    count=[0, 65, True, None],
    label=["eleven", None, "<script>alert(1)</script>"],
    guidance=[NAN, 1e9, "much", None],
    lower_order_final=["maybe", None, True],
    denoise=["yes", None, 1],
)
BAD_TOGETHER = [
    dict(by="NFE", solver="heun", amount=7),
    dict(by="NFE", solver="rk45"),
    dict(run="moons-run", label="0"),
    dict(run="moons-run", guidance=2.0),
    dict(solver="moons-solver", amount=3),
    dict(run="moons-solver", solver="moons-solver", amount=4),
    LEARNED | dict(grid="logsnr"),
    LEARNED | dict(denoise=False),
    LEARNED | dict(weights="raw"),
    LEARNED | dict(guidance=2.0),
]


@pytest.mark.parametrize("field", [*BAD_VALUES, "together"])
def test_bad_input_is_answered_in_one_sentence(app, field):
    changes = BAD_TOGETHER
    if field in BAD_VALUES:
        changes = [{field: value} for value in BAD_VALUES[field]]
    for change in changes:
        complaint(lambda change=change: sample(**change))


# Solvers and the controls they decide


def test_every_solver_offered_samples(app):
    names = offer.solver_names(offer.open_run("moons-run"))
    # flow-map needs a network of two times; moons-solver fits
    assert set(names) == set(SOLVERS) - {"flow-map"} | {"moons-solver"}
    for name in [*names, "flow-map"]:
        run = "moons-jumps" if name == "flow-map" else "moons-run"
        choices = GOOD | dict(run=run, solver=name, amount=3, grid="native", count=2)
        asked = request.parse_form(choices.values())
        tau = asked.solve()
        assert tau.x.isfinite().all(), name
        assert asked.solver.nfe is None or tau.nfe == asked.solver.nfe(3), name


def test_the_last_moves_are_as_asked(app):
    how = dict(solver="dpmpp-2s", amount=4, grid="native")
    usual, short = (sample(**how, denoise=denoise)[-1] for denoise in (True, False))
    assert figure(usual["numbers"], "NFE counted") == "7"
    assert figure(short["numbers"], "NFE counted") == "8" and "denoise=False" in short["code"]
    pages = {how: sample(solver="ab3", lower_order_final=how)[-1] for how in ("auto", "yes", "no")}
    last = {how: page["film"].splitlines()[-1] for how, page in pages.items()}
    assert last["auto"] == last["no"] != last["yes"]
    assert "lower_order_final=True" in pages["yes"]["code"]
    assert "lower_order" not in pages["auto"]["code"]


def test_a_learned_solver_is_offered_for_its_network_only(app, lab):
    assert offer.learned_solvers() == ["moons-solver"]
    for run, offered in {"moons-run": True, "moons-solver": True, "digits-run": False}.items():
        names = [name for _, name in fit(run)["solver"]["choices"]]
        assert ("moons-solver" in names) == offered, run
    said = complaint(lambda: sample(solver="moons-solver", amount=3))
    wrong = "moons-solver was fitted for the network of moons-run, not for the one of digits-run"
    assert said == wrong
    create_run(Config(method="dode", data="moons", args=dict(teacher="moons-run")), "unfitted")
    assert "unfitted" not in offer.learned_solvers()
    assert "not offered" in complaint(lambda: sample(run="moons-run", solver="unfitted"))
    shutil.rmtree(Path(lab["CUDLAB_RUNS_PATH"]) / "unfitted")


def test_a_learned_solver_sets_and_locks_the_controls(app):
    want = dict(by="steps", amount=3, grid="uniform", weights="ema")
    want |= dict(lower_order_final="auto", denoise=True, head=1, guidance=1.0)
    locked = dict(zip(form.LOCKABLE, form.on_solver("moons-run", "moons-solver")))
    assert {key: update["value"] for key, update in locked.items()} == want
    assert not any(update["interactive"] for update in locked.values())
    free = dict(zip(form.LOCKABLE, form.on_solver("moons-run", "heun")))
    one_of_one = ("head", "guidance")  # a single head, and no classes to guide with
    assert all(update["interactive"] for key, update in free.items() if key not in one_of_one)
    assert "value" not in free["amount"]
    own = fit("moons-solver", "heun")
    assert own["solver"]["value"] == "moons-solver" and own["amount"]["value"] == 3
    assert "network of <b>moons-run" in own["line"]
    assert fit("moons-run", "moons-solver")["solver"]["value"] == "moons-solver"
    assert fit("digits-run", "moons-solver")["solver"]["value"] == "euler"
    page = sample(**LEARNED | dict(run="moons-solver"))[-1]
    assert "solver='moons-solver'" in page["code"]


def test_a_one_step_student_locks_the_controls_and_refuses_the_rest(app):
    shown = fit("moons-short", "heun", 8)
    assert [name for _, name in shown["solver"]["choices"]] == ["euler"]
    assert shown["solver"]["value"] == "euler" and shown["amount"]["value"] == 1
    assert not shown["amount"]["interactive"] and not shown["grid"]["interactive"]
    assert not shown["guidance"]["visible"]
    back = fit("moons-run", "euler", 1)["amount"]
    own = offer.open_run("moons-run").sampling_defaults["steps"]
    assert back["interactive"] and back["value"] == own
    how = dict(run="moons-short", solver="euler", amount=1)
    numbers = sample(**how)[-1]["numbers"]
    assert figure(numbers, "NFE counted") == "1" and "straight" not in numbers
    for change in (dict(amount=3), dict(solver="heun"), dict(grid="edm"), dict(denoise=False)):
        assert "one call" in complaint(lambda change=change: sample(**how | change)), change


def test_a_network_of_two_times_opens_with_its_jumps(app):
    assert fit("moons-jumps", "heun")["solver"]["value"] == "flow-map"
    page = sample(run="moons-jumps", solver="flow-map", amount=3)[-1]
    assert figure(page["numbers"], "NFE counted") == "3"
    assert "one time only" in complaint(lambda: sample(run="moons-run", solver="flow-map"))


def test_a_solver_without_its_teacher_is_a_sentence(app, lab):
    folder = Path(lab["CUDLAB_RUNS_PATH"])
    (folder / "moons-run").rename(folder / "hidden")
    try:
        said = complaint(lambda: sample(**LEARNED | dict(run="moons-solver", solver="euler")))
        assert "cannot be used" in said
    finally:
        (folder / "hidden").rename(folder / "moons-run")


# Trade-off


def line_names(chart) -> list:
    return [trace.name for trace in chart.data if trace.name not in (None, "Pareto front")]


def count_points(chart, name) -> int:
    return sum(len(trace.x) for trace in chart.data if trace.name == name)


def test_missing_points_are_measured_one_by_one_and_kept(app):
    steps = measure(["digits-run"], ["euler"], "2, 1 2")
    assert len(steps) == 3 and count_points(steps[-1][0], "digits-run · euler") == 2
    assert len(measure(["digits-run"], ["euler"], "1,2")) == 1
    assert len(offer.open_run("digits-run").scores) == 2
    chart, caption, table = measure(["digits-run"], ["euler", "ab2"], "2")[-1]
    assert line_names(chart) == ["digits-run · euler", "digits-run · ab2"]
    assert all(said in caption for said in ("digits-v2", "80", "seeds"))
    assert table.count("<tr>") == 4 and "<caption>" in table


def test_scores_of_another_protocol_are_counted_and_not_drawn(app):
    measure(["digits-run"], ["euler"], "1, 2")
    run = offer.open_run("digits-run")
    mine = [score for score in run.scores if score["solver"] == "euler"]
    run.add_score(mine[0] | dict(n=32, note="a <b>warning</b>"))
    chart, caption, table = tradeoff.show_scores(["digits-run"], ["euler"])
    assert count_points(chart, "digits-run · euler") == len(mine)
    assert "1 scores are not on this axis" in caption and "n is 80" in caption
    assert "<b>warning" not in caption + table


def test_learned_solvers_students_and_teachers_share_an_axis(app):
    names, solvers = scores.default_choice(offer.open_run("moons-short"))
    assert names == ["moons-short", "moons-run"]
    assert {"euler", "ab2", "dpmpp-2m", "unipc2-bh2"} <= set(solvers)
    assert scores.default_choice(offer.open_run("moons-solver"))[1][0] == "moons-solver"
    names = ["moons-short", "moons-run", "moons-solver"]
    lines = line_names(measure(names, ["euler", "moons-solver"], "1, 3")[-1][0])
    assert {"moons-short · euler", "moons-run · euler"} <= set(lines)
    assert any("moons-solver" in line for line in lines)
    native = measure(["moons-run"], ["dpmpp-2m"], "2", "native")[-1][0]
    assert line_names(native) == ["moons-run · dpmpp-2m · grid logsnr"]
    chart, words, table = tradeoff.show_scores(["moons-jumps"], ["euler"])
    assert chart is None and "Nothing measured yet" in words and not table


def test_other_scores_and_the_time_axis(app):
    measure(["digits-run"], ["euler"], "1, 2")
    for value in scores.VALUES:
        _, caption, _ = tradeoff.show_scores(["digits-run"], ["euler"], value, "wall time")
        assert "Protocol" in caption or "None of these scores" in caption, value
    for axis, timed in (("wall time", True), ("NFE", False)):
        chart, caption, _ = tradeoff.show_scores(["digits-run"], ["euler"], "fd", axis)
        assert ("ms" in chart.layout.xaxis.title.text) == timed
        assert ("other work on the machine" in caption) == timed


def test_the_job_measures_the_same(app):
    measure(["digits-run"], ["euler"], "1, 2")
    job = tradeoff.score_command(["digits-run"], ["euler", "ab2"], "edm", "1, 2", 80, "0 1")
    words = shlex.split(job)
    assert words[:3] == ["cudlab", "evaluate", "digits-run"]
    flags = dict(zip(words[3::2], words[4::2]))
    want = {"--solvers": "euler ab2", "--nfes": "1 2", "--seeds": "0 1", "--n": "80"}
    assert flags == want | {"--grid": "edm"}
    assert choose("digits-run")["n"] == 80, "a new point is to join those there are"
    url, name = tradeoff.export_scores(["digits-run"], ["euler"])
    assert name == "trade-off.csv" and b"extractor_hash" in decode(url)
    said = complaint(lambda: tradeoff.export_scores(["moons-jumps"], ["euler"]))
    assert "nothing to save" in said
    values = GOOD | dict(solver="heun", seed=3)
    point = share.point_command(*values.values())
    assert point == "cudlab evaluate digits-run --solvers heun --nfes 8 --seeds 3 --n 80"
    point = share.point_command(*(values | dict(weights="raw", denoise=False)).values())
    assert point.endswith("--n 80 --weights raw --denoise False")
    for change in (dict(run="nope"), dict(solver="rk45", by="NFE")):
        assert share.point_command(*(values | change).values()) == ""


def test_bad_measurements_are_answered_in_one_sentence(app):
    good = dict(names=["digits-run"], solvers=["euler"], value="fd", axis="NFE", grid="uniform")
    good |= dict(nfes="1", n=100, seeds="0")
    bad = dict(
        names=[[], "nope", None, [3], ["digits-run"] * 30],
        solvers=[["nope"], [], ["flow-map"]],
        value=["best"],
        axis=["cost"],
        grid=["cosine"],
        nfes=["", "1, two", "0", "99999", None, "1.5"],
        n=[3, None, 10**9, NAN],
        seeds=["x", ""],
    )
    for key, values in bad.items():
        for value in values:
            choice = good | {key: value}
            complaint(lambda c=choice: list(tradeoff.stream_scores(**c, progress=no_progress)))


# Compare

COLUMNS = [
    ("digits-run", "euler", 2, "uniform", "ema", 1),
    ("digits-run", "ab2", 4, "uniform", "raw", 1),
    ("none", "euler", 4, "uniform", "ema", 1),
    ("none", "euler", 4, "uniform", "ema", 1),
]
EMPTY = COLUMNS[2]
POINTS = [("moons-run", "euler", 2, "uniform", "ema", 1), EMPTY, EMPTY, EMPTY]


def flatten(columns) -> list:
    return [value for column in columns for value in column]


ROW = flatten(COLUMNS)


def test_columns_share_their_noise(app):
    *_, (text, _, _, table) = compare.stream_columns(5, 4, *ROW)
    head, columns = parse_film(text)
    assert [c["letter"] for c in columns] == ["A", "B"] and head["w"] == head["h"] == 17
    run = Run.open("digits-run")
    a = run.solve(seed=5, index=4, steps=2).x
    b = run.solve(seed=5, index=4, steps=4, solver="ab2", weights="raw").x
    shown = decode_image(columns[1]["src"])[9:, 9:, 0]
    assert np.array_equal(shown, to_pixels(b)[3, ..., 0])
    reference = run.solve(seed=5, index=4, solver="heun", steps=64).x
    for other in (b, reference):
        assert f"{float((a - other).flatten(1).square().mean(1).sqrt().mean()):.4f}" in table
    for row, names in ((ROW, "ab"), (flatten([EMPTY, COLUMNS[0], EMPTY, COLUMNS[1]]), "bd")):
        space = {}
        exec(compare.columns_script(5, 4, *row), space)  # the first columns may be empty
        assert torch.equal(space[names[0]].x, a) and torch.equal(space[names[1]].x, b)


def test_points_are_compared_too_and_a_student_with_its_teacher(app):
    student = ("moons-short", "euler", 1, "uniform", "ema", 1)
    teacher = ("moons-run", "heun", 4, "uniform", "ema", 1)
    pages = list(compare.stream_columns(0, 16, *flatten([student, teacher, EMPTY, EMPTY])))
    assert pages[-1][0] == "" and pages[-1][3].count("moons-run") >= 3
    assert any(getattr(page[1], "data", None) for page in pages)


def test_distances_to_different_references_are_not_subtracted_and_fd_is_shown(app, monkeypatch):
    run = Run.open("moons-run")
    way = dict(solver="ab2", steps=4, n=200, step=run.step, extractor="points", fd_low=1.5)
    scores = [way | dict(fd=9.0, n=100), way | dict(fd=2.0, fd_high=2.5)]
    monkeypatch.setattr(Run, "scores", scores)
    other = ("moons-run", "ab2", 4, "uniform", "raw", 1)
    same = ("moons-run", "ab2", 4, "uniform", "ema", 1)
    asked = flatten([POINTS[0], other, same, ("moons-jumps", "euler", 1, "uniform", "ema", 1)])
    rows = compare.compare_ends(walked(compare.parse_columns(0, 4, asked)))
    assert ["nearer than A by" in row for row in rows] == [False, False, True, False]
    assert all("distance to it" in row for row in rows)
    assert [row["fd"] for row in rows] == [
        *("not measured", "not measured", "2 [1.5, 2.5] @points, n 200", "not measured")
    ]


def walked(columns: list) -> list:
    for column in columns:
        list(column.sample())
    return columns


@pytest.mark.parametrize(
    "changes, said",
    [
        ({0: "nope"}, "column A"),
        ({0: "none", 6: "damaged-run"}, "column B"),
        ({2: 0}, "column A"),
        ({2: None}, "column A"),
        ({1: "rk45"}, "column A"),
        ({6: "moons-run"}, "samples of 2"),
        ({6: "moons-short"}, "column B"),
        ({3: "x"}, "grid"),
        ({11: 7}, "head"),
    ],
    ids=str,
)
def test_a_bad_column_is_named(app, changes, said):
    row = [changes.get(k, value) for k, value in enumerate(ROW)]
    assert said in complaint(lambda: list(compare.stream_columns(0, 4, *row)))
    complaint(lambda: compare.columns_script(0, 4, *row))


def test_a_column_takes_what_its_run_decides(app):
    assert compare.fill_column("moons-short", "heun", 4) == ("euler", 1, "uniform", 1)
    filled = compare.fill_column("moons-run", "moons-solver", 4)
    assert filled == ("moons-solver", 3, "uniform", 1)
    assert compare.fill_column("moons-run", "ab2", 4)[0] == "ab2"
    assert compare.fill_column("none")[0] == gr.skip()
    complaint(lambda: compare.fill_column("nope"))


# Share


def test_the_address_is_checked_and_says_what_is_wrong(app):
    query = dict(run="digits-run", amount="4", seed="7", denoise="false", guidance="2.5")
    found, wrong = share.parse_address(query | dict(view="velocity", unknown="1"))
    want = dict(run="digits-run", amount=4, seed=7, denoise=False, guidance=2.5, view="velocity")
    assert found == want and not wrong
    query = dict(amount="1e9", seed="-1", weights="best", view="nowhere")
    found, wrong = share.parse_address(query | dict(value="<b>", denoise="maybe"))
    assert not found and len(wrong) == 6 and all(len(line) < 200 for line in wrong)
    long = ["the address is longer than 2048 characters and was not read"]
    assert share.parse_address(dict(run="x" * 3000)) == ({}, long)
    bad = ["zzz", "a~b~1~nowhere~ema~1", "a~b~1~uniform~best~1", "~" * 5]
    for text in [*bad, "digits-rf~euler~x~uniform~ema~1"]:
        assert "run~solver~NFE" in share.parse_address(dict(a=text))[1][0]
    columns = share.parse_shared_columns(dict(a="digits-run~euler~4~uniform~ema~1", b="broken"))
    assert [c["run"] for c in columns] == ["digits-run", "none", "none", "none"]
    assert columns[0]["amount"] == 4


def arrive(**query) -> dict:
    "What a page with this query shows, by name."
    names = ["run", "view", *form.FITTED, "plane", "film", "box", "runs", "solvers", "n", "seed"]
    columns = [f"{key}_{letter}" for letter in "abcd" for key in compare.FIELDS]
    names += [*share.CHARTED, "seed2", "count2", *columns]
    page = share.arrive(SimpleNamespace(query_params=query))
    assert len(names) == len(page)
    return dict(zip(names, page))


def test_a_link_opens_what_it_says(app):
    column = "moons-run~ab2~3~uniform~ema~1"
    query = dict(run="moons-run", solver="heun", amount="5", seed="9", count="12", view="compare")
    page = arrive(**query, a=column, value="kd", runs="moons-run nope")
    assert page["run"]["value"] == "moons-run" and page["view"]["selected"] == "compare"
    assert page["solver"]["value"] == "heun" and page["amount"]["value"] == 5
    assert page["count"]["value"] == 12 and page["runs"]["value"] == ["moons-run"]
    assert page["plane"]["visible"] and not page["film"]["visible"]
    assert page["seed"] == 9 and page["value"] == "kd"
    assert page["run_a"]["value"] == "moons-run" and page["amount_a"] == 3
    assert page["run_b"]["value"] == "none"
    locked = arrive(run="moons-short", amount="7", n="300")
    assert locked["n"] == 300 and locked["amount"]["value"] == 1


@pytest.mark.parametrize("wanted", ["nope", "damaged-run", "<b>x", "\x1b[2J"])
def test_a_link_to_a_run_that_is_not_here_says_so_and_opens_no_other(app, wanted):
    page = arrive(run=wanted, solver="heun", amount="5", view="velocity")
    assert page["run"]["value"] is None and "digits-run" in str(page["run"]["choices"])
    assert (
        page["line"].startswith("<p class='cost bad'") and "is not here or damaged" in page["line"]
    )
    assert "<b>" not in page["line"] and "\x1b" not in page["line"]
    assert page["view"]["selected"] == "velocity" and page["runs"]["choices"]
    assert list(trajectory.greet(page["run"]["value"])) == [trajectory.show()]


def test_what_a_link_gets_wrong_is_said_in_place(app):
    page = arrive(run="moons-run", solver="nope", amount="x", seed="9")
    assert page["run"]["value"] == "moons-run" and page["seed"] == 9
    assert page["line"].count("In the address: ") == 2 and "moon" in page["line"]


def test_an_empty_lab_is_a_page_too(app, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDLAB_RUNS_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("CUDLAB_CHECKPOINTS_PATH", str(tmp_path / "none"))
    assert "No run yet" in arrive()["line"]
    assert list(trajectory.greet(None)) == [trajectory.show()]


# Runs


def test_the_list_has_every_run_and_says_what_is_damaged(app):
    rows = {row[0]: dict(zip(runs.HEADERS, row)) for row in runs.browse_runs()}
    assert set(rows) == SOUND | {"damaged-run"}
    state = rows["damaged-run"]["state"]
    assert state.startswith("damaged: ") and "ema.safetensors" in state
    assert rows["moons-run"]["steps"] == 20
    assert [row[0] for row in runs.browse_runs(method="distill")] == ["moons-short"]
    assert [row[0] for row in runs.browse_runs(data="digits", text="dam")] == ["damaged-run"]
    for bad in (dict(method="nope"), dict(data=3), dict(text=["x"]), dict(text="x" * 300)):
        complaint(lambda bad=bad: runs.browse_runs(**bad))
    differences = runs.show_differences(["moons-run", "moons-short"])
    assert "aim" not in differences and "method" in differences
    many = ["moons-run", *map(str, range(7))]
    assert "at most 6" in complaint(lambda: runs.show_differences(many))


def make_again(command: str) -> Config:
    "The configuration that a shown command trains."
    words = shlex.split(command)
    assert words[:2] == ["cudlab", "train"]
    return jobs.parse_job(shlex.join(words[2:]))[0]


def test_a_run_tells_everything(app):
    facts, loss, log, command, config = runs.show_run("digits-run")
    assert "match their SHA-256" in facts and len(loss.data) == 2
    assert "label_dropout" in config and log.count("<tr>") == 5
    assert make_again(command) == offer.open_run("digits-run").config
    assert command.endswith(" --name digits-run"), "the same command continues it"
    assert runs.show_run(None)[1:] == (None, "", "", "")
    for name in ("nope", 3, "damaged-run"):
        complaint(lambda name=name: runs.show_run(name))


def test_a_run_that_holds_a_solver_tells_what_was_learned(app):
    facts, loss, _, command, _ = runs.show_run("moons-solver")
    held = Run.open("moons-solver").tensors("ema.safetensors")
    spread = held["solver.by_batch"].std(0)[-1, 0]
    last = f"{held['solver.lam'][-1, 0]:.3f}\u00a0±\u00a0{spread:.3f}"
    assert "<code>0.000, " in facts and last in facts and "over 2 batches" in facts
    assert figure(facts, "fitted batches") == "2 of 2" and figure(facts, "parameters") == "3"
    assert "network of <b>moons-run</b>, step 20" in facts
    assert Run.open("moons-run").network_hash()[:12] in facts
    assert {trace.name for trace in loss.data if trace.name} == {"solver", "euler"}
    config = offer.open_run("moons-solver").config
    assert replace(make_again(command), log_every=1) == config


def test_the_newest_average_of_a_job_is_measured(app):
    pages = list(live.stream_quality("moons-jumps", progress=no_progress))
    assert len(pages) == 13 and "12 scores of the average of step 4" in pages[-1][1]
    assert len(list(live.stream_quality("moons-jumps", progress=no_progress))) == 1
    solvers = {score["solver"] for score in offer.open_run("moons-jumps").scores}
    assert solvers == {"flow-map", "euler", "ab2"}
    for bad in ("nope", None, 3, "damaged-run", "../moons-jumps"):
        complaint(lambda bad=bad: list(live.stream_quality(bad, progress=no_progress)))


# Bad inputs by the thousand

STRANGE_TEXTS = [
    *("../../etc/passwd", "/etc/passwd", "runs/moons-run", "<script>alert(1)</script>"),
    *("'; DROP TABLE runs; --", "\\u0000", "🦆" * 50, "nan", "", "damaged-run", "deleted"),
    *("\ud800", "\x1b[2J", "a\x00b"),
]
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
    st.sampled_from(STRANGE_TEXTS),
)
MOONS = GOOD | dict(run="moons-run", amount=2, count=2)
CONTEST = {f"{key}{k}": v for k, column in enumerate(POINTS) for key, v in enumerate(column)}
CHOICE = dict(names=["moons-run"], solvers=["euler"])
CHART = CHOICE | dict(value="fd", axis="NFE", grid="uniform")
CHOSEN = dict(name="moons-run", solver="euler", amount=3)
LINK = dict(run="moons-run", solver="euler", amount="3", view="runs")
# endpoint -> (what answers, a good form, whether it takes the form as a row of values)
ENDPOINTS = {
    "sample": (trajectory.stream_sample, MOONS, True),
    "errors": (trajectory.stream_errors, MOONS, True),
    "paths": (trajectory.redraw_paths, dict(chosen="1", dimensions="2-D") | MOONS, True),
    "export": (film.export_file, dict(kind="csv") | MOONS, True),
    "fit": (form.on_run, CHOSEN, False),
    "decide": (form.on_solver, CHOSEN, False),
    "scores": (tradeoff.show_scores, CHART, False),
    "measure": (
        lambda **choice: tradeoff.stream_scores(**choice, progress=no_progress),
        CHART | dict(nfes="2", n=16, seeds="0"),
        False,
    ),
    "job": (
        tradeoff.score_command,
        CHOICE | dict(grid="uniform", nfes="2", n=100, seeds="0"),
        False,
    ),
    "compare": (compare.stream_columns, dict(seed=0, count=2) | CONTEST, True),
    "cost": (
        form.describe_cost,
        dict(solver="euler", by="steps", amount=3, denoise=True, run="moons-run"),
        False,
    ),
    "point": (share.point_command, MOONS, True),
    "browse": (runs.browse_runs, dict(method="all", data="all", text=""), False),
    "about": (runs.show_run, dict(name="moons-run"), False),
    "differences": (runs.show_differences, dict(names=["moons-run", "moons-short"]), False),
    "job_state": (jobs.job_state, dict(name="moons-run"), False),
    "job_start": (jobs.start_job, dict(text="--method nope", token=""), False),
    "runs": (
        lambda **query: arrive(**{key: str(value) for key, value in query.items()}),
        LINK | dict(a="moons-run~ab2~3~uniform~ema~1"),
        False,
    ),
}
# these answer what is wrong otherwise
QUIET = ("cost", "point", "runs", "job_start")


def call_endpoint(name, change: dict):
    answer, good, is_row = ENDPOINTS[name]
    values = good | change
    result = answer(*values.values()) if is_row else answer(**values)
    return list(result) if hasattr(result, "__next__") else result


@pytest.mark.parametrize("examples", [40, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize("name", ENDPOINTS)
def test_a_thousand_bad_inputs_each_get_a_sentence(app, name, examples):
    def usual() -> str:
        try:
            text = str(call_endpoint(name, {}))[:3000]
        except gr.Error as e:
            text = e.message
        return re.sub(r"\d+ ms|'?took.*", "", text)

    before = usual()
    complaints = []

    @settings(
        max_examples=examples,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.dictionaries(st.sampled_from(sorted(ENDPOINTS[name][1])), JUNK, min_size=1))
    def attack(bad):
        try:
            call_endpoint(name, bad)
        except gr.Error as e:
            complaints.append(e.message)
            check_sentence(e.message)

    attack()
    assert len(complaints) > 0.3 * examples or name in QUIET
    assert name == "measure" or usual() == before  # a measurement adds to what is drawn


@pytest.mark.parametrize("run", [None, "nope", 3, "damaged-run"])
def test_every_callback_answers_for_a_bad_run(app, run):
    complaint(lambda: form.on_run(run, "euler"))
    complaint(lambda: form.on_solver(run, "euler"))
    complaint(lambda: trajectory.update_visible(run))
    complaint(lambda: tradeoff.update_choice(run))
    assert not run or "bad" in form.describe_cost("euler", "steps", 3, True, run)


def test_an_unforeseen_failure_is_a_sentence_too(app, monkeypatch, caplog):
    def fail(*args):
        raise KeyError("secret detail")

    monkeypatch.setattr(request, "open_run", fail)
    with pytest.raises(gr.Error) as caught:
        sample()
    assert "KeyError" in caught.value.message and "secret" not in caught.value.message
    assert "secret detail" in caplog.text


# Runs that come, go and change


def test_damaged_runs_are_not_offered(app):
    assert {name for _, name in offer.run_choices()} == SOUND
    assert offer.default_run() == "digits-run" == offer.default_run("damaged-run")
    assert offer.default_run("moons-run") == "moons-run"


def test_a_run_deleted_meanwhile(app, lab):
    folder = Path(lab["CUDLAB_RUNS_PATH"])
    shutil.copytree(folder / "moons-run", folder / "short-lived")
    assert len(sample(run="short-lived")) >= 2
    shutil.rmtree(folder / "short-lived")
    assert "not here" in complaint(lambda: sample(run="short-lived"))


def test_a_link_out_of_the_runs_is_refused(app, lab, tmp_path):
    folder = Path(lab["CUDLAB_RUNS_PATH"])
    shutil.copytree(folder / "moons-run", tmp_path / "outside")
    (folder / "linked").symlink_to(tmp_path / "outside")
    try:
        assert "linked" not in [name for _, name in offer.run_choices()]
        complaint(lambda: sample(run="linked"))
    finally:
        (folder / "linked").unlink()


def test_open_runs_are_few_and_follow_their_folder(app, lab):
    source = Path(lab["CUDLAB_RUNS_PATH"]) / "moons-run"
    copies = [source.parent / f"copy{k}" for k in range(6)]
    for copy in copies:
        shutil.copytree(source, copy)
        offer.open_run(copy.name)
    assert len(offer.opened) == 4
    first = offer.open_run("copy5")
    assert offer.open_run("copy5") is first
    first.add_score({"fd": 1.0})
    assert offer.open_run("copy5") is not first
    for copy in copies:
        shutil.rmtree(copy)


def test_of_a_long_log_only_the_end_is_read(app, lab, monkeypatch):
    folder = Path(lab["CUDLAB_RUNS_PATH"])
    shutil.copytree(folder / "moons-run", folder / "talkative")
    with open(folder / "talkative" / "metrics.jsonl", "r+b") as f:
        rows = f.read()
        f.seek(300 * 2**20)  # of nothing, which takes no room
        f.write(b"\n" + rows)
    amounts = []
    real = disk.open_plain

    class Counted(io.BufferedReader):
        def read(self, *args):
            data = super().read(*args)
            amounts.append(len(data))
            return data

    monkeypatch.setattr(
        disk, "open_plain", lambda path: (Counted(real(path)[0].detach()), os.stat(path).st_size)
    )
    try:
        facts, loss, table, _, _ = runs.show_run("talkative")
        assert len(loss.data) == 2 and table.count("<tr>") > 5
        assert live.show_job("talkative")[1]
        assert amounts and max(amounts) <= offer.LOG_BYTES
    finally:
        shutil.rmtree(folder / "talkative")


@pytest.mark.long
@pytest.mark.timeout(900)
def test_two_thousand_calls_leave_the_memory_where_it_was(app):
    import gc

    import psutil

    process = psutil.Process()

    def call_one(k):
        is_digits = k % 50 < 10
        how = GOOD | dict(seed=k // 10, amount=2, count=2)
        how["run"] = "digits-run" if is_digits else "moons-run"
        values = how.values()
        match k % 10:
            case 0 | 1:
                list(trajectory.stream_sample(*values))
            case 2:
                list(trajectory.stream_errors(*values))
            case 3:
                list(compare.stream_columns(k, 2, *flatten(COLUMNS if is_digits else POINTS)))
            case 4:
                form.on_run(how["run"], "euler", 8)
            case 5:
                complaint(lambda: sample(**how | dict(amount="x")))
            case 6:
                film.export_file("gif", *values)
            case _:
                form.describe_cost("heun", "NFE", 2 + k % 7 * 2, True, how["run"])

    for k in range(300):
        call_one(k)
    gc.collect()
    before = process.memory_info().rss
    for k in range(2000):
        call_one(k)
    gc.collect()
    assert process.memory_info().rss - before < 50 * 2**20


# A server in this process


@pytest.fixture(scope="module")
def address(app):
    page = app.build()
    yield server.launch_page(page, server.open_socket("127.0.0.1", 0))
    page.close(verbose=False)


@pytest.fixture(scope="module")
def connect(address):
    from gradio_client import Client

    return lambda: Client(address, verbose=False, analytics_enabled=False)


@pytest.fixture
def gated(monkeypatch):
    "Walks that wait for a permit before each step; what they did, and whether one has ended."
    states = request.SampleRequest.states
    gate = SimpleNamespace(seen=[], permits=threading.Semaphore(0), ended=threading.Event())

    def gated_states(self):
        try:
            for state in states(self):
                gate.seen.append((self.form.seed, state.i))
                gate.permits.acquire(timeout=300)
                yield state
        finally:
            gate.ended.set()

    monkeypatch.setattr(request.SampleRequest, "states", gated_states)
    yield gate
    gate.permits.release(10_000)


def check_stops_early(gate) -> None:
    "Permits one by one until the walk is ended, long before its last step."
    for _ in range(150):
        if gate.ended.wait(0.1):
            break
        gate.permits.release()
    assert gate.ended.is_set() and len(gate.seen) < 190


def test_a_cancelled_walk_stops_within_a_step(gated, connect):
    job = connect().submit(*(GOOD | dict(amount=200, seed=31)).values(), api_name="/sample")
    gated.permits.release(4)
    wait_for(lambda: len(gated.seen) == 5)
    # it returns when the walk has ended, which waits for a permit
    threading.Thread(target=job.cancel, daemon=True).start()
    check_stops_early(gated)


def test_a_closed_tab_stops_the_walk(gated, address, chromium):
    sync_api = pytest.importorskip("playwright.sync_api")
    flags = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
    gated.permits.release(7)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)
        browser.new_page().goto(f"{address}?run=digits-run&amount=200&seed=41")
        wait_for(lambda: len(gated.seen) == 8)
        browser.close()
    check_stops_early(gated)


def test_a_full_queue_answers_at_once(gated, connect):
    client = connect()

    def submit(seed):
        return client.submit(*(GOOD | dict(seed=seed)).values(), api_name="/sample")

    submitted = [submit(100)]
    try:
        # one at work, then 32 that wait; whichever come later are refused
        wait_for(lambda: gated.seen)
        submitted += [submit(100 + k) for k in range(1, 39)]
        wait_for(lambda: sum(job.done() for job in submitted) == 6)
        refused = [str(job.exception()).lower() for job in submitted if job.done()]
        assert all("queue is full" in words for words in refused), refused
        assert len(gated.seen) == 1
    finally:
        gated.permits.release(10_000)
        for job in submitted:
            job.cancel()


PUBLIC = {
    *("sample", "errors", "paths", "export_png", "export_gif", "export_csv", "export_scores"),
    *("browse", "about", "differences", "job_state", "job_start", "job_stop", "job_resume"),
    *("job_measure", "seed", "runs", "fit", "cost", "decide", "point", "scores", "measure"),
    *("job", "compare"),
}


def test_every_endpoint_has_a_stable_name(app):
    page = app.build()
    functions = page.fns.values()
    names = {f.api_name for f in functions if f.api_visibility == "public"}
    assert PUBLIC <= names
    assert not [n for n in names if isinstance(n, str) and re.search(r"_\d+$|lambda", n)], names
    solving = [f for f in functions if f.concurrency_id == "solve"]
    assert len(solving) >= 7 and all(f.concurrency_limit == 1 for f in solving)
    page.close(verbose=False)


def test_only_safetensors_is_ever_loaded():
    unsafe = (
        r"import pickle|pickle\.loads?\(|allow_pickle=True|weights_only=False|yaml\.load|"
        r"(?<![.\w])eval\(|(?<![.\w])exec\("
    )
    for source in [*(ROOT / "apps").rglob("*.py"), *(ROOT / "cudlab").glob("*.py")]:
        text = source.read_text()
        if source.name == "pickles.py":  # it reads pickles itself and has nothing to call
            text = text.replace("import pickle\n", "", 1)
        assert not re.search(unsafe, text), source
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert "weights_only=True" in ast.unparse(node), (source, node.lineno)


def test_round_trip_through_a_server(connect, app):
    page = named(connect().predict(*GOOD.values(), api_name="/sample"))
    assert page["film"] == sample()[-1]["film"] and page["plane"] is None
    assert figure(page["numbers"], "NFE counted") == "4"
    assert "Run.open('digits-run')" in page["code"]


def test_everything_the_page_does_can_be_called(connect):
    def predict(name, *values):
        return connect_once.predict(*values, api_name=f"/{name}")

    connect_once = connect()
    values = GOOD.values()
    chart = [["moons-run"], ["euler"], "fd", "NFE", "uniform"]
    assert "digits-run" in predict("errors", *values)[-1]
    assert predict("paths", "1", "3-D", *values)[0]["type"] == "plotly"
    for kind in ("png", "gif", "csv"):
        url, name = predict(f"export_{kind}", *values)
        assert url.startswith("data:") and name.endswith(kind)
    assert "Protocol" in predict("measure", *chart, "2", 100, "0")[1]
    assert "Protocol" in predict("scores", *chart)[1]
    assert predict("compare", 0, 4, *ROW)[3].count("<tr>") == 3
    job = predict("job", ["moons-run"], ["euler"], "uniform", "2", 100, "0")
    assert job.startswith("cudlab evaluate moons-run ")


def test_bad_input_through_a_server_leaves_it_alive(connect):
    client = connect()
    changes = [dict(run="nope"), dict(amount="abc"), dict(seed=None), dict(count=10**9)]
    for change in [*changes, dict(label="<b>")]:
        with pytest.raises(Exception) as caught:
            client.predict(*(GOOD | change).values(), api_name="/sample")
        assert "Traceback" not in str(caught.value) and len(str(caught.value)) <= 260, caught.value
    assert "4</b> steps" in client.predict("heun", "NFE", 8, api_name="/cost")


TEXTS = {
    "fit": ["\ud800", "\ud800", 3],
    "about": ["\ud800"],
    "browse": ["all", "all", "\ud800"],
    "differences": [["\ud800", "moons-run"]],
    "scores": [["\ud800"], ["\ud800"], "fd", "NFE", "uniform"],
    "job": [["\ud800"], ["\ud800"], "uniform", "2", 100, "0"],
    "cost": ["\ud800", "steps", 3, True, "\ud800", "\ud800", 1],
    "job_state": ["\ud800"],
    "job_start": ["\ud800", "\ud800"],
    "paths": ["\ud800", "2-D", *GOOD.values()],
    **{key: [*(GOOD | {"run": "\ud800"}).values()] for key in ("sample", "errors", "export_csv")},
}


@pytest.mark.parametrize("name", TEXTS)
def test_half_a_letter_is_answered_like_any_other_text(address, app, name):
    "Sent as a browser never would: JSON can spell what UTF-8 cannot."

    def ask(method, path, body=None):
        connection = HTTPConnection(address[7:-1], timeout=120)
        connection.request(method, f"/gradio_api/queue/{path}", body, JSON)
        return connection.getresponse().read().decode()

    page = json.loads(urlopen(f"{address}config", timeout=60).read())
    calls = {fn["api_name"]: fn["id"] for fn in page["dependencies"]}
    body = dict(data=TEXTS[name], fn_index=calls[name], session_hash=f"half-{name}")
    ask("POST", "join", json.dumps(body))
    said = ask("GET", f"data?session_hash=half-{name}")
    assert '"msg":"process_completed"' in said and "unexpected" not in said
    assert "the explorer failed" not in said, said


def test_two_clients_do_not_see_each_other(connect, app):
    want = {seed: sample(seed=seed, amount=12)[-1]["film"] for seed in (1, 2)}
    request.solved.clear()

    def ask(seed):
        client = connect()
        values = (GOOD | dict(seed=seed, amount=12)).values()
        return [client.predict(*values, api_name="/sample")[0] for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        got = dict(zip(want, pool.map(ask, want)))
    assert got == {seed: [text] * 3 for seed, text in want.items()}


def test_nothing_but_the_page_is_served(address):
    for path in ("file=/etc/passwd", f"file={APP}", "file=../settings.ini"):
        with pytest.raises(HTTPError):
            urlopen(f"{address}gradio_api/{path}", timeout=60)
    with pytest.raises(HTTPError):
        urlopen(f"{address}monitoring", timeout=60)


# Starting it


@pytest.mark.long
def test_a_busy_port_gives_way_and_says_so(lab):
    from gradio_client import Client

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        process, address, printed = start_explorer(lab, "--runs", "moons-run", port=port)
        try:
            assert f":{port}/" not in address and len(printed) == 2
            assert printed[0].startswith(f"port {port} is busy, using ")
            client = Client(address, verbose=False, analytics_enabled=False)
            listed = str(client.predict(api_name="/runs"))
            assert "moons-run" in listed and "digits-run" not in listed
        finally:
            stop_explorer(process)
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
        error = capsys.readouterr().err
        assert said in error and error.startswith("explorer: ") and error.count("\n") == 1


def test_another_address_asks_for_a_password(app):
    from gradio_client import Client

    args = server.parse_arguments(["--host", "0.0.0.0", "--auth", "me:a-word"])
    server.check_arguments(args)
    assert args.auth == ("me", "a-word") and not guard.is_local(args.host)
    page = app.build()
    address = server.launch_page(page, server.open_socket("127.0.0.1", 0), auth=args.auth)
    with pytest.raises(HTTPError) as refused:
        urlopen(f"{address}config", timeout=60)
    assert refused.value.code == 401
    client = Client(address, auth=args.auth, verbose=False, analytics_enabled=False)
    assert "4</b> steps" in client.predict("heun", "NFE", 8, True, "", api_name="/cost")
    page.close(verbose=False)


def test_the_page_opens_on_this_machine_only(app):
    assert server.parse_arguments([]).host == "127.0.0.1"
    assert ".launch(" not in Path(server.__file__).read_text()  # which could share
    assert app.os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    for host in ("127.0.0.1", "::1", "localhost", "127.5.5.5"):
        assert guard.is_local(host)
    for host in ("0.0.0.0", "192.168.1.2", "example.org", ""):
        assert not guard.is_local(host)
