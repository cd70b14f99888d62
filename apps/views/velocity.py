"Velocity: what every move of a walk does, as numbers."

from dataclasses import replace
from types import SimpleNamespace

import gradio as gr
from markup import details_html, heading_html, table_html
from request import SampleRequest

from cudlab import trajectory as measures
from cudlab.solver import Trajectory


def to_network_device(request: SampleRequest, trajectory: Trajectory) -> Trajectory:
    "The trajectory on the device of the network that made it."
    network = request.run.network_run.net(request.form.weights)
    where = next(network.parameters()).device
    moved = {name: getattr(trajectory, name).to(where) for name in ("ts", "xs", "vs")}
    return replace(trajectory, **moved)


def measure_moves(request: SampleRequest, trajectory: Trajectory) -> dict:
    "Every quantity of the view: title -> (moves, samples), or (heads, moves, samples)."
    tau = to_network_device(request, trajectory)
    found = {"speed (|v| / √d)": measures.move_speed(tau)}
    if len(tau.vs) > 1:
        found |= {
            "turning (cosine with the next v)": measures.move_turning(tau),
            "angle to the chord (degrees)": measures.chord_angle(tau),
            "curvature (rad / rms distance)": measures.move_curvature(tau),
        }
    if not request.run.sampling_fixed:
        found["catch-up gap (rms)"] = measures.catch_up_gap(tau, request.velocity())
    if request.run.heads > 1:
        network = request.run.network_run.net(request.form.weights)
        y = request.labels()
        y = None if y is None else y.to(tau.xs.device)
        found["heads, distance from the first (rms)"] = measures.head_gaps(tau, network, y)
    return found


def list_moves(trajectory: Trajectory, quantities: dict) -> list:
    "One row a move: its times, and the median over the samples of every quantity."
    ts = [round(t, 4) for t in trajectory.ts.tolist()]
    rows = [dict(move=i, t=t, to=s) for i, (t, s) in enumerate(zip(ts, ts[1:]), 1)]
    for title, values in quantities.items():
        name = title.partition(" (")[0]
        columns = {name: values}
        if values.dim() == 3:
            columns = {f"{name}, head {k}": v for k, v in enumerate(values, 1)}
        for column, by_move in columns.items():
            for row, median in zip(rows, by_move.nanmedian(1).values.tolist()):
                row[column] = median
    return rows


def moves_table(trajectory: Trajectory, quantities: dict) -> str:
    "The rows of `list_moves` as HTML."
    rows = list_moves(trajectory, quantities)
    caption = "medians over the samples, one row a move"
    return details_html("the same as a table", table_html(rows, caption))


def errors_button(hint: str, **names) -> tuple:
    "The button that measures errors, and what is known of them; they stand in two views."
    with gr.Row(elem_classes="buttons measuring"):
        button = gr.Button(
            "Measure errors", size="md", min_width=150, scale=0, elem_id=names.get("button")
        )
        words = gr.HTML(hint, elem_id=names.get("words"))
    return button, words


def build(hint: str) -> SimpleNamespace:
    "The tab."
    with gr.Tab("Velocity", id="velocity"):
        panels = gr.Plot(label="Every quantity of each move", show_label=False, elem_id="panels")
        check, checked = errors_button(hint)
        moves = gr.HTML(elem_id="moved")
        gr.HTML(heading_html("schedule"))
        schedule = gr.Plot(label="Schedule", show_label=False, elem_id="schedule")
    return SimpleNamespace(
        panels=panels, check=check, checked=checked, moves=moves, schedule=schedule
    )
