"""Samples without the lab: python sample.py samples.npy [noise.npy [labels.npy]]"""

import json
import sys
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).resolve().parent
CARD = json.loads((FOLDER / "card.json").read_text())


def open_onnx():
    "The network as a function of named arrays, run by ONNX Runtime."
    import onnxruntime

    session = onnxruntime.InferenceSession(
        FOLDER / "model.onnx", providers=["CPUExecutionProvider"]
    )

    def net(**given):
        return session.run(None, {name: given[name] for name in CARD["inputs"]})[0]

    return net


def open_torch():
    "The network as a function of named arrays, run by torch."
    import torch

    program = torch.export.load(FOLDER / "model.pt2").module()

    most = CARD.get("largest_batch") or sys.maxsize

    def net(**given):
        arrays = [np.ascontiguousarray(given[name]) for name in CARD["inputs"]]
        starts = range(0, len(arrays[0]), most)
        parts = [[torch.from_numpy(array[k : k + most]) for array in arrays] for k in starts]
        with torch.no_grad():
            return np.concatenate([program(*part).numpy() for part in parts])

    return net


def weigh(weights, known):
    "The weighted sum of arrays (B, *shape); a weight is a number, or one number a channel."
    trailing = (1,) * (known[0].ndim - 2)
    total = sum(np.reshape(w, (-1, *trailing)) * z for w, z in zip(weights, known))
    return total.astype(np.float32)


def sample(net, noise, labels=None):
    "Samples in [-1, 1] of standard normal noise (B, *shape), with labels (B,) or without."
    noise = np.asarray(noise, np.float32)
    no_class = np.full(len(noise), len(CARD["classes"]))
    y = no_class if labels is None else np.asarray(labels, np.int64)
    if CARD["what"] == "sampler":
        return net(x=noise, y=y)
    guidance = np.float32(CARD["sampling"]["guidance"])
    known = [noise]
    for row in CARD["recipe"]:  # a weighted sum of noise and velocities, then a network call
        x = weigh(row["weights"], known)
        if row["t"] is None:  # the last sum is the sample
            return x
        t, r = (np.full(len(x), row[key], np.float32) for key in ("t", "r"))
        v = net(x=x, t=t, y=y, r=r, w=np.full(len(x), guidance))
        if labels is not None and guidance != 1 and "w" not in CARD["inputs"]:
            free = net(x=x, t=t, y=no_class, r=r)
            v = free + guidance * (v - free)
        known.append(v)


def main(out, noise_file=None, labels_file=None):
    "Draw samples and save them; 16 of seed 0 where no noise is given."
    if noise_file is None:
        shape = (16, *CARD["shape"])
        noise = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    else:
        noise = np.load(noise_file)
    labels = None if labels_file is None else np.load(labels_file)
    net = open_onnx() if CARD["format"] == "onnx" else open_torch()
    np.save(out, sample(net, noise, labels))


if __name__ == "__main__":
    if not 2 <= len(sys.argv) <= 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
