import pytest
import torch

from ksr_distill.degradation import BicubicDegradation
from ksr_distill.evaluation.benchmark_images import (
    as_picture,
    common_scale,
    find_images,
    load_pair,
    read_image,
    write_image,
)
from ksr_distill.levels import round_to_8_bit
from ksr_distill.randomness import generator_for
from tests.evaluation.conftest import photo, write_pair


def load(image, degradation=None):
    return load_pair(image, scale=2, degradation=degradation, generator=generator_for(0))


def test_pairs_are_found_by_their_endings(pairs):
    images = find_images(pairs)
    assert [image.name for image in images] == ["bird", "house", "sea"]
    assert common_scale(images) == 2
    pair = load(images[0])
    assert pair.lowres.shape == (1, 3, 40, 32)
    assert pair.hires.shape == (1, 3, 80, 64)


def test_a_file_survives_writing_and_reading(tmp_path):
    image = photo()
    write_image(image, tmp_path / "new" / "image.png")
    torch.testing.assert_close(read_image(tmp_path / "new" / "image.png"), round_to_8_bit(image))


def test_two_folders_are_matched_by_name_with_or_without_the_scale(tmp_path):
    for folder, ending, size in (("hr", "", (64, 80)), ("lr", "x2", (32, 40))):
        (tmp_path / folder).mkdir()
        as_picture(photo()).resize(size).save(tmp_path / folder / f"0801{ending}.png")
    (image,) = find_images(tmp_path / "hr", tmp_path / "lr")
    assert image.name == "0801"
    assert common_scale([image]) == 2


def test_photos_are_cut_to_the_scale_and_degraded_by_the_recipe(tmp_path):
    write_image(photo()[..., :79, :63], tmp_path / "photo.png")
    images = find_images(tmp_path)
    assert common_scale(images) is None
    recipe = BicubicDegradation(scale=2)
    pair = load(images[0], recipe)
    assert pair.hires.shape == (1, 3, 78, 62)
    assert torch.equal(pair.lowres, recipe(pair.hires, generator=generator_for(0)))


def test_photos_without_a_recipe_are_refused(tmp_path):
    write_image(photo(), tmp_path / "photo.png")
    with pytest.raises(ValueError, match="photo has no lowres; name a recipe"):
        load(find_images(tmp_path)[0])


def test_a_missing_partner_is_named(pairs):
    (pairs / "house_LR.png").unlink()
    with pytest.raises(ValueError, match=r"has no house_LR\.\* beside its partner"):
        find_images(pairs)


def test_sizes_that_do_not_fit_are_named(pairs):
    as_picture(photo()).resize((30, 40)).save(pairs / "sea_LR.png")
    with pytest.raises(ValueError, match="sea: the original is 64x80 px and the lowres 30x40 px"):
        common_scale(find_images(pairs))


def test_pairs_of_two_scales_are_refused(pairs):
    write_pair(pairs, "zoo", photo(), scale=4)
    with pytest.raises(ValueError, match=r"zoo: .* ×2 needs 32x40"):
        common_scale(find_images(pairs))


def test_mismatched_folders_name_the_file_that_stands_alone(tmp_path):
    write_image(photo(), tmp_path / "hr" / "a.png")
    write_image(photo(), tmp_path / "hr" / "b.png")
    write_image(photo(), tmp_path / "lr" / "a.png")
    with pytest.raises(ValueError, match=r"b\.png has no lowres of its name"):
        find_images(tmp_path / "hr", tmp_path / "lr")
    write_image(photo(), tmp_path / "lr" / "c.png")
    with pytest.raises(ValueError, match=r"c\.png has no original of its name"):
        find_images(tmp_path / "hr", tmp_path / "lr")


def test_missing_and_empty_folders_and_files_that_are_no_pictures_are_refused(tmp_path):
    with pytest.raises(ValueError, match="benchmark is not set"):
        find_images(None)
    with pytest.raises(ValueError, match="nowhere is no folder"):
        find_images(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no pictures; allowed are \.png"):
        find_images(tmp_path)
    (tmp_path / "a.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"a\.png cannot be read as a picture"):
        load(find_images(tmp_path)[0], BicubicDegradation(scale=2))


def test_two_files_of_one_name_are_refused(tmp_path):
    as_picture(photo()).save(tmp_path / "a.png")
    as_picture(photo()).save(tmp_path / "a.jpg")
    with pytest.raises(ValueError, match="have one name; rename one of them"):
        find_images(tmp_path)
