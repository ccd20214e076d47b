"""Emoji of four artists, drawn at any size on a ground of one colour."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from emojis import art
from emojis.prompts import COLOURS, STYLES, THINGS, kinds_of

SIDES = (0.7, 0.95)  # smallest and largest side of an object's square, as a share of the shorter side of its image
TURN = 10.0  # largest rotation in degrees, either way


def render(
    things: torch.Tensor,
    styles: torch.Tensor,
    height: int,
    width: int,
    generator: torch.Generator,
    folder: Path = art.FOLDER,
) -> torch.Tensor:
    """Objects (B, 4, height, width), uint8, red, green, blue and opacity, of things (B,) and styles (B,).

    Size, position and rotation are random. Size and position are relative to the image, so their distribution is the
    same at every size.

    Raises:
        ImportError: resvg_py, which draws SVG, is missing.
        OSError: the emoji cannot be downloaded.
    """
    poses = torch.rand(len(things), 4, generator=generator).tolist()
    images = [
        _draw(art.drawings(STYLES[style], folder)[THINGS[thing]], height, width, *pose)
        for thing, style, pose in zip(things.tolist(), styles.tolist(), poses, strict=True)
    ]
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)


def _draw(drawing: art.Drawing, height: int, width: int, size: float, x: float, y: float, turn: float) -> np.ndarray:
    try:
        import resvg_py  # only who trains or renders references needs it
    except ImportError as error:
        raise ImportError("drawing emoji needs resvg_py: pip install 'entropy_attn[emojis]'") from error
    side = (SIDES[0] + (SIDES[1] - SIDES[0]) * size) * min(height, width)
    # The object is inside the image; its position varies over the middle half of the free space.
    across = (width - side) * (0.25 + 0.5 * x) + side / 2
    down = (height - side) * (0.25 + 0.5 * y) + side / 2
    scale = side / max(drawing.width, drawing.height)
    svg = (
        '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
        f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"><g transform="translate({across} {down}) '
        f'rotate({TURN * (2 * turn - 1)}) scale({scale}) translate({-drawing.width / 2} {-drawing.height / 2})">'
        f"{drawing.body}</g></svg>"
    )
    return np.asarray(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA"))


def on_ground(objects: torch.Tensor, colours: torch.Tensor) -> torch.Tensor:
    """Images (B, 3, H, W) in [0, 1], float32: objects (B, 4, H, W) of `render` on grounds of colours (B,)."""
    grounds = torch.tensor(list(COLOURS.values()))[colours][:, :, None, None] / 255
    opacity = objects[:, 3:].float() / 255
    return objects[:, :3].float() / 255 * opacity + grounds * (1 - opacity)


def references(count: int, height: int, width: int, folder: Path = art.FOLDER) -> torch.Tensor:
    """Images (count, 3, height, width) in [0, 1] of the kinds of the images 0 to count − 1. Raises as `render`."""
    things, styles, colours = kinds_of(torch.arange(count))
    return on_ground(render(things, styles, height, width, torch.Generator().manual_seed(2**31), folder), colours)
