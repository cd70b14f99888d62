"""Plots: the numbers they draw, what they weigh on a page, what they refuse, and how they sit and
move in a browser.
"""

import json
import math
from pathlib import Path

import numpy as np
import plotly
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from cudlab.config import error_of
from cudlab.path import make_grid
from cudlab.plot import (
    FRAMES_SCRIPT,
    arrow_lines,
    motion_chart,
    moves_chart,
    path_chart,
    style_chart,
)
from cudlab.rng import draw_noise
from cudlab.scoring import PROTOCOL
from cudlab.tradeoff import (
    COSTS,
    HIGHER,
    TIME_KEYS,
    asinh_axis,
    pareto_front,
    quality_chart,
    tradeoff_chart,
)


def scores(runs=("a", "b"), nfes=(1, 2, 4, 8), seeds=1, **more):
    "Made-up scores of one protocol; run k is k times as good."
    same = (
        dict(
            solver="euler", extractor="digits-v2", n=1000, machine="a CPU", batch=250, device="cpu"
        )
        | more
    )
    return [
        dict(
            same,
            run=run,
            nfe=n,
            seed=seed,
            ms=0.2 * n * k,
            fd=20 / n / k + 0.01 * seed,
            kd=3 / n / k - 0.5,
            recall=1 - 1 / (n + k),
            endpoint=1 / n,
        )
        for k, run in enumerate(runs, 1)
        for n in nfes
        for seed in range(seeds)
    ]


def lines(fig):
    "Name -> trace, without bands."
    return {trace.name: trace for trace in fig.data if trace.name}


# Moves


@pytest.mark.parametrize("count", [1, 2, 3, 17])
@pytest.mark.parametrize("less", [0, 1])
def test_moves_draw_the_median_and_half_of_the_samples(count, less):
    values = draw_noise(count, 9, (count,)).T[less:]
    fig = moves_chart({"speed (rms)": values}, make_grid("uniform", count))
    drawn = lines(fig)
    if not len(values):
        assert not drawn and "needs two moves" in [a.text for a in fig.layout.annotations]
        return
    trace = drawn["speed"]
    assert trace.x.tolist() == list(range(1, count - less + 1))
    np.testing.assert_allclose(trace.y, np.median(values, 1), rtol=1e-6)
    np.testing.assert_allclose(
        trace.customdata[:, 1:], np.quantile(values, [0.25, 0.75], 1).T, rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(trace.customdata[:, 0], make_grid("uniform", count)[: len(values)])
    assert (trace.error_y.array is not None) == (len(values) == 1)


def test_moves_of_heads_share_one_legend_and_differ_without_colour():
    values = draw_noise(0, 3, (5, 8)).abs()
    fig = moves_chart(
        {"speed": values[0], "heads (rms)": values, "heads again": values}, make_grid("uniform", 5)
    )
    assert [t.name for t in fig.data if t.showlegend] == ["head 1", "head 2", "head 3"]
    styles = {(t.line.dash, t.marker.symbol) for t in fig.data if t.name}
    assert (
        len({t.line.dash for t in fig.data if t.legendgroup == "head 1"}) == 1 and len(styles) == 4
    )


def test_moves_point_at_one_move_in_every_panel_and_use_a_log_axis_for_errors_alone():
    values = torch.logspace(-6, 0, 6)[:, None].repeat(1, 4)
    fig = moves_chart(
        {"local error (rms)": values, "gap (rms)": values, "dead error": values * 0},
        make_grid("uniform", 6),
        mark=3,
    )
    assert [axis.type for axis in fig.select_yaxes()][:3] == ["log", None, None]
    assert [(s.x0, s.x1) for s in fig.layout.shapes] == [(3, 3)] * 3 and len(
        {s.xref for s in fig.layout.shapes}
    ) == 3
    assert {axis.matches for axis in fig.select_xaxes()} == {None, "x"}


def test_moves_survive_samples_that_diverged_and_refuse_other_grids():
    values = draw_noise(0, 8, (4,)).T
    values[:, :3], values[2] = math.nan, math.nan
    fig = moves_chart({"speed": values, "error": values.abs()}, make_grid("uniform", 4))
    assert np.isnan(lines(fig)["speed"].y).tolist() == [False, False, True, False] and fig.to_json()
    for wrong in (values[:2], values[0], torch.zeros(4, 0), torch.zeros(2, 3, 6, 1)):
        assert "the panel 'speed' has the shape" in error_of(
            moves_chart, {"speed": wrong}, make_grid("uniform", 4)
        )


# Paths and motion


@pytest.mark.parametrize("dims", [2, 3])
def test_256_paths_are_two_lines_and_light(dims):
    points = draw_noise(0, 256, (18, dims)).transpose(0, 1)
    fig = path_chart(points, torch.tensor([0.5, 0.3, 0.1][:dims]))
    chord, path, start, end = fig.data
    assert len(fig.to_json()) <= 250_000
    assert np.isnan(path.x).sum() == np.isnan(chord.x).sum() == 256
    np.testing.assert_array_equal(path.y.reshape(256, 19)[:, :-1].T, points[..., 1])
    np.testing.assert_array_equal(chord.x.reshape(256, 3)[:, :2].T, points[[0, -1], :, 0])
    np.testing.assert_array_equal(start.x, points[0, :, 0])
    np.testing.assert_array_equal(end.x, points[-1, :, 0])
    axes = fig.layout if dims == 2 else fig.layout.scene
    assert "50 %" in axes.xaxis.title.text and "30 %" in axes.yaxis.title.text


def test_paths_of_one_sample_and_one_move():
    assert (
        path_chart(torch.zeros(2, 1, 3), torch.zeros(3)).to_json()
        and len(path_chart(torch.zeros(2, 1, 2), ends=False).data) == 2
    )
    assert "are no paths" in error_of(path_chart, torch.zeros(5, 4)) and "are no paths" in error_of(
        path_chart, torch.zeros(5, 4, 2), torch.zeros(3)
    )


def moving(steps=16, count=128, side=15):
    "A contracting flow with its field."
    ts, axis = make_grid("uniform", steps), torch.linspace(-2.6, 2.6, side)
    at, x = torch.cartesian_prod(axis, axis), draw_noise(0, count, (2,))
    return motion_chart(
        torch.stack([x * (0.1 + t) for t in ts]),
        ts,
        x,
        torch.stack([at * (0.1 + t) for t in ts]),
        at,
    ), torch.stack([x * (0.1 + t) for t in ts])


def test_motion_has_a_frame_a_step_and_is_light():
    fig, xs = moving()
    assert len(fig.to_json()) <= 600_000
    assert (
        [f.name for f in fig.frames]
        == [str(i) for i in range(17)]
        == [s.args[0][0] for s in fig.layout.sliders[0].steps]
    )
    for i in (0, 7, 16):
        np.testing.assert_array_equal(fig.frames[i].data[-1].x, xs[i, :, 0])
        assert [fig.data[k].name for k in fig.frames[i].traces] == ["velocity", "sample"]
    assert "t = 0.000" in fig.layout.sliders[0].steps[-1].label


def test_arrows_point_where_the_velocity_points():
    lines = arrow_lines(np.array([[1.0, 2.0]]), np.array([[3.0, -1.0]]))
    start, tip, left, again, right, gap = lines
    assert (
        start.tolist() == [1, 2]
        and tip.tolist() == again.tolist() == [4, 1]
        and np.isnan(gap).all()
    )
    np.testing.assert_allclose(
        (left - tip) @ [-1.0, -3.0], -((right - tip) @ [-1.0, -3.0]), rtol=1e-5
    )
    assert (left - tip) @ [3.0, -1.0] < 0


def test_no_line_of_the_field_is_longer_than_the_gap_of_the_grid():
    axis = torch.linspace(-1, 1, 9)
    at, ts = torch.cartesian_prod(axis, axis), make_grid("uniform", 3)
    field = draw_noise(0, 4, (81, 2)) * torch.tensor([1.0, 1.0, 1.0, 1e6])[:, None, None]
    fig = motion_chart(torch.zeros(4, 5, 2), ts, None, field, at)
    for one in fig.frames:
        start, tip = (
            np.stack([one.data[0].x, one.data[0].y], 1).reshape(-1, 6, 2)[:, :2].swapaxes(0, 1)
        )
        assert np.linalg.norm(tip - start, axis=1).max() <= 0.25 + 1e-6


def test_motion_refuses_what_does_not_fit_together():
    ts, xs, at = make_grid("uniform", 4), torch.zeros(5, 3, 2), torch.zeros(9, 2)
    assert "is no motion over 5 times" in error_of(
        motion_chart, xs[:3], ts
    ) and "is no motion" in error_of(motion_chart, torch.zeros(5, 3, 4), ts)
    assert "is no field over 5 times" in error_of(
        motion_chart, xs, ts, None, torch.zeros(4, 9, 2), at
    ) and "is no field" in error_of(motion_chart, xs, ts, None, torch.zeros(5, 9, 2))


# What a call buys


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(-5, 5)), max_size=30), st.booleans())
@budget(max_examples=80, deadline=None)
def test_front_is_what_nothing_beats(points, higher):
    cost, value = [p[0] for p in points], [p[1] for p in points]
    sign = -1 if higher else 1
    beats = lambda p, q: p[0] <= q[0] and sign * p[1] <= sign * q[1] and p != q
    found = pareto_front(cost, value, higher)
    assert {points[i] for i in found} == {q for q in points if not any(beats(p, q) for p in points)}
    assert (np.diff([cost[i] for i in found]) > 0).all()


@pytest.mark.parametrize("axis", COSTS)
@pytest.mark.parametrize("value", ["fd", "recall"])
def test_the_front_lies_on_the_better_side(value, axis):
    fig = tradeoff_chart(scores(), value, axis)
    best, drawn = fig.data[0], lines(fig)
    assert (
        best.name == "Pareto front"
        and best.line.shape == "hv"
        and HIGHER[value] == ("↑" in fig.layout.yaxis.title.text)
    )
    for name in ("a · euler", "b · euler"):
        for x, y in zip(drawn[name].x, drawn[name].y):
            reached = best.y[np.searchsorted(best.x, x, side="right") - 1]
            assert reached >= y if HIGHER[value] else reached <= y
    assert best.x[-1] == max(max(t.x) for t in drawn.values())


def test_time_is_the_mean_over_seeds_and_old_scores_are_told():
    rows = scores(seeds=3)
    for row in rows:
        row["ms"] += 0.01 * row["seed"]
    old = [
        {k: v for k, v in row.items() if k not in ("ms", "machine", "batch")}
        for row in scores(("old",))
    ]
    fig = tradeoff_chart(rows + old, "fd", "ms")
    assert (
        "4 of 28 scores have no time and are left out"
        in fig.layout.xaxis.title.text.replace("</i><br><i>", " ")
        and "a CPU, batch 250" in fig.layout.xaxis.title.text
    )
    np.testing.assert_allclose(lines(fig)["a · euler"].x, [0.21, 0.41, 0.81, 1.61])
    assert (lines(fig)["a · euler"].error_y.array > 0).all()
    assert (
        "no endpoint"
        in tradeoff_chart(
            rows + [dict(row, endpoint=None) for row in rows], "endpoint"
        ).layout.xaxis.title.text
    )
    assert len(tradeoff_chart(rows + old).data) == 4


@pytest.mark.parametrize("key", (*PROTOCOL, *TIME_KEYS))
def test_scores_measured_otherwise_are_refused(key):
    rows = scores(data="digits")
    rows[-1] = dict(rows[-1], **{key: "other"})
    assert f"{key} is" in error_of(tradeoff_chart, rows, "fd", "ms")
    if key in PROTOCOL:
        assert (
            error_of(tradeoff_chart, rows)
            == error_of(quality_chart, rows)
            == error_of(tradeoff_chart, rows, "fd", "ms")
        )
    else:
        assert len(tradeoff_chart(rows).data) == 3


def test_a_score_below_zero_keeps_its_place():
    rows = scores(nfes=(1, 2, 4, 8, 16, 32))
    for row in rows:
        row.update(kd=400 / row["nfe"] ** 2 - 0.5 * (row["run"] == "b"), kd_low=-3.0, kd_high=450.0)
    fig = tradeoff_chart(rows, "kd")
    y, truth = lines(fig)["b · euler"].y, [row["kd"] for row in rows if row["run"] == "b"]
    unit = asinh_axis([row["kd"] for row in rows])[0]
    assert unit > 0 and fig.layout.yaxis.type is None
    np.testing.assert_allclose(np.sinh(y) * unit, truth, rtol=1e-9)
    np.testing.assert_allclose(
        np.sinh(fig.layout.yaxis.tickvals) * unit,
        [float(t) for t in fig.layout.yaxis.ticktext],
        rtol=1e-4,
        atol=1e-9,
    )
    np.testing.assert_allclose(np.sinh(y - lines(fig)["b · euler"].error_y.arrayminus) * unit, -3.0)


def test_a_share_of_zero_stays_on_a_plain_axis():
    fig = tradeoff_chart(
        [dict(row, recall=r) for row, r in zip(scores(), (0, 0.001, 0.5, 0.93))], "recall"
    )
    assert lines(fig)["a · euler"].y.tolist() == [
        0,
        0.001,
        0.5,
        0.93,
    ] and fig.layout.yaxis.range == (0, 1.04)


@pytest.mark.parametrize("value", HIGHER)
def test_every_value_can_be_drawn_with_missing_ends(value):
    rows = [
        dict(row, **{value: 0.5 + 0.1 * k, f"{value}_low": None, f"{value}_high": None})
        for k, row in enumerate(scores())
    ]
    for axis in COSTS:
        fig = tradeoff_chart(rows, value, axis)
        assert len(fig.data) == 3 and json.loads(fig.to_json())
    assert len(tradeoff_chart([], value).data) == 0 and len(quality_chart(rows, value).data) == 2


def test_zoom_is_kept_for_new_data_and_not_for_another_axis():
    first, more, time, other = (
        tradeoff_chart(scores()),
        tradeoff_chart(scores(nfes=(1, 2))),
        tradeoff_chart(scores(), "fd", "ms"),
        tradeoff_chart(scores(), "recall"),
    )
    same = lambda a, b, key: a.layout[key].uirevision == b.layout[key].uirevision
    assert (
        same(first, more, "xaxis")
        and same(first, more, "yaxis")
        and not same(first, time, "xaxis")
        and not same(first, other, "yaxis")
    )
    assert all(
        fig.layout.uirevision == "cudlab"
        for fig in (
            first,
            moves_chart({}, make_grid("uniform", 2)),
            path_chart(torch.zeros(2, 1, 2)),
        )
    )


def test_unknown_names_are_one_sentence():
    assert (
        error_of(tradeoff_chart, scores(), "fid")
        == f"value = 'fid' cannot be drawn; take one of {', '.join(HIGHER)}"
    )
    assert (
        error_of(tradeoff_chart, scores(), "fd", "hours")
        == "axis = 'hours' cannot be drawn; take one of nfe, ms"
    )


def test_the_frame_keeps_what_a_chart_already_has():
    fig = plotly.graph_objects.Figure(
        layout=dict(xaxis=dict(range=[0, 1], title="mine"), annotations=[dict(text="note")])
    )
    style_chart(fig, 200, y="theirs", legend=dict(x=0.5))
    assert (
        fig.layout.xaxis.range == (0, 1)
        and fig.layout.xaxis.title.text == "mine"
        and fig.layout.yaxis.title.text == "theirs"
    )
    assert (
        fig.layout.annotations[0].text == "note"
        and fig.layout.legend.x == 0.5
        and fig.layout.legend.orientation == "h"
    )


# In a browser


@pytest.fixture(scope="module")
def draw(chromium):
    "Draw a figure as a page of this width would; frames are left out, as Gradio leaves them out."
    sync_api = pytest.importorskip("playwright.sync_api")
    script, complaints = Path(plotly.__file__).parent / "package_data" / "plotly.min.js", []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"],
        )

        def page(fig, width=390):
            page = browser.new_page(viewport=dict(width=width, height=900))
            page.on("pageerror", lambda e: complaints.append(str(e)))
            page.set_content(
                "<!doctype html><body style='margin:0'><div id=motion><div id=chart></div></div>"
            )
            page.add_script_tag(path=script)
            page.evaluate(
                "f => Plotly.newPlot('chart', f.data, f.layout, {responsive: true})",
                json.loads(fig.to_json()),
            )
            page.wait_for_selector("#chart .main-svg")
            return page

        yield page
        browser.close()
    assert not complaints, complaints


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1200])
@pytest.mark.parametrize("name", ["moves", "heads", "paths", "motion", "tradeoff", "time"])
def test_every_word_is_on_the_page(draw, name, width):
    ts, values = make_grid("uniform", 16), draw_noise(0, 8, (16,)).T.abs()
    fig = dict(
        moves=lambda: moves_chart(
            {
                "speed (|v| / √d)": values,
                "turning (cosine)": values[1:],
                "angle to the chord (degrees)": values * 30,
                "curvature (radians per unit of rms distance)": values[1:],
                "catch-up gap (rms)": values,
                "local error (rms)": values**6,
            },
            ts,
            mark=4,
        ),
        heads=lambda: moves_chart(
            {
                "head speed (rms)": torch.stack([values, values * 2]),
                "difference from head 1 (rms)": torch.stack([values * 0, values]),
            },
            ts,
        ),
        paths=lambda: path_chart(
            draw_noise(0, 8, (17, 2)).transpose(0, 1), torch.tensor([0.4, 0.3])
        ),
        motion=lambda: moving()[0],
        tradeoff=lambda: tradeoff_chart(
            scores(
                ("digits-reflow-distill", "digits-cud-aim8", "digits-rf"),
                (1, 2, 3, 4, 6, 8, 16, 32),
            )
        ),
        time=lambda: tradeoff_chart(
            scores(machine="Intel Xeon Platinum 8370C CPU @ 2.80GHz, 2 threads")
            + [dict(scores()[0], ms=None)],
            "fd",
            "ms",
        ),
    )[name]()
    page = draw(fig, width)
    cut = page.evaluate("""() => {
      const box = document.querySelector('#chart').getBoundingClientRect()
      return [...document.querySelectorAll('#chart text')].filter(t => t.textContent && getComputedStyle(t).fill !== 'rgba(0, 0, 0, 0)' && getComputedStyle(t).fillOpacity > 0).map(t => [t.textContent, t.getBoundingClientRect()])
        .filter(([_, r]) => r.width && (r.left < box.left - 1 || r.right > box.right + 1 || r.top < box.top - 1 || r.bottom > box.bottom + 1)).map(([text]) => text)}""")
    page.close()
    assert not cut


@pytest.mark.browser
def test_motion_plays_once_its_frames_are_handed_over(draw):
    fig, xs = moving(steps=4, count=20, side=5)
    page = draw(fig, 600)
    page.evaluate(f"value => ({FRAMES_SCRIPT})(value)", dict(plot=fig.to_json()))
    shown = lambda: page.evaluate(
        "() => { const g = document.querySelector('#chart'); return "
        "[g._transitionData._frames.length, g.layout.sliders[0].active, [...g._fullData[2].x]] }"
    )
    frames, active, x = shown()
    assert frames == 5 and active == 0
    np.testing.assert_allclose(x, xs[0, :, 0], rtol=1e-6)
    page.locator(".updatemenu-button", has_text="play").click()
    page.wait_for_function(
        "() => document.querySelector('#chart').layout.sliders[0].active === 4", timeout=20_000
    )
    page.wait_for_timeout(500)
    np.testing.assert_allclose(shown()[2], xs[4, :, 0], rtol=1e-6)
    assert page.locator("#chart image").count() == 1  # the density stays
    rail = page.locator(".slider-rail-touch-rect").bounding_box()
    page.mouse.click(rail["x"] + rail["width"] / 2, rail["y"] + rail["height"] / 2)
    page.wait_for_function(
        "() => document.querySelector('#chart').layout.sliders[0].active === 2", timeout=20_000
    )
    page.wait_for_timeout(300)
    np.testing.assert_allclose(shown()[2], xs[2, :, 0], rtol=1e-6)
    shorter = moving(steps=2, count=20, side=5)[0].to_json()
    page.evaluate("f => Plotly.react('chart', f.data, f.layout)", json.loads(shorter))
    page.evaluate(f"value => ({FRAMES_SCRIPT})(value)", dict(plot=shorter))
    assert shown()[0] == 3  # those of the chart before are gone
    page.close()
