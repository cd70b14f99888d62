"""Samples of an exported diffusers folder by some of the lab's solvers, without the lab.

python -I sample_with_diffusers.py FOLDER noise.npy samples.npz (from test_exporting.py)
"""

import sys

import numpy as np
import torch
from diffusers import DiffusionPipeline

sys.modules["cudlab"] = None
folder, noise, out = sys.argv[1:]
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
x = torch.from_numpy(np.load(noise))
three = torch.full((len(x),), 3)


def draw(**given):
    return pipe(latents=x, output_type="latent", **given).images.numpy()


np.savez(
    out,
    ab2=draw(solver="ab2", num_inference_steps=5),
    unipc=draw(solver="unipc2-bh2", num_inference_steps=4, grid="logsnr"),
    label=draw(class_labels=three, num_inference_steps=2, guidance_scale=1.5),
)
images = pipe(3, generator=torch.Generator().manual_seed(0)).images
assert len(images) == 3 and images[0].size == (8, 8)
try:
    pipe(solver="ab3x")
except ValueError as e:
    assert "did you mean 'ab3'" in str(e)
else:
    sys.exit("a wrong solver was taken")
