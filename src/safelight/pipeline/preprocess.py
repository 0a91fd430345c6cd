"""Preprocesses pictures for ControlNets with OpenCV. No preprocessor needs its own weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
from PIL import Image as PILImage

from safelight.extensions import Extensible, extensions, function
from safelight.request.adapters import PREPROCESSOR_GROUP, Control, require_preprocessor


def preprocess(picture: PILImage.Image, control: Control) -> PILImage.Image:
    """Preprocess a picture as ``control`` says. Returns an RGB image of the same size.

    Raises MissingExtraError if it needs OpenCV, and OpenCV is not installed.
    """
    if control.preprocessor == "none":
        return picture.convert("RGB")
    require_preprocessor(control.preprocessor)
    pixels = np.array(picture.convert("RGB"))
    if control.preprocessor in _PREPROCESSORS.builtin:
        found = np.asarray(_PREPROCESSORS[control.preprocessor](pixels, control), np.uint8)
    else:
        found = _by_package(pixels, control)
    return PILImage.fromarray(found if found.ndim == 3 else np.repeat(found[..., None], 3, axis=2))


def _by_package(pixels: Any, control: Control) -> Any:
    """Preprocess pixels by an installed package. Raises ExtensionError if its function fails or returns no picture."""
    compute = _PREPROCESSORS[control.preprocessor]
    try:
        found: Any = np.asarray(compute(pixels, control.low, control.high))
        if found.dtype != np.uint8 or found.shape not in (pixels.shape, pixels.shape[:2]):
            raise ValueError(f"returned {found.dtype} {list(found.shape)} for uint8 {list(pixels.shape)}")
    except Exception as error:
        raise extensions(PREPROCESSOR_GROUP).error(control.preprocessor, error) from error
    return found


def _cv2() -> Any:
    # The import takes 0.1 s and 60 MB, so it happens only if a preprocessor is used.
    import cv2

    return cast("Any", cv2)


def _grey(pixels: Any) -> Any:
    return _cv2().cvtColor(pixels, _cv2().COLOR_RGB2GRAY)


def _canny(pixels: Any, control: Control) -> Any:
    """Edges by Canny (1986) on all three channels, as in the training of the published ControlNets."""
    return _cv2().Canny(pixels, control.low, control.high)


def _lineart(pixels: Any, _: Control) -> Any:
    """White lines where the picture is darker than its surroundings."""
    wide = pixels.astype(np.float32)
    around = _cv2().GaussianBlur(wide, (0, 0), 6.0)
    lines = (around - wide).min(axis=2).clip(0, None)
    strong = max(16.0, float(np.median(lines[lines > 8])) if (lines > 8).any() else 16.0)
    return (lines / strong * 127).clip(0, 255)


def _scribble(pixels: Any, _: Control) -> Any:
    """A thresholded extended difference of Gaussians (Winnemöller et al. 2012)."""
    wide = pixels.astype(np.float32)
    fine, coarse = (_cv2().GaussianBlur(wide, (0, 0), sigma) for sigma in (0.5, 5.0))
    difference = (255 - (coarse - fine).clip(0, 255)).min(axis=2)
    return np.where(difference < 223, 255, 0)


def _softedge(pixels: Any, _: Control) -> Any:
    """The magnitude of the brightness gradient (Scharr), scaled so that the strongest is white."""
    grey = _cv2().GaussianBlur(_grey(pixels), (0, 0), 1.0)
    across, down = (_cv2().Scharr(grey, _cv2().CV_32F, *axes) for axes in ((1, 0), (0, 1)))
    length = np.hypot(across, down)
    return length / max(1.0, float(length.max())) * 255


def _threshold(pixels: Any, control: Control) -> Any:
    return np.where(_grey(pixels) >= control.low, 255, 0)


def _blur(pixels: Any, control: Control) -> Any:
    return _cv2().GaussianBlur(pixels, (0, 0), control.high / 100)


def _color(pixels: Any, _: Control) -> Any:
    """The mean colours of an 8 x 8 grid."""
    height, width = pixels.shape[:2]
    small = _cv2().resize(pixels, (8, 8), interpolation=_cv2().INTER_AREA)
    return _cv2().resize(small, (width, height), interpolation=_cv2().INTER_NEAREST)


_BUILTIN: Mapping[str, Callable[[Any, Control], Any]] = {
    "canny": _canny,
    "invert": lambda pixels, _: 255 - pixels,
    "lineart": _lineart,
    "scribble": _scribble,
    "softedge": _softedge,
    "grayscale": lambda pixels, _: _grey(pixels),
    "threshold": _threshold,
    "blur": _blur,
    "color": _color,
}

_PREPROCESSORS: Extensible[Callable[..., Any]] = Extensible(_BUILTIN, PREPROCESSOR_GROUP, function)
