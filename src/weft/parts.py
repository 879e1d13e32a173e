"""Parts and turns, the pieces of a record, and how a sentence is woven into parts. Import them from `weft.record`."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import WeftError

if TYPE_CHECKING:
    from PIL import Image

TYPES = ("text", "image", "motion")
PART_ROLES = ("source", "reference", "mask", "start", "end", "rejected")
TURN_ROLES = ("user", "assistant")
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".avif")
MOTION_SUFFIXES = (".bvh", ".amc", ".npz", ".npy", ".glb")


@dataclass(slots=True)
class Part:
    """Text, a picture or a movement.

    A medium is a `path` (relative to its record's folder; absolute only in memory) or a `value` in memory:
    a PIL picture, or any object with `.load()` and `.digest` (a lazy picture, a `weft.motion.Motion`).
    """

    type: str
    text: str | None = None
    path: str | None = None
    role: str | None = None
    value: Any = None

    def load(self, root: Path | None = None) -> Image.Image:
        """The picture as upright 8-bit RGB. Raises `WeftError` as `weft.media.load_image` does.

        Movements are loaded by `weft.motion.load_part`.
        """
        if self.type != "image":
            hint = "weft.motion.load_part reads it" if self.type == "motion" else "only image parts load as one"
            raise WeftError(f"a {self.type} part is not a picture: {hint}")
        from PIL.Image import Image as Picture  # Pillow only where a picture is really needed

        from weft.media import load_image, to_rgb

        if self.value is not None:
            return to_rgb(self.value if isinstance(self.value, Picture) else self.value.load())
        return load_image(self.file(root))

    def file(self, root: Path | None = None) -> Path:
        """Where the medium lies; `root` is the record's folder. Raises `WeftError` for a part without a path."""
        if self.path is None:
            raise WeftError(f"this {self.type} part lives in memory and has no file: write the record first")
        return Path(root, self.path) if root is not None else Path(self.path)

    def digest(self, root: Path | None = None) -> str:
        """SHA-256 (hexadecimal) of the content: the file's bytes, the lazy value's own, or the pixels."""
        if self.type == "text":
            return hashlib.sha256((self.text or "").encode()).hexdigest()
        if self.value is None:
            return file_digest(self.file(root))
        if hasattr(self.value, "digest"):
            return str(self.value.digest)
        pixels = self.load()
        return hashlib.sha256(f"RGB {pixels.width}x{pixels.height}\n".encode() + pixels.tobytes()).hexdigest()


@dataclass(slots=True)
class Turn:
    """What one side says: `role` user or assistant, `parts` in order."""

    role: str
    parts: list[Part]


def targets_of(turn: Turn) -> list[Part]:
    return [p for p in turn.parts if p.type != "text" and p.role != "rejected"]


def is_reference(part: Part) -> bool:
    return part.type != "text" and part.role in (None, "reference")


def text_part(text: str) -> Part:
    """A text part."""
    return Part("text", text=text)


def image_part(medium: Any, role: str | None = None) -> Part:
    """An image part of a path, a PIL picture or a lazy picture (`.load()`, `.digest`)."""
    if isinstance(medium, str | Path):
        return Part("image", path=Path(medium).as_posix(), role=role)
    return Part("image", role=role, value=medium)


def motion_part(medium: Any, role: str | None = None) -> Part:
    """A motion part of a path or a value in memory."""
    if isinstance(medium, str | Path):
        return Part("motion", path=Path(medium).as_posix(), role=role)
    return Part("motion", role=role, value=medium)


def instruction_text(turn: Turn, name: str = "picture {k}", first: int = 1) -> str:
    """The text of a turn with its woven references named by `name` at their place.

    `k` counts the input pictures from `first`, the source before the references. Movements are counted on their
    own and read "motion k". References before an empty text part are attached: counted, but not named. White space
    around the whole is dropped.
    """
    counts = {"image": first, "motion": 1}
    attached = 0  # parts before this one
    for k, part in enumerate(turn.parts):
        if part.role == "source":
            counts[part.type] += 1
        if part.type == "text" and not part.text:
            attached = k
    text = ""
    for k, part in enumerate(turn.parts):
        piece = part.text or ""
        if is_reference(part):
            if k >= attached:
                piece = (name if part.type == "image" else "motion {k}").format(k=counts[part.type])
            counts[part.type] += 1
        if text and piece and text[-1].isalnum() and piece[0].isalnum():
            text += " "
        text += piece
    return text.strip()


def weave(text: str, root: str | Path | None = None) -> list[Part]:
    """Read "the object of {a.png} with the pattern of {b.png}": text parts and references, in order.

    `{{` and `}}` are braces. With `root`, files must lie in that folder; without, paths are the user's own.
    Raises `WeftError` for a missing file, an unknown suffix, or an unmatched brace.
    """
    parts: list[Part] = []
    literal, k = "", 0
    while k < len(text):
        if text[k : k + 2] in ("{{", "}}"):
            literal, k = literal + text[k], k + 2
        elif text[k] == "{":
            end = text.find("}", k)
            if end < 0:
                raise WeftError(f"instruction: '{{' at character {k + 1} is not closed: write }} or, for a brace, {{{{")
            parts += [text_part(literal)] if literal else []  # an empty text part would mean something else
            parts.append(_woven(text[k + 1 : end].strip(), root))
            literal, k = "", end + 1
        elif text[k] == "}":
            raise WeftError(f"instruction: '}}' at character {k + 1} closes nothing: write }}}} for a brace")
        else:
            literal, k = literal + text[k], k + 1
    return parts + ([text_part(literal)] if literal or not parts else [])


def _woven(name: str, root: str | Path | None) -> Part:
    if not name:
        raise WeftError("instruction: {} names no file: write {picture.png}, or {{}} for the braces")
    path = Path(name) if root is None else Path(root, relative_path(name, "instruction"))
    if not os.path.isfile(path):  # unlike Path's it takes a name that is too long for one that is not there
        raise WeftError(f"instruction: {{{name}}}: no such file {path}: check the path, or write {{{{ for a brace")
    kind = kind_of(path)
    return Part(kind, path=path.absolute().as_posix(), role="reference")


def kind_of(path: Path) -> str:
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return "image"
    if path.suffix.lower() in MOTION_SUFFIXES:
        return "motion"
    raise WeftError(f"{path}: unknown suffix '{path.suffix}', use one of {', '.join(IMAGE_SUFFIXES + MOTION_SUFFIXES)}")


def relative_path(name: str, field: str) -> str:
    """A media path as records hold it: relative, with `/`. Raises `WeftError` for any way out of the folder."""
    path = name.replace("\\", "/")
    if "://" in path or path.startswith("data:"):
        raise WeftError(f"{field}: '{short(name)}' is a URL: download the file beside the records")
    if path.startswith("/") or path[1:2] == ":":
        raise WeftError(f"{field}: '{short(name)}' is absolute: write it relative to the records' folder")
    if ".." in path.split("/"):
        raise WeftError(f"{field}: '{short(name)}' leaves the records' folder: move the file below it")
    long = any(len(piece.encode("utf-8", "surrogatepass")) > 255 for piece in path.split("/")) or len(path) > 1024
    if not path or "\0" in path or long:  # a picture's bytes as text are a common find
        raise WeftError(f"{field}: '{short(name)}' is not a path: name a file")
    return path


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, hexadecimal; remembered as long as its size and time of change stay."""
    try:
        stat = Path(path).stat()
        return _file_digest(str(Path(path).absolute()), stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise WeftError(f"{path} cannot be read ({error.strerror}): check the path") from error


@lru_cache(maxsize=1 << 17)
def _file_digest(path: str, size: int, mtime_ns: int) -> str:
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
