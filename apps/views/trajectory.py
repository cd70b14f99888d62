"Trajectory and Velocity: one walk, seen picture by picture and number by number."

import hashlib
import io
import json
import time
from dataclasses import dataclass, field, replace
from functools import lru_cache

import gradio as gr
import numpy as np
import torch
from PIL import Image, ImageDraw

from cudlab import plot
from cudlab import trajectory as of
from cudlab.data import load_data
from cudlab.solver import SolverState
from views.ask import (
    MOST,
    Clock,
    SampleRequest,
    as_one_line,
    csv_url,
    data_url,
    details_html,
    figures_html,
    find_entry,
    is_planar,
    manifest_stamp,
    parse_form,
    remember_walk,
    solve_request,
    table_html,
    time_states,
    to_trajectory,
)

EVERY = 0.1
HINT = "<p class='caption'>Against the flow's own way (Heun, 64 steps) and move by move.</p>"
SHARP = 2_000_000
FIELD = 17


@lru_cache(4)
def cloud(name: str):
    "Points of a 2-D data set to lay behind the paths, (M, 2)."
    return load_data(name).batch(0, 0, 600)[0]


# The film: a text of JSON lines that only ever grows, so that each update sends what is new


def stacked(x: torch.Tensor, reach: float = None, quality: int = 0) -> str:
    """Samples (B, C, H, W), one below the other, as a data address; signed ones in colour where
    `reach` is their full scale.
    """
    body = plot.signed_pixels(x, reach) if reach else plot.to_pixels(x)
    image = Image.fromarray(
        body.reshape(-1, *body.shape[2:]).squeeze(-1)
        if body.shape[-1] == 1
        else body.reshape(-1, *body.shape[2:])
    )
    return data_url(plot.encode_image(image, quality), f"image/{'webp' if quality else 'png'}")


@dataclass
class Film:
    """The pictures of a walk as they are sent: a header, then one line for each layer of each step
    that is shown.
    """

    walk: SampleRequest
    reach: dict = field(default_factory=lambda: dict(v=2.0))
    text: str = ""

    def __post_init__(self):
        (channels, height, width), ask, steps = self.walk.run.shape, self.walk.ask, self.walk.steps
        every = max(1, -(-(steps + 1) // MOST["columns"]))
        self.shown = {i for i in range(steps + 1) if i % every == 0 or i == steps}
        self.quality = (
            86 if channels * height * width * ask.count * len(self.shown) * 3 > SHARP else 0
        )
        name = hashlib.sha256(repr((ask, manifest_stamp(self.walk.run.dir))).encode()).hexdigest()[
            :12
        ]
        self.write(
            id=name, count=ask.count, steps=steps, c=channels, h=height, w=width, reach=self.reach
        )

    def write(self, **line):
        self.text += json.dumps(line) + "\n"

    def add(self, layer: str, i: int, t: float, x: torch.Tensor, reach: float = None):
        """One layer of step i: states x, estimates hat, velocities v, off the reference gap, local
        error.
        """
        if i in self.shown:
            self.write(
                k=layer, i=i, t=round(float(t), 6), src=stacked(x.cpu(), reach, self.quality)
            )

    def start(self, state):
        self.add("x", state.i, state.t, state.x)

    def move(self, left, state):
        "What a move adds: velocity and estimate where it left, the state where it came to."
        if left.i in self.shown:
            self.add(
                "hat",
                left.i,
                left.t,
                self.walk.run.path.x0(
                    left.x, state.v, torch.full((len(left.x),), float(left.t), device=left.x.device)
                ),
            )
            self.add("v", left.i, left.t, state.v, self.reach["v"])
        self.start(state)
        if state.i == self.walk.steps and not state.t:
            self.add("hat", state.i, state.t, state.x)

    def replay(self, tau):
        "All of a finished walk, in the order in which it was sent the first time."
        states = [
            SolverState(i, float(t), x, tau.vs[i - 1] if i else None, 0.0)
            for i, (t, x) in enumerate(zip(tau.ts, tau.xs))
        ]
        self.start(states[0])
        for left, right in zip(states, states[1:]):
            self.move(left, right)
        return self


# Numbers of a walk


def at_home(walk: SampleRequest, tau):
    "The trajectory on the device of the network that made it."
    where = next(walk.run.network_run.net(walk.ask.weights).parameters()).device
    return replace(tau, ts=tau.ts.to(where), xs=tau.xs.to(where), vs=tau.vs.to(where))


def panels(walk: SampleRequest, tau, **extra) -> dict:
    "Every quantity of the Velocity view: title -> (moves, samples)."
    tau = at_home(walk, tau)
    found = {"speed (|v| / √d)": of.move_speed(tau)}
    if len(tau.vs) > 1:
        found |= {
            "turning (cosine with the next v)": of.move_turning(tau),
            "angle to the chord (degrees)": of.chord_angle(tau),
            "curvature (rad / rms distance)": of.move_curvature(tau),
        }
    if not walk.run.sampling_fixed:
        found |= {"catch-up gap (rms)": of.catch_up_gap(tau, walk.flow())}
    if walk.run.heads > 1:
        y = walk.choices["y"]
        network = walk.run.network_run.net(walk.ask.weights)
        found |= {
            "heads, distance from the first (rms)": of.head_gaps(
                tau,
                network,
                None if y is None else walk.run.labels(y, walk.ask.count).to(tau.xs.device),
            )
        }
    return found | extra


def moved(tau, found: dict) -> list:
    "One row a move: its times, and the median over the samples of every quantity."
    rows = [
        dict(move=i + 1, t=round(float(a), 4), to=round(float(b), 4))
        for i, (a, b) in enumerate(zip(tau.ts[:-1], tau.ts[1:]))
    ]
    for title, values in found.items():
        title = title.partition(" (")[0]
        lines = (
            {title: values}
            if values.dim() == 2
            else {f"{title}, head {k}": v for k, v in enumerate(values, 1)}
        )
        for name, line in lines.items():
            for row, value in zip(rows, line.nanmedian(1).values.tolist()):
                row[name] = value
    return rows


def tabled(rows: list) -> str:
    "The rows of `moved` as a page."
    return details_html(
        "the same as a table",
        table_html(rows, list(rows[0]), "medians over the samples, one row a move"),
    )


def script(walk: SampleRequest) -> str:
    "The Python that makes the same picture."
    return (
        f"from cudlab.run import Run\n\ntrajectory = {walk.script()}\ntrajectory.x, "
        "trajectory.nfe, trajectory.straightness.mean()"
    )


def told(walk: SampleRequest, tau, spent: float, after: float) -> str:
    "The line of figures over a finished walk."
    lost, many = int((~tau.x.flatten(1).isfinite().all(1)).sum()), len(tau.vs) > 1
    return figures_html(
        [
            ("steps", len(tau.vs)),
            ("NFE counted", f"{tau.nfe:g}"),
            *(
                [
                    ("solver time", f"{1000 * spent:.0f} ms"),
                    ("shown after", f"{1000 * after:.0f} ms"),
                ]
                if spent is not None
                else []
            ),
            *(
                [("deviation from straight", f"{float(tau.straightness.mean()):.3g}")]
                if many and find_entry(walk.ask.solver, walk.run).order
                else []
            ),
            *([("not finite", f"{lost} of {walk.ask.count}")] if lost else []),
        ]
    )


def projected(walk: SampleRequest, tau, chosen="all", dims="2-D"):
    """The paths of the chosen samples in the plane, or the space, of their principal components,
    and their ends as a table.
    """
    if dims not in ("2-D", "3-D"):
        raise ValueError(f"dimensions = {str(dims)[:40]!r} are not possible; 2-D or 3-D is")
    if is_planar(walk.run):
        return None, ""
    words = str(chosen or "all").replace(",", " ").split()
    if words == ["all"]:
        index = list(range(walk.ask.count))
    else:
        for word in words:
            if not word.isdecimal() or not 1 <= int(word[:9]) <= walk.ask.count:
                raise ValueError(
                    f"sample = {word[:40]!r} is not one of 1 to {walk.ask.count}; write all, or "
                    "numbers as 1, 3, 4"
                )
        index = sorted({int(word) - 1 for word in words})
    seen = of.fit_projection(tau.xs[:, index], int(dims[0]))
    rows = [
        dict(
            sample=index[b] + 1,
            **{
                f"{name} {k + 1}": float(at[b, k])
                for name, at in (("start", seen.points[0]), ("end", seen.points[-1]))
                for k in range(int(dims[0]))
            },
        )
        for b in range(len(index))
    ]
    return plot.path_chart(seen.points, seen.share), details_html(
        "the same as a table",
        table_html(
            rows, list(rows[0]), "where each path starts and ends, along the principal components"
        ),
    )


def sampled(*form):
    """Stream a sampling: (film, plane, paths, their table, panels, schedule, numbers, table of
    moves, script, what is known of the errors) as they come to be.
    """
    with as_one_line():
        walk = parse_form(form)
        start = shown = time.perf_counter()
        plane, states, spent, drawing = is_planar(walk.run), [], 0.0, 0.0
        film, code = None if plane else Film(walk), script(walk)
        for state, took in time_states(walk.states()):
            spent += took
            states.append(state)
            if film:
                film.move(states[-2], state) if state.i else film.start(state)
            now = time.perf_counter()
            if len(states) == 1 or took > EVERY or now - shown >= EVERY and drawing <= spent:
                shown = now
                done = figures_html(
                    [
                        ("step", f"{state.i} of {walk.steps}"),
                        ("NFE so far", f"{state.nfe:g}"),
                        ("time", f"{1000 * spent:.0f} ms"),
                    ]
                )
                chart = (
                    plot.plane_chart(
                        torch.stack([s.x for s in states]), cloud(walk.run.config.data), reach=3.2
                    )
                    if plane
                    else None
                )
                drawing += time.perf_counter() - now
                yield (
                    film.text if film else "",
                    chart,
                    *[gr.skip()] * 4,
                    done,
                    gr.skip(),
                    gr.skip(),
                    HINT,
                )
        tau = to_trajectory(states, walk.run)
        remember_walk(walk, tau)
        done = told(walk, tau, spent, time.perf_counter() - start)
        yield film.text if film else "", gr.skip(), *[gr.skip()] * 4, done, gr.skip(), code, HINT
        yield whole(walk, tau, film, panels(walk, tau), done, HINT)


def whole(walk: SampleRequest, tau, film, found: dict, done: str, words: str) -> tuple:
    "Everything the page shows of a finished walk."
    plane = is_planar(walk.run)
    return (
        film.text if film else "",
        played(walk, tau) if plane else None,
        *projected(walk, tau),
        plot.moves_chart(found, tau.ts),
        plot.schedule_chart(tau.ts, 300),
        done,
        tabled(moved(tau, found)),
        script(walk),
        words,
    )


def played(walk: SampleRequest, tau):
    "The points of a 2-D walk in motion over the velocity field."
    keep = sorted(
        {round(k) for k in np.linspace(0, len(tau.ts) - 1, min(len(tau.ts), MOST["columns"]))}
    )
    at, field = (
        (None, None)
        if walk.run.sampling_fixed
        else of.velocity_field(walk.flow(), at_home(walk, tau).ts[keep], 3.2, FIELD)
    )
    return plot.motion_chart(
        tau.xs[keep], tau.ts[keep], cloud(walk.run.config.data), field, at, reach=3.2
    )


def repathed(chosen, dims, *form):
    "The paths again, for other samples or dimensions."
    with as_one_line():
        walk = parse_form(form)
        return projected(walk, solve_request(walk), chosen, dims)


# Errors: against the flow's own way, and move by move


def reference(walk: SampleRequest) -> tuple:
    "(name, velocity) of the run whose flow the states are held against."
    root, run, ask = walk.run.reference_run, walk.run, walk.ask
    if root is None:
        raise ValueError(
            f"{run.name} has nothing to be held against: its own network is no flow, and its "
            "teacher is not here (any more)"
        )
    own = root.dir == run.network_run.dir
    choices = (
        dict(weights=ask.weights, head=ask.head, guidance=ask.guidance)
        if own
        else dict(
            head=getattr(run.method, "head", 1), guidance=getattr(run.method, "guidance", 1.0)
        )
    )
    y = walk.choices["y"] if root.config.classes else None
    f = root.velocity(y=None if y is None else root.labels(y, ask.count), **choices)
    where = next(root.net(choices.get("weights", "ema")).parameters()).device
    return root.name, lambda x, t: f(x.to(where), t.to(where)).to(x.device)


def scale_of(values: list) -> float:
    "A round full scale for signed pictures: the 99.5th percentile, to one digit."
    every = torch.cat([v.abs().flatten() for v in values]).cpu()
    every = every[every.isfinite()]
    top = float(np.quantile(every.numpy(), 0.995)) if len(every) else 1.0
    return float(f"{max(top, 1e-9):.0e}")


def errors(*form):
    """Measure a walk move by move: what `sampled` gives, with the film's last two layers, two
    panels more and in words how far it went astray.
    """
    with as_one_line():
        walk, clock = parse_form(form), Clock()
        if find_entry(walk.ask.solver, walk.run).order is None:
            raise ValueError(
                f"{walk.ask.solver} follows no ODE: there is no flow to hold its states against; "
                "choose another solver"
            )
        began = time.perf_counter()
        tau = solve_request(walk)
        done = told(walk, tau, None, time.perf_counter() - began)
        film = None if is_planar(walk.run) else Film(walk).replay(tau)
        name, flow = reference(walk)
        tau = at_home(walk, tau)
        gaps, local, sizes, accuracy = [], [], [], []
        for i, ref in of.reference_states(flow, tau.xs[0], tau.ts):
            clock.check()
            gaps.append(tau.xs[i] - ref)
            yield (
                *[gr.skip()] * 9,
                f"<p class='caption' role='status'>the reference: step {i} of {walk.steps}</p>",
            )
        if not walk.run.sampling_fixed:
            for _, error, rms, sure in of.local_error(tau, walk.flow()):
                clock.check()
                local.append(error)
                sizes.append(rms)
                accuracy.append(float(sure.max()))
                yield (
                    *[gr.skip()] * 9,
                    f"<p class='caption' role='status'>the local error: move {len(local)} of "
                    f"{walk.steps}</p>",
                )
        if film:
            film.reach = {}
            for layer, values, at in (("gap", gaps, 0), ("error", local, 1)):
                if values:
                    film.reach[layer] = scale_of(values)
                    film.write(k="scale", reach=film.reach)
                    for i, value in enumerate(values, at):
                        film.add(layer, i, tau.ts[i], value, film.reach[layer])
        apart = of.root_mean_square(torch.stack(gaps), 2)
        extra = {"error against the reference (rms)": apart[1:]} | (
            {"local error (rms)": torch.stack(sizes)} if sizes else {}
        )
        found = panels(walk, tau, **extra)
        sure = f", known to {max(accuracy):.1g}" if accuracy else ""
        words = (
            f"<p class='caption' role='status'>Held against the flow of <b>{name}</b> (Heun, at "
            f"least 64 steps): the samples end <b>{float(apart[-1].mean()):.3g}</b> away (rms, "
            f"mean of {walk.ask.count})."
            + (
                " Local error of a move: its state against the flow from where it left "
                f"(Runge-Kutta 4, step doubling{sure})."
                if sizes
                else ""
            )
            + "</p>"
        )
        yield whole(walk, solve_request(walk), film, found, done, words)


# Files of what is on screen


def mosaic(x: torch.Tensor, scale: int = 1) -> Image.Image:
    "Samples (B, C, H, W) in a near-square sheet."
    wide = round(len(x) ** 0.5 + 0.499)
    full = torch.full((-(-len(x) // wide) * wide - len(x), *x.shape[1:]), -1.0)
    return plot.film_strip(
        torch.cat([x.cpu(), full]).unflatten(0, (-1, wide)).transpose(0, 1), scale, 1
    )


def dots(x: torch.Tensor, side: int = 320, reach: float = 3.2) -> Image.Image:
    "Points of the plane (B, 2) as a picture."
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    for a, b in ((x.clamp(-reach, reach) / reach * 0.5 + 0.5).nan_to_num(0.0) * side).tolist():
        draw.ellipse((a - 2, side - b - 2, a + 2, side - b + 2), fill="#0072B2")
    return image


def exported(kind, *form) -> tuple:
    """(a data address, a file name) of what is on screen: png and gif of the pictures, csv of the
    moves.
    """
    with as_one_line():
        if kind not in ("png", "gif", "csv"):
            raise ValueError(f"kind = {str(kind)[:40]!r} is not one of png, gif, csv")
        walk = parse_form(form)
        tau = solve_request(walk)
        name = f"{walk.ask.run}-{walk.ask.solver}-{walk.steps}-seed{walk.ask.seed}.{kind}"
        if kind == "csv":
            return csv_url(moved(tau, panels(walk, tau))), name
        draw = dots if is_planar(walk.run) else (lambda x: mosaic(x, max(1, 64 // x.shape[-1])))
        if kind == "png":
            picture = (
                draw(tau.x)
                if is_planar(walk.run)
                else plot.film_strip(tau.xs, max(1, 48 // tau.x.shape[-1]))
            )
            return data_url(plot.encode_image(picture), "image/png"), name
        keep = sorted(
            {round(k) for k in np.linspace(0, len(tau.xs) - 1, min(len(tau.xs), MOST["columns"]))}
        )
        frames = [draw(tau.xs[i]).convert("RGB") for i in keep]
        out = io.BytesIO()
        frames[0].save(
            out,
            "GIF",
            save_all=True,
            append_images=frames[1:],
            duration=[max(80, 2400 // len(frames))] * (len(frames) - 1) + [1500],
            loop=0,
        )
        return data_url(out.getvalue(), "image/gif"), name
