"""Panels: what a control changes, what stays when something is refused."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cudlab.config import Config, error_of
from cudlab.create import create_run
from cudlab.panels import ComparePanel, TradeoffPanel, VelocityPanel, matching_scores, move_panels
from cudlab.path import make_grid
from cudlab.rng import draw_noise
from cudlab.run import Run
from cudlab.scrub import STATE_VIEWS, ExplorePanel, ScrubPanel, find_flow
from cudlab.solver import solve
from cudlab.training import train
from cudlab.widgets import BrowsePanel, describe_info, draw_points, table_html, tile_images


def test_pictures_fill_a_sheet_and_points_beyond_it_are_left_out():
    assert tile_images(torch.zeros(16, 1, 8, 8)).size == (4 * (10 * 8 + 2) - 2,) * 2
    points = torch.tensor([[0.0, 0.0], [99.0, 0.0], [math.nan, 0.0]])
    assert np.asarray(draw_points(points))[..., 3].sum() == 9 * 255


def test_a_table_shows_text_as_text():
    assert "<th" in table_html([["a"], [None]]) and "&lt;b&gt;" in table_html([["<b>"]])


def test_a_damaged_run_says_so_in_its_line():
    assert describe_info(SimpleNamespace(name="r", damaged="no weights")).endswith("no weights")


def test_browse_filters_by_words_and_shows_what_differs():
    panel = BrowsePanel()
    everything = panel.line.value
    panel.filter.value = "cud aim digits"
    names = [name for _, name in panel.choose.options]
    assert names == ["digits-cud-aim4", "digits-cud-aim8", "digits-cud-aim8-classes"]
    panel.choose.value = names[:2]
    assert "args.aim" in panel.line.value and "args.w1" not in panel.line.value
    panel.filter.value = "aim4"
    assert panel.choose.value == ("digits-cud-aim4",) and "log_every" in panel.line.value
    panel.filter.value = "<no such run>"
    assert panel.choose.value == () and panel.line.value.startswith("0 of")
    panel.filter.value = ""
    assert panel.line.value == everything


def shrink(x, t):
    return x


@pytest.mark.parametrize("shape", [(2,), (1, 4, 4)])
def test_scrubbing_there_and_back_shows_the_same_bytes_in_every_view(shape):
    tau = solve(shrink, draw_noise(0, 5, shape), make_grid("uniform", 3))
    panel = ScrubPanel(tau, f=shrink)
    for name in STATE_VIEWS:
        panel.choose.value = name
        panel.slider.value = 0
        first = panel.state.value, panel.beside.value
        panel.slider.value = 3
        assert panel.state.value != first[0] and panel.choose.value == name
        panel.slider.value = 0
        assert (panel.state.value, panel.beside.value) == first


def test_scrub_survives_a_walk_that_diverged():
    tau = solve(lambda x, t: x * math.nan, draw_noise(0, 5, (2,)), make_grid("uniform", 1))
    panel = ScrubPanel(tau, f=shrink)
    for name in STATE_VIEWS:
        panel.choose.value = name
        assert panel.choose.value == name


def test_what_needs_a_flow_says_so_and_the_picture_stays():
    panel = ScrubPanel(solve(shrink, draw_noise(0, 5, (2,)), make_grid("uniform", 3)))
    shown = panel.beside.value
    panel.choose.value = "local error"
    assert panel.choose.value == "x0_hat" and "f=" in panel.line.value
    assert panel.beside.value == shown


def test_a_new_walk_keeps_the_view_and_a_refused_one_keeps_the_walk():
    panel = ExplorePanel(Run.open("digits-rf"), 2)
    assert panel.shown.slider.max == panel.run.sampling_defaults["steps"]
    panel.shown.choose.value = "local error"
    panel.set(solver="heun", steps=3)
    assert "3 steps = 6 NFE" in panel.line.value
    assert panel.shown.slider.max == 3 and panel.shown.choose.value == "local error"
    good = panel.shown
    panel.set(solver="flow-map")
    assert panel.shown is good and "one time only" in panel.line.value


def test_a_one_step_student_is_held_against_its_teacher():
    run = Run.open("digits-distill")
    panel = ExplorePanel(run, 2)
    assert "1 steps = 1 NFE" in panel.line.value
    panel.shown.choose.value = "x_t - flow"
    assert "±" in panel.shown.line.value
    panel.set(steps=4)
    assert "not possible" in panel.line.value and panel.shown.slider.max == 1
    assert len(move_panels(run, run.solve(index=2), find_flow(run))) == 6
    velocities = VelocityPanel(run, 2)
    velocities.set(solver="ab2")
    assert "not possible" in velocities.line.value and velocities.shown is not None


def test_a_student_whose_teacher_is_gone_is_shown_without_a_flow():
    orphan = Run.open("digits-distill")
    orphan.info["teacher"]["network"] = "another"
    assert "no flow" in error_of(find_flow, orphan)
    panel = ExplorePanel(orphan, 2).shown
    panel.choose.value = "x_t - flow"
    assert panel.choose.value == "x0_hat" and "no flow" in panel.line.value
    assert "no flow" in VelocityPanel(orphan, 2).line.value
    assert '0 0"></td>' in ComparePanel([dict(run=orphan)], 2).table.value


KINDS = ("boot", "cd", "meanflow", "dode-euler5", "cud-heads3", "cud-aim8-classes")


@pytest.mark.parametrize("name", [f"digits-{kind}" for kind in KINDS] + ["checkerboard-cud-aim4"])
def test_every_kind_of_run_opens_in_every_panel(name):
    run = Run.open(name)
    panel = ExplorePanel(run, 2).shown
    panel.choose.value = "local error"
    assert panel.choose.value == "local error" and VelocityPanel(run, 2).shown is not None
    assert ComparePanel([dict(run=run)], 2).images[0].value


def test_scores_follow_the_choice_of_runs_and_samples():
    names = ["digits-rf", "digits-distill"]
    panel = TradeoffPanel(names)
    stored = [len(matching_scores(Run.open(name), ("euler", "ab2"), 2000)) for name in names]
    assert panel.line.value == f"{sum(stored)} scores" and stored[0] > 30
    panel.controls["runs"].value = (1,)
    assert panel.line.value == f"{stored[1]} scores"
    panel.controls["n"].value = 1999
    assert panel.line.value == "0 scores"


def test_measuring_adds_what_is_missing_and_nothing_twice():
    run = create_run(Config(method="rf", data="moons", steps=10, batch=16))
    for _ in train(run):
        pass
    panel = TradeoffPanel([run.name], n=64)
    panel.controls["solvers"].value = ("euler",)
    panel.controls["nfes"].value = "1 2"
    for _ in range(2):
        panel.button.click()
        assert len(run.scores) == 2
    panel.controls["nfes"].value = "two"
    panel.button.click()
    assert "not possible" in panel.line.value and not panel.button.disabled


def test_columns_start_from_the_same_noise():
    rf = dict(run="digits-rf", steps=4)
    panel = ComparePanel(
        [dict(rf, solver="euler"), dict(rf, solver="ab2"), dict(run="digits-distill")]
    )
    ends = [image.value for image in panel.images]
    assert len(set(ends)) == 3
    cells = [row.split("</td>") for row in panel.table.value.split("<tr>")[2:]]
    assert [row[1][-1] for row in cells] == ["4", "4", "1"]
    panel.choose.value = "difference from column 1"
    assert panel.images[0].value not in ends and "±" in panel.line.value
    panel.at.value = 0
    assert len({image.value for image in panel.images}) == 1
    panel.choose.value, panel.at.value = "state", 100
    assert [image.value for image in panel.images] == ends
    panel.seed.value = 1
    assert panel.images[0].value != ends[0]


def test_columns_that_do_not_fit_are_refused_in_a_sentence():
    rf, board = dict(run="digits-rf"), dict(run="checkerboard-cud-aim4")
    for columns, why in (
        ([], "1 to 4 fit side by side"),
        ([rf] * 5, "1 to 4 fit side by side"),
        ([dict(rf, solvr="euler")], "did you mean 'solver'"),
        ([dict(solver="euler")], "column 1 names no run"),
        ([rf, board], "no noise serves both"),
    ):
        assert why in error_of(ComparePanel, columns)
    panel = ComparePanel([dict(run="digits-distill"), dict(run="digits-distill", solver="heun")])
    assert "column 2" in panel.line.value and not panel.images[0].value
