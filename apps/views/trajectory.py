"Trajectory: one walk, seen picture by picture; its stream fills the Velocity view too."

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from types import SimpleNamespace

import gradio as gr
import torch
from markup import bold, caption_html, details_html, figures_html, heading_html, table_html
from offer import is_planar, open_run
from request import Clock, SampleRequest, as_one_line, parse_form

from cudlab import trajectory as measures
from cudlab.data import load_data
from cudlab.motion import FRAMES_SCRIPT, motion_chart
from cudlab.moves import moves_chart, schedule_chart
from cudlab.plane import path_chart, plane_chart
from cudlab.solver import Trajectory
from views import PRIVATE, QUICK, SOLVE, cancel_on, run_script
from views.film import REACH, Film, film_text, spread_indices, start_film
from views.velocity import errors_button, measure_moves, moves_table, to_network_device

EVERY = 0.1  # seconds between two updates of a page
ARROWS = 17  # of the velocity field along each axis
HINT = caption_html("Against the flow's own way (Heun, 64 steps) and move by move.")
# what a sampling fills, in this order
SHOWN = (
    "film", "plane", "paths", "ends", "panels", "schedule", "numbers", "moves", "code", "checked"
)  # fmt: skip


def show(**updates) -> tuple:
    "Some of SHOWN, the others left as they are."
    return tuple(updates.get(name, gr.skip()) for name in SHOWN)


@lru_cache(4)
def data_points(name: str) -> torch.Tensor:
    "Points of a 2-D data set to lay behind the paths, (M, 2)."
    return load_data(name).batch(0, 0, 600)[0]


# The stream of a sampling


def describe_progress(state, steps: int, spent: float) -> str:
    "The line of figures over a walk that is under way."
    return figures_html(
        [
            ("step", f"{state.i} of {steps}"),
            ("NFE so far", f"{state.nfe:g}"),
            ("time", f"{1000 * spent:.0f} ms"),
        ]
    )


def summary_html(request: SampleRequest, tau: Trajectory, timings: list) -> str:
    "The line of figures over a finished walk; timings are figures too."
    figures = [("steps", len(tau.vs)), ("NFE counted", f"{tau.nfe:g}"), *timings]
    if len(tau.vs) > 1 and request.solver.order:
        figures.append(("deviation from straight", f"{float(tau.straightness.mean()):.3g}"))
    if lost := int((~tau.x.flatten(1).isfinite().all(1)).sum()):
        figures.append(("not finite", f"{lost} of {request.form.count}"))
    return figures_html(figures)


def request_script(request: SampleRequest) -> str:
    "The Python that makes the same picture."
    lines = [
        "from cudlab.run import Run",
        "",
        f"trajectory = {request.script()}",
        "trajectory.x, trajectory.nfe, trajectory.straightness.mean()",
    ]
    return "\n".join(lines)


def draw_plane(request: SampleRequest, states: list):
    "The points of a 2-D walk that is under way; None for pictures."
    if not is_planar(request.run):
        return None
    xs = torch.stack([state.x for state in states])
    return plane_chart(xs, data_points(request.run.config.data), reach=REACH)


def draw_motion(request: SampleRequest, tau: Trajectory):
    "The points of a finished 2-D walk in motion over the velocity field; None for pictures."
    if not is_planar(request.run):
        return None
    keep = spread_indices(len(tau.ts))
    at = arrows = None
    if not request.run.sampling_fixed:
        ts = to_network_device(request, tau).ts[keep]
        at, arrows = measures.velocity_field(request.velocity(), ts, REACH, ARROWS)
    points = data_points(request.run.config.data)
    return motion_chart(tau.xs[keep], tau.ts[keep], points, arrows, at, reach=REACH)


def render_all(request, tau: Trajectory, film: Film | None, panels: dict, **texts) -> tuple:
    "Everything the page shows of a finished walk."
    paths, ends = draw_paths(request, tau)
    return show(
        film=film_text(film),
        plane=draw_motion(request, tau),
        paths=paths,
        ends=ends,
        panels=moves_chart(panels, tau.ts),
        schedule=schedule_chart(tau.ts, 300),
        moves=moves_table(tau, panels),
        code=request_script(request),
        **texts,
    )


def stream_sample(*values):
    "Samples, and yields SHOWN as it comes to be."
    with as_one_line():
        request = parse_form(values)
        film = start_film(request)
        states = []
        spent = drawing = 0.0
        began = last = time.perf_counter()
        for state, took in request.timed_states():
            spent += took
            states.append(state)
            if film:
                film.follow(states)
            now = time.perf_counter()
            is_due = now - last >= EVERY and drawing <= spent
            if is_due or took > EVERY or len(states) == 1:
                last = now
                numbers = describe_progress(state, request.steps, spent)
                plane = draw_plane(request, states)
                drawing += time.perf_counter() - now
                yield show(film=film_text(film), plane=plane, numbers=numbers, checked=HINT)
        tau = request.remember(states)
        after = time.perf_counter() - began
        timings = [
            ("solver time", f"{1000 * spent:.0f} ms"),
            ("shown after", f"{1000 * after:.0f} ms"),
        ]
        texts = dict(numbers=summary_html(request, tau, timings), checked=HINT)
        yield show(film=film_text(film), code=request_script(request), **texts)
        yield render_all(request, tau, film, measure_moves(request, tau), **texts)


# Paths of chosen samples


def parse_samples(chosen, count: int) -> list:
    "The indices a person means by `all`, or by numbers as 1, 3, 4."
    words = str(chosen or "all").replace(",", " ").split()
    if words == ["all"]:
        return list(range(count))
    for word in words:
        if not word.isdecimal() or not 1 <= int(word[:9]) <= count:
            raise ValueError(
                f"sample = {word[:40]!r} is not one of 1 to {count}; write all, or numbers as "
                "1, 3, 4"
            )
    return sorted({int(word) - 1 for word in words})


def draw_paths(request: SampleRequest, tau: Trajectory, chosen="all", dimensions="2-D") -> tuple:
    """The paths of the chosen samples in the plane, or the space, of their principal components,
    and their ends as a table.
    """
    if dimensions not in ("2-D", "3-D"):
        raise ValueError(f"dimensions = {str(dimensions)[:40]!r} are not possible; 2-D or 3-D is")
    if is_planar(request.run):
        return None, ""
    size = int(dimensions[0])
    index = parse_samples(chosen, request.form.count)
    axes = measures.fit_projection(tau.xs[:, index], size)
    rows = []
    for b, sample in enumerate(index):
        row = {"sample": sample + 1}
        for name, points in (("start", axes.points[0]), ("end", axes.points[-1])):
            row |= {f"{name} {k + 1}": float(points[b, k]) for k in range(size)}
        rows.append(row)
    caption = "where each path starts and ends, along the principal components"
    table = details_html("the same as a table", table_html(rows, caption))
    return path_chart(axes.points, axes.share), table


def redraw_paths(chosen, dimensions, *values) -> tuple:
    "The paths again, for other samples or dimensions."
    with as_one_line():
        request = parse_form(values)
        return draw_paths(request, request.solve(), chosen, dimensions)


# Errors: against the flow's own way, and move by move


def reference_velocity(request: SampleRequest) -> tuple[str, Callable]:
    "(name, velocity) of the run whose flow the states are held against."
    run = request.run
    form = request.form
    root = run.reference_run
    if root is None:
        raise ValueError(
            f"{run.name} has nothing to be held against: its own network is no flow, and its "
            "teacher is not here (any more)"
        )
    if root.dir == run.network_run.dir:
        choices = dict(weights=form.weights, head=form.head, guidance=form.guidance)
    else:
        choices = run.teacher_sampling(form.guidance)
    y = request.choices["y"] if root.config.classes else None
    labels = None if y is None else root.labels(y, form.count)
    velocity = root.velocity(y=labels, **choices)
    where = next(root.net(choices.get("weights", "ema")).parameters()).device
    return root.name, lambda x, t: velocity(x.to(where), t.to(where)).to(x.device)


@dataclass
class Errors:
    "How far a walk is off the flow, and what each of its moves adds to that."

    request: SampleRequest
    gaps: list = field(default_factory=list)  # state - reference, (B, *S) for each state
    local: list = field(default_factory=list)  # error of a move, (B, *S) for each move
    sizes: list = field(default_factory=list)  # its rms, (B,)
    accuracy: list = field(default_factory=list)  # how well that is known

    def measure(self, tau: Trajectory, velocity: Callable):
        "Measures, and yields a line after each piece."
        clock = Clock()
        steps = self.request.steps
        for i, reference in measures.reference_states(velocity, tau.xs[0], tau.ts, path=tau.path):
            clock.check()
            self.gaps.append(tau.xs[i] - reference)
            yield f"the reference: step {i} of {steps}"
        if self.request.run.sampling_fixed:
            return
        for _, error, rms, accuracy in measures.local_error(tau, self.request.velocity()):
            clock.check()
            self.local.append(error)
            self.sizes.append(rms)
            self.accuracy.append(float(accuracy.max()))
            yield f"the local error: move {len(self.local)} of {steps}"

    @property
    def distances(self) -> torch.Tensor:
        "Distance from the reference, (states, B)."
        return measures.root_mean_square(torch.stack(self.gaps), 2)

    def panels(self) -> dict:
        "The panels that the Velocity view shows besides."
        found = {"error against the reference (rms)": self.distances[1:]}
        if self.sizes:
            found["local error (rms)"] = torch.stack(self.sizes)
        return found

    def describe(self, reference: str) -> str:
        "In words, with the name of the run that is the reference."
        end = float(self.distances[-1].mean())
        text = (
            f"Held against the flow of {bold(reference)} (Heun, at least 64 steps): the samples "
            f"end {bold(f'{end:.3g}')} away (rms, mean of {self.request.form.count})."
        )
        if self.sizes:
            text += (
                " Local error of a move: its state against the flow from where it left "
                f"(Runge-Kutta 4, step doubling, known to {max(self.accuracy):.1g})."
            )
        return caption_html(text, status=True)


def stream_errors(*values):
    """Measures a walk move by move: what `stream_sample` yields, with the film's last two layers,
    two panels more and in words how far it went astray.
    """
    with as_one_line():
        request = parse_form(values)
        if request.solver.order is None:
            raise ValueError(
                f"{request.form.solver} follows no ODE: there is no flow to hold its states "
                "against; choose another solver"
            )
        tau = request.solve()
        film = start_film(request)
        if film:
            film.replay(tau)
        name, velocity = reference_velocity(request)
        moved = to_network_device(request, tau)
        errors = Errors(request)
        for line in errors.measure(moved, velocity):
            yield show(checked=caption_html(line, status=True))
        if film:
            film.reach = {}
            film.add_signed("gap", errors.gaps, tau.ts, 0)
            film.add_signed("error", errors.local, tau.ts, 1)
        panels = measure_moves(request, tau) | errors.panels()
        texts = dict(numbers=summary_html(request, tau, []), checked=errors.describe(name))
        yield render_all(request, tau, film, panels, **texts)


# The page


def update_visible(name) -> tuple:
    "Film and paths for pictures, points in motion for points of the plane."
    with as_one_line():
        plane = is_planar(open_run(name))
        return gr.update(visible=plane), gr.update(visible=not plane), gr.update(visible=not plane)


def greet(*values):
    "The first picture of a page, if there is anything to show."
    if values[0]:
        yield from stream_sample(*values)
    else:
        yield show()


def build() -> SimpleNamespace:
    "The tab."
    with gr.Tab("Trajectory", id="trajectory"):
        numbers = gr.HTML(elem_id="numbers")
        film = gr.HTML(
            "",
            html_template="<div class='stagehand'></div>",
            js_on_load="new cudlab.Reel(element, props, watch)",
            elem_id="film",
        )
        plane = gr.Plot(label="Points in motion", show_label=False, visible=False, elem_id="motion")
        check, checked = errors_button(HINT, button="errors", words="checked")
        with gr.Column() as box:
            gr.HTML(heading_html("paths in the plane of their principal components"))
            with gr.Row(equal_height=False):
                chosen = gr.Textbox(
                    "all",
                    label="Samples drawn",
                    info="all, or numbers as 1, 3, 4",
                    max_length=200,
                    min_width=160,
                    elem_id="chosen",
                )
                dimensions = gr.Radio(
                    ["2-D", "3-D"], value="2-D", label="Dimensions", min_width=140
                )
            paths = gr.Plot(label="Paths", show_label=False, elem_id="paths")
            ends = gr.HTML(elem_id="path-ends")
    outputs = dict(film=film, plane=plane, paths=paths, ends=ends, numbers=numbers)
    inputs = dict(check=check, checked=checked, box=box, chosen=chosen, dimensions=dimensions)
    return SimpleNamespace(**outputs, **inputs)


def wire(form, inputs: list, tab, velocity, code: gr.Code, asks) -> SimpleNamespace:
    """Fills this tab, the Velocity tab and the code. `asks` are the events after which a page wants
    another picture: load (of the page), fit (to another run) and reseed.
    """
    fitted = [tab.plane, tab.film, tab.box]
    filled = vars(velocity) | vars(tab) | dict(code=code)
    outputs = [filled[name] for name in SHOWN]
    sample = dict(fn=stream_sample, inputs=inputs, outputs=outputs, **SOLVE)
    private = sample | dict(api_visibility="private")
    first = asks.load.success(**private | dict(fn=greet))
    pressed = form.sample.click(**sample, api_name="sample")
    reseeded = asks.reseed.success(**private)
    refitted = asks.fit.success(update_visible, form.run, fitted, **PRIVATE).success(**private)
    checking = gr.on(
        [tab.check.click, velocity.check.click],
        stream_errors,
        inputs,
        outputs,
        api_name="errors",
        **SOLVE,
    )
    cancel_on([form.stop.click], [first, pressed, reseeded, refitted, checking])
    tab.checked.change(lambda words: words, tab.checked, velocity.checked, **PRIVATE)
    gr.on(
        [tab.chosen.submit, tab.dimensions.input],
        redraw_paths,
        [tab.chosen, tab.dimensions, *inputs],
        [tab.paths, tab.ends],
        api_name="paths",
        **QUICK,
    )
    run_script([tab.plane.change], FRAMES_SCRIPT, [tab.plane])
