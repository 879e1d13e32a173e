"""Photographic backgrounds: pictures without licence restrictions that scikit-image ships (extra `weft[photos]`)."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from PIL import Image

from weft.errors import WeftError

PHOTOS = ("coffee", "chelsea", "rocket", "brick", "grass", "gravel")


@lru_cache(maxsize=len(PHOTOS))
def _whole(name: str) -> Image.Image:
    try:
        from skimage import data
    except ModuleNotFoundError:
        raise WeftError("photographic backgrounds need scikit-image: pip install 'weft[photos]'") from None
    array = getattr(data, name)()
    return Image.fromarray(array).convert("RGB")


def photo(name: str, x: float, y: float, height: int, width: int) -> np.ndarray:
    """A crop of a photograph, lightened so that things stand out: float32 [height, width, 3] in 0..255.

    `x`, `y` in [0, 1] place the crop, which has the canvas' aspect and two thirds of the largest possible size.
    """
    whole = _whole(name)
    scale = min(whole.width / width, whole.height / height) * 2 / 3
    w, h = width * scale, height * scale
    left, top = x * (whole.width - w), y * (whole.height - h)
    crop = whole.resize((width, height), Image.Resampling.BOX, box=(left, top, left + w, top + h))
    return np.asarray(crop, np.float32) * 0.5 + 127.5
