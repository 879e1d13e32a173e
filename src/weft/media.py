"""Pictures in and out of files: decoded once and correctly, refused by name, written atomically with their metadata."""

from __future__ import annotations

import hashlib
import io
import json
import os
import secrets
import struct
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image, ImageCms, ImageOps, PngImagePlugin, features

from weft.errors import WeftError

MAX_PIXELS = 89_478_485  # Pillow's own warning level: a quarter of a gigabyte in RGB
_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"]  # no vector format: those run Ghostscript
if features.check("avif"):  # Pillow from 11.3 on
    _FORMATS.append("AVIF")
_SAVE = {
    ".png": ("PNG", {}),
    ".jpg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".jpeg": ("JPEG", {"quality": 95, "subsampling": 0}),
    ".webp": ("WEBP", {"quality": 95}),
}
_KEY = "weft"  # the PNG text chunk
_EXIF_IFD, _USER_COMMENT, _ORIENTATION, _ASCII = 0x8769, 0x9286, 0x0112, b"ASCII\0\0\0"

T = TypeVar("T")


class LazyPicture:
    """An encoded picture that is read when it is needed (a parquet cell, a tar member): a value for `weft.record.Part`.

    `read` gives the bytes of the picture file, `name` stands in the errors.
    """

    def __init__(self, name: str, read: Callable[[], bytes]) -> None:
        self.name, self.read = name, read
        self._digest: str | None = None

    def load(self) -> Image.Image:
        """The decoded picture; see `decode_image`."""
        return decode_image(self.read(), self.name)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as `image_size` reads it."""
        return _size(io.BytesIO(self.read()), self.name)

    @property
    def digest(self) -> str:
        """SHA-256 of the encoded bytes, hexadecimal."""
        if self._digest is None:
            self._digest = hashlib.sha256(self.read()).hexdigest()
        return self._digest


def load_image(path: str | Path, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of a file as 8-bit RGB, upright.

    The EXIF orientation is applied, alpha is laid on white, CMYK and pictures with a foreign colour profile become
    sRGB, 16 bits are reduced to their upper 8, and of an animation the first frame is taken.

    Raises `WeftError` with the file's name if it is missing, empty, truncated, not a picture, or larger than
    `max_pixels` (which is read from the header: nothing is allocated for a decompression bomb).
    """
    return _of_file(path, lambda handle, name: _decode(handle, name, max_pixels))


def image_size(path: str | Path) -> tuple[int, int]:
    """(width, height) of the picture that `load_image` gives, from the file's header alone. Raises as `load_image`,
    but does not see what is wrong with the pixels."""

    return _of_file(path, _size)


def _size(handle: BinaryIO, name: str) -> tuple[int, int]:
    def upright(image: Image.Image) -> tuple[int, int]:
        # Pillow's own `getexif` of a PNG decodes the picture to see whether an EXIF chunk follows the pixels
        skip = image.format == "PNG" and not _late_exif(handle)
        exif = Image.Image.getexif(image) if skip else image.getexif()
        return image.size[::-1] if exif.get(_ORIENTATION) in (5, 6, 7, 8) else image.size

    return _opened(handle, name, MAX_PIXELS, upright)


def _late_exif(handle: BinaryIO) -> bool:
    """Whether a PNG has an EXIF chunk, or ImageMagick's text in place of one, behind its pixels."""
    before, names = handle.tell(), list[bytes]()
    handle.seek(8)
    while len(head := handle.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        names.append(name)
        handle.seek(length + 4, io.SEEK_CUR)
    handle.seek(before)
    behind = names[names.index(b"IDAT") :] if b"IDAT" in names else []
    return not {b"eXIf", b"zTXt", b"tEXt", b"iTXt"}.isdisjoint(behind)


def _of_file(path: str | Path, read: Callable[[BinaryIO, str], T]) -> T:
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not a picture" if path.is_dir() else "does not exist: check the path"
        raise WeftError(f"{path} {what}")
    try:
        handle = path.open("rb")
    except OSError as error:
        raise WeftError(f"{path} cannot be opened ({error.strerror}): check its permissions") from error
    with handle:
        return read(handle, str(path))


def decode_image(data: bytes, name: str, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture of an encoded file in memory as 8-bit RGB; `name` stands in the errors. See `load_image`."""
    return _decode(io.BytesIO(data), name, max_pixels)


def _decode(handle: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    def whole(image: Image.Image) -> Image.Image:
        image.load()
        if image.format == "PNG":
            _refuse_missing_rows(image, handle)
            _scale_transparency(image, handle)
        return to_rgb(image)

    return _opened(handle, name, max_pixels, whole)


def _opened(handle: BinaryIO, name: str, max_pixels: int, use: Callable[[Image.Image], T]) -> T:
    """What `use` makes of an opened picture; everything that can be wrong with it is a `WeftError` with its name."""
    head = handle.read(512)
    handle.seek(0)
    if not head:
        raise WeftError(f"{name} is empty (0 bytes): download or write it again")
    try:
        with Image.open(handle, formats=_FORMATS) as image:
            if image.width * image.height > max_pixels:
                raise WeftError(_too_large(name, f"{image.width} x {image.height}", max_pixels))
            return use(image)
    except WeftError as error:
        raise error if name in str(error) else WeftError(f"{name}: {error}") from error
    except Image.UnidentifiedImageError as error:
        raise WeftError(f"{name} {_not_a_picture(head)}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise WeftError(_too_large(name, "more than that", max_pixels)) from error
    except Exception as error:  # decoders meet hostile bytes with every kind of exception
        raise WeftError(f"{name} is damaged or truncated ({error}): replace the file") from error


def _refuse_missing_rows(image: Image.Image, handle: BinaryIO) -> None:
    """Raise `EOFError` for a PNG whose stream ends before its last row, which Pillow fills with zeros.

    The stream is inflated a second time, so only where zeros could be such rows.
    """
    bits, colour, interlaced = _png_header(handle)
    last = image.crop((0, image.height - 1, image.width, image.height))
    if not interlaced and any(last.tobytes()):
        return
    bits *= {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    expected = 0
    for x, y, dx, dy in _ADAM7 if interlaced else ((0, 0, 1, 1),):
        width, height = -(-(image.width - x) // dx), -(-(image.height - y) // dy)
        if width > 0 and height > 0:
            expected += height * (1 + (width * bits + 7) // 8)
    found = _inflated_size(handle, expected)
    if found < expected:
        raise EOFError(f"{found} of {expected} bytes of pixels")


def _scale_transparency(image: Image.Image, handle: BinaryIO) -> None:
    """Bring the transparent colour of a PNG to the 8 bits that Pillow gives its pixels, but not this colour."""
    bits, colour, _ = _png_header(handle)
    key = image.info.get("transparency")
    if colour == 0 and bits in (2, 4) and key is not None:
        image.info["transparency"] = key * 255 // (2**bits - 1)
    elif colour == 2 and bits == 16 and key is not None:
        image.info["transparency"] = tuple(value >> 8 for value in key)


_ADAM7 = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))


def _png_header(handle: BinaryIO) -> tuple[int, int, bool]:
    """Bits per channel, colour type, interlaced: of the IHDR chunk, which is the first."""
    handle.seek(24)
    bits, colour, _, _, interlaced = handle.read(5)
    return bits, colour, bool(interlaced)


def _inflated_size(handle: BinaryIO, enough: int) -> int:
    """Bytes of pixels in the IDAT chunks, counted up to `enough` and never held."""
    handle.seek(8)
    stream, size = zlib.decompressobj(), 0
    while size < enough and len(head := handle.read(8)) == 8:
        length, name = struct.unpack(">I4s", head)
        data = handle.read(length) if name == b"IDAT" else b""
        while data and size < enough:
            size += len(stream.decompress(data, 1 << 20))
            data = stream.unconsumed_tail
        handle.seek(4 if name == b"IDAT" else length + 4, io.SEEK_CUR)
    return size


def picture_suffix(data: bytes, name: str) -> str:
    """The usual suffix (".png", ".jpg") of an encoded picture. Raises `WeftError` if it is none."""
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            kind = str(image.format)
            # MPO: a JPEG with further pictures behind it, as many telephones write
            return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")
    except Exception as error:  # as in `_decode`
        raise WeftError(f"{name} {_not_a_picture(data[:512])}") from error


def _too_large(name: str, size: str, max_pixels: int) -> str:
    return f"{name} is too large: {size} pixels, the limit is {max_pixels} in all: scale it down first"


def _not_a_picture(head: bytes) -> str:
    start = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if start.startswith((b"<!doctype html", b"<html", b"<head", b"<body")):
        return "is a web page, not a picture: download the picture itself"
    if start.startswith((b"<svg", b"<?xml")):
        return "is an SVG or XML file: export it as PNG"
    if start.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the picture: run git lfs pull"
    return "is not a picture that can be read: use PNG, JPEG, WebP, GIF, BMP or TIFF"


def to_rgb(image: Image.Image) -> Image.Image:
    """Any Pillow picture as upright 8-bit RGB without metadata: EXIF orientation applied, alpha on white, 16 bits to
    the upper 8, profile to sRGB."""
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        rgb = _from_integers(image)
    elif image.mode == "F":
        raise WeftError("floating-point pixels have no defined white: convert the picture to 8 or 16 bits")
    elif image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = _to_srgb((image.convert("LA") if image.mode == "La" else image).convert("RGBA"), image)
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    elif image.mode == "CMYK":
        managed = _to_srgb(image, image)
        rgb = managed if managed.mode == "RGB" else image.convert("RGB")
    else:
        rgb = _to_srgb(image.convert("RGB"), image)
    rgb.info = {}
    return rgb


def _from_integers(image: Image.Image) -> Image.Image:
    """Grey of 16 bits (Pillow's modes I;16* and I), which `convert` would clip instead of scale."""
    grey = np.asarray(image).astype(np.int64)  # [H, W]
    if grey.size and (grey.max() > 65535 or grey.min() < 0):
        raise WeftError("32-bit integer pixels have no defined white: convert the picture to 8 or 16 bits")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[grey == transparent] = 65535
    return Image.fromarray((grey >> 8).astype(np.uint8)).convert("RGB")


def _to_srgb(image: Image.Image, origin: Image.Image) -> Image.Image:
    """Apply the embedded colour profile of `origin`, if it is another one than sRGB and fits the pixels."""
    data = origin.info.get("icc_profile")
    if not data:
        return image
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        space = profile.profile.xcolor_space.strip()
        if "srgb" in (profile.profile.profile_description or "").lower():
            return image
        if space != ("CMYK" if image.mode == "CMYK" else "RGB"):
            return image
        mode = "RGBA" if image.mode == "RGBA" else "RGB"
        managed = ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode=mode)
    except (ImageCms.PyCMSError, OSError):  # an unreadable profile is ignored, as every browser does
        return image
    assert managed is not None
    return managed


def save_image(image: Image.Image, path: str | Path, metadata: dict[str, Any] | None = None) -> Path:
    """Write PNG, JPEG or WebP by the suffix, atomically: at any time the file is the old one or the whole new one.

    `metadata` (JSON) goes into a PNG text chunk `weft`, or into the EXIF user comment of JPEG and WebP.
    Folders above it are made. Raises `WeftError` for another suffix and for a full or read-only disk.
    """
    path = Path(path)
    if path.suffix.lower() not in _SAVE:
        raise WeftError(f"{path}: cannot write the suffix '{path.suffix}', use one of {', '.join(_SAVE)}")
    kind, options = _SAVE[path.suffix.lower()]
    extra: dict[str, Any] = dict(options)
    if metadata:
        extra |= _embed(kind, json.dumps(metadata, ensure_ascii=True), path)
    with atomic_write(path) as handle:
        to_rgb(image).save(handle, format=kind, **extra)
    return path


def _embed(kind: str, text: str, path: Path) -> dict[str, Any]:
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt(_KEY, text)
        return {"pnginfo": info}
    if len(text) > 60_000:
        raise WeftError(f"{path}: {len(text)} bytes of metadata, EXIF holds 60000: write a PNG")
    exif = Image.Exif()
    exif.get_ifd(_EXIF_IFD)[_USER_COMMENT] = _ASCII + text.encode()
    return {"exif": exif.tobytes()}


def read_metadata(path: str | Path) -> dict[str, Any]:
    """The metadata that `save_image` put into a picture; {} if there is none. Raises as `load_image`."""
    path = Path(path)
    if not path.is_file():
        raise WeftError(f"{path} does not exist: check the path")
    try:
        with Image.open(path, formats=_FORMATS) as image:
            if isinstance(image, PngImagePlugin.PngImageFile):
                text = image.text.get(_KEY)  # also loads chunks that follow the pixels
            else:
                comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
                text = comment[8:].decode() if isinstance(comment, bytes) and comment.startswith(_ASCII) else None
        found = json.loads(text) if text else {}
    except Exception as error:  # as in `_decode`: hostile bytes, every kind of exception
        raise WeftError(f"{path} has no readable metadata ({error}): it is damaged or not a picture") from error
    return found if isinstance(found, dict) else {}


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """A binary file that appears under `path` only when it is complete and on disk (same folder, fsync, rename).

    On any error nothing of it is left and an older file stays. Raises `WeftError` where the disk refuses.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name[:80]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        why = error.strerror or error
        raise WeftError(f"{path} cannot be written ({why}): free space, or write elsewhere") from error
    finally:
        with suppress(OSError):  # nothing may hide the error above
            temporary.unlink(missing_ok=True)
