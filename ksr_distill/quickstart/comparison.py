"""The picture at the top of the README: one crop of a held-out photo, by each model."""

from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

CROP_PX = 112
MAGNIFICATION = 2
MARGIN_PX = 8
LABEL_PX = 28


def write_comparison(
    pictures: Sequence[tuple[str, Path]], place: tuple[int, int], out: Path
) -> None:
    """Write the same crop of every picture side by side, each pixel as a square, labelled above.

    Args:
        pictures: (label, file), of one size.
        place: Left and top of the crop, px.
        out: The file to write.
    """
    side = CROP_PX * MAGNIFICATION
    size = (len(pictures) * (side + MARGIN_PX) - MARGIN_PX, side + LABEL_PX)
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)
    left, top = place
    for number, (label, file) in enumerate(pictures):
        with Image.open(file) as image:
            crop = image.convert("RGB").crop((left, top, left + CROP_PX, top + CROP_PX))
        x = number * (side + MARGIN_PX)
        draw.text((x, 4), label, fill="black", font=ImageFont.load_default(15))
        sheet.paste(crop.resize((side, side), Image.Resampling.NEAREST), (x, LABEL_PX))
    sheet.save(out, optimize=True)
