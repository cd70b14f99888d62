"Compare: up to four ways of sampling on the same noise."

import json
from dataclasses import dataclass
from types import SimpleNamespace

import gradio as gr
import torch
from markup import data_url, figures_html, heading_html, table_html
from offer import (
    countable_solvers,
    is_planar,
    keep_solver,
    open_run,
    pick_solver,
    run_choices,
    solver_names,
)
from request import LIMITS, SampleForm, SampleRequest, as_one_line, make_request

from cudlab import plot
from cudlab.catalog import is_finite
from cudlab.distances import mean_interval
from cudlab.dode import NATIVE
from cudlab.evaluate import find_fd
from cudlab.path import GRIDS
from cudlab.plane import endpoint_chart
from cudlab.run import Run
from cudlab.runfiles import run_stamp
from cudlab.scoring import Sampling, memoize
from cudlab.solver import Trajectory, solve
from cudlab.trajectory import root_mean_square
from views import PRIVATE, SOLVE, cancel_on, run_script
from views.film import make_mosaic
from views.trajectory import data_points, reference_velocity

NONE = "none"
LETTERS = "ABCD"
EMPTY = dict(run=NONE, solver="euler", amount=4, grid="uniform", weights="ema", head=1)
FIELDS = tuple(EMPTY)
SCORED = ("solver", "grid", "weights", "head", "guidance", "lower_order_final", "denoise")
CAPTION = (
    "root mean square distances, mean over the samples and 95 % interval; the same noise in every "
    "column; fd with its interval from the scores of the run, which are of many more samples; "
    "columns with different references compare by fd alone"
)


@dataclass
class Column:
    "One way of sampling, and what has come of it."

    letter: str
    request: SampleRequest
    trajectory: Trajectory = None
    seconds: float = 0.0

    @property
    def name(self) -> str:
        "The column in words."
        form = self.request.form
        parts = list(dict.fromkeys([form.run, form.solver])) + [f"{form.amount} NFE"]
        changed = form.changed(("grid", "weights", "head"))
        parts += [v if key == "weights" else f"{key} {v}" for key, v in changed.items()]
        return ", ".join(parts)

    def sample(self):
        "Samples, and yields after each step."
        states = []
        for state, took in self.request.timed_states():
            self.seconds += took
            states.append(state)
            yield state
        self.trajectory = self.request.remember(states)

    def picture(self) -> str:
        "A line of the arena's text: the samples as a picture."
        words = f"{self.trajectory.nfe:g} NFE, {1000 * self.seconds:.0f} ms"
        source = data_url(
            plot.encode_image(make_mosaic(self.request.run.pictures(self.trajectory.x))),
            "image/png",
        )
        return json.dumps(dict(letter=self.letter, name=self.name, words=words, src=source)) + "\n"


def parse_columns(seed, count, row) -> list[Column]:
    "The columns that are in use; they share their noise."
    columns = []
    for k, letter in enumerate(LETTERS):
        values = dict(zip(FIELDS, row[k * len(FIELDS) : (k + 1) * len(FIELDS)]))
        if values.get("run") in (None, "", NONE):
            continue
        try:
            form = SampleForm(by="NFE", seed=seed, count=count, **values)
            columns.append(Column(letter, make_request(form)))
        except ValueError as e:
            raise ValueError(f"column {letter}: {e}") from None
    if not columns:
        raise ValueError("no column has a run; choose one in A")
    first = columns[0].request.run
    for column in columns[1:]:
        run = column.request.run
        if run.shape != first.shape:
            raise ValueError(
                f"column {column.letter}: {run.name} makes samples of "
                f"{' x '.join(map(str, run.shape))}, {first.name} of "
                f"{' x '.join(map(str, first.shape))}; their noise cannot be the same"
            )
    return columns


def reference_ends(request: SampleRequest) -> tuple:
    "(name of the reference, where its flow takes this noise); computed once."
    name, velocity = reference_velocity(request)
    root = request.run.reference_run
    form = request.form

    def compute() -> torch.Tensor:
        x = next(request.run.iterate(**request.choices)).x.cpu()
        with torch.no_grad():
            return solve(velocity, x, torch.linspace(1, 0, 65), "heun", root.path).x

    key = ("reference", str(root.dir), run_stamp(root.dir), request.run.config.method)
    how = (form.weights, form.head, form.guidance, form.label, form.seed, form.count)
    return name, memoize((*key, *how), compute)


def format_mean(values: torch.Tensor) -> str:
    "Mean and 95 % interval over the samples."
    mean, low, high = mean_interval(values.tolist())
    return f"{mean:.4f}" if len(values) < 2 else f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def format_fd(request: SampleRequest) -> str:
    "What the scores of the run say of this way of sampling: fd and 95 % interval."
    form = request.form
    ways = {key: getattr(form, key) for key in SCORED}
    found = find_fd(request.run, Sampling(**ways, steps=request.steps))
    if not found:
        return "not measured"
    numbers = f"{found['fd']:.4g}"
    if is_finite(found["low"]) and is_finite(found["high"]):
        numbers += f" [{found['low']:.4g}, {found['high']:.4g}]"
    return f"{numbers} @{found['extractor']}, n {found['n']:,}"


def compare_ends(columns: list[Column]) -> list:
    """A row for each column: its fd, how far it ends from its reference and from the first column.
    Distances to different references are not subtracted.
    """
    first = columns[0]
    rows = []
    goals = {}
    distances = {}
    for column in columns:
        row = {
            "": column.letter,
            "sampled": column.name,
            "steps": column.request.steps,
            "NFE": f"{column.trajectory.nfe:g}",
            "solver time": f"{1000 * column.seconds:.0f} ms",
            "fd": format_fd(column.request),
        }
        x = column.trajectory.x
        try:
            name, ends = reference_ends(column.request)
        except ValueError as e:
            row["reference"] = str(e)[:120]
        else:
            goals[column.letter] = ends
            distances[column.letter] = distance = root_mean_square(x - ends)
            row |= {"reference": name, "distance to it": format_mean(distance)}
        if column is not first:
            row[f"from {first.letter}"] = format_mean(root_mean_square(x - first.trajectory.x))
            ours, theirs = goals.get(column.letter), goals.get(first.letter)
            if ours is not None and theirs is not None and torch.equal(ours, theirs):
                gain = distances[first.letter] - distances[column.letter]
                row[f"nearer than {first.letter} by"] = format_mean(gain)
        rows.append(row)
    return rows


def draw_ends(columns: list[Column]):
    "The ends of all columns in the plane; None for pictures."
    run = columns[0].request.run
    if not is_planar(run):
        return None
    ends = {f"{column.letter} {column.name}": column.trajectory.x for column in columns}
    return endpoint_chart(ends, data_points(run.config.data))


def stream_columns(seed, count, *row):
    "Yields (pictures, points, figures, table) as each column is done."
    with as_one_line():
        columns = parse_columns(seed, count, row)
        form = columns[0].request.form
        text = ""
        for column in columns:
            for state in column.sample():
                at = f"{column.letter}, step {state.i} of {column.request.steps}"
                yield text, gr.skip(), figures_html([("column", at)]), ""
            if not is_planar(column.request.run):
                if not text:
                    sheet = make_mosaic(column.request.run.pictures(column.trajectory.x))
                    text = json.dumps(dict(w=sheet.width, h=sheet.height)) + "\n"
                text += column.picture()
                yield text, gr.skip(), gr.skip(), gr.skip()
        figures = figures_html([("the reference", "Heun, 64 steps")])
        yield text, draw_ends(columns), figures, gr.skip()
        table = table_html(compare_ends(columns), CAPTION)
        figures = [("samples", form.count), ("seed", form.seed), ("columns", len(columns))]
        yield text, gr.skip(), figures_html(figures), table


def columns_script(seed, count, *row) -> str:
    "The Python that makes the same columns."
    with as_one_line():
        columns = parse_columns(seed, count, row)
        names = [column.letter.lower() for column in columns]
        made = [f"{name} = {c.request.script()}" for name, c in zip(names, columns)]
        last = f"{names[0]}.x"
        if len(names) > 1:
            last = f"({names[0]}.x - {names[1]}.x).square().mean().sqrt()"
        return "\n".join(["from cudlab.run import Run", "", *made, last])


# The page


def fill_column(name, solver="euler", amount=4) -> tuple:
    """Solver, NFE, grid and head of a column when its run or solver is chosen: what that leaves no
    choice about is set.
    """
    with as_one_line():
        if name in (None, "", NONE):
            return (gr.skip(),) * 4
        run = open_run(name)
        if solver not in solver_names(run):
            solver = keep_solver(run, solver)
        entry = pick_solver(solver, run)
        if fixed := run.sampling_fixed:
            return solver, entry.nfe(fixed["steps"]), fixed["grid"], 1
        if entry.ts:
            return solver, entry.nfe(len(entry.ts) - 1), entry.grid, entry.made_for["head"]
        own = run.sampling_defaults["steps"] if amount == 1 else gr.skip()
        return solver, own, gr.skip(), gr.skip() if run.heads > 1 else 1


def default_columns(run: Run) -> list:
    "The run with its own solver, and with AB2; a one-step student with its teacher."
    own = dict(
        run=run.name,
        solver=run.sampling_defaults["solver"],
        amount=1 if run.sampling_fixed else 4,
        grid=run.sampling_defaults["grid"],
    )
    if not run.sampling_fixed:
        return [own, own | dict(solver="ab2")]
    root = run.reference_run
    return [own, dict(run=root.name, solver="ab2")] if root else [own]


def update_columns(name, wanted: dict = None, columns: list = None) -> list:
    """Seed, samples and the four columns: what was asked for, or what goes with a run; `wanted` are
    fields of the address.
    """
    wanted = wanted or {}
    columns = columns or default_columns(open_run(name))
    runs = [("none", NONE), *run_choices()]
    solvers = countable_solvers()
    updates = [wanted.get("seed2", 0), wanted.get("count2", 16)]
    for k in range(len(LETTERS)):
        column = EMPTY | (columns[k] if k < len(columns) else {})
        if column["run"] not in [run for _, run in runs]:
            column["run"] = NONE
        updates += [
            gr.update(choices=runs, value=column["run"]),
            gr.update(choices=solvers, value=column["solver"]),
            *(column[key] for key in FIELDS[2:]),
        ]
    return updates


def build_column(letter: str) -> list:
    "The controls of one column, in the order of FIELDS."
    with gr.Column(min_width=200, elem_classes="contestant"):
        gr.HTML(heading_html(letter))
        run = gr.Dropdown(
            [("none", NONE)],
            value=NONE,
            label=f"Run {letter}",
            show_label=False,
            elem_id=f"run-{letter.lower()}",
        )
        solver = gr.Dropdown(
            countable_solvers(),
            value="euler",
            label=f"Solver {letter}",
            show_label=False,
            elem_id=f"solver-{letter.lower()}",
        )
        nfe = gr.Number(4, label=f"NFE {letter}", precision=0, minimum=1)
        with gr.Accordion("Grid, weights, head", open=False):
            grid = gr.Dropdown(
                [*GRIDS, NATIVE], value="uniform", label=f"Grid {letter}", filterable=False
            )
            weights = gr.Radio(["ema", "raw"], value="ema", label=f"Weights {letter}")
            head = gr.Number(1, label=f"Head {letter}", precision=0, minimum=1)
    chosen = [run.input, solver.input]
    gr.on(chosen, fill_column, [run, solver, nfe], [solver, nfe, grid, head], **PRIVATE)
    return [run, solver, nfe, grid, weights, head]


def build_result() -> SimpleNamespace:
    "What the columns come to."
    numbers = gr.HTML(elem_id="c-numbers")
    arena = gr.HTML(
        "",
        html_template="<div class='stagehand'></div>",
        js_on_load="new cudlab.Arena(element, props, watch)",
        elem_id="arena",
    )
    plane = gr.Plot(
        label="Where the columns end", show_label=False, elem_id="c-plane", visible=False
    )
    table = gr.HTML(elem_id="c-table")
    with gr.Row(elem_classes="buttons"):
        png = gr.Button("PNG of the columns", size="sm", min_width=150, scale=0)
    with gr.Accordion("The same in Python", open=False):
        code = gr.Code(language="python", show_label=False, interactive=False)
    run_script([png.click], "() => cudlab.arena && cudlab.arena.keep()")
    return SimpleNamespace(shown=[arena, plane, numbers, table], code=code)


def build() -> list:
    "The tab and its wiring; returns the controls that `update_columns` sets."
    with gr.Tab("Compare", id="compare"):
        with gr.Row(equal_height=False, elem_id="contest-form"):
            columns = [build_column(letter) for letter in LETTERS]
        with gr.Row(elem_classes="buttons"):
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, min_width=120, scale=1)
            count = gr.Slider(
                1, LIMITS["count"], value=16, step=1, label="Samples", min_width=180, scale=2
            )
            compare = gr.Button(
                "Compare", variant="primary", elem_id="contest", min_width=110, size="md", scale=1
            )
            stop = gr.Button("Stop", min_width=60, size="md", scale=0)
        result = build_result()
    controls = [seed, count, *sum(columns, [])]
    comparing = compare.click(stream_columns, controls, result.shown, api_name="compare", **SOLVE)
    comparing.then(columns_script, controls, result.code, **PRIVATE)
    cancel_on([stop.click], [comparing])
    remember = f"(...values) => {{ cudlab.columns(values, {len(FIELDS)}); }}"
    run_script([compare.click], remember, controls)
    return controls
