"""Samples without the lab: python sample.py samples.npy [noise.npy [labels.npy]]"""

import sys
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline


def main(out, noise_file=None, labels_file=None):
    "Draw samples and save them; 16 of random noise where none is given."
    noise, labels = (
        None if name is None else torch.from_numpy(np.load(name))
        for name in (noise_file, labels_file)
    )
    folder = Path(__file__).resolve().parent
    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
    count = 16 if noise is None and labels is None else None
    choices = {"latents": noise, "class_labels": labels, "output_type": "latent"}
    np.save(out, pipe(count, **choices).images)


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
