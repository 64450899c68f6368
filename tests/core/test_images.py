"""Pictures come out as a viewer shows them, or are refused in one line (fault 19)."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sparse_forcing.errors import VideoError
from sparse_forcing.media.images import fit, read_image

RED, BLUE = (220, 30, 20), (20, 40, 200)


def halves(height: int = 16, width: int = 32) -> np.ndarray:
    """Left half red, right half blue."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[:, : width // 2], picture[:, width // 2 :] = RED, BLUE
    return picture


@pytest.mark.parametrize("name", ["p.png", "p.bmp", "p.tiff", "p.gif", "p.ppm"])
def test_lossless_formats_come_back(tmp_path: Path, name: str) -> None:
    Image.fromarray(halves()).save(tmp_path / name)
    np.testing.assert_array_equal(read_image(tmp_path / name), halves())


@pytest.mark.parametrize(("mode", "name"), [("RGB", "p.jpg"), ("CMYK", "p.jpg"), ("RGB", "p.webp")])
def test_lossy_and_cmyk_pictures_keep_their_colours(tmp_path: Path, mode: str, name: str) -> None:
    Image.fromarray(halves()).convert(mode).save(tmp_path / name, quality=95)
    np.testing.assert_allclose(read_image(tmp_path / name)[:, :12], halves()[:, :12], atol=12)


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise
    Image.fromarray(halves()).save(tmp_path / "p.png", exif=exif)
    picture = read_image(tmp_path / "p.png")
    assert picture.shape == (32, 16, 3)
    assert tuple(picture[0, 0]) == RED
    assert tuple(picture[-1, 0]) == BLUE


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    rgba = np.dstack([halves(), np.full((16, 32), 255, np.uint8)])
    rgba[:, :4, 3], rgba[:, 4:8, 3] = 0, 128
    Image.fromarray(rgba).save(tmp_path / "p.png")
    picture = read_image(tmp_path / "p.png")
    assert tuple(picture[0, 0]) == (255, 255, 255)
    np.testing.assert_allclose(picture[0, 5], (np.array(RED) + 255) / 2, atol=1)
    palette = Image.new("P", (8, 8), 0)
    palette.putpalette([10, 20, 30, *RED])
    palette.save(tmp_path / "t.gif", transparency=0)
    assert (read_image(tmp_path / "t.gif") == 255).all()


def test_sixteen_bits_and_other_depths_are_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.full((4, 4), 0x8000, np.uint16)).save(tmp_path / "p.png")
    assert (read_image(tmp_path / "p.png") == 128).all()
    for mode, value in (("1", 1), ("L", 255), ("LA", (255, 255))):
        Image.new(mode, (4, 4), value).save(tmp_path / f"{mode}.png")
        assert (read_image(tmp_path / f"{mode}.png") == 255).all()


@pytest.mark.parametrize("name", ["p.png", "p.jpg", "p.webp", "p.bmp", "p.tiff"])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 0.9])
def test_cut_file_is_refused(tmp_path: Path, name: str, share: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / f"cut-{name}").write_bytes(data[: int(len(data) * share)])
    with pytest.raises(VideoError, match=rf"^[^\n]*cut-{name}[^\n]*$"):
        read_image(tmp_path / f"cut-{name}")


def png(width: int, height: int, *, colour: int = 2, depth: int = 8, data: bytes = b"\0" * 99) -> bytes:
    """A PNG whose header declares a size that its data need not have."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(60_000, 60_000), (12_000, 12_000), (2**31 - 1, 2**31 - 1), (0, 5)])
def test_absurd_header_is_refused_before_decoding(tmp_path: Path, size: tuple[int, int]) -> None:
    (tmp_path / "bomb.png").write_bytes(png(*size))
    with pytest.raises(VideoError, match=r"bomb\.png"):
        read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("rows", [0, 1, 15])
@pytest.mark.parametrize(
    ("colour", "bands", "depth"), [(0, 1, 8), (2, 3, 8), (4, 2, 8), (6, 4, 8), (2, 3, 16), (0, 1, 16)]
)
def test_a_png_without_its_last_rows_is_refused(tmp_path: Path, rows: int, colour: int, bands: int, depth: int) -> None:
    row = b"\0" + b"\x80" * (16 * bands * depth // 8)
    for count in (rows, 16):
        (tmp_path / f"{count}.png").write_bytes(png(16, 16, colour=colour, depth=depth, data=row * count))
    assert read_image(tmp_path / "16.png").shape == (16, 16, 3)
    with pytest.raises(VideoError, match=rf"{rows}\.png"):
        read_image(tmp_path / f"{rows}.png")


def test_bound_is_obeyed_and_other_files_are_refused(tmp_path: Path) -> None:
    Image.fromarray(halves()).save(tmp_path / "p.png")
    with pytest.raises(VideoError, match="32x16 pixels exceed the bound of 511"):
        read_image(tmp_path / "p.png", max_pixels=511)
    (tmp_path / "page.png").write_bytes(b"<html>404</html>")
    (tmp_path / "ps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("page.png", "ps.png", "none.png", "."):
        with pytest.raises(VideoError, match="image"):
            read_image(tmp_path / name)


def test_fit_scales_and_cuts_evenly() -> None:
    frames = np.stack([halves(16, 32)] * 2)
    assert fit(frames, 16, 32) is frames
    square = fit(frames, 8, 8)
    assert square.shape == (2, 8, 8, 3)
    assert tuple(square[0, 4, 0]) == RED
    assert tuple(square[0, 4, 7]) == BLUE
