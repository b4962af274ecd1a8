"""Building: bad input is named in one line and leaves nothing behind."""

import sqlite3
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from ksr_distill.study.basket import Prompt, read_basket
from ksr_distill.study.build import StudyPlan, build_study
from tests.study.studies import make_study_of, write_basket, write_picture

ROWS = [("p0", "a cat", "animals"), ("p1", "a dog", "animals"), ("p2", "a tree", "plants")]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_basket(tmp_path / "basket.csv", ROWS)
    for index in range(3):
        write_picture(tmp_path / "a" / f"p{index}.png", (24, 16), index)
        write_picture(tmp_path / "b" / f"p{index}.png", (48, 32), index)
    return tmp_path


def build(folder: Path, **plan: object) -> Path:
    plan = StudyPlan(**{"num_checks": 1, **plan})
    prompts = read_basket(folder / "basket.csv")
    build_study(folder / "a", folder / "b", prompts, folder / "study", plan=plan)
    return folder / "study"


def pairs_of(study: Path) -> list[tuple]:
    with sqlite3.connect(study / "study.sqlite") as connection:
        return connection.execute("SELECT * FROM pair ORDER BY id").fetchall()


def test_both_pictures_of_a_pair_are_kept_at_the_larger_size(folder):
    study = build(folder)
    for _, _, _, _, _, width, height, picture_a, picture_b in pairs_of(study):
        for name in (picture_a, picture_b):
            with Image.open(study / "pictures" / name) as picture:
                assert picture.size == (48, 32) == (width, height)


def test_png_keeps_the_larger_picture_bit_for_bit_and_no_metadata(folder):
    source = Image.open(folder / "b" / "p0.png")
    source.save(folder / "b" / "p0.png", exif=Image.Exif(), comment="made by the student")
    study = build(folder, picture_format="png", num_checks=0)
    (name,) = [row[8] for row in pairs_of(study) if row[2] == "p0"]
    with Image.open(study / "pictures" / name) as kept:
        assert np.array_equal(np.asarray(kept), np.asarray(source))
        assert not kept.info


def test_checks_are_an_identical_pair_and_a_heavily_blurred_one(folder):
    study = build(folder)
    by_kind = {row[1]: row for row in pairs_of(study)}
    pixels = {
        kind: [np.asarray(Image.open(study / "pictures" / name), dtype=float) for name in row[7:9]]
        for kind, row in by_kind.items()
    }
    assert np.array_equal(*pixels["identical"])
    sharp, blurred = pixels["blurred"]
    assert blurred.std() < 0.5 * sharp.std()


def test_the_number_of_a_pair_does_not_tell_checks_from_pairs(tmp_path):
    prompts = [Prompt(f"p{index}", "x", "c") for index in range(20)]
    study = make_study_of(tmp_path, prompts, num_checks=10)
    kinds = [row[1] for row in pairs_of(study)]
    assert len(kinds) == 40
    assert {"pair", "identical", "blurred"} <= set(kinds[:20])


def test_the_study_needs_its_originals_no_more(folder):
    study = build(folder)
    for path in [*folder.glob("a/*"), *folder.glob("b/*")]:
        path.unlink()
    assert all((study / "pictures" / name).is_file() for row in pairs_of(study) for name in row[7:])


def test_an_existing_study_is_never_overwritten(folder):
    study = build(folder)
    before = (study / "study.sqlite").read_bytes()
    with pytest.raises(ValueError, match="never overwritten"):
        build(folder)
    assert (study / "study.sqlite").read_bytes() == before


def test_upright_and_srgb_pictures_are_shown_as_their_makers_meant(folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.new("RGB", (32, 48), (200, 30, 30)).save(folder / "b" / "p0.png", icc_profile=profile)
    Image.new("RGB", (48, 32), (200, 30, 30)).save(folder / "a" / "p0.png", exif=exif)
    study = build(folder, picture_format="png")
    (row,) = [row for row in pairs_of(study) if row[2] == "p0" and row[1] == "pair"]
    assert row[5:7] == (32, 48)
    for name in row[7:]:
        with Image.open(study / "pictures" / name) as picture:
            assert np.abs(np.asarray(picture).astype(int) - (200, 30, 30)).max() <= 1


def remove_one(folder: Path) -> None:
    (folder / "b" / "p1.png").unlink()


def add_foreign(folder: Path) -> None:
    write_picture(folder / "a" / "other.png")


def double(folder: Path) -> None:
    write_picture(folder / "a" / "p1.bmp", (24, 16))


def square(folder: Path) -> None:
    write_picture(folder / "b" / "p1.png", (48, 48))


def cut_short(folder: Path) -> None:
    data = (folder / "b" / "p1.png").read_bytes()
    (folder / "b" / "p1.png").write_bytes(data[: len(data) // 2])


def sixteen_bits(folder: Path) -> None:
    Image.fromarray(np.zeros((32, 48), np.uint16)).save(folder / "b" / "p1.png")


def no_folder(folder: Path) -> None:
    (folder / "a").rename(folder / "elsewhere")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (remove_one, "1 of 3 ids have no picture: p1"),
        (add_foreign, "belong to no id of the basket: other"),
        (double, "p1.bmp and p1.png are both 'p1'"),
        (square, "24×16 and .*48×48: other aspect ratios"),
        (cut_short, "cannot be read as a picture"),
        (sixteen_bits, "I;16; the study shows 8-bit"),
        (no_folder, "not a folder"),
    ],
)
def test_folders_that_do_not_fit_are_refused_and_nothing_is_left(folder, spoil, message):
    spoil(folder)
    with pytest.raises(ValueError, match=message) as caught:
        build(folder)
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("study*"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,prompt\np0,a\n", r"lack \['category'\]"),
        ("", "lack"),
        ("id,prompt,category\n", "no prompts"),
        ("id,prompt,category\np0,a,\n", "line 2: category is empty"),
        ("id,prompt,category\np0,a\n", "line 2: category is empty"),
        ("id,prompt,category\np0,,c\n", "line 2: prompt is empty"),
        ("id,prompt,category\np0,a,c\nP0,b,c\n", "more than once .*: p0"),
        ("id,prompt,category\n../p0,a,c\n", "cannot name a picture"),
        ("id,prompt,category\n=1+1,a,c\n", "cannot name a picture"),
        ("id,prompt,category\n<b>,a,c\n", "cannot name a picture"),
    ],
)
def test_a_bad_basket_is_named_by_its_line(tmp_path, text, message):
    (tmp_path / "basket.csv").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_basket(tmp_path / "basket.csv")


def test_a_basket_in_another_encoding_is_refused_and_a_byte_order_mark_is_not(tmp_path):
    path = tmp_path / "basket.csv"
    path.write_bytes("id,prompt,category\np0,рыба,c\n".encode("cp1251"))
    with pytest.raises(ValueError, match="not a CSV file in UTF-8"):
        read_basket(path)
    path.write_bytes("id,prompt,category\np0,рыба,c\n".encode("utf-8-sig"))
    assert read_basket(path) == [Prompt("p0", "рыба", "c")]


@pytest.mark.parametrize(
    "plan", [{"votes_per_pair": 0}, {"check_every": 0}, {"lease_seconds": 1}, {"label_b": "A"}]
)
def test_a_plan_that_cannot_be_is_refused(folder, plan):
    with pytest.raises(ValueError, match=r"use|different labels"):
        build(folder, **plan)
