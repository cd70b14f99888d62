"The pictures of a walk: the film that a page shows, and files of what is on screen."

import hashlib
import io
import json
from dataclasses import dataclass, field

import numpy as np
import torch
from markup import csv_url, data_url
from offer import is_planar
from PIL import Image, ImageDraw
from request import LIMITS, SampleRequest, as_one_line, parse_form

from cudlab import plot
from cudlab.run import Run
from cudlab.runfiles import run_stamp
from cudlab.solver import SolverState, Trajectory
from views.velocity import list_moves, measure_moves

SHARP = 2_000_000  # bytes of a film above which its pictures are compressed
REACH = 3.2  # of the plane that is shown


def encode_stack(x: torch.Tensor, reach: float = None, quality: int = 0) -> str:
    """Samples (B, C, H, W), one below the other, as a data address; signed ones in colour where
    `reach` is their full scale.
    """
    pixels = plot.signed_pixels(x, reach) if reach else plot.to_pixels(x)
    pixels = pixels.reshape(-1, *pixels.shape[2:])
    if pixels.shape[-1] == 1:
        pixels = pixels.squeeze(-1)
    kind = "webp" if quality else "png"
    return data_url(plot.encode_image(Image.fromarray(pixels), quality), f"image/{kind}")


@dataclass
class Film:
    """A walk as a text of JSON lines that only ever grows, so that each update sends what is new: a
    header, then one line for each layer of each step that is shown.
    """

    request: SampleRequest
    reach: dict = field(default_factory=lambda: dict(v=2.0))  # full scale of the signed layers
    text: str = ""

    def __post_init__(self):
        run = self.request.run
        channels, height, width = run.preview(torch.zeros(run.shape)).shape
        form = self.request.form
        steps = self.request.steps
        every = max(1, -(-(steps + 1) // LIMITS["columns"]))
        self.shown = {i for i in range(steps + 1) if i % every == 0 or i == steps}
        size = channels * height * width * form.count * len(self.shown) * 3
        self.quality = 86 if size > SHARP else 0
        version = repr((form, run_stamp(self.request.run.dir)))
        self.write(
            id=hashlib.sha256(version.encode()).hexdigest()[:12],
            count=form.count,
            steps=steps,
            c=channels,
            h=height,
            w=width,
            reach=self.reach,
        )

    def write(self, **line) -> None:
        self.text += json.dumps(line) + "\n"

    def add(self, layer: str, i: int, t: float, x: torch.Tensor, done: bool = False) -> None:
        """One layer of step i: x, hat (the estimate), v, gap (to the reference) or (local) error.
        Latents are shown by their preview, and decoded where the walk is done.
        """
        if i in self.shown:
            reach, run = self.reach.get(layer), self.request.run
            x = run.pictures(x) if done else run.preview(x, signed=bool(reach))
            source = encode_stack(x.cpu(), reach, self.quality)
            self.write(k=layer, i=i, t=round(float(t), 6), src=source)

    def follow(self, states: list) -> None:
        "What the newest state adds: velocity and estimate of the one before, then its own picture."
        state = states[-1]
        if len(states) > 1 and states[-2].i in self.shown:
            left = states[-2]
            t = torch.full((len(left.x),), float(left.t), device=left.x.device)
            self.add("hat", left.i, left.t, self.request.run.path.x0(left.x, state.v, t))
            self.add("v", left.i, left.t, state.v)
        done = state.i == self.request.steps and not state.t
        self.add("x", state.i, state.t, state.x, done)
        if done:
            self.add("hat", state.i, state.t, state.x, done)

    def replay(self, trajectory: Trajectory) -> "Film":
        "All of a finished walk, in the order in which it was sent the first time."
        states = []
        for i, (t, x) in enumerate(zip(trajectory.ts, trajectory.xs)):
            v = trajectory.vs[i - 1] if i else None
            states.append(SolverState(i, float(t), x, v, 0.0))
            self.follow(states)
        return self

    def add_signed(self, layer: str, values: list, ts: torch.Tensor, first: int) -> None:
        "A layer measured afterwards, from step `first` on, on a scale of its own."
        if values:
            self.reach[layer] = full_scale(values)
            self.write(k="scale", reach=self.reach)
            for i, value in enumerate(values, first):
                self.add(layer, i, ts[i], value)


def start_film(request: SampleRequest) -> Film | None:
    "The film of a request; None where the samples are points of the plane."
    return None if is_planar(request.run) else Film(request)


def film_text(film: Film | None) -> str:
    "The text of a film, if there is one."
    return film.text if film else ""


def full_scale(values: list) -> float:
    "A round full scale for signed pictures: the 99.5th percentile, to one digit."
    flat = torch.cat([value.abs().flatten() for value in values]).cpu()
    flat = flat[flat.isfinite()]
    top = float(np.quantile(flat.numpy(), 0.995)) if len(flat) else 1.0
    return float(f"{max(top, 1e-9):.0e}")


# Files of what is on screen


def make_mosaic(x: torch.Tensor, scale: int = 1) -> Image.Image:
    "Samples (B, C, H, W) in a near-square sheet."
    wide = round(len(x) ** 0.5 + 0.499)
    empty = torch.full((-len(x) % wide, *x.shape[1:]), -1.0)
    sheet = torch.cat([x.cpu(), empty]).unflatten(0, (-1, wide))
    return plot.film_strip(sheet.transpose(0, 1), scale, 1)


def draw_points(x: torch.Tensor, side: int = 320) -> Image.Image:
    "Points of the plane (B, 2) as a picture."
    image = Image.new("RGB", (side, side), "white")
    draw = ImageDraw.Draw(image)
    places = (x.clamp(-REACH, REACH) / REACH * 0.5 + 0.5).nan_to_num(0.0) * side
    for a, b in places.tolist():
        draw.ellipse((a - 2, side - b - 2, a + 2, side - b + 2), fill="#0072B2")
    return image


def draw_samples(x: torch.Tensor) -> Image.Image:
    "Samples as a picture, whatever they are."
    if x.dim() == 2:
        return draw_points(x)
    return make_mosaic(x, max(1, 64 // x.shape[-1]))


def spread_indices(count: int) -> list:
    "At most as many indices as a film has columns, the first and the last among them."
    most = min(count, LIMITS["columns"])
    return sorted({round(k) for k in np.linspace(0, count - 1, most)})


def encode_gif(trajectory: Trajectory, run: Run) -> bytes:
    "The samples on their way, as a GIF that rests at the end."
    states = [run.preview(trajectory.xs[i]) for i in spread_indices(len(trajectory.xs))]
    frames = [draw_samples(x) for x in [*states[:-1], run.pictures(trajectory.x)]]
    frames = [frame.convert("RGB").resize(frames[0].size) for frame in frames]
    pause = max(80, 2400 // len(frames))
    durations = [pause] * (len(frames) - 1) + [1500]
    out = io.BytesIO()
    options = dict(save_all=True, append_images=frames[1:], duration=durations, loop=0)
    frames[0].save(out, "GIF", **options)
    return out.getvalue()


def encode_png(trajectory: Trajectory, run: Run) -> bytes:
    "The points where they end, or the whole film."
    if trajectory.x.dim() == 2:
        return plot.encode_image(draw_points(trajectory.x))
    scale = max(1, 48 // trajectory.x.shape[-1])
    return plot.encode_image(plot.film_strip(run.preview(trajectory.xs), scale))


def export_file(kind, *values) -> tuple:
    """(a data address, a file name) of what is on screen: png and gif of the pictures, csv of the
    moves.
    """
    with as_one_line():
        if kind not in ("png", "gif", "csv"):
            raise ValueError(f"kind = {str(kind)[:40]!r} is not one of png, gif, csv")
        request = parse_form(values)
        form = request.form
        trajectory = request.solve()
        name = f"{form.run}-{form.solver}-{request.steps}-seed{form.seed}.{kind}"
        if kind == "csv":
            return csv_url(list_moves(trajectory, measure_moves(request, trajectory))), name
        encode = encode_png if kind == "png" else encode_gif
        return data_url(encode(trajectory, request.run), f"image/{kind}"), name
