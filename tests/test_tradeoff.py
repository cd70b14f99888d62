"""Quality against cost: the best points, what may share an axis, where values are drawn."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as budget
from hypothesis import strategies as st

from cudlab.config import error_of
from cudlab.moves import moves_chart
from cudlab.path import make_grid
from cudlab.plane import path_chart
from cudlab.scoring import PROTOCOL, TIMED
from cudlab.tradeoff import (
    COSTS,
    HIGHER,
    asinh_axis,
    line_styles,
    name_line,
    pareto_front,
    quality_chart,
    tradeoff_chart,
)


def scores(runs=("a", "b"), nfes=(1, 2, 4, 8), seeds=1, **more):
    "Made-up scores of one protocol; run k is k times as good."
    same = dict(solver="euler", extractor="digits-v2", n=1000, data="digits")
    same |= dict(machine="a CPU", batch=250, device="cpu") | more
    rows = []
    for k, run in enumerate(runs, 1):
        for n in nfes:
            quality = dict(kd=3 / n / k - 0.5, recall=1 - 1 / (n + k), endpoint=1 / n)
            for seed in range(seeds):
                row = dict(run=run, nfe=n, seed=seed, ms=0.2 * n * k, fd=20 / n / k + 0.01 * seed)
                rows.append(same | quality | row)
    return rows


def lines(fig):
    return {trace.name: trace for trace in fig.data}


def test_a_line_is_named_after_its_run_its_sampler_and_what_is_unusual():
    row = dict(run="r", solver="heun", grid="edm", head=2)
    assert name_line(row) == "r · heun · grid edm · head 2"
    assert name_line(dict(run="d", solver="d", denoise=False)) == "d · denoise False"
    row = dict(run="r", solver="ddim", lower_order_final="no", grid="uniform")
    assert name_line(row) == "r · ddim · lower_order_final no"


def test_no_two_lines_look_alike():
    crowd = line_styles(
        [dict(run=run, solver=solver) for run in "abcdefghijkl" for solver in "mnopqrstuvwx"]
    )
    assert len(set(crowd.values())) == len(crowd) == 144
    assert crowd["b · n"][0] == crowd["b · o"][0] != crowd["c · n"][0]
    assert crowd["b · n"][1] == crowd["c · n"][1] != crowd["b · o"][1]
    alone = line_styles([dict(run="a", solver=solver) for solver in "mnopqr"])
    assert len({colour for colour, _, _ in alone.values()}) == 6


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(-5, 5)), max_size=30), st.booleans())
@budget(max_examples=80, deadline=None)
def test_front_is_what_nothing_beats(points, higher):
    cost, value = [p[0] for p in points], [p[1] for p in points]
    sign = -1 if higher else 1

    def beats(p, q):
        return p[0] <= q[0] and sign * p[1] <= sign * q[1] and p != q

    found = pareto_front(cost, value, higher)
    best = {q for q in points if not any(beats(p, q) for p in points)}
    assert {points[i] for i in found} == best
    assert (np.diff([cost[i] for i in found]) > 0).all()


@pytest.mark.parametrize("axis", COSTS)
@pytest.mark.parametrize("value", ["fd", "recall"])
def test_the_front_lies_on_the_better_side(value, axis):
    fig = tradeoff_chart(scores(), value, axis)
    front, *drawn = fig.data
    assert front.name == "Pareto front" and front.line.shape == "hv"
    assert HIGHER[value] == ("↑" in fig.layout.yaxis.title.text)
    assert [trace.name for trace in drawn] == ["a · euler", "b · euler"]
    for trace in drawn:
        for x, y in zip(trace.x, trace.y):
            reached = front.y[np.searchsorted(front.x, x, side="right") - 1]
            assert reached >= y if HIGHER[value] else reached <= y
    assert front.x[-1] == max(max(trace.x) for trace in drawn)


def test_time_is_the_mean_over_seeds_and_old_scores_are_told():
    rows = scores(seeds=3)
    for row in rows:
        row["ms"] += 0.01 * row["seed"]
    old = [dict(row, ms=None, machine=None, batch=None) for row in scores(("old",))]
    fig = tradeoff_chart(rows + old, "fd", "ms")
    title = fig.layout.xaxis.title.text.replace("</i><br><i>", " ")
    assert "4 of 28 scores have no time and are left out" in title and "a CPU, batch 250" in title
    line = lines(fig)["a · euler"]
    np.testing.assert_allclose(line.x, [0.21, 0.41, 0.81, 1.61])
    assert (line.error_y.array > 0).all()
    blind = tradeoff_chart(rows + [dict(row, endpoint=None) for row in rows], "endpoint")
    assert "no endpoint" in blind.layout.xaxis.title.text
    assert len(tradeoff_chart(rows + old).data) == 4


@pytest.mark.parametrize("key", (*PROTOCOL, *TIMED))
def test_scores_measured_otherwise_are_refused(key):
    rows = scores()
    rows[-1] = dict(rows[-1], **{key: "other"})
    refusal = error_of(tradeoff_chart, rows, "fd", "ms")
    assert f"do not belong on one axis: a and b are not comparable: {key} is" in refusal
    if key in PROTOCOL:
        assert error_of(tradeoff_chart, rows) == error_of(quality_chart, rows) == refusal
    else:
        assert len(tradeoff_chart(rows).data) == 3


def test_a_score_below_zero_keeps_its_place():
    rows = scores(nfes=(1, 2, 4, 8, 16, 32))
    for row in rows:
        row.update(kd=400 / row["nfe"] ** 2 - 0.5 * (row["run"] == "b"), kd_low=-3.0, kd_high=450.0)
    fig = tradeoff_chart(rows, "kd")
    line, truth = lines(fig)["b · euler"], [row["kd"] for row in rows if row["run"] == "b"]
    unit = asinh_axis([row["kd"] for row in rows])[0]
    ticks, texts = fig.layout.yaxis.tickvals, fig.layout.yaxis.ticktext
    assert unit > 0 and fig.layout.yaxis.type is None
    np.testing.assert_allclose(np.sinh(line.y) * unit, truth, rtol=1e-9)
    np.testing.assert_allclose(np.sinh(ticks) * unit, np.array(texts, float), rtol=1e-4, atol=1e-9)
    np.testing.assert_allclose(np.sinh(line.y - line.error_y.arrayminus) * unit, -3.0)


@pytest.mark.parametrize("values", [[1.0, 100.0], [-1.0, 5.0], [0.0], []])
def test_an_axis_is_folded_only_where_it_must_be(values):
    assert asinh_axis(values) == (0, (None, None))


def test_a_share_of_zero_stays_on_a_plain_axis():
    rows = [dict(row, recall=r) for row, r in zip(scores(("a",)), (0, 0.001, 0.5, 0.93))]
    fig = tradeoff_chart(rows, "recall")
    assert lines(fig)["a · euler"].y.tolist() == [0, 0.001, 0.5, 0.93]
    assert fig.layout.yaxis.range == (0, 1.04)


@pytest.mark.parametrize("value", HIGHER)
def test_every_value_can_be_drawn_with_missing_ends(value):
    rows = [
        dict(row, **{value: 0.5 + 0.1 * k, f"{value}_low": None, f"{value}_high": None})
        for k, row in enumerate(scores())
    ]
    for axis in COSTS:
        fig = tradeoff_chart(rows, value, axis)
        assert len(fig.data) == 3 and json.loads(fig.to_json())
        assert len(tradeoff_chart([], value, axis).data) == 0
    assert len(quality_chart(rows, value).data) == 2


def test_zoom_is_kept_for_new_data_and_not_for_another_axis():
    def zoom(*args, **more):
        layout = tradeoff_chart(scores(**more), *args).layout
        return layout.xaxis.uirevision, layout.yaxis.uirevision

    first = zoom()
    assert zoom(nfes=(1, 2)) == first
    assert zoom("fd", "ms")[0] != first[0] and zoom("recall")[1] != first[1]
    moves, paths = moves_chart({}, make_grid("uniform", 2)), path_chart(torch.zeros(2, 1, 2))
    for fig in (tradeoff_chart(scores()), moves, paths):
        assert fig.layout.uirevision == "cudlab"


def test_unknown_names_are_one_sentence():
    wanted = f"value = 'fid' cannot be drawn; take one of {', '.join(HIGHER)}"
    assert error_of(tradeoff_chart, scores(), "fid") == wanted
    wanted = "axis = 'hours' cannot be drawn; take one of nfe, ms"
    assert error_of(tradeoff_chart, scores(), "fd", "hours") == wanted
