"""Samples of a cudlab run with diffusers:
DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
"""

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput

# diffusers brings along only the files that are imported here
from .config import lookup
from .multistep import SOLVERS, iterate
from .path import PATHS, append_dims, make_grid
from .rng import Rng  # noqa: F401
from .solver import NFECounter  # noqa: F401


class CudlabPipeline(DiffusionPipeline):
    "Noise to samples, by the recipe the folder was checked with or by any solver of the lab."

    def __init__(self, unet, card=None):
        super().__init__()
        self.register_modules(unet=unet)
        self.register_to_config(card=card)

    def guided_velocity(
        self,
        y,  # labels, (B,) or None
        scale,  # guidance; 1 is the conditional velocity
    ):
        "The network as velocity(x, t[, r]) for these labels."
        classes = len(self.config.card["classes"])

        def velocity(x, t, *end):
            v = self.unet(x, t, y, *end)
            if y is None or scale == 1:
                return v
            free = self.unet(x, t, torch.full_like(y, classes), *end)
            return free + scale * (v - free)

        velocity.is_flow_map = self.unet.config.times == 2
        return velocity

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
        batch_size=1,  # number of samples
        num_inference_steps=None,  # solver steps; None = as in the card
        solver=None,  # a name in SOLVERS; None = as in the card
        grid="uniform",  # a name in GRIDS, where steps or a solver are given
        class_labels=None,  # (B,) or None
        guidance_scale=None,  # 1 = the conditional velocity; None = as in the card
        generator=None,  # torch.Generator, where no noise is given
        latents=None,  # standard normal noise (B, *S)
        output_type="pil",  # "pil", "np" or "pt" in [0, 1], or "latent": as they are, in [-1, 1]
        return_dict=True,
    ):
        card = self.config.card
        if latents is None:
            latents = torch.randn(batch_size, *card["shape"], generator=generator)
        noise = latents.to(self.device, torch.float32)
        scale = card["sampling"]["guidance"] if guidance_scale is None else guidance_scale
        y = None if class_labels is None else torch.as_tensor(class_labels, device=noise.device)
        velocity = self.guided_velocity(y, scale)
        if num_inference_steps is None and solver is None:
            x = self.follow_recipe(velocity, noise)
        else:
            x = self.solve(velocity, noise, solver, num_inference_steps, grid)
        images = self.to_images(x, output_type)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
