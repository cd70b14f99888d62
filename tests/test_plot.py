"""Charts: the numbers they draw, what they weigh, what they refuse, how they move in a browser."""

import json
import math
from pathlib import Path

import numpy as np
import plotly
import plotly.graph_objects as go
import pytest
import torch

from cudlab.config import error_of
from cudlab.motion import FRAMES_SCRIPT, arrow_lines, density_grid, motion_chart
from cudlab.moves import moves_chart, schedule_chart
from cudlab.path import make_grid
from cudlab.plane import endpoint_chart, path_chart, plane_chart
from cudlab.plot import (
    encode_image,
    film_strip,
    line_look,
    logged_losses,
    signed_pixels,
    style_chart,
    to_pixels,
    training_chart,
    use_lab_style,
)
from cudlab.rng import draw_noise
from cudlab.tradeoff import tradeoff_chart


def lines(fig):
    "Name -> trace, without bands."
    return {trace.name: trace for trace in fig.data if trace.name}


def notes(fig):
    return [note.text for note in fig.layout.annotations]


# Style, pictures, training


def test_the_style_keeps_what_a_chart_already_has():
    axis = dict(range=[0, 1], title="mine")
    fig = go.Figure(layout=dict(xaxis=axis, annotations=[dict(text="note")]))
    style_chart(fig, 200, y="theirs", legend=dict(x=0.5))
    assert fig.layout.xaxis.range == (0, 1) and fig.layout.xaxis.title.text == "mine"
    assert fig.layout.yaxis.title.text == "theirs" and notes(fig) == ["note"]
    assert fig.layout.legend.x == 0.5 and fig.layout.legend.orientation == "h"


def test_eight_lines_of_matplotlib_differ_without_colour():
    import matplotlib

    with matplotlib.rc_context():
        use_lab_style()
        cycle = list(matplotlib.rcParams["axes.prop_cycle"])
        assert matplotlib.rcParams["font.size"] == 9
    assert len(cycle) == len({str(look) for look in cycle}) == 8
    assert len({line_look(k) for k in range(36)}) == 36


@pytest.mark.parametrize("channels, mode", [(1, "LA"), (3, "RGBA")])
def test_a_film_repeats_pixels_and_leaves_gaps_open(channels, mode):
    xs = draw_noise(0, 6, (channels, 8, 8)).unflatten(0, (3, 2))
    film = film_strip(xs)
    sheet = np.asarray(film)
    assert film.mode == mode and film.size == (3 * 34 - 2, 2 * 34 - 2)
    np.testing.assert_array_equal(sheet[:32:4, :32:4, :-1], to_pixels(xs)[0, 0])
    assert (sheet[:32, :32, -1] == 255).all() and not sheet[32:34, :, -1].any()
    assert film_strip(xs, reach=1.0).mode == "RGBA"
    assert "is no film" in error_of(film_strip, torch.rand(2, 3, 2))


def test_pixels_are_clipped_and_what_is_no_number_is_dark_or_pale():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, math.nan])
    assert to_pixels(values[-3:].view(3, 1, 1)).ravel().tolist() == [128, 191, 0]
    blue, pale = [5, 74, 145], [242, 242, 240]
    row = signed_pixels(values.view(1, 1, 5))[0].tolist()
    assert row == [blue, blue, pale, [239, 154, 107], pale]
    assert signed_pixels(torch.tensor([-1.0, 0, 1]).view(3, 1, 1))[0, 0].tolist() == [0, 128, 255]


def test_lossless_is_lossless_and_webp_is_smaller():
    film = film_strip(draw_noise(0, 2, (3, 32, 32))[None], 1)
    assert encode_image(film).startswith(b"\x89PNG")
    assert len(encode_image(film, 80)) < len(encode_image(film))


def test_training_curves_are_thinned_and_may_be_empty():
    long = [dict(step=k, loss=1.0) for k in range(9_000)]
    assert len(logged_losses(long)["loss"][0]) <= 2000
    falling = [dict(step=k, loss=dict(net=math.exp(-k / 9), disc=None)) for k in range(1, 50)]
    fig = training_chart(falling)
    assert len(fig.data) == 2 and fig.layout.yaxis.type == "log"
    assert len(training_chart([]).data) == 0


# Moves


@pytest.mark.parametrize("count", [1, 2, 17])
@pytest.mark.parametrize("less", [0, 1])
def test_moves_draw_the_median_and_half_of_the_samples(count, less):
    values, ts = draw_noise(count, 9, (count,)).T[less:], make_grid("uniform", count)
    fig = moves_chart({"speed (rms)": values}, ts)
    if not len(values):
        assert not fig.data and "needs two moves" in notes(fig)
        return
    trace = lines(fig)["speed"]
    quartiles = np.quantile(values, [0.25, 0.75], 1).T
    assert trace.x.tolist() == list(range(1, count - less + 1))
    np.testing.assert_allclose(trace.y, np.median(values, 1), rtol=1e-6)
    np.testing.assert_allclose(trace.customdata[:, 1:], quartiles, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(trace.customdata[:, 0], ts[: len(values)])
    assert (trace.error_y.array is not None) == (len(values) == 1)


def test_moves_of_heads_share_one_legend_and_differ_without_colour():
    values = draw_noise(0, 3, (5, 8)).abs()
    panels = {"speed": values[0], "heads (rms)": values, "heads again": values}
    fig = moves_chart(panels, make_grid("uniform", 5))
    assert [t.name for t in fig.data if t.showlegend] == ["head 1", "head 2", "head 3"]
    styles = {(t.line.dash, t.marker.symbol) for t in fig.data if t.name}
    first = {t.line.dash for t in fig.data if t.legendgroup == "head 1"}
    assert len(first) == 1 and len(styles) == 4


def test_moves_point_at_one_move_in_every_panel_and_use_a_log_axis_for_errors_alone():
    values = torch.logspace(-6, 0, 6)[:, None].repeat(1, 4)
    panels = {"local error (rms)": values, "gap (rms)": values, "dead error": values * 0}
    fig = moves_chart(panels, make_grid("uniform", 6), mark=3)
    assert [axis.type for axis in fig.select_yaxes()][:3] == ["log", None, None]
    assert [(s.x0, s.x1) for s in fig.layout.shapes] == [(3, 3)] * 3
    assert len({shape.xref for shape in fig.layout.shapes}) == 3
    assert {axis.matches for axis in fig.select_xaxes()} == {None, "x"}


def test_moves_survive_samples_that_diverged_and_refuse_other_grids():
    values, ts = draw_noise(0, 8, (4,)).T, make_grid("uniform", 4)
    values[:, :3], values[2] = math.nan, math.nan
    fig = moves_chart({"speed": values, "error": values.abs()}, ts)
    assert np.isnan(lines(fig)["speed"].y).tolist() == [False, False, True, False]
    assert fig.to_json() and not moves_chart({}, ts).data
    for wrong in (values[:2], values[0], torch.zeros(4, 0), torch.zeros(2, 3, 6, 1)):
        assert "the panel 'speed' has the shape" in error_of(moves_chart, {"speed": wrong}, ts)


@pytest.mark.parametrize("count", [1, 3, 40])
def test_the_schedule_spends_all_the_time_and_counts_whole_moves(count):
    fig = schedule_chart(make_grid("edm", count))
    sizes, times = fig.data
    assert sum(sizes.y) == pytest.approx(times.y[0] - times.y[-1])
    assert fig.layout.xaxis.dtick == int(fig.layout.xaxis.dtick) >= 1


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
    assert path_chart(torch.zeros(2, 1, 3), torch.zeros(3)).to_json()
    assert len(path_chart(torch.zeros(2, 1, 2), ends=False).data) == 2
    for wrong in ((torch.zeros(5, 4),), (torch.zeros(5, 4, 2), torch.zeros(3))):
        assert "are no paths" in error_of(path_chart, *wrong)


def test_end_points_differ_without_colour():
    groups = {"A": torch.zeros(3, 2), "B": torch.ones(3, 2)}
    data, a, b = endpoint_chart(groups, torch.zeros(5, 2)).data
    assert [data.name, a.name, b.name] == ["data", "A", "B"] and a.marker.symbol != b.marker.symbol


def moving(steps=16, count=128, side=15):
    "A contracting flow with its field: the chart and its states."
    ts, axis = make_grid("uniform", steps), torch.linspace(-2.6, 2.6, side)
    at, x = torch.cartesian_prod(axis, axis), draw_noise(0, count, (2,))
    xs, field = (torch.stack([points * (0.1 + t) for t in ts]) for points in (x, at))
    return motion_chart(xs, ts, x, field, at), xs


def test_motion_has_a_frame_a_step_and_is_light():
    fig, xs = moving()
    steps = fig.layout.sliders[0].steps
    names = [str(i) for i in range(17)]
    assert len(fig.to_json()) <= 600_000
    assert [frame.name for frame in fig.frames] == [step.args[0][0] for step in steps] == names
    for i in (0, 7, 16):
        np.testing.assert_array_equal(fig.frames[i].data[-1].x, xs[i, :, 0])
        assert [fig.data[k].name for k in fig.frames[i].traces] == ["velocity", "sample"]
    assert "t = 0.000" in steps[-1].label
    ts = make_grid("uniform", 16)
    np.testing.assert_array_equal(motion_chart(xs, ts, first=-1).data[-1].x, xs[-1, :, 0])
    assert motion_chart(xs * math.nan, ts).layout.xaxis.range[1] == 3


def test_arrows_point_where_the_velocity_points():
    arrow = arrow_lines(np.array([[1.0, 2.0]]), np.array([[3.0, -1.0]]))
    start, tip, left, again, right, gap = arrow
    back = np.array([-1.0, -3.0])
    assert start.tolist() == [1, 2] and tip.tolist() == again.tolist() == [4, 1]
    assert np.isnan(gap).all() and (left - tip) @ [3.0, -1.0] < 0
    np.testing.assert_allclose((left - tip) @ back, -((right - tip) @ back), rtol=1e-5)


def test_no_line_of_the_field_is_longer_than_the_gap_of_the_grid():
    axis = torch.linspace(-1, 1, 9)
    at, ts = torch.cartesian_prod(axis, axis), make_grid("uniform", 3)
    scale = torch.tensor([1.0, 1.0, 1.0, 1e6])[:, None, None]
    fig = motion_chart(torch.zeros(4, 5, 2), ts, None, draw_noise(0, 4, (81, 2)) * scale, at)
    for frame in fig.frames:
        points = np.stack([frame.data[0].x, frame.data[0].y], 1).reshape(-1, 6, 2)
        assert np.linalg.norm(points[:, 1] - points[:, 0], axis=1).max() <= 0.25 + 1e-6


def test_the_density_is_highest_where_the_points_are():
    cloud = torch.tensor([[1.0, -2.0]]) + 0.01 * draw_noise(0, 50, (2,))
    values = density_grid(cloud, 3.0, 61)
    assert values.max() == 1 and np.unravel_index(values.argmax(), values.shape) == (10, 40)


def test_motion_refuses_what_does_not_fit_together():
    ts, xs, at = make_grid("uniform", 4), torch.zeros(5, 3, 2), torch.zeros(9, 2)
    assert "is no motion over 5 times" in error_of(motion_chart, xs[:3], ts)
    assert "is no motion" in error_of(motion_chart, torch.zeros(5, 3, 4), ts)
    for field, where in ((torch.zeros(4, 9, 2), at), (torch.zeros(5, 9, 2), None)):
        assert "is no field over 5 times" in error_of(motion_chart, xs, ts, None, field, where)


# In a browser


@pytest.fixture(scope="module")
def draw(chromium):
    "Draw figures as a page of this width would, one below the other, without their frames."
    sync_api = pytest.importorskip("playwright.sync_api")
    script = Path(plotly.__file__).parent / "package_data" / "plotly.min.js"
    flags = ["--no-sandbox", "--disable-background-networking", "--disable-gpu"]
    complaints = []
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=flags)

        def page(figs, width=390):
            page = browser.new_page(viewport=dict(width=width, height=900))
            page.on("pageerror", lambda e: complaints.append(str(e)))
            places = "".join(f"<div id={name}><div class=chart></div></div>" for name in figs)
            page.set_content(f"<!doctype html><body style='margin:0'>{places}")
            page.add_script_tag(path=script)
            for name, fig in figs.items():
                page.evaluate(
                    "([name, f]) => Plotly.newPlot(document.querySelector(`#${name} .chart`), "
                    "f.data, f.layout, {responsive: true})",
                    [name, json.loads(fig.to_json())],
                )
            return page

        yield page
        browser.close()
    assert not complaints, complaints


def crowded():
    "Every chart with the longest words it may have to place."
    ts, values = make_grid("uniform", 16), draw_noise(0, 8, (16,)).T.abs()
    quantities = {
        "speed (|v| / √d)": values,
        "turning (cosine)": values[1:],
        "angle to the chord (degrees)": values * 30,
        "curvature (radians per unit of rms distance)": values[1:],
        "catch-up gap (rms)": values,
        "local error (rms)": values**6,
    }
    heads = {
        "head speed (rms)": torch.stack([values, values * 2]),
        "difference from head 1 (rms)": torch.stack([values * 0, values]),
    }
    points = draw_noise(0, 8, (17, 2)).transpose(0, 1)
    same = dict(extractor="digits-v2", n=1000, solver="euler", batch=250, device="cpu")
    same["machine"] = "Intel Xeon Platinum 8370C CPU @ 2.80GHz, 2 threads"
    scores = [
        dict(same, run=run, nfe=nfe, fd=9 / nfe, ms=0.2 * nfe)
        for run in ("digits-reflow-distill", "digits-cud-aim8", "digits-rf")
        for nfe in (1, 2, 3, 4, 6, 8, 16, 32)
    ]
    return dict(
        moves=moves_chart(quantities, ts, mark=4),
        heads=moves_chart(heads, ts),
        schedule=schedule_chart(ts),
        paths=path_chart(points, torch.tensor([0.4, 0.3])),
        plane=plane_chart(points, points[0]),
        motion=moving()[0],
        tradeoff=tradeoff_chart(scores),
        time=tradeoff_chart([*scores, dict(scores[0], ms=None)], "fd", "ms"),
    )


WORDS_CUT = """() => [...document.querySelectorAll('.chart text')].filter((text) => {
  const box = text.closest('.chart').getBoundingClientRect();
  const style = getComputedStyle(text);
  const r = text.getBoundingClientRect();
  const hidden = style.fill === 'rgba(0, 0, 0, 0)' || style.fillOpacity === '0';
  if (!text.textContent || hidden || !r.width) return false;
  return r.left < box.left - 1 || r.right > box.right + 1
    || r.top < box.top - 1 || r.bottom > box.bottom + 1;
}).map((text) => text.textContent)"""


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, pytest.param(1200, marks=pytest.mark.long)])
def test_every_word_is_on_the_page(draw, width):
    page = draw(crowded(), width)
    assert page.locator(".chart text").count() > 200
    assert page.evaluate(WORDS_CUT) == []
    page.close()


@pytest.mark.browser
def test_motion_plays_once_its_frames_are_handed_over(draw):
    fig, xs = moving(steps=4, count=20, side=5)
    page = draw(dict(motion=fig), 600)

    def hand_over(text):
        page.evaluate(f"value => ({FRAMES_SCRIPT})(value)", dict(plot=text))

    def arrived(step):
        "Wait until the slider and the first sample are at this step."
        page.wait_for_function(
            "([i, x]) => { const chart = document.querySelector('.chart');"
            "return chart.layout.sliders[0].active === i"
            " && Math.abs(chart._fullData[2].x[0] - x) < 1e-5; }",
            arg=[step, float(xs[step, 0, 0])],
        )

    def count_frames():
        return page.evaluate(
            "() => document.querySelector('.chart')._transitionData._frames.length"
        )

    hand_over(fig.to_json())
    assert count_frames() == 5
    arrived(0)
    page.locator(".updatemenu-button", has_text="play").click()
    arrived(4)
    assert page.locator(".chart image").count() == 1  # the density stays
    rail = page.locator(".slider-rail-touch-rect").bounding_box()
    page.mouse.click(rail["x"] + rail["width"] / 2, rail["y"] + rail["height"] / 2)
    arrived(2)
    shorter = moving(steps=2, count=20, side=5)[0].to_json()
    page.evaluate(
        "f => Plotly.react(document.querySelector('.chart'), f.data, f.layout)",
        json.loads(shorter),
    )
    hand_over(shorter)
    assert count_frames() == 3  # those of the chart before are gone
    page.close()
