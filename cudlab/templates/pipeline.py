"""Samples of a cudlab run with diffusers:
DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""

import json
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

# diffusers brings along only the files that are imported in this one
from .bundle import copy_code
from .condition import Condition  # noqa: F401
from .config import lookup
from .multistep import SOLVERS, iterate
from .net import Velocity
from .path import PATHS, append_dims, make_grid
from .rng import Rng  # noqa: F401
from .sample import main  # noqa: F401
from .solver import NFECounter  # noqa: F401
from .step import linear_step  # noqa: F401

NAMES = {"_class_name": ["pipeline", "CudlabPipeline"], "unet": ["model", "VelocityModel"]}


def find_batch_size(batch_size, generator, class_labels, latents) -> int:
    "How many samples are wanted: all that say so must agree; 1 where nothing does."
    said = {
        "batch_size": batch_size,
        "generator": len(generator) if isinstance(generator, list) else None,
        "class_labels": len(class_labels) if class_labels is not None else None,
        "latents": len(latents) if latents is not None else None,
    }
    said = {name: size for name, size in said.items() if size is not None}
    if len(set(said.values())) > 1:
        sizes = ", ".join(f"{name}: {size}" for name, size in said.items())
        raise ValueError(f"how many samples? {sizes}; leave out what the others say")
    return next(iter(said.values()), 1)


class CudlabPipeline(DiffusionPipeline):
    "Noise to samples, by the recipe the folder was checked with or by any solver of the lab."

    def __init__(self, unet, card=None):
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(card=card)

    def read_labels(self, class_labels, batch_size):
        "Labels as a tensor (B,) on the network's device, or None; one number is for all samples."
        if class_labels is None:
            return None
        classes = len(self.config.card["classes"])
        y = torch.as_tensor(class_labels).to(self.device, torch.long).expand(batch_size)
        if y.min() < 0 or y.max() > classes or not classes:
            known = f"0 to {classes - 1}, and {classes} for no class" if classes else "none"
            raise ValueError(
                f"class_labels from {y.min()} to {y.max()}: this network knows {known}"
            )
        return y

    def draw_noise(self, batch_size, generator):
        "Standard normal noise, (B, *S); in float32, as all numbers but the network's own."
        shape = (batch_size, *self.config.card["shape"])
        return randn_tensor(shape, generator, self.device, torch.float32)

    def follow_recipe(self, velocity, noise):
        "The samples of the card's recipe: weighted sums of noise and velocities, a call for each."
        known = [noise]
        for row in self.config.card["recipe"]:
            weights = [noise.new_tensor(w).reshape(-1) for w in row["weights"]]
            x = sum(append_dims(w, noise[0]) * z for w, z in zip(weights, known))
            if row["t"] is None:
                return x
            end = [x.new_full((len(x),), row["r"])] if velocity.is_flow_map else []
            known.append(velocity(x, x.new_full((len(x),), row["t"]), *end))

    def solve(self, velocity, noise, solver, steps, grid):
        "The samples of a solver of the lab, chosen by name."
        card = self.config.card
        if card["one_step"]:
            raise ValueError(
                "this network knows only the way from noise to data in one call; leave out "
                "num_inference_steps and solver"
            )
        entry = lookup("solver", solver or card["sampling"]["solver"], SOLVERS)
        path = PATHS[card["path"]]
        ts = make_grid(grid, steps or card["sampling"]["steps"], path, entry.needs_finite_logsnr)
        start = noise * path.sigma(ts[:1]).item()
        *_, last = iterate(velocity, start, ts, entry, path)
        return last.x

    def to_images(self, x, output_type):
        "Samples in [-1, 1] as images in [0, 1], or as they are."
        if output_type == "latent":
            return x
        x = (x / 2 + 0.5).clamp(0, 1).cpu()
        if output_type == "pt":
            return x
        images = x.permute(0, 2, 3, 1).numpy()
        return self.numpy_to_pil(images) if output_type == "pil" else images

    @torch.no_grad()
    def __call__(
        self,
        batch_size=None,  # number of samples; None = as many as the others say, or 1
        num_inference_steps=None,  # solver steps; None = as in the card
        solver=None,  # a name in SOLVERS; None = as in the card
        grid="uniform",  # a name in GRIDS, where steps or a solver are given
        class_labels=None,  # (B,), one for all, or None
        guidance_scale=None,  # 1 = the conditional velocity; None = as in the card
        generator=None,  # torch.Generator, or a list of one for each sample; without latents
        latents=None,  # standard normal noise (B, *S)
        output_type="pil",  # "pil", "np" or "pt" in [0, 1], or "latent": as they are, in [-1, 1]
        return_dict=True,
    ):
        labels = None if isinstance(class_labels, int) else class_labels
        batch_size = find_batch_size(batch_size, generator, labels, latents)
        y = self.read_labels(class_labels, batch_size)
        if latents is None:
            latents = self.draw_noise(batch_size, generator)
        noise = latents.to(self.device, torch.float32)
        scale = self.config.card["sampling"]["guidance"]
        scale = scale if guidance_scale is None else guidance_scale
        velocity = Velocity(self.unet, y, guidance=scale)
        if num_inference_steps is None and solver is None:
            x = self.follow_recipe(velocity, noise)
        else:
            x = self.solve(velocity, noise, solver, num_inference_steps, grid)
        images = self.to_images(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def save_pretrained(self, save_directory, *args, **kwargs):
        "The folder once more, with the code and the card that it needs."
        super().save_pretrained(save_directory, *args, **kwargs)
        folder = Path(save_directory)
        copy_code(__file__, folder)
        index = json.loads((folder / "model_index.json").read_text())
        (folder / "model_index.json").write_text(json.dumps(index | NAMES, indent=1))
        (folder / "card.json").write_text(json.dumps(self.config.card, indent=1))
