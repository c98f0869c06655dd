"""Finds faces in images of any size with facenet-pytorch's MTCNN: `python examples/pretrained/faces.py [networks]`.

Needs both requirement files of this folder, see requirements.txt; the weights lie in the package facenet-pytorch.
Without a supported GPU: `TRT_DYNAMO_RUNTIME=reference python ...`.

The detector shrinks an image step by step, looks for faces at each size, and looks closer at what it found. Compiled
as a whole, the networks and the arithmetic between them go to engines; `nonzero` and the suppression of boxes that
overlap stay in eager. With the argument `networks` only its three networks are compiled: fewer engines, sooner ready.
"""

import sys

import numpy as np
import torch
from facenet_pytorch import MTCNN

import trt_dynamo


def picture(height: int, width: int, *faces: tuple[float, float, float]) -> torch.Tensor:
    """Drawn faces on grey, each of center y, x and radius, in parts of the shorter side: (height, width, 3) uint8."""
    image = np.full((height, width, 3), 90, np.uint8)
    y, x = np.mgrid[:height, :width] / min(height, width)
    for top, left, radius in faces:
        v, u = (y - top) / radius, (x - left) / radius
        image[(u / 0.75) ** 2 + v**2 < 1] = (224, 172, 140)
        for eye in (-0.33, 0.33):
            image[(u - eye) ** 2 + ((v + 0.25) * 1.8) ** 2 < 0.13**2] = (40, 25, 20)
        image[u**2 + ((v - 0.45) * 3) ** 2 < 0.3**2] = (150, 50, 50)
        image[(u * 2.5) ** 2 + (v - 0.12) ** 2 < 0.2**2] = (190, 130, 110)
    return torch.from_numpy(image)


PICTURES = {
    "one face": picture(160, 160, (0.5, 0.5, 0.3)),
    "two faces": picture(161, 243, (0.5, 0.5, 0.3), (0.3, 1.1, 0.15)),
    "no face": picture(120, 90),
    "a small one": picture(97, 131, (0.5, 0.5, 0.3)),
}


def main(way: str = "whole") -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, other = MTCNN(keep_all=True, device=device), MTCNN(keep_all=True, device=device)
    if way == "networks":
        for network in (other.pnet, other.rnet, other.onet):
            network.compile(backend="tensorrt", dynamic=True)
        detect = other.detect
    else:
        detect = torch.compile(other.detect, backend="tensorrt", dynamic=True)
    largest = 0.0
    for name, image in PICTURES.items():
        found, expected = detect(image, landmarks=True), model.detect(image, landmarks=True)
        print(f"{name}, {image.shape[1]} x {image.shape[0]}: {0 if found[0] is None else len(found[0])} found")
        assert (found[0] is None) == (expected[0] is None)
        if found[0] is not None:  # boxes and the five points of each face in pixels, and how sure the network is
            for mine, theirs in zip(found, expected, strict=True):
                largest = max(largest, np.abs(mine.astype(float) - theirs.astype(float)).max())
    print(f"largest difference from eager: {largest:.1e}")
    for name in ("graphs", "engines_built", "engine_calls", "eager_calls"):
        print(f"{name}: {trt_dynamo.report()[name]}")


if __name__ == "__main__":
    main(*sys.argv[1:])
