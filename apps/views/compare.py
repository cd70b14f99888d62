"Compare: up to four ways of sampling on the same noise."

import json

import gradio as gr
import torch

from cudlab import plot
from cudlab.distances import mean_interval
from cudlab.multistep import solve
from cudlab.scoring import memoize
from cudlab.trajectory import root_mean_square
from views.ask import (
    NAMES,
    SampleRequest,
    as_one_line,
    data_url,
    figures_html,
    find_entry,
    is_planar,
    keep_solver,
    manifest_stamp,
    open_run,
    parse_form,
    remember_walk,
    solver_names,
    table_html,
    time_states,
    to_trajectory,
)
from views.trajectory import cloud, mosaic, reference

NONE = "none"
COLUMN = ("run", "solver", "amount", "grid", "weights", "head")
LETTERS = "ABCD"


def goal(walk: SampleRequest) -> tuple:
    "(name of the reference, where its flow takes this noise); computed once."
    name, flow = reference(walk)
    ask, root = walk.ask, walk.run.reference_run

    def compute():
        x = next(walk.run.iterate(**walk.choices)).x.cpu()
        with torch.no_grad():
            return solve(flow, x, torch.linspace(1, 0, 65), "heun", root.path).x

    return name, memoize(
        (
            "goal",
            str(root.dir),
            manifest_stamp(root.dir),
            walk.run.config.method,
            ask.weights,
            ask.head,
            ask.guidance,
            ask.label,
            ask.seed,
            ask.count,
        ),
        compute,
    )


def paired(values: torch.Tensor) -> str:
    "Mean and 95 % interval over the samples."
    mean, low, high = mean_interval(values.tolist())
    return f"{mean:.4f}" if len(values) < 2 else f"{mean:.4f} [{low:.4f}, {high:.4f}]"


def columns_of(seed, count, row) -> list:
    "The columns that are in use, as walks: [(letter, walk), ...]."
    found = []
    for k, letter in enumerate(LETTERS):
        values = dict(zip(COLUMN, row[k * len(COLUMN) : (k + 1) * len(COLUMN)]))
        if values.get("run") in (None, "", NONE):
            continue
        form = (
            dict(
                by="NFE",
                seed=seed,
                count=count,
                label="any",
                guidance=1.0,
                lower_order_final="auto",
                denoise=True,
            )
            | values
        )
        try:
            walk = parse_form([form[n] for n in NAMES])
            if why := walk.run.refuses(
                **{k: walk.choices[k] for k in ("solver", "steps", "grid", "denoise", "guidance")}
            ):
                raise ValueError(why)
            found.append((letter, walk))
        except ValueError as e:
            raise ValueError(f"column {letter}: {e}") from None
    if not found:
        raise ValueError("no column has a run; choose one in A")
    first = found[0][1].run
    for letter, walk in found[1:]:
        if walk.run.shape != first.shape:
            raise ValueError(
                f"column {letter}: {walk.run.name} makes samples of "
                f"{' x '.join(map(str, walk.run.shape))}, {first.name} of "
                f"{' x '.join(map(str, first.shape))}; their noise cannot be the same"
            )
    return found


def compared(seed, count, *row):
    "Stream the columns: (their pictures, their points, figures, table) as each is done."
    with as_one_line():
        columns, lines, ends, spent = columns_of(seed, count, row), [], {}, {}
        plane = is_planar(columns[0][1].run)
        text = ""
        for letter, walk in columns:
            states, spent[letter] = [], 0.0
            for state, took in time_states(walk.states()):
                spent[letter] += took
                states.append(state)
                yield (
                    text,
                    gr.skip(),
                    figures_html([("column", f"{letter}, step {state.i} of {walk.steps}")]),
                    "",
                )
            tau = to_trajectory(states, walk.run)
            remember_walk(walk, tau)
            ends[letter] = tau
            if not plane:
                sheet = mosaic(tau.x)
                text = text or json.dumps(dict(w=sheet.width, h=sheet.height)) + "\n"
                text += (
                    json.dumps(
                        dict(
                            letter=letter,
                            name=name_of(walk),
                            words=f"{tau.nfe:g} NFE, {1000 * spent[letter]:.0f} ms",
                            src=data_url(plot.encode_image(sheet), "image/png"),
                        )
                    )
                    + "\n"
                )
                yield text, gr.skip(), gr.skip(), gr.skip()
        figure = (
            plot.endpoint_chart(
                {f"{letter} {name_of(walk)}": ends[letter].x for letter, walk in columns},
                cloud(columns[0][1].run.config.data),
            )
            if plane
            else None
        )
        yield text, figure, figures_html([("the reference", "Heun, 64 steps")]), gr.skip()
        apart = {}
        for letter, walk in columns:
            tau = ends[letter]
            line = {
                "": letter,
                "sampled": name_of(walk),
                "steps": walk.steps,
                "NFE": f"{tau.nfe:g}",
                "solver time": f"{1000 * spent[letter]:.0f} ms",
            }
            try:
                name, x = goal(walk)
                apart[letter] = root_mean_square(tau.x - x)
                line |= {"reference": name, "distance to it": paired(apart[letter])}
            except ValueError as e:
                line |= {"reference": str(e)[:120]}
            first = columns[0][0]
            if letter != first:
                line[f"from {first}"] = paired(root_mean_square(tau.x - ends[first].x))
                if letter in apart and first in apart:
                    line[f"nearer than {first} by"] = paired(apart[first] - apart[letter])
            lines.append(line)
        names = list(dict.fromkeys(k for line in lines for k in line))
        yield (
            text,
            gr.skip(),
            figures_html(
                [
                    ("samples", columns[0][1].ask.count),
                    ("seed", columns[0][1].ask.seed),
                    ("columns", len(columns)),
                ]
            ),
            table_html(
                lines,
                names,
                "root mean square distances, mean over the samples and 95 % interval; the same "
                "noise in every column",
            ),
        )


def name_of(walk: SampleRequest) -> str:
    "A column in words."
    ask = walk.ask
    rest = [
        *([f"grid {ask.grid}"] if ask.grid != "uniform" else []),
        *([ask.weights] if ask.weights != "ema" else []),
        *([f"head {ask.head}"] if ask.head > 1 else []),
    ]
    return ", ".join(
        [ask.run, *([ask.solver] if ask.solver != ask.run else []), f"{ask.amount} NFE", *rest]
    )


def seated(name, solver="euler", amount=4) -> tuple:
    """Solver, NFE, grid and head of a column when its run or solver is chosen: what that leaves no
    choice about is set.
    """
    with as_one_line():
        if name in (None, "", NONE):
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        run = open_run(name)
        solver = (
            solver if solver in solver_names(run) else keep_solver(run, solver_names(run), solver)
        )
        made = find_entry(solver, run)
        if run.sampling_fixed:
            return solver, made.nfe(run.sampling_fixed["steps"]), run.sampling_fixed["grid"], 1
        if made.ts:
            return solver, made.nfe(len(made.ts) - 1), made.grid, made.made_for["head"]
        return (
            solver,
            run.sampling_defaults["steps"] if amount == 1 else gr.skip(),
            gr.skip(),
            gr.skip() if run.heads > 1 else 1,
        )


def script(seed, count, *row) -> str:
    "The Python that makes the same columns."
    with as_one_line():
        made = {letter.lower(): walk.script() for letter, walk in columns_of(seed, count, row)}
        a, b = [*made, *made][:2]
        return "\n".join(
            [
                "from cudlab.run import Run",
                "",
                *(f"{k} = {v}" for k, v in made.items()),
                f"({a}.x - {b}.x).square().mean().sqrt()" if len(made) > 1 else f"{a}.x",
            ]
        )
