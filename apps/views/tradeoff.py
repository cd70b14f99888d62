"Trade-off: quality against calls or time, for any runs and solvers, measured where it is missing."

import shlex
from types import SimpleNamespace

import gradio as gr
from markup import csv_url, heading_html
from offer import countable_solvers, open_run, pick_solver, run_choices, solver_names
from request import LIMITS, Clock, as_one_line

from cudlab.dode import NATIVE
from cudlab.evaluate import Evaluation, score_curve
from cudlab.flags import flags_of
from cudlab.path import GRIDS
from views import (
    ASIDE,
    PRIVATE,
    QUICK,
    SOLVE,
    SPLIT,
    cancel_on,
    remember_fields,
    run_script,
    save_file,
)
from views.scores import (
    AXES,
    VALUES,
    Chart,
    default_choice,
    default_count,
    draw_chart,
    find_scores,
    largest_protocol,
    parse_chart,
)

BUDGETS = "1, 2, 4, 8, 16"
ADDRESS = ("runs", "solvers", "value", "axis", "grid2", "nfe", "seeds", "n")


def parse_numbers(text, what: str, low: int, high: int, most: int) -> list:
    "Whole numbers from what a person typed: 1, 2, 4."
    example = f"{low}, {low + 1}, {low + 2}"
    words = str("" if text is None else text).replace(";", " ").replace(",", " ").split(" ")
    words = [word for word in words if word]
    for word in words:
        if not word.isdecimal() or len(word) > 16 or not low <= int(word) <= high:
            raise ValueError(
                f"{what} = {word[:40]!r} is not a whole number from {low} to {high}; write them "
                f"as {example}"
            )
    numbers = sorted(set(map(int, words)))
    if not 1 <= len(numbers) <= most:
        given = f"{len(numbers)} numbers are" if numbers else "nothing is"
        raise ValueError(f"{what}: {given} given; write 1 to {most} of them as {example}")
    return numbers


def parse_nfes(text) -> list:
    "Budgets in network calls."
    return parse_numbers(text, "NFE", 1, LIMITS["nfe"], LIMITS["scores"])


def parse_seeds(text) -> list:
    "Noise seeds."
    return parse_numbers(text, "seeds", 0, 2**53 - 1, LIMITS["seeds"])


def show_scores(names, solvers, value="fd", axis="NFE", grid="uniform") -> tuple:
    "What is measured of these runs and solvers: (chart, protocol in words, table)."
    with as_one_line():
        return draw_chart(parse_chart(names, solvers, value=value, axis=axis, grid=grid))


def export_scores(names, solvers, value="fd", axis="NFE", grid="uniform") -> tuple:
    "(a data address, a file name) of the scores that are drawn, as CSV with their whole protocol."
    with as_one_line():
        chart = parse_chart(names, solvers, value=value, axis=axis, grid=grid)
        group = largest_protocol(find_scores(chart))
        rows = [score for score in group if score.get(chart.value) is not None]
        if not rows:
            raise ValueError(
                "nothing is measured of these runs and solvers yet, so there is nothing to save"
            )
        return csv_url(rows), "trade-off.csv"


# The scores that are missing


def plan_lines(chart: Chart, seeds: list) -> list:
    "The lines of a chart that can be measured: (run, solver, arguments of the sampling)."
    for name in chart.solvers:
        pick_solver(name)
    lines = []
    for run in map(open_run, chart.runs):
        offered = solver_names(run)
        for name in chart.solvers:
            if name not in offered:
                continue
            solver = pick_solver(name, run)
            how = dict(n=chart.n, grid=chart.grid)
            if solver.ts:
                made_for = solver.made_for
                how |= dict(grid=solver.grid, head=made_for["head"], guidance=made_for["guidance"])
            if run.sampling_fixed:
                how["grid"] = run.sampling_fixed["grid"]
            lines += [(run, name, how | dict(seed=seed)) for seed in seeds]
    if not lines:
        raise ValueError(
            f"none of these solvers goes with {', '.join(chart.runs)[:80]}; choose another solver"
        )
    return lines


def stream_scores(names, solvers, value, axis, grid, nfes, n, seeds, progress=gr.Progress()):
    "Measures the points that are missing, one by one: (chart, protocol, table) after each."
    with as_one_line():
        chart = parse_chart(names, solvers, value=value, axis=axis, grid=grid, n=n)
        budgets = tuple(parse_nfes(nfes))
        lines = plan_lines(chart, parse_seeds(seeds))
        clock = Clock(5)
        newest = None
        for at, (run, solver, how) in enumerate(lines):
            words = f"{run.name}, {solver}: line {at + 1} of {len(lines)}"

            def tell(done, size, at=at, words=words):
                clock.check()
                total = len(lines) * size
                progress((at * size + done, total), desc=words, unit="samples")

            for score in score_curve(run, (solver,), budgets, progress=tell, **how):
                run.add_score(score)
                newest = score
                yield draw_chart(chart, newest)
        if newest is None:
            gr.Info("All of these points are measured already, or not possible.", duration=4)
        yield draw_chart(chart, newest)


def score_command(names, solvers, grid, nfes, n, seeds, **sampling) -> str:
    "The command that measures the same."
    with as_one_line():
        chart = parse_chart(names, solvers, grid=grid, n=n)
        job = Evaluation(
            solvers=" ".join(chart.solvers),
            nfes=" ".join(map(str, parse_nfes(nfes))),
            seeds=" ".join(map(str, parse_seeds(seeds))),
            n=chart.n,
            grid=chart.grid,
            **sampling,
        )
        return shlex.join(["cudlab", "evaluate", *chart.runs, *flags_of(job)])


# The page


def update_choice(name, wanted: dict = None) -> tuple:
    "Runs, solvers and samples that go with a run; `wanted` are fields of the address."
    with as_one_line():
        run = open_run(name)
        wanted = wanted or {}
        runs = [choice for _, choice in run_choices()]
        solvers = countable_solvers()
        chosen_runs, chosen_solvers = default_choice(run)
        asked_runs = wanted.get("runs", "").split()[: LIMITS["runs"]]
        asked_solvers = wanted.get("solvers", "").split()[: LIMITS["solvers"]]
        known = [solver for _, solver in solvers]
        return (
            gr.update(choices=runs, value=[r for r in asked_runs if r in runs] or chosen_runs),
            gr.update(
                choices=solvers,
                value=[s for s in asked_solvers if s in known] or chosen_solvers,
            ),
            wanted.get("n", default_count(run)),
        )


def build_choice() -> SimpleNamespace:
    "What is drawn."
    runs = gr.Dropdown(
        [],
        value=[],
        multiselect=True,
        label="Runs",
        info="a teacher stands beside its student",
        elem_id="t-runs",
    )
    solvers = gr.Dropdown(
        [],
        value=[],
        multiselect=True,
        label="Solvers",
        info="AB2, DPM++ and UniPC are the baselines",
        elem_id="t-solvers",
    )
    value = gr.Dropdown(
        list(VALUES), value="fd", label="Score", filterable=False, elem_id="t-value"
    )
    axis = gr.Radio(list(AXES), value="NFE", label="Against")
    grid = gr.Dropdown(
        [*GRIDS, NATIVE],
        value="uniform",
        label="Grid",
        info="native is the one of each solver's authors",
        filterable=False,
        elem_id="t-grid",
    )
    return SimpleNamespace(runs=runs, solvers=solvers, value=value, axis=axis, grid=grid)


def build_plan() -> SimpleNamespace:
    "What is to be measured."
    gr.HTML(heading_html("to measure"))
    nfes = gr.Textbox(
        BUDGETS, label="NFE", info="network calls per sample, with commas", max_length=200
    )
    n = gr.Slider(100, LIMITS["n"], value=2000, step=100, label="Samples per score")
    seeds = gr.Textbox("0", label="Seeds", info="three or more give an interval", max_length=100)
    with gr.Row(elem_classes="buttons"):
        measure = gr.Button(
            "Measure missing points",
            variant="primary",
            elem_id="measure",
            scale=2,
            min_width=170,
            size="md",
        )
        stop = gr.Button("Stop", elem_id="halt", min_width=60, size="md")
    progress = gr.HTML(elem_id="progress", min_height=60)
    return SimpleNamespace(
        nfes=nfes, n=n, seeds=seeds, measure=measure, stop=stop, progress=progress
    )


def build_result() -> SimpleNamespace:
    "Chart, protocol, table, and ways to take them away."
    chart = gr.Plot(label="Quality against cost", show_label=False, elem_id="chart")
    caption = gr.HTML(elem_id="caption")
    scores = gr.HTML(elem_id="scores")
    with gr.Accordion("The same as a job", open=False):
        job = gr.Code(language="shell", show_label=False, interactive=False)
    with gr.Row(elem_classes="buttons"):
        csv = gr.Button("CSV", size="sm", min_width=60, scale=0)
        svg = gr.Button("SVG", size="sm", min_width=60, scale=0)
    run_script([svg.click], "() => cudlab.saveChart('chart', 'trade-off.svg')")
    return SimpleNamespace(chart=chart, caption=caption, scores=scores, job=job, csv=csv)


def build(run: gr.Dropdown, download: list) -> SimpleNamespace:
    "The tab and its wiring."
    with gr.Tab("Trade-off", id="trade-off") as tab:
        with gr.Row(**SPLIT):
            with gr.Column(**ASIDE):
                choice = build_choice()
                plan = build_plan()
            with gr.Column(scale=3, min_width=300):
                result = build_result()
    chosen = list(vars(choice).values())
    drawn = [result.chart, result.caption, result.scores]
    drawing = dict(fn=show_scores, inputs=chosen, outputs=drawn, **QUICK)
    gr.on([tab.select, *(c.input for c in chosen)], **drawing, api_name="scores")
    measuring = plan.measure.click(
        stream_scores,
        [*chosen, plan.nfes, plan.n, plan.seeds],
        drawn,
        api_name="measure",
        **SOLVE | dict(show_progress="full", show_progress_on=plan.progress),
    )
    cancel_on([plan.stop.click], [measuring])
    planned = [choice.runs, choice.solvers, choice.grid, plan.nfes, plan.n, plan.seeds]
    triggers = [tab.select, *(c.input for c in planned)]
    gr.on(triggers, score_command, planned, result.job, api_name="job", **QUICK)
    saving = result.csv.click(export_scores, chosen, download, api_name="export_scores", **QUICK)
    save_file(saving, download)
    remembered = [*chosen, plan.nfes, plan.seeds, plan.n]
    usual = [None, None, "fd", "NFE", "uniform", BUDGETS, "0", None]
    remember_fields([c.input for c in remembered], ADDRESS, usual, remembered)
    return SimpleNamespace(
        run=run,
        fitted=[choice.runs, choice.solvers, plan.n],
        charted=[choice.value, choice.axis, choice.grid, plan.nfes, plan.seeds],
        drawing=drawing,
    )


def wire(tab: SimpleNamespace, fit) -> None:
    "The chart follows the run of the form; `fit` is the event after which that is another."
    drawing = PRIVATE | tab.drawing | dict(api_visibility="private")
    fit.success(update_choice, tab.run, tab.fitted, **PRIVATE).success(**drawing)
