"""Contact sheets: rows of small pictures, enlarged without blur, with labels and captions that can be read."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from weft.errors import WeftError
from weft.media import save_image

PAPER, INK, QUIET, RULE = (255, 255, 255), (28, 30, 33), (110, 115, 122), (214, 217, 221)
GAP = 12  # pixels between pictures and around the sheet


def contact_sheet(
    rows: Sequence[Sequence[Image.Image | None]],
    *,
    columns: Sequence[str],
    captions: Sequence[str] | None = None,
    scale: int = 3,
    path: str | Path | None = None,
) -> Image.Image:
    """Lay out pictures in labelled columns, each row with a caption below it; optionally save it.

    Pictures are enlarged `scale` times by nearest neighbour, so that a pixel stays a pixel. A missing picture
    (None) is an empty frame; a short row is filled with them. Captions wrap at the sheet's width.

    Raises:
        WeftError: no rows or columns, a row longer than `columns`, as many captions as not rows, scale below 1.
    """
    if not rows or not columns:
        raise WeftError(f"a contact sheet needs rows and columns; it got {len(rows)} rows, {len(columns)} columns")
    if scale < 1:
        raise WeftError(f"scale is {scale}; it must be at least 1")
    if captions is not None and len(captions) != len(rows):
        raise WeftError(f"{len(captions)} captions for {len(rows)} rows; give one caption for each row")
    for index, row in enumerate(rows):
        if len(row) > len(columns):
            raise WeftError(f"row {index} has {len(row)} pictures for {len(columns)} columns; name every column")
    cells = [[*row, *[None] * (len(columns) - len(row))] for row in rows]
    label_font, caption_font = _font(12), _font(13)

    # An empty frame takes the size of the other pictures, so that columns of gaps keep the grid.
    common = max((image.width for row in cells for image in row if image), default=64) * scale
    widths = [
        max(max((image.width * scale for image in column if image), default=common), _width(name, label_font))
        for column, name in zip(zip(*cells, strict=True), columns, strict=True)
    ]
    total = sum(widths) + GAP * (len(widths) + 1)
    heights = [max((image.height * scale for image in row if image), default=common) for row in cells]
    wrapped = [_wrap(text, caption_font, total - 2 * GAP) for text in captions] if captions else [[] for _ in cells]
    line = _line_height(caption_font)
    label_height = _line_height(label_font) + 6
    bottom = sum(heights) + sum(line * len(text) + (6 if text else 0) + GAP for text in wrapped)
    sheet = Image.new("RGB", (total, GAP + label_height + bottom), PAPER)
    draw = ImageDraw.Draw(sheet)

    lefts = [GAP + sum(widths[:k]) + GAP * k for k in range(len(widths))]
    for left, name in zip(lefts, columns, strict=True):
        draw.text((left, GAP), name, font=label_font, fill=QUIET)
    top = GAP + label_height
    for row, height, text in zip(cells, heights, wrapped, strict=True):
        for left, image in zip(lefts, row, strict=True):
            if image is None:
                draw.rectangle((left, top, left + min(common, height) - 1, top + height - 1), outline=RULE)
            else:
                sheet.paste(enlarge(image, scale), (left, top))
        top += height + (6 if text else 0)
        for words in text:
            draw.text((GAP, top), words, font=caption_font, fill=INK)
            top += line
        top += GAP
    if path is not None:
        save_image(sheet, path)
    return sheet


def enlarge(image: Image.Image, scale: int) -> Image.Image:
    """The RGB picture, `scale` times as large, every pixel a crisp square."""
    image = image.convert("RGB")
    return image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST) if scale > 1 else image


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    # DejaVu ships with matplotlib and, unlike Pillow's own font, covers arrows, ticks and most scripts.
    import matplotlib

    return ImageFont.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), size)


def _line_height(font: ImageFont.FreeTypeFont) -> int:
    ascent, descent = font.getmetrics()
    return ascent + descent + 2


def _width(text: str, font: ImageFont.FreeTypeFont) -> int:
    return int(font.getlength(text) + 0.999)


def _wrap(text: str, font: ImageFont.FreeTypeFont, width: int) -> list[str]:
    """Break into lines no wider than `width` pixels, at spaces, or inside a word that alone is too long."""
    lines: list[str] = []
    for paragraph in text.splitlines():
        current = ""
        for word in paragraph.split():
            joined = f"{current} {word}" if current else word
            if _width(joined, font) <= width:
                current = joined
                continue
            if current:
                lines.append(current)
            while _width(word, font) > width and len(word) > 1:
                cut = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or _width(word[:n], font) <= width)
                lines.append(word[:cut])
                word = word[cut:]
            current = word
        lines.append(current)
    return lines
