"""Pictures are decoded once and correctly, or refused by name."""

from __future__ import annotations

import errno
import io
import os
import struct
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageFile

from weft.errors import WeftError
from weft.media import (
    LazyPicture,
    atomic_write,
    decode_image,
    image_size,
    load_image,
    picture_suffix,
    read_metadata,
    save_image,
    to_rgb,
)
from weft.record import image_part, make_record
from weft.train.sizes import picture_size


def photo(height: int = 24, width: int = 40) -> Image.Image:
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x * 255 // width, y * 255 // height, (x + y) % 256], -1).astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def raw_png(width: int, height: int, bits: int, colour: int, rows: bytes) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows)) + png_chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def array(image: Image.Image) -> np.ndarray:
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(tmp_path: Path, orientation: int) -> None:
    upright = photo()
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Pillow's transpose that an upright picture is stored with
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(undo[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    for name in ("a.png", "a.tif"):
        stored.save(tmp_path / name, exif=exif)
        np.testing.assert_array_equal(array(load_image(tmp_path / name)), np.asarray(upright))
    stored.save(tmp_path / "a.jpg", exif=exif, quality=100, subsampling=0)
    assert np.abs(array(load_image(tmp_path / "a.jpg")).astype(int) - np.asarray(upright)).max() < 12


def test_the_size_of_a_header_is_that_of_the_picture(tmp_path: Path) -> None:
    """Aspect buckets read headers alone: what is wrong with one has the file's name there, too."""
    for orientation in (None, 1, 3, 5, 6, 8, 9):
        exif = Image.Exif()
        if orientation is not None:
            exif[0x0112] = orientation
        Image.new("RGB", (6, 4)).save(tmp_path / "a.jpg", exif=exif)
        assert image_size(tmp_path / "a.jpg") == load_image(tmp_path / "a.jpg").size
    record = make_record("x", target=tmp_path / "a.jpg")
    assert picture_size(record) == (4, 6)
    for data, message in ((b"", "empty"), (b"<html>", "web page"), (b"nothing", "not a picture")):
        (tmp_path / "a.jpg").write_bytes(data)
        with pytest.raises(WeftError, match=rf"a\.jpg is .*{message}"):
            picture_size(record)
    Image.new("1", (9_500, 9_500)).save(tmp_path / "b.png")
    with pytest.raises(WeftError, match="too large: 9500 x 9500"):
        image_size(tmp_path / "b.png")


def test_the_size_of_a_png_is_read_without_its_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Unless EXIF stands behind them, which Pillow finds only by decoding them."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (6, 4)).save(tmp_path / "before.png", exif=exif)
    chunk = png_chunk(b"eXIf", exif.tobytes().removeprefix(b"Exif\0\0"))
    data = encoded(Image.new("RGB", (6, 4)), "PNG")
    (tmp_path / "behind.png").write_bytes(data[:-12] + chunk + data[-12:])
    for name in ("before.png", "behind.png"):
        assert image_size(tmp_path / name) == load_image(tmp_path / name).size == (4, 6)
    assert LazyPicture("x", (tmp_path / "behind.png").read_bytes).size == (4, 6)
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", lambda image: pytest.fail("decoded"))
    assert image_size(tmp_path / "before.png") == (4, 6)
    Image.new("RGB", (6, 4)).save(tmp_path / "none.png")
    assert image_size(tmp_path / "none.png") == (6, 4)
    assert LazyPicture("x", (tmp_path / "none.png").read_bytes).size == (6, 4)


def test_a_picture_in_memory_stands_upright_too(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    photo().save(tmp_path / "a.png", exif=exif)
    upright = array(load_image(tmp_path / "a.png"))
    with Image.open(tmp_path / "a.png") as opened:
        part = make_record("x", opened).source
        assert part is not None
        np.testing.assert_array_equal(array(part.load()), upright)
        np.testing.assert_array_equal(array(load_image(save_image(opened, tmp_path / "b.png"))), upright)
        assert opened.size == (40, 24)  # as it was


def test_a_telephones_jpeg_with_a_second_picture_is_a_jpeg() -> None:
    data = encoded(Image.new("RGB", (6, 4), "red"), "MPO", save_all=True, append_images=[Image.new("RGB", (3, 2))])
    assert picture_suffix(data, "x") == ".jpg" and decode_image(data, "x").size == (6, 4)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA"])
def test_alpha_lies_on_white(mode: str) -> None:
    red = Image.new("RGBA", (4, 3), (255, 0, 0, 255))
    red.putalpha(Image.fromarray(np.array([[0, 255, 128, 255]] * 3, np.uint8)))
    image = red.convert(mode) if mode != "PA" else red.convert("L").convert("P")
    if mode == "PA":
        image.putalpha(red.getchannel("A"))
    assert image.mode == mode
    colour = (255, 0, 0) if mode == "RGBA" else (76, 76, 76)
    row = array(to_rgb(image))[0]
    np.testing.assert_array_equal(row[0], (255, 255, 255))
    np.testing.assert_array_equal(row[1], colour)
    expected = np.array(colour) * (128 / 255) + 255 * (127 / 255)
    assert np.abs(row[2] - expected).max() <= 1


def test_premultiplied_grey_lies_on_white() -> None:
    assert array(to_rgb(Image.new("La", (1, 1), (100, 128))))[0, 0, 0] == pytest.approx(100 + 127, abs=1)


def test_transparent_colour_of_a_palette_grey_and_rgb() -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    for data in (
        encoded(palette, "PNG", transparency=1),
        encoded(palette, "GIF", transparency=1),
        encoded(palette, "PNG", transparency=b"\xff\x00\xff"),
    ):
        row = array(decode_image(data, "p"))[0]
        np.testing.assert_array_equal(row, [[10, 20, 30], [255, 255, 255], [70, 80, 90]])
    grey = Image.fromarray(np.array([[0, 9, 255]], np.uint8))
    row = array(decode_image(encoded(grey, "PNG", transparency=9), "g"))[0]
    np.testing.assert_array_equal(row[:, 0], [0, 255, 255])
    rgb = Image.new("RGB", (1, 1), (1, 2, 3))
    np.testing.assert_array_equal(array(decode_image(encoded(rgb, "PNG", transparency=(1, 2, 3)), "c"))[0], [[255] * 3])


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    expected = [0, 0, 1, 128, 255]
    grey = encoded(Image.fromarray(values), "PNG")
    np.testing.assert_array_equal(array(decode_image(grey, "g"))[0, :, 1], expected)
    np.testing.assert_array_equal(array(decode_image(encoded(Image.fromarray(values), "TIFF"), "t"))[0, :, 1], expected)
    big = values.astype(">u2").tobytes()
    rgb = raw_png(5, 1, 16, 2, b"\0" + b"".join(big[2 * k : 2 * k + 2] * 3 for k in range(5)))
    np.testing.assert_array_equal(array(decode_image(rgb, "rgb"))[0, :, 2], expected)
    alpha = raw_png(2, 1, 16, 4, b"\0" + b"\x80\x00\xff\xff" + b"\x80\x00\x00\x00")
    np.testing.assert_array_equal(array(decode_image(alpha, "la"))[0, :, 0], [128, 255])


def test_the_transparent_colour_of_other_depths() -> None:
    """Pillow gives pixels of 2, 4 and 16 bits as 8, and leaves the colour of the tRNS chunk as it is."""

    def with_key(data: bytes, *key: int) -> bytes:
        return data[:33] + png_chunk(b"tRNS", struct.pack(f">{len(key)}H", *key)) + data[33:]

    two = with_key(raw_png(4, 1, 2, 0, b"\0\x1b"), 1)
    np.testing.assert_array_equal(array(decode_image(two, "2"))[0, :, 0], [0, 255, 170, 255])
    four = with_key(raw_png(4, 1, 4, 0, b"\0\x01\x2f"), 2)
    np.testing.assert_array_equal(array(decode_image(four, "4"))[0, :, 0], [0, 17, 255, 255])
    big = np.array([[258, 515, 772], [0, 0, 0]], ">u2").tobytes()
    found = array(decode_image(with_key(raw_png(2, 1, 16, 2, b"\0" + big), 258, 515, 772), "16"))[0]
    np.testing.assert_array_equal(found, [(255, 255, 255), (0, 0, 0)])


def test_pixels_without_a_white_are_refused() -> None:
    for values in (np.ones((2, 2), np.float32), np.full((2, 2), 1 << 20, np.int32)):
        with pytest.raises(WeftError, match=r"deep\.tif: .*convert the picture to 8 or 16 bits"):
            decode_image(encoded(Image.fromarray(values), "TIFF"), "deep.tif")


def test_cmyk_bilevel_and_grey() -> None:
    cmyk = Image.new("CMYK", (4, 4), (0, 255, 255, 0))  # magenta + yellow = red
    for kind in ("JPEG", "TIFF"):
        red, green, blue = array(decode_image(encoded(cmyk, kind), "c"))[0, 0]
        assert red > 250 and green < 5 and blue < 5
    np.testing.assert_array_equal(array(to_rgb(Image.new("1", (1, 1), 1)))[0, 0], [255] * 3)
    np.testing.assert_array_equal(array(to_rgb(Image.new("L", (1, 1), 7)))[0, 0], [7] * 3)


def test_colour_profiles() -> None:
    image = photo()
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for profile in (srgb, b"not a profile"):
        data = encoded(image, "PNG", icc_profile=profile)
        np.testing.assert_array_equal(array(decode_image(data, "p")), np.asarray(image))
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # does not fit RGB pixels
    np.testing.assert_array_equal(array(decode_image(encoded(image, "PNG", icc_profile=lab), "p")), np.asarray(image))


def test_first_frame_of_an_animation(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (6, 5), colour) for colour in ("#ff0000", "#00ff00", "#0000ff")]
    for name in ("a.gif", "a.webp", "a.png"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(array(load_image(tmp_path / name))[0, 0], [255, 0, 0])


def test_the_result_owns_nothing_of_the_file() -> None:
    data = encoded(photo(), "PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    image = decode_image(data, "p")
    assert type(image) is Image.Image and image.info == {} and not image.getexif()


# -- refused by name --


def test_named_refusals(tmp_path: Path) -> None:
    def half(kind: str) -> bytes:
        data = encoded(photo(), kind)
        return data[: len(data) // 2]

    cases = {
        "zero.png": (b"", "is empty"),
        "page.jpg": (b"\n <!DOCTYPE html><html>404</html>", "is a web page"),
        "lfs.png": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
        "draw.png": (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG"),
        "text.png": (b"hello", "is not a picture"),
        "cut.jpg": (half("JPEG"), "damaged or truncated"),
        "cut.png": (half("PNG"), "damaged or truncated"),
        "cut.webp": (half("WEBP"), "damaged or truncated|not a picture"),
        "cut.gif": (half("GIF"), "damaged or truncated"),
        "ps.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is not a picture"),
    }
    for name, (data, message) in cases.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(WeftError, match=message) as caught:
            load_image(tmp_path / name)
        assert name in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(WeftError, match="nothing.png does not exist"):
        load_image(tmp_path / "nothing.png")
    with pytest.raises(WeftError, match="is a folder"):
        load_image(tmp_path)
    assert ImageFile.LOAD_TRUNCATED_IMAGES is False


@pytest.mark.parametrize("rows", [1, 8, 63])
def test_a_header_that_promises_more_rows_than_there_are(rows: int) -> None:
    with pytest.raises(WeftError, match=f"lies.png is damaged or truncated .*{rows * 193} of 12352"):
        decode_image(raw_png(64, 64, 8, 2, (b"\0" + b"\x50" * 192) * rows), "lies.png")


def test_pictures_that_end_in_black_are_whole() -> None:
    black = np.asarray(photo()).copy()
    black[-5:] = 0
    for kind in ("PNG", "GIF", "TIFF"):
        found = array(decode_image(encoded(Image.fromarray(black), kind), kind))
        assert np.abs(found.astype(int) - black).max() <= (30 if kind == "GIF" else 0)
    for mode in ("1", "L", "P", "LA", "RGBA", "I;16"):
        assert decode_image(encoded(Image.new(mode, (13, 7)), "PNG"), mode).size == (13, 7)


ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def interlaced(width: int, height: int, drop: int = 0) -> bytes:
    """A grey Adam7 PNG of 77s (PNG specification, section 8.2); `drop` leaves out so many bytes at its end."""
    rows = b""
    for x, y, dx, dy in ADAM7:
        across, down = -(-(width - x) // dx), -(-(height - y) // dy)
        rows += (b"\0" + b"M" * across) * down if across > 0 and down > 0 else b""
    data = raw_png(width, height, 8, 0, rows[: len(rows) - drop])
    header = data[12:28] + b"\1"
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


@pytest.mark.parametrize("size", [(1, 1), (3, 2), (8, 8), (13, 17)])
def test_interlaced_png(size: tuple[int, int]) -> None:
    np.testing.assert_array_equal(np.unique(array(decode_image(interlaced(*size), "i"))), [77])
    with pytest.raises(WeftError, match="i.png is damaged or truncated"):
        decode_image(interlaced(*size, drop=1), "i.png")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "TIFF"])
def test_every_truncation_is_refused_or_complete(kind: str) -> None:
    data = encoded(photo(), kind)
    whole = array(decode_image(data, "x"))
    refused = 0
    for end in range(1, len(data), max(1, len(data) // 150)):
        try:
            found = array(decode_image(data[:end], "x.pic"))
        except WeftError as error:
            assert str(error).startswith("x.pic")
            refused += 1
        else:
            np.testing.assert_array_equal(found, whole)
    assert refused > 75


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM"]), st.data())
def test_damaged_bytes_never_escape_as_another_error(kind: str, data: st.DataObject) -> None:
    bytes_ = bytearray(encoded(photo(12, 9), kind))
    for _ in range(data.draw(st.integers(1, 4))):
        bytes_[data.draw(st.integers(0, len(bytes_) - 1))] = data.draw(st.integers(0, 255))
    try:
        assert decode_image(bytes(bytes_), "fuzz", max_pixels=10_000).mode == "RGB"
    except WeftError as error:
        assert "fuzz" in str(error)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("size", [(50_000, 50_000), (12_000, 9_000)])
def test_bombs_are_refused_before_anything_is_allocated(tmp_path: Path, size: tuple[int, int]) -> None:
    path = tmp_path / "bomb.png"
    path.write_bytes(raw_png(*size, 1, 0, bytes((size[0] // 8 + 1) * size[1])))
    gif = tmp_path / "bomb.gif"
    gif.write_bytes(
        b"GIF89a" + struct.pack("<HHBBB", *size, 0, 0, 0) + b"," + struct.pack("<HHHHB", 0, 0, *size, 0) + b"\2"
    )
    for bomb in (path, gif):
        tracemalloc.start()
        with pytest.raises(WeftError, match=f"{bomb.name} is too large"):
            load_image(bomb)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2_000_000
    with pytest.raises(WeftError, match="960 pixels|40 x 24"):
        decode_image(encoded(photo(), "PNG"), "x", max_pixels=959)
    assert decode_image(encoded(photo(), "PNG"), "x", max_pixels=960).size == (40, 24)


def test_text_bomb_in_metadata() -> None:
    text = png_chunk(b"zTXt", b"weft\0\0" + zlib.compress(bytes(200_000_000)))
    data = encoded(photo(), "PNG")
    with pytest.raises(WeftError, match="bomb is damaged"):
        decode_image(data[:33] + text + data[33:], "bomb")


def test_many_frames_cost_nothing() -> None:
    frame = encoded(Image.new("P", (2, 2)), "GIF")
    body = frame[frame.index(b",") : -1]
    data = frame[:-1] + (b"!\xf9\4\0\0\0\0\0" + body) * 100_000 + b";"
    assert decode_image(data, "long.gif").size == (2, 2)


# -- writing --


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".jpeg", ".webp", ".PNG"])
def test_metadata_round_trip(tmp_path: Path, suffix: str) -> None:
    metadata = {"seed": 7, "model": "tiny", "instruction": 'mach den Stern größer 🟥\n"{x}"'}
    path = save_image(photo(), tmp_path / "new" / f"a{suffix}", metadata)
    assert read_metadata(path) == metadata
    assert np.abs(array(load_image(path)).astype(int) - np.asarray(photo())).max() <= (
        0 if suffix.lower() == ".png" else 40
    )
    assert read_metadata(save_image(photo(), tmp_path / f"b{suffix}")) == {}
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []


def test_metadata_of_nothing_and_of_strangers(tmp_path: Path) -> None:
    photo().save(tmp_path / "stranger.png")
    assert read_metadata(tmp_path / "stranger.png") == {}
    (tmp_path / "bad.png").write_bytes(b"x")
    with pytest.raises(WeftError, match="bad.png has no readable metadata"):
        read_metadata(tmp_path / "bad.png")
    with pytest.raises(WeftError, match="does not exist"):
        read_metadata(tmp_path / "none.png")


def test_writing_refusals(tmp_path: Path) -> None:
    with pytest.raises(WeftError, match=r"cannot write the suffix '.bmp', use one of .png"):
        save_image(photo(), tmp_path / "a.bmp")
    with pytest.raises(WeftError, match="write a PNG"):
        save_image(photo(), tmp_path / "a.jpg", {"x": "y" * 70_000})
    (tmp_path / "file").write_text("")
    with pytest.raises(WeftError, match="cannot be written"):
        save_image(photo(), tmp_path / "file" / "a.png")


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_image(photo(), tmp_path / "a.png")
    before = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("weft.media.os.fsync", full)
    with pytest.raises(WeftError, match=r"a\.png cannot be written \(No space left"):
        save_image(photo(30, 30), path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as handle:
        handle.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    with atomic_write(path) as handle:
        handle.write(b"new")
        assert path.read_bytes() == b"old"
    assert path.read_bytes() == b"new"


def test_lazy_picture() -> None:
    reads = []

    def read() -> bytes:
        reads.append(1)
        return encoded(photo(), "PNG")

    lazy = LazyPicture("shard:7", read)
    assert not reads
    assert image_part(lazy).load().size == (40, 24) and len(reads) == 1  # its digest takes another reading
    reads.clear()
    assert lazy.load().size == (40, 24) and lazy.digest == lazy.digest and len(reads) == 2
    with pytest.raises(WeftError, match="shard:8 is empty"):
        LazyPicture("shard:8", lambda: b"").load()
