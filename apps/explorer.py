"""The explorer: watch what every network call does and measure what it buys, on real checkpoints.

python apps/explorer.py [--port 7860] [--host 127.0.0.1] [--runs NAME ...] [--root-path /lab]
[--auth USER:PASSWORD]
"""

import argparse
import html
import json
import os
import socket
import sys
import threading
from dataclasses import fields
from functools import partial
from pathlib import Path

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent))

import gradio as gr
from views import compare, live, share, tradeoff, trajectory
from views import runs as browser
from views.ask import (
    ANY,
    LOG,
    LOWER,
    MOST,
    NAMES,
    ONLY,
    SampleForm,
    as_one_line,
    class_choices,
    count_moves,
    default_run,
    error_line,
    find_entry,
    is_guided,
    is_planar,
    keep_solver,
    learned_solvers,
    open_run,
    parse_form,
    run_choices,
    solver_choices,
    solver_names,
)

from cudlab.catalog import list_runs
from cudlab.config import did_you_mean, get_settings, set_threads
from cudlab.dode import NATIVE
from cudlab.multistep import SOLVERS, Solver
from cudlab.path import GRIDS
from cudlab.plot import FRAMES_SCRIPT
from cudlab.run import Run

HERE = Path(__file__).resolve().parent


# What the form shows when a run or a solver is chosen


def cost(solver, by, amount, denoise=True, run="", label=ANY, guidance=1.0) -> str:
    "The lines under the amount: steps and NFE, always both, and what kind of solver this is."
    try:
        ask = SampleForm(
            solver=solver, by=by, amount=amount, denoise=denoise, label=label, guidance=guidance
        )
        found, twice = (
            find_entry(ask.solver, open_run(run) if run else None),
            is_guided(ask.label, ask.guidance),
        )
        steps = count_moves(ask.solver, found, ask.by, ask.amount, ask.denoise, twice)
    except ValueError as e:
        return f"<p class='cost bad' role='status'>{error_line(e)}</p>"
    nfe = f"{found.nfe(steps, ask.denoise) * (1 + twice)} NFE" if found.nfe else "NFE as needed"
    kind = (
        f"fitted for {len(found.ts) - 1} steps on the {found.grid} grid"
        if found.ts
        else f"native grid {found.grid}"
    )
    return (
        f"<p class='cost' role='status'><b>{steps}</b> {'step' if steps == 1 else 'steps'} "
        f"<i>=</i> <b>{nfe}</b> "
        f"<span>{f'order {found.order:g}' if found.order else 'no order: it follows no ODE'}, "
        f"{kind}</span> <span>{html.escape(found.network_run)}</span></p>"
    )


BOUND = ("by", "amount", "grid", "weights", "lower_order_final", "denoise", "head", "guidance")


def bound(solver: Solver, run: Run) -> dict:
    """The controls that a learned solver or the run itself decides, and their values; none for
    other solvers and runs.
    """
    usual = dict(by="steps", lower_order_final="auto", denoise=True)
    if run.sampling_fixed:
        return usual | dict(
            amount=run.sampling_fixed["steps"],
            grid=run.sampling_fixed["grid"],
            guidance=run.sampling_fixed["guidance"],
        )
    return (
        usual
        | dict(
            weights="ema",
            amount=len(solver.ts) - 1,
            grid=solver.grid,
            head=solver.made_for["head"],
            guidance=solver.made_for["guidance"],
        )
        if solver.ts
        else {}
    )


def settled(solver: Solver, run: Run, amount=None, wanted: dict = None) -> list:
    """Updates for the controls in BOUND: what is decided is set and locked, what is wanted is set;
    a lone step left over from a one-step run grows.
    """
    held, wanted = bound(solver, run), wanted or {}
    if amount == 1 and not held:
        wanted = {"amount": run.sampling_defaults["steps"]} | wanted
    if run.heads == 1:
        held = {"head": 1} | held
    if len(run.weights) == 1:  # a run that was cut to what samples need
        held = {"weights": run.weights[0]} | held
    more = {
        "head": dict(maximum=max(run.heads, 2)),
        "guidance": dict(visible=bool(class_choices(run)) and not run.sampling_fixed),
    }
    value = lambda key: (
        {"value": held[key]} if key in held else {"value": wanted[key]} if key in wanted else {}
    )
    return [
        gr.update(interactive=key not in held, **value(key), **more.get(key, {})) for key in BOUND
    ]


def decided(name, solver, amount=None) -> tuple:
    "What choosing a solver does to the controls in BOUND."
    with as_one_line():
        run = open_run(name)
        return tuple(settled(find_entry(SampleForm(solver=solver).solver, run), run, amount))


def fitted(name, solver="", amount=None, wanted: dict = None) -> tuple:
    """The controls that depend on the run: a line about it, classes, samples, what is drawn,
    solvers and what they decide, and the trade-off's choice.
    """
    with as_one_line():
        run, wanted = open_run(name), wanted or {}
        done = (
            f"{run.step:,} training steps"
            if run.method.trains == "net"
            else f"a solver for the network of <b>{html.escape(run.info['teacher']['name'])}</b>"
        )
        line = (
            f"<p class='about'><b>{html.escape(run.config.method)}</b> on "
            f"<b>{html.escape(run.config.data)}</b>, {done}, "
            f"samples of {' × '.join(map(str, run.shape))}{f', {run.heads} heads' if run.heads > 1 else ''}{', one call a sample' if run.sampling_fixed else ''}</p>"
        )
        names, plane = solver_names(run), is_planar(run)
        solver = (
            wanted["solver"] if wanted.get("solver") in names else keep_solver(run, names, solver)
        )
        theirs, with_solvers = tradeoff.beside(run)
        everyone, countable = [r for _, r in run_choices()], measurable()
        among = lambda key, names, usual, most: (
            [n for n in wanted[key].split()[:most] if n in names] or usual
            if key in wanted
            else usual
        )
        return (
            line,
            gr.update(
                choices=[ANY, *class_choices(run)],
                value=wanted.get("label", ANY),
                visible=bool(class_choices(run)),
            ),
            gr.update(value=wanted.get("count", 64 if plane else 8)),
            gr.update(visible=plane),
            gr.update(visible=not plane),
            gr.update(visible=not plane),
            gr.update(choices=solver_choices(names), value=solver),
            *settled(find_entry(solver, run), run, amount, wanted),
            gr.update(choices=everyone, value=among("runs", everyone, theirs, 24)),
            gr.update(
                choices=countable,
                value=among("solvers", [n for _, n in countable], with_solvers, 12),
            ),
            wanted.get("n", tradeoff.samples(run)),
        )


def measurable() -> list:
    "Solvers whose calls can be counted beforehand, the learned ones too."
    return solver_choices(
        [s for s in [*SOLVERS, *learned_solvers()] if s not in SOLVERS or SOLVERS[s].nfe]
    )


def greeted(*form):
    "The first picture of a page, if there is anything to show."
    if form[0]:
        yield from trajectory.sampled(*form)
    else:
        yield tuple(gr.skip() for _ in range(10))


FITS = 10 + len(BOUND)


def arrived(request: gr.Request = None) -> tuple:
    "What a page shows on arrival: the runs there are now, and what the address asks for."
    with as_one_line():
        found, wrong = share.understood(dict(request.query_params) if request else {})
        wanted = found.get("run", "")
        chosen = default_run(wanted)
        if wanted and chosen != wanted:
            wrong.append(f"run {wanted[:60]!r} is not here or damaged; this is {chosen!r}")
        for why in wrong[:3]:
            gr.Warning(html.escape(f"In the address: {why}"[:200]), duration=8)
        if chosen is None:
            line = (
                "<p class='about'>No run yet. Train one: <code>python -m cudlab.cli "
                "train</code></p>"
            )
            return (
                gr.update(choices=[], value=None),
                gr.skip(),
                line,
                *[gr.skip()] * (FITS - 1 + 3 + 5 + 26),
            )
        if "solver" in found and found["solver"] not in solver_names(open_run(chosen)):
            gr.Warning(
                html.escape(
                    f"In the address: {found['solver'][:60]!r} is not a solver for {chosen}"
                ),
                duration=8,
            )
        if "label" in found and found["label"] not in (ANY, *class_choices(open_run(chosen))):
            gr.Warning(
                html.escape(
                    f"In the address: class = {found.pop('label')[:40]!r} is not one of {chosen}"
                ),
                duration=8,
            )
        chart = [
            found.get(k, f.default)
            for k, f in ((f.name, f) for f in fields(share.View))
            if k in ("value", "axis", "grid2", "nfe", "seeds")
        ]
        view = found.get("view", "trajectory")
        return (
            gr.update(choices=run_choices(), value=chosen),
            gr.update(selected=view),
            *fitted(chosen, wanted=found),
            found.get("seed", get_settings().seed),
            *chart,
            *contestants(
                chosen, share.columns(found) if any(k in found for k in "abcd") else None, found
            ),
        )


def contestants(chosen: str, columns: list = None, found: dict = None) -> list:
    """Seed, samples and the four columns of the comparison: what was asked for, or the run with
    Euler and AB2.
    """
    found, run = found or {}, open_run(chosen)
    if columns is None:
        own = dict(
            run=chosen,
            solver=run.sampling_defaults["solver"],
            amount=1 if run.sampling_fixed else 4,
            grid=run.sampling_defaults["grid"],
        )
        root = run.reference_run
        other = (
            own | dict(solver="ab2")
            if not run.sampling_fixed
            else dict(run=root.name, solver="ab2", amount=4)
            if root
            else {}
        )
        columns = [own, other, {"run": compare.NONE}, {"run": compare.NONE}]
    usual = dict(zip(compare.COLUMN, (compare.NONE, "euler", 4, "uniform", "ema", 1)))
    choices, solvers = [("none", compare.NONE), *run_choices()], measurable()
    rows = []
    for column in columns:
        made = usual | column
        rows += [
            gr.update(
                choices=choices,
                value=made["run"] if made["run"] in [c for _, c in choices] else compare.NONE,
            ),
            gr.update(choices=solvers, value=made["solver"]),
            *(made[k] for k in compare.COLUMN[2:]),
        ]
    return [found.get("seed2", 0), found.get("count2", 16), *rows]


THEME = gr.themes.Base(
    primary_hue=gr.themes.colors.Color(
        *(
            "#eef4f8 #dbe8f1 #b6d0e3 #86b1cf #4f8db6 #0f6da3 #00598c #004a75 #003a5c "
            "#002b45 #001c2e"
        ).split(),
        name="cudlab",
    ),
    secondary_hue="slate",
    neutral_hue="zinc",
    radius_size="sm",
    spacing_size="md",
    text_size="md",
    font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
    font_mono=[
        gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)),
        "ui-monospace",
        "monospace",
    ],
).set(
    body_background_fill="#fcfcfb",
    body_background_fill_dark="#111315",
    background_fill_primary="#fcfcfb",
    background_fill_primary_dark="#111315",
    background_fill_secondary="#f4f4f2",
    background_fill_secondary_dark="#181b1e",
    block_background_fill="transparent",
    block_background_fill_dark="transparent",
    block_border_width="0px",
    block_border_width_dark="0px",
    block_shadow="none",
    block_shadow_dark="none",
    block_label_background_fill="transparent",
    block_label_background_fill_dark="transparent",
    block_label_border_width="0px",
    block_label_border_width_dark="0px",
    block_title_text_weight="600",
    block_title_text_size="*text_sm",
    block_title_text_color="*neutral_600",
    block_title_text_color_dark="*neutral_400",
    block_padding="0px",
    layout_gap="20px",
    form_gap_width="0px",
    panel_background_fill="transparent",
    panel_background_fill_dark="transparent",
    input_background_fill="#ffffff",
    input_background_fill_dark="#181b1e",
    input_border_color="#d9d9d4",
    input_border_color_dark="#33383d",
    input_shadow="none",
    input_shadow_dark="none",
    input_border_width="1px",
    input_border_color_focus="*primary_500",
    input_border_color_focus_dark="*primary_400",
    button_primary_background_fill="*primary_500",
    button_primary_background_fill_hover="*primary_600",
    button_primary_background_fill_dark="*primary_500",
    button_primary_background_fill_hover_dark="*primary_400",
    button_primary_text_color="white",
    button_primary_text_color_dark="white",
    button_secondary_background_fill="transparent",
    button_secondary_background_fill_dark="transparent",
    button_secondary_border_color="#cfcfc9",
    button_secondary_border_color_dark="#3a4046",
    button_border_width="1px",
    button_border_width_dark="1px",
    button_large_text_weight="600",
    slider_color="*primary_500",
    slider_color_dark="*primary_400",
    body_text_color="#1d2023",
    body_text_color_dark="#e4e6e8",
    body_text_color_subdued="#63686e",
    body_text_color_subdued_dark="#9aa1a8",
    checkbox_label_background_fill="transparent",
    checkbox_label_background_fill_dark="transparent",
    checkbox_label_background_fill_selected="transparent",
    checkbox_label_background_fill_selected_dark="transparent",
    checkbox_label_border_width="0px",
    checkbox_label_border_width_dark="0px",
    checkbox_label_padding="4px 10px 4px 0",
    checkbox_label_shadow="none",
    border_color_primary="#e2e2dd",
    border_color_primary_dark="#2a2f33",
    link_text_color="*primary_600",
    link_text_color_dark="*primary_300",
)


# The page


def build() -> gr.Blocks:
    "The page and its wiring; nothing is launched."
    page = gr.Blocks(title="cudlab explorer", analytics_enabled=False, fill_width=True)
    solve = dict(concurrency_id="solve", concurrency_limit=1)
    quick = dict(queue=True, show_progress="hidden", concurrency_limit=8)
    usual = [f.default for f in fields(SampleForm)]
    with page:
        gr.HTML(
            "<header id='head'><h1>cudlab</h1><p>Few-step sampling, one network call at a time.</p>"
            "<button id='help' type='button'><kbd>?</kbd> keyboard</button></header>"
        )
        with gr.Row(equal_height=False, elem_classes="split", elem_id="work"):
            with gr.Column(scale=1, min_width=288, elem_id="side", elem_classes="aside"):
                run = gr.Dropdown(
                    run_choices(), value=default_run(), label="Run", elem_id="run", filterable=True
                )
                line = gr.HTML(elem_id="line")
                with gr.Column(elem_id="form"):
                    solver = gr.Dropdown(
                        solver_choices(SOLVERS), value="euler", label="Solver", elem_id="solver"
                    )
                    with gr.Group():
                        by = gr.Radio(
                            ["steps", "NFE"],
                            value="steps",
                            label="Count in",
                            info="steps are moves; NFE are network calls per sample",
                        )
                        amount = gr.Slider(
                            1, 64, value=8, step=1, label="How many", elem_id="amount"
                        )
                    price = gr.HTML(cost("euler", "steps", 8))
                    grid = gr.Dropdown(
                        [*GRIDS, NATIVE],
                        value="uniform",
                        label="Grid",
                        filterable=False,
                        elem_id="grid",
                    )
                    seed = gr.Number(get_settings().seed, label="Seed", precision=0, minimum=0)
                    count = gr.Slider(1, MOST["count"], value=8, step=1, label="Samples")
                    label = gr.Dropdown([ANY], value=ANY, label="Class", visible=False)
                    guidance = gr.Slider(
                        0, 8, value=1.0, step=0.1, label="Guidance", info="1 is none", visible=False
                    )
                    with gr.Accordion("Network and last moves", open=False):
                        weights = gr.Radio(
                            [("average (EMA)", "ema"), ("raw", "raw")], value="ema", label="Weights"
                        )
                        head = gr.Slider(1, 2, value=1, step=1, label="Head")
                        lower = gr.Radio(
                            list(LOWER),
                            value="auto",
                            label="Lower order in the last moves",
                            info="auto is as the solver's authors do",
                        )
                        denoise = gr.Checkbox(
                            True,
                            label="Last move to t = 0",
                            info="off ends at the smallest noise level; NFE may change",
                        )
                    with gr.Row(elem_classes="buttons"):
                        go = gr.Button(
                            "Sample",
                            variant="primary",
                            elem_id="sample",
                            scale=2,
                            min_width=90,
                            size="md",
                        )
                        reseed = gr.Button("New seed", elem_id="reseed", min_width=90, size="md")
                        stop = gr.Button("Stop", elem_id="stop", min_width=60, size="md")
            with gr.Column(scale=3, min_width=300):
                with gr.Tabs(elem_id="views") as views:
                    with gr.Tab("Trajectory", id="trajectory"):
                        done = gr.HTML(elem_id="numbers")
                        film = gr.HTML(
                            "",
                            html_template="<div class='stagehand'></div>",
                            js_on_load="new cudlab.Reel(element, props, watch)",
                            elem_id="film",
                        )
                        plane = gr.Plot(
                            label="Points in motion",
                            show_label=False,
                            visible=False,
                            elem_id="motion",
                        )
                        with gr.Row(elem_classes="buttons measuring"):
                            check = gr.Button(
                                "Measure errors",
                                elem_id="errors",
                                size="md",
                                min_width=150,
                                scale=0,
                            )
                            checked = gr.HTML(trajectory.HINT, elem_id="checked")
                        with gr.Column() as box:
                            gr.HTML(
                                "<h2 class='group-name'>paths in the plane of their principal "
                                "components</h2>"
                            )
                            with gr.Row(equal_height=False):
                                chosen = gr.Textbox(
                                    "all",
                                    label="Samples drawn",
                                    info="all, or numbers as 1, 3, 4",
                                    max_length=200,
                                    scale=1,
                                    min_width=160,
                                    elem_id="chosen",
                                )
                                dims = gr.Radio(
                                    ["2-D", "3-D"],
                                    value="2-D",
                                    label="Dimensions",
                                    scale=1,
                                    min_width=140,
                                )
                            paths = gr.Plot(label="Paths", show_label=False, elem_id="paths")
                            ends = gr.HTML(elem_id="path-ends")
                    with gr.Tab("Velocity", id="velocity"):
                        panels = gr.Plot(
                            label="Every quantity of each move", show_label=False, elem_id="panels"
                        )
                        with gr.Row(elem_classes="buttons measuring"):
                            check_too = gr.Button(
                                "Measure errors", size="md", min_width=150, scale=0
                            )
                            checked_too = gr.HTML(trajectory.HINT)
                        moved = gr.HTML(elem_id="moved")
                        gr.HTML("<h2 class='group-name'>schedule</h2>")
                        schedule = gr.Plot(label="Schedule", show_label=False, elem_id="schedule")
                    with gr.Tab("Trade-off", id="trade-off") as tradeoff_tab:
                        with gr.Row(equal_height=False, elem_classes="split"):
                            with gr.Column(scale=1, min_width=288, elem_classes="aside"):
                                t_runs = gr.Dropdown(
                                    [],
                                    value=[],
                                    multiselect=True,
                                    label="Runs",
                                    info="a teacher stands beside its student",
                                    elem_id="t-runs",
                                )
                                t_solvers = gr.Dropdown(
                                    [],
                                    value=[],
                                    multiselect=True,
                                    label="Solvers",
                                    info="AB2, DPM++ and UniPC are the baselines",
                                    elem_id="t-solvers",
                                )
                                t_value = gr.Dropdown(
                                    list(tradeoff.VALUES),
                                    value="fd",
                                    label="Score",
                                    filterable=False,
                                    elem_id="t-value",
                                )
                                t_axis = gr.Radio(list(tradeoff.AXES), value="NFE", label="Against")
                                t_grid = gr.Dropdown(
                                    [*GRIDS, NATIVE],
                                    value="uniform",
                                    label="Grid",
                                    info="native is the one of each solver's authors",
                                    filterable=False,
                                    elem_id="t-grid",
                                )
                                gr.HTML("<h2 class='group-name'>to measure</h2>")
                                t_nfe = gr.Textbox(
                                    tradeoff.BUDGETS,
                                    label="NFE",
                                    info="network calls per sample, with commas",
                                    max_length=200,
                                )
                                t_n = gr.Slider(
                                    100, MOST["n"], value=2000, step=100, label="Samples per score"
                                )
                                t_seeds = gr.Textbox(
                                    "0",
                                    label="Seeds",
                                    info="three or more give an interval",
                                    max_length=100,
                                )
                                with gr.Row(elem_classes="buttons"):
                                    fill = gr.Button(
                                        "Measure missing points",
                                        variant="primary",
                                        elem_id="measure",
                                        scale=2,
                                        min_width=170,
                                        size="md",
                                    )
                                    halt = gr.Button(
                                        "Stop", elem_id="halt", min_width=60, size="md"
                                    )
                                progress = gr.HTML(elem_id="progress", min_height=60)
                            with gr.Column(scale=3, min_width=300):
                                chart = gr.Plot(
                                    label="Quality against cost", show_label=False, elem_id="chart"
                                )
                                caption = gr.HTML(elem_id="caption")
                                scores = gr.HTML(elem_id="scores")
                                with gr.Accordion("The same as a job", open=False):
                                    t_job = gr.Code(
                                        language="shell", show_label=False, interactive=False
                                    )
                                with gr.Row(elem_classes="buttons"):
                                    t_csv = gr.Button("CSV", size="sm", min_width=60, scale=0)
                                    gr.Button("SVG", size="sm", min_width=60, scale=0).click(
                                        None,
                                        None,
                                        None,
                                        js="() => cudlab.svg('chart', 'trade-off.svg')",
                                        api_name=False,
                                    )
                    with gr.Tab("Compare", id="compare"):
                        contest, countable = [], measurable()
                        with gr.Row(equal_height=False, elem_id="contest-form"):
                            for letter in compare.LETTERS:
                                with gr.Column(min_width=200, elem_classes="contestant"):
                                    gr.HTML(f"<h2 class='group-name'>{letter}</h2>")
                                    contest += [
                                        gr.Dropdown(
                                            [("none", compare.NONE)],
                                            value=compare.NONE,
                                            label=f"Run {letter}",
                                            show_label=False,
                                            elem_id=f"run-{letter.lower()}",
                                        ),
                                        gr.Dropdown(
                                            countable,
                                            value="euler",
                                            label=f"Solver {letter}",
                                            show_label=False,
                                            elem_id=f"solver-{letter.lower()}",
                                        ),
                                        gr.Number(4, label=f"NFE {letter}", precision=0, minimum=1),
                                    ]
                                    with gr.Accordion("Grid, weights, head", open=False):
                                        contest += [
                                            gr.Dropdown(
                                                [*GRIDS, NATIVE],
                                                value="uniform",
                                                label=f"Grid {letter}",
                                                filterable=False,
                                            ),
                                            gr.Radio(
                                                ["ema", "raw"],
                                                value="ema",
                                                label=f"Weights {letter}",
                                            ),
                                            gr.Number(
                                                1, label=f"Head {letter}", precision=0, minimum=1
                                            ),
                                        ]
                        with gr.Row(elem_classes="buttons"):
                            c_seed = gr.Number(
                                0, label="Seed", precision=0, minimum=0, min_width=120, scale=1
                            )
                            c_count = gr.Slider(
                                1,
                                MOST["count"],
                                value=16,
                                step=1,
                                label="Samples",
                                min_width=180,
                                scale=2,
                            )
                            fight = gr.Button(
                                "Compare",
                                variant="primary",
                                elem_id="contest",
                                min_width=110,
                                size="md",
                                scale=1,
                            )
                            pause = gr.Button("Stop", min_width=60, size="md", scale=0)
                        c_numbers = gr.HTML(elem_id="c-numbers")
                        arena = gr.HTML(
                            "",
                            html_template="<div class='stagehand'></div>",
                            js_on_load="new cudlab.Arena(element, props, watch)",
                            elem_id="arena",
                        )
                        c_plane = gr.Plot(
                            label="Where the columns end",
                            show_label=False,
                            elem_id="c-plane",
                            visible=False,
                        )
                        c_table = gr.HTML(elem_id="c-table")
                        with gr.Row(elem_classes="buttons"):
                            gr.Button(
                                "PNG of the columns", size="sm", min_width=150, scale=0
                            ).click(
                                None,
                                None,
                                None,
                                js="() => cudlab.arena && cudlab.arena.keep()",
                                api_name=False,
                            )
                        with gr.Accordion("The same in Python", open=False):
                            c_code = gr.Code(language="python", show_label=False, interactive=False)
                    with gr.Tab("Runs", id="runs") as runs_tab:
                        opens = browser.build(run, runs_tab)
                    with gr.Tab("Live", id="live") as live_tab:
                        live.build(live_tab)
                with gr.Accordion("Share what is on screen", open=False, elem_id="share"):
                    gr.HTML(
                        "<label class='link'><span class='group-name'>link</span><input data-link "
                        "readonly aria-label='link to this view'></label>"
                    )
                    code = gr.Code(language="python", label="The same in Python", interactive=False)
                    job = gr.Code(
                        language="shell",
                        lines=1,
                        label="The score of this point as a job",
                        interactive=False,
                    )
                    with gr.Row(elem_classes="buttons"):
                        files = {
                            kind: gr.Button(kind.upper(), size="sm", min_width=60, scale=0)
                            for kind in ("png", "gif", "csv")
                        }
                        gr.Button("SVG of the charts", size="sm", min_width=140, scale=0).click(
                            None,
                            None,
                            None,
                            js="() => ['paths', 'motion', 'panels', 'schedule'].forEach((id) => "
                            "cudlab.svg(id, id + '.svg'))",
                            api_name=False,
                        )
                    file, file_name = gr.Textbox(visible=False), gr.Textbox(visible=False)

        form = [
            run,
            weights,
            head,
            solver,
            by,
            amount,
            grid,
            seed,
            count,
            label,
            guidance,
            lower,
            denoise,
        ]
        shown = [film, plane, paths, ends, panels, schedule, done, moved, code, checked]
        decides = [by, amount, grid, weights, lower, denoise, head, guidance]
        fits = [line, label, count, plane, film, box, solver, *decides, t_runs, t_solvers, t_n]
        sampling = dict(
            fn=trajectory.sampled,
            inputs=form,
            outputs=shown,
            preprocess=False,
            show_progress="hidden",
            **solve,
        )
        charted = [t_value, t_axis, t_grid, t_nfe, t_seeds]

        first = page.load(
            arrived,
            None,
            [run, views, *fits, seed, *charted, c_seed, c_count, *contest],
            api_name="runs",
            **quick,
        ).success(**sampling | dict(fn=greeted), api_visibility="private")
        pressed = go.click(**sampling, api_name="sample")
        fresh = reseed.click(
            lambda: int.from_bytes(os.urandom(4), "big") % 1_000_000,
            None,
            seed,
            api_name="seed",
            **quick,
        ).success(**sampling, api_visibility="private")
        refit = gr.on(
            [run.input, opens],
            fitted,
            [run, solver, amount],
            fits,
            api_name="fit",
            preprocess=False,
            **quick,
        )
        changed = refit.success(**sampling, api_visibility="private")
        solver.input(
            decided, [run, solver, amount], decides, api_name="decide", preprocess=False, **quick
        )
        gr.on(
            [c.change for c in (solver, by, amount, denoise, label, guidance)],
            cost,
            [solver, by, amount, denoise, run, label, guidance],
            price,
            preprocess=False,
            api_name="cost",
            **quick,
        )
        checking = gr.on(
            [check.click, check_too.click],
            trajectory.errors,
            form,
            shown,
            preprocess=False,
            api_name="errors",
            show_progress="hidden",
            **solve,
        )
        plane.change(None, plane, None, js=FRAMES_SCRIPT, api_name=False)
        checked.change(lambda words: words, checked, checked_too, api_visibility="private", **quick)
        stop.click(
            None, None, None, cancels=[pressed, fresh, changed, first, checking], api_name=False
        )
        gr.on(
            [chosen.submit, dims.input],
            trajectory.repathed,
            [chosen, dims, *form],
            [paths, ends],
            preprocess=False,
            api_name="paths",
            **quick,
        )
        for kind, button in files.items():
            button.click(
                partial(trajectory.exported, kind),
                form,
                [file, file_name],
                preprocess=False,
                api_name=f"export_{kind}",
                **quick,
            ).success(
                None,
                [file, file_name],
                None,
                js="(url, name) => { cudlab.save(url, name); }",
                api_name=False,
            )

        curves, choice = [chart, caption, scores], [t_runs, t_solvers, t_value, t_axis, t_grid]
        t_csv.click(
            tradeoff.exported,
            choice,
            [file, file_name],
            preprocess=False,
            api_name="export_scores",
            **quick,
        ).success(
            None,
            [file, file_name],
            None,
            js="(url, name) => { cudlab.save(url, name); }",
            api_name=False,
        )
        drawing = dict(fn=tradeoff.scores, inputs=choice, outputs=curves, preprocess=False, **quick)
        gr.on([tradeoff_tab.select, *(c.input for c in choice)], **drawing, api_name="scores")
        refit.success(**drawing, api_visibility="private")
        measuring = fill.click(
            tradeoff.measured,
            [*choice, t_nfe, t_n, t_seeds],
            curves,
            preprocess=False,
            api_name="measure",
            show_progress="full",
            show_progress_on=progress,
            **solve,
        )
        halt.click(None, None, None, cancels=[measuring], api_name=False)
        gr.on(
            [
                tradeoff_tab.select,
                *(c.input for c in (t_runs, t_solvers, t_grid, t_nfe, t_n, t_seeds)),
            ],
            tradeoff.job,
            [t_runs, t_solvers, t_grid, t_nfe, t_n, t_seeds],
            t_job,
            preprocess=False,
            api_name="job",
            **quick,
        )

        columns = [c_seed, c_count, *contest]
        fighting = fight.click(
            compare.compared,
            columns,
            [arena, c_plane, c_numbers, c_table],
            preprocess=False,
            api_name="compare",
            show_progress="hidden",
            **solve,
        )
        fighting.then(
            compare.script, columns, c_code, preprocess=False, api_visibility="private", **quick
        )
        pause.click(None, None, None, cancels=[fighting], api_name=False)

        remember = lambda triggers, inputs, js: gr.on(
            triggers, None, inputs, None, js=js, api_name=False
        )
        remember(
            [code.change],
            form,
            f"(...values) => {{ cudlab.form({json.dumps(NAMES)}, {json.dumps(usual)}, values); }}",
        )
        keys, plain = (
            ("runs", "solvers", "value", "axis", "grid2", "nfe", "seeds", "n"),
            [None, None, "fd", "NFE", "uniform", tradeoff.BUDGETS, "0", None],
        )
        remember(
            [c.input for c in (t_runs, t_solvers, *charted, t_n)],
            [t_runs, t_solvers, *charted, t_n],
            f"(...values) => {{ cudlab.form({json.dumps(keys)}, {json.dumps(plain)}, "
            f"values.map((v) => Array.isArray(v) ? v.join(' ') : v)); }}",
        )
        remember(
            [fight.click],
            columns,
            f"(...values) => {{ cudlab.columns(values, {len(compare.COLUMN)}); }}",
        )
        for k in range(len(compare.LETTERS)):
            run_k, solver_k, nfe_k, grid_k, _, head_k = contest[
                k * len(compare.COLUMN) : (k + 1) * len(compare.COLUMN)
            ]
            gr.on(
                [run_k.input, solver_k.input],
                compare.seated,
                [run_k, solver_k, nfe_k],
                [solver_k, nfe_k, grid_k, head_k],
                preprocess=False,
                api_visibility="private",
                **quick,
            )
        code.change(pointed, form, job, preprocess=False, api_name="point", **quick)
    return page.queue(max_size=32)


def pointed(*form) -> str:
    "The command that scores what is on screen; '' where there is none."
    try:
        walk = parse_form(form)
        ask, made = walk.ask, find_entry(walk.ask.solver, walk.run)
        usual = {f.name: f.default for f in fields(SampleForm)}
        how = {
            k: getattr(ask, k)
            for k in ("weights", "head", "guidance", "lower_order_final", "denoise")
            if getattr(ask, k) != usual[k]
        }
        return tradeoff.job(
            [ask.run],
            [ask.solver],
            ask.grid,
            str(made.nfe(walk.steps, ask.denoise) if made.nfe else 1),
            tradeoff.samples(walk.run),
            str(ask.seed),
            **how,
        )
    except (ValueError, gr.Error):
        return ""


# The server


def free_port(host: str, port: int) -> int:
    "The first free port from `port` on."
    for candidate in range(port, min(port + 100, 65536)):
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind((host, candidate))
                return candidate
            except OSError:
                continue
    raise ValueError(
        f"port = {port}: no port from here to {min(port + 99, 65535)} is free on {host}"
    )


def warm() -> None:
    """Open the default run and take two steps, so that the first visitor does not pay for the first
    call.
    """
    try:
        for _ in zip(range(3), open_run(default_run()).iterate(index=8)):
            pass
    except Exception as e:
        LOG.warning("the default run could not be warmed up: %s", error_line(e))


def main(argv: list = None) -> int:
    "Start the explorer and serve until interrupted."
    parser = argparse.ArgumentParser(
        prog="explorer", description="Watch what every network call does and measure what it buys."
    )
    parser.add_argument(
        "--port",
        type=int,
        help="default: port in settings.ini; the next free one is taken if it is busy",
    )
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        help="address to serve on; the default is this machine only, another one needs --auth",
    )
    parser.add_argument(
        "--runs", nargs="*", default=[], metavar="NAME", help="show only these runs"
    )
    parser.add_argument(
        "--root-path",
        default="",
        metavar="PATH",
        help="the path under which a proxy serves this page, for example /lab",
    )
    parser.add_argument(
        "--auth",
        default="",
        metavar="USER:PASSWORD",
        help="ask for this name and password; CUDLAB_AUTH in the environment does the same and is "
        "not seen in the list of processes",
    )
    given = parser.parse_args(argv)
    try:
        given.port = get_settings().port if given.port is None else given.port
        names = {r.name for r in list_runs()}
        for name in given.runs:
            if name not in names:
                raise ValueError(f"unknown run {name!r}{did_you_mean(name, names)}")
        if not 1 <= given.port <= 65535:
            raise ValueError(f"port = {given.port} is out of range: 1 to 65535")
        user, colon, password = (given.auth or os.environ.get("CUDLAB_AUTH", "")).partition(":")
        if (user or colon) and not (user and password):
            raise ValueError("auth is not USER:PASSWORD with both of them given")
        if not live.own(given.host) and not user:
            raise ValueError(
                f"host = {given.host!r} can be reached from other machines: give --auth "
                "USER:PASSWORD, or serve on 127.0.0.1"
            )
        if given.root_path and not given.root_path.startswith("/"):
            raise ValueError(
                f"root-path = {given.root_path!r} does not begin with /; for example /lab"
            )
        port = free_port(given.host, given.port)
    except (ValueError, OSError) as e:
        print(f"explorer: {e}", file=sys.stderr)
        return 2
    ONLY[:] = given.runs
    live.ALLOWED = live.own(given.host)
    set_threads()
    if port != given.port:
        print(f"port {given.port} is busy, using {port} instead", flush=True)
    page = build()
    script = f"<script>{(HERE / 'explorer.js').read_text()}</script>"
    _, address, _ = page.launch(
        server_name=given.host,
        server_port=port,
        share=False,
        inbrowser=False,
        quiet=True,
        prevent_thread_lock=True,
        show_error=False,
        theme=THEME,
        css=(HERE / "explorer.css").read_text(),
        head=script,
        js="() => cudlab.start()",
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        mcp_server=False,
        root_path=given.root_path or None,
        auth=(user, password) if user else None,
        max_file_size="1kb",
    )
    threading.Thread(target=warm, daemon=True).start()
    print(f"explorer ready at {address}  (Ctrl-C stops it)", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        page.close(
            verbose=False
        )  # ends the pages' heartbeats first; block_thread would wait five seconds for them
    return 0


if __name__ == "__main__":
    sys.exit(main())
