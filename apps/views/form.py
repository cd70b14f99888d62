"The form beside the views: which run to sample, and how."

import os
from types import SimpleNamespace

import gradio as gr
from markup import bold, escape
from offer import (
    class_choices,
    default_run,
    is_planar,
    keep_solver,
    open_run,
    pick_solver,
    run_choices,
    solver_choices,
    solver_names,
)
from request import ANY, LIMITS, LOWER_ORDER, SampleForm, as_one_line, count_steps, error_line

from cudlab.config import get_settings
from cudlab.dode import NATIVE
from cudlab.path import GRIDS
from cudlab.run import Run
from cudlab.solver import SOLVERS, Solver
from views import ASIDE, QUICK

# the controls that a learned solver or the run itself may decide
LOCKABLE = ("by", "amount", "grid", "weights", "lower_order_final", "denoise", "head", "guidance")
# what follows from the choice of a run, in the order of `on_run`
FITTED = ("line", "label", "count", "solver", *LOCKABLE)


def describe_cost(solver, by, amount, denoise=True, run="", label=ANY, guidance=1.0) -> str:
    "The lines under the amount: steps and NFE, always both, and what kind of solver this is."
    try:
        form = SampleForm(
            solver=solver, by=by, amount=amount, denoise=denoise, label=label, guidance=guidance
        )
        sampled = open_run(run) if run else None
        entry = pick_solver(form.solver, sampled)
        steps = count_steps(form, entry, sampled)
    except ValueError as e:
        return f"<p class='cost bad' role='status'>{error_line(e)}</p>"
    nfe = "NFE as needed"
    if entry.nfe:
        nfe = f"{entry.nfe(steps, form.denoise) * (2 if form.is_guided(sampled) else 1)} NFE"
    order = f"order {entry.order:g}" if entry.order else "no order: it follows no ODE"
    kind = f"native grid {entry.grid}"
    if entry.ts:
        kind = f"fitted for {len(entry.ts) - 1} steps on the {entry.grid} grid"
    return (
        f"<p class='cost' role='status'>{bold(steps)} {'step' if steps == 1 else 'steps'} "
        f"<i>=</i> {bold(nfe)} <span>{order}, {kind}</span> "
        f"<span>{escape(entry.source)}</span></p>"
    )


def locked_values(solver: Solver, run: Run) -> dict:
    "The controls that leave no choice, and their values."
    locked = {}
    if run.heads == 1:
        locked["head"] = 1
    if len(run.weights) == 1:  # a run that was cut to what samples need
        locked["weights"] = run.weights[0]
    if not class_choices(run):
        locked["guidance"] = 1
    if not run.sampling_fixed and not solver.ts:
        return locked
    locked |= dict(by="steps", lower_order_final="auto", denoise=True)
    if run.sampling_fixed:
        names = {"steps": "amount", "grid": "grid", "guidance": "guidance"}
        fixed = run.sampling_fixed
        return locked | {names[key]: value for key, value in fixed.items() if key in names}
    return locked | dict(
        weights="ema",
        amount=len(solver.ts) - 1,
        grid=solver.grid,
        head=solver.made_for["head"],
        guidance=solver.made_for["guidance"],
    )


def update_locked(solver: Solver, run: Run, amount=None, wanted: dict = None) -> list:
    """Updates of the LOCKABLE controls: what is decided is set and locked, what is wanted is set;
    a lone step left over from a one-step run grows.
    """
    locked = locked_values(solver, run)
    values = dict(wanted or {})
    if amount == 1 and "amount" not in locked:
        values.setdefault("amount", run.sampling_defaults["steps"])
    if run.method.guidance_range:  # an input of the network, whose range may not hold 1
        values.setdefault("guidance", run.sampling_defaults["guidance"])
    values |= locked
    has_guidance = bool(class_choices(run)) and "guidance" not in run.sampling_fixed
    more = {"head": dict(maximum=max(run.heads, 2)), "guidance": dict(visible=has_guidance)}
    updates = []
    for key in LOCKABLE:
        value = {"value": values[key]} if key in values else {}
        updates.append(gr.update(interactive=key not in locked, **value, **more.get(key, {})))
    return updates


def on_solver(name, solver, amount=None) -> tuple:
    "What choosing a solver does to the LOCKABLE controls."
    with as_one_line():
        run = open_run(name)
        return tuple(update_locked(pick_solver(SampleForm(solver=solver).solver, run), run, amount))


def describe_open_run(run: Run) -> str:
    "A line about the chosen run."
    done = f"{run.step:,} training steps"
    if run.method.trains == "solver":
        done = f"a solver for the network of {bold(run.info['teacher']['name'])}"
    shape = " × ".join(map(str, run.shape))
    heads = f", {run.heads} heads" if run.heads > 1 else ""
    calls = ", one call a sample" if run.sampling_fixed else ""
    return (
        f"<p class='about'>{bold(run.config.method)} on {bold(run.config.data)}, {done}, "
        f"samples of {shape}{heads}{calls}</p>"
    )


def on_run(name, solver="", amount=None, wanted: dict = None) -> tuple:
    "What choosing a run does to the FITTED controls; `wanted` are fields of the form."
    with as_one_line():
        run = open_run(name)
        wanted = wanted or {}
        names = solver_names(run)
        labels = class_choices(run)
        chosen = wanted.get("solver")
        if chosen not in names:
            chosen = keep_solver(run, solver)
        return (
            describe_open_run(run),
            gr.update(choices=[ANY, *labels], value=wanted.get("label", ANY), visible=bool(labels)),
            gr.update(value=wanted.get("count", 64 if is_planar(run) else 8)),
            gr.update(choices=solver_choices(names), value=chosen),
            *update_locked(pick_solver(chosen, run), run, amount, wanted),
        )


def draw_seed() -> int:
    "A new seed."
    return int.from_bytes(os.urandom(4), "big") % 1_000_000


# The page


def build_amount() -> SimpleNamespace:
    "How many steps or calls, and what they cost."
    with gr.Group():
        by = gr.Radio(
            ["steps", "NFE"],
            value="steps",
            label="Count in",
            info="steps are moves; NFE are network calls per sample",
        )
        amount = gr.Slider(1, 64, value=8, step=1, label="How many", elem_id="amount")
    price = gr.HTML(describe_cost("euler", "steps", 8))
    return SimpleNamespace(by=by, amount=amount, price=price)


def build_details() -> SimpleNamespace:
    "What is rarely changed: the network's weights and head, and the last moves."
    with gr.Accordion("Network and last moves", open=False):
        weights = gr.Radio([("average (EMA)", "ema"), ("raw", "raw")], value="ema", label="Weights")
        head = gr.Slider(1, 2, value=1, step=1, label="Head")
        lower_order_final = gr.Radio(
            list(LOWER_ORDER),
            value="auto",
            label="Lower order in the last moves",
            info="auto is as the solver's authors do",
        )
        denoise = gr.Checkbox(
            True,
            label="Last move to t = 0",
            info="off ends at the smallest noise level; NFE may change",
        )
    return SimpleNamespace(
        weights=weights, head=head, lower_order_final=lower_order_final, denoise=denoise
    )


def build_buttons() -> SimpleNamespace:
    "Sample, draw a new seed, stop."
    with gr.Row(elem_classes="buttons"):
        sample = gr.Button(
            "Sample", variant="primary", elem_id="sample", scale=2, min_width=90, size="md"
        )
        reseed = gr.Button("New seed", elem_id="reseed", min_width=90, size="md")
        stop = gr.Button("Stop", elem_id="stop", min_width=60, size="md")
    return SimpleNamespace(sample=sample, reseed=reseed, stop=stop)


def build() -> SimpleNamespace:
    "The column with the form; its `fit` is the event after which another run is shown."
    with gr.Column(elem_id="side", **ASIDE):
        run = gr.Dropdown(run_choices(), value=default_run(), label="Run", elem_id="run")
        line = gr.HTML(elem_id="line")
        with gr.Column(elem_id="form"):
            solver = gr.Dropdown(
                solver_choices(SOLVERS), value="euler", label="Solver", elem_id="solver"
            )
            amount = build_amount()
            grid = gr.Dropdown(
                [*GRIDS, NATIVE], value="uniform", label="Grid", filterable=False, elem_id="grid"
            )
            seed = gr.Number(get_settings().seed, label="Seed", precision=0, minimum=0)
            count = gr.Slider(1, LIMITS["count"], value=8, step=1, label="Samples")
            label = gr.Dropdown([ANY], value=ANY, label="Class", visible=False)
            guidance = gr.Slider(
                0, 8, value=1.0, step=0.1, label="Guidance", info="1 is none", visible=False
            )
            details = build_details()
            buttons = build_buttons()
    main = dict(run=run, line=line, solver=solver, grid=grid, seed=seed, count=count, label=label)
    return SimpleNamespace(
        **main, guidance=guidance, **vars(amount), **vars(details), **vars(buttons)
    )


def wire(form: SimpleNamespace, opened) -> SimpleNamespace:
    """What the form does by itself; `opened` is the event after which the list has chosen a run.
    Returns the events that ask for a new picture.
    """
    run_solver_amount = [form.run, form.solver, form.amount]
    form.solver.input(
        on_solver,
        run_solver_amount,
        [getattr(form, name) for name in LOCKABLE],
        api_name="decide",
        **QUICK,
    )
    price = [form.solver, form.by, form.amount, form.denoise, form.run, form.label, form.guidance]
    gr.on(
        [c.change for c in price if c is not form.run],
        describe_cost,
        price,
        form.price,
        api_name="cost",
        **QUICK,
    )
    fit = gr.on(
        [form.run.input, opened],
        on_run,
        run_solver_amount,
        [getattr(form, name) for name in FITTED],
        api_name="fit",
        **QUICK,
    )
    reseed = form.reseed.click(draw_seed, None, form.seed, api_name="seed", **QUICK)
    return SimpleNamespace(fit=fit, reseed=reseed)
