"""Copies of pictures are found however they were changed, and nothing else is."""

import io

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from torchthaw.data.audit import fingerprints
from torchthaw.data.audit.candidates import BandIndex
from torchthaw.data.audit.fingerprints import CROPS, ORIENTATIONS, coefficients, thumbnail, turned
from torchthaw.data.audit.near_duplicates import find_near_duplicates

NUMBER = 60


def recompressed(picture):
    data = io.BytesIO()
    picture.save(data, "JPEG", quality=40)
    return Image.open(data).convert("RGB")


def cropped(picture, left=0.03, top=0.08, share=0.9):
    width, height = picture.size
    box = (left * width, top * height, (left + share) * width, (top + share) * height)
    return picture.crop(tuple(round(edge) for edge in box))


CHANGES = {
    "copy": lambda picture: picture.copy(),
    "half the size": lambda picture: picture.resize(
        (picture.width // 2, picture.height // 2), Image.Resampling.BICUBIC
    ),
    "JPEG 40": recompressed,
    "brighter": lambda picture: ImageEnhance.Brightness(picture).enhance(1.2),
    "darker": lambda picture: ImageEnhance.Brightness(picture).enhance(0.8),
    "grey": lambda picture: picture.convert("L").convert("RGB"),
    "flipped": lambda picture: picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "upside down": lambda picture: picture.transpose(Image.Transpose.ROTATE_180),
    "turned": lambda picture: picture.transpose(Image.Transpose.ROTATE_90),
    "turned and flipped": lambda picture: picture.transpose(Image.Transpose.TRANSVERSE),
    "cropped": cropped,
    "cropped in the middle": lambda picture: cropped(picture, 0.05, 0.05),
    "hardly cropped": lambda picture: cropped(picture, 0.01, 0.02, 0.96),
}


@pytest.fixture(scope="module")
def photos(draw_photo):
    return [draw_photo(number) for number in range(NUMBER)]


def pairs_of(pictures, **options):
    found = find_near_duplicates(np.stack([thumbnail(picture) for picture in pictures]), **options)
    return {(pair.first, pair.second) for pair in found}


@pytest.mark.parametrize("change", CHANGES)
def test_every_kind_of_copy_is_found_and_nothing_else(photos, change):
    found = pairs_of([*photos, *map(CHANGES[change], photos)])
    planted = {(number, NUMBER + number) for number in range(NUMBER)}
    assert len(found & planted) >= 0.95 * NUMBER
    assert found <= planted


def test_crops_are_fitted_until_their_details_agree(photos):
    parts = [cropped(photo, 0.02, 0.13, 0.85) for photo in photos]
    found = find_near_duplicates(np.stack([thumbnail(picture) for picture in (*photos, *parts)]))
    assert len(found) >= 0.9 * NUMBER
    assert np.median([pair.detail for pair in found]) > 0.84
    assert min(pair.likeness for pair in found) > 0.99


def test_unrelated_pictures_are_no_copies(photos):
    assert pairs_of(photos) == set()
    assert find_near_duplicates(np.empty((0, 64, 64), np.uint8)) == []
    assert pairs_of(photos[:1]) == set()


def test_the_same_scene_with_other_details_is_no_copy(draw_photo):
    def smooth(picture):
        return np.asarray(picture.resize((12, 9)).resize((160, 120), Image.Resampling.BICUBIC)).astype(float)

    def fine(number):
        return np.asarray(draw_photo(number)) - smooth(draw_photo(number))

    # Two photographs of one place have the smooth part in common, and of the details about half.
    takes = []
    for take in range(2):
        for number in range(10):
            shown = 0.4 * (fine(100 + number) + fine(200 + 10 * take + number))
            takes.append(smooth(draw_photo(number)) + shown)
    thumbnails = np.stack([thumbnail(Image.fromarray(take.clip(0, 255).astype(np.uint8))) for take in takes])
    prints = coefficients(thumbnails)
    assert min(float(prints[number] @ prints[10 + number]) for number in range(10)) > 0.97
    assert find_near_duplicates(thumbnails) == []


def test_the_search_can_be_narrowed(photos):
    turned_round = [*photos[:10], *(CHANGES["turned"](photo) for photo in photos[:10])]
    assert pairs_of(turned_round, orientations=False, crops=False) == set()
    parts = [*photos[:10], *(cropped(photo) for photo in photos[:10])]
    assert len(pairs_of(parts, crops=False)) < len(pairs_of(parts)) == 10


def test_a_clip_in_which_hardly_anything_moves_hangs_together(draw_photo):
    still = np.asarray(draw_photo(7)).astype(int)
    random = np.random.default_rng(0)
    frames = [(still + random.integers(-6, 7, still.shape)).clip(0, 255).astype(np.uint8) for _ in range(120)]
    pairs = pairs_of([*(Image.fromarray(frame) for frame in frames), *(draw_photo(number) for number in range(20, 40))])
    reached = {0}
    for first, second in sorted(pairs):
        if first in reached:
            reached.add(second)
    assert reached == set(range(120))


def test_progress_ends_with_everything_done(photos):
    told = []
    find_near_duplicates(
        np.stack([thumbnail(p) for p in photos]), progress=lambda done, total: told.append((done, total))
    )
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]


def test_frequencies_are_those_of_the_changed_picture(photos):
    thumbnails = np.stack([thumbnail(photo) for photo in photos[:8]])
    for orientation in ORIENTATIONS:
        direct = coefficients(turned(thumbnails, orientation))
        np.testing.assert_allclose(coefficients(thumbnails, orientation), direct, atol=1e-4)
    assert len({tuple(turned(thumbnails[:1], orientation).ravel()) for orientation in ORIENTATIONS}) == 8


@pytest.mark.parametrize("crop", CROPS, ids=lambda crop: str(crop.window))
def test_windows_show_the_part_that_is_cut_out(draw_photo, crop):
    # Large and smooth, so that the interpolation does not matter.
    photo = draw_photo(3, (640, 640)).resize((40, 40)).resize((640, 640), Image.Resampling.BICUBIC)
    top, left, height, width = crop.window
    part = photo.crop(tuple(round(640 * edge) for edge in (left, top, left + width, top + height)))
    similarity = coefficients(thumbnail(photo)[None], crop)[0] @ coefficients(thumbnail(part)[None])[0]
    assert similarity > 0.999


def test_the_index_finds_what_comparing_all_with_all_finds():
    random = np.random.default_rng(5)
    prints = random.normal(size=(3000, fingerprints.NUM_COEFFICIENTS)).astype(np.float32)
    prints[1500:] = prints[:1500] + random.normal(scale=0.15, size=(1500, prints.shape[1]))
    prints /= np.linalg.norm(prints, axis=1, keepdims=True)
    query, picture, similarity = BandIndex(prints).matches(prints, least_similarity=0.9)
    found = set(zip(query.tolist(), picture.tolist(), strict=True))
    everything = prints @ prints.T
    first, second = np.where(everything >= 0.9)
    wanted = set(zip(first.tolist(), second.tolist(), strict=True))
    assert found <= wanted
    assert len(found) >= 0.99 * len(wanted)
    np.testing.assert_allclose(similarity, everything[query, picture], atol=1e-5)


def test_an_index_of_many_uses_wider_bands_and_still_finds_copies():
    random = np.random.default_rng(6)
    prints = random.normal(size=(52_000, fingerprints.NUM_COEFFICIENTS)).astype(np.float32)
    prints /= np.linalg.norm(prints, axis=1, keepdims=True)
    changed = prints[:500] + random.normal(scale=0.015, size=(500, prints.shape[1])).astype(np.float32)
    changed /= np.linalg.norm(changed, axis=1, keepdims=True)
    query, picture, _ = BandIndex(prints).matches(changed, least_similarity=0.9)
    assert (query == picture).sum() >= 495
    assert len(query) <= 505


def test_real_photographs(shared_data):
    files = sorted((shared_data / "hymenoptera" / "val").glob("*/*.jpg"))[::2]
    pictures = [Image.open(file).convert("RGB") for file in files]
    number = len(pictures)
    for change, least in (("half the size", 0.98), ("JPEG 40", 0.98), ("brighter", 0.98), ("cropped", 0.9)):
        found = pairs_of([*pictures, *map(CHANGES[change], pictures)])
        planted = {(row, number + row) for row in range(number)}
        assert found <= planted, change
        assert len(found) >= least * number, change
