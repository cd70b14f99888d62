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


def refused(**given) -> str:
    try:
        pipe(**given)
    except ValueError as e:
        assert "\n" not in str(e)
        return str(e)
    sys.exit(f"{given} was taken")


def generators() -> list:
    return [torch.Generator().manual_seed(k) for k in (4, 5, 6)]


saved = f"{folder}-again"
pipe.save_pretrained(saved)
again = DiffusionPipeline.from_pretrained(saved, trust_remote_code=True)
halves = {
    str(dtype): DiffusionPipeline.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
    for dtype in (torch.float16, torch.bfloat16)
}
np.savez(
    out,
    ab2=draw(solver="ab2", num_inference_steps=5),
    unipc=draw(solver="unipc2-bh2", num_inference_steps=4, grid="logsnr"),
    label=draw(class_labels=three, num_inference_steps=2, guidance_scale=1.5),
    adaptive=draw(class_labels=[1, 2, 3, 4], guidance_scale=2.0, solver="rk45"),
    plain=draw(),
    again=again(latents=x, output_type="latent").images,
    **{key: half(latents=x, output_type="latent").images for key, half in halves.items()},
)
assert all(half.unet.dtype != torch.float32 for half in halves.values())
images = pipe(3, generator=torch.Generator().manual_seed(0)).images
assert len(images) == 3 and images[0].size == (8, 8)
several = pipe(generator=generators(), class_labels=[7, 8, 9], output_type="latent").images
alone = pipe(generator=generators()[1], class_labels=8, output_type="latent").images
assert len(several) == 3 and (several[1] - alone[0]).abs().max() < 1e-5
assert "did you mean 'ab3'" in refused(solver="ab3x")
assert "batch_size: 2, class_labels: 1" in refused(batch_size=2, class_labels=[1])
assert "0 to 9, and 10 for no class" in refused(class_labels=[11])
