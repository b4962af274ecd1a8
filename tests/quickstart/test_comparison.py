import numpy as np
from PIL import Image

from ksr_distill.quickstart.comparison import CROP_PX, LABEL_PX, MARGIN_PX, write_comparison


def test_the_same_place_of_every_picture_is_shown_in_order(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, (160, 200, 3), dtype=np.uint8) for _ in range(2)]
    files = [tmp_path / f"{i}.png" for i in range(2)]
    for array, file in zip(arrays, files, strict=True):
        Image.fromarray(array).save(file)
    out = tmp_path / "sheet.png"
    write_comparison([("a", files[0]), ("b", files[1])], (30, 20), out)
    sheet = np.asarray(Image.open(out))
    side = 2 * CROP_PX
    for i, array in enumerate(arrays):
        x = i * (side + MARGIN_PX)
        shown = sheet[LABEL_PX:, x : x + side][::2, ::2]
        assert np.array_equal(shown, array[20 : 20 + CROP_PX, 30 : 30 + CROP_PX])
