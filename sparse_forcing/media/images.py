"""Still pictures, read within bounds and with the pixels a viewer would show."""

from __future__ import annotations

import struct
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import numpy as np
from PIL import Image, ImageOps

from sparse_forcing.errors import VideoError
from sparse_forcing.files import PathLike, is_file

MAX_PIXELS = 1 << 26
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")


def read_image(path: PathLike, *, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """Read a picture as uint8 [H, W, 3] RGB: turned as its EXIF says, transparency over white, first frame only.

    Raises:
        VideoError: missing, damaged, of another format, or larger than `max_pixels` (known before it is decoded).
    """
    if not is_file(path, VideoError):
        raise VideoError(f"{path}: no such image file")
    try:
        # Twice, onto different grounds: a file without its last rows leaves them as they were, and nothing is said.
        with _decode(path, max_pixels, ground=255) as image:
            other = image.tobytes()
        with _decode(path, max_pixels, ground=0) as image:
            if image.tobytes() != other:
                raise VideoError(f"{path}: rows of the picture are missing; the file is cut or damaged")
            return np.asarray(_to_rgb(ImageOps.exif_transpose(image)))
    except (Image.DecompressionBombError, OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        if isinstance(error, VideoError):
            raise
        raise VideoError(f"{path}: not a readable image ({' '.join(str(error).split())[:120]})") from error


@contextmanager
def _decode(path: PathLike, max_pixels: int, *, ground: int) -> Iterator[Image.Image]:
    """The picture as it is stored; `ground` is the value of every band where the file says nothing."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        # Pillow warns of sizes that it does not yet refuse; the bound here is ours.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = stack.enter_context(Image.open(path, formats=FORMATS))
        if image.width * image.height > max_pixels:
            raise VideoError(f"{path}: {image.width}x{image.height} pixels exceed the bound of {max_pixels}")
        prepare = image.load_prepare

        def prepare_ground() -> None:
            prepare()
            bands = image.im.bands
            image.im.paste(ground if bands == 1 else (ground,) * bands, (0, 0, *image.im.size))

        image.load_prepare = prepare_ground  # type: ignore[method-assign]
        image.load()
        yield image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # Sixteen bits: Pillow's own conversion clips at 255 instead of scaling.
        high = np.asarray(image).astype(np.int64) >> 8
        image = Image.fromarray(np.clip(high, 0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def fit(frames: np.ndarray, height: int, width: int) -> np.ndarray:
    """Scale uint8 frames [F, H, W, 3] until they cover `height` x `width`; cut the surplus evenly off both sides."""
    if frames.shape[1:3] == (height, width):
        return frames
    return np.stack([np.asarray(ImageOps.fit(Image.fromarray(frame), (width, height))) for frame in frames])
