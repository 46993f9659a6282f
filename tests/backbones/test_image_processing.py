"""The processor gives the pixels of torchvision's own evaluation transforms, whatever form the image comes in."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from transformers import AutoImageProcessor
from transformers.image_utils import load_image

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor
from torchthaw.backbones.anatomy import list_architectures
from torchthaw.backbones.image_processing import to_rgb


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Noise over a gradient, so that a shift or another filter shows."""
    random = np.random.default_rng(seed)
    ramp = np.linspace(0, 200, width)[None, :, None] + np.zeros((height, 1, 3))
    return Image.fromarray((ramp + random.integers(0, 56, (height, width, 3))).astype(np.uint8))


def test_equals_the_transforms_of_all_weights():
    images = [picture(300, 220), picture(150, 400, seed=1), picture(40, 37, seed=2)]
    compared: dict[str, list[torch.Tensor]] = {}
    for architecture in list_architectures():
        for weights in torchvision.models.get_model_weights(architecture):
            processor = TorchvisionImageProcessor.from_torchvision(architecture, weights)
            key = f"{weights.transforms()} {weights.transforms().antialias} {processor}"
            if key not in compared:
                compared[key] = [weights.transforms()(image) for image in images]
                for image, expected in zip(images, compared[key], strict=True):
                    assert torch.equal(processor(image).pixel_values[0], expected), weights
    assert len(compared) >= 15


def test_weights_by_name_and_in_a_file():
    second = TorchvisionImageProcessor.from_torchvision("resnet50", "IMAGENET1K_V2")
    assert second.size == {"shortest_edge": 232}
    assert TorchvisionImageProcessor.from_torchvision("resnet50").to_dict() == second.to_dict()
    for weights in ("folder/weights.pth", Path("weights.safetensors"), None):
        assert TorchvisionImageProcessor.from_torchvision("resnet50", weights).size == {"shortest_edge": 256}
    # There is no IMAGENET1K_V1 for these weights of swag only.
    assert TorchvisionImageProcessor.from_torchvision("vit_h_14", None).crop_size == {"height": 518, "width": 518}


def test_another_image_size_keeps_the_proportion_of_resize_to_crop():
    processor = TorchvisionImageProcessor.from_torchvision("resnet50", None, image_size=112)
    assert processor.crop_size == {"height": 112, "width": 112}
    assert processor.size == {"shortest_edge": 128}
    assert processor(picture(200, 150), return_tensors="pt").pixel_values.shape == (1, 3, 112, 112)


def test_eight_bit_arrays_equal_the_pil_image():
    processor = TorchvisionImageProcessor()
    image = picture(70, 50)
    array = np.asarray(image)
    expected = processor(image, return_tensors="pt").pixel_values
    chw = np.ascontiguousarray(array.transpose(2, 0, 1))
    for form in (array, chw, torch.from_numpy(chw), torch.from_numpy(array.copy()), array.astype(np.int64), [array]):
        assert torch.equal(processor(form, return_tensors="pt").pixel_values, expected)
    gray = image.convert("L")
    expected = processor(gray, return_tensors="pt").pixel_values
    for form in (np.asarray(gray), np.asarray(gray)[None], np.asarray(gray)[..., None]):
        assert torch.equal(processor(form, return_tensors="pt").pixel_values, expected)
    rgba = image.copy()
    rgba.putalpha(100)
    assert torch.equal(processor(np.asarray(rgba)).pixel_values[0], processor(image).pixel_values[0])


def test_shape_that_does_not_tell_where_the_channels_are():
    processor = TorchvisionImageProcessor(do_resize=False, do_center_crop=False)
    cube = np.random.default_rng(0).integers(0, 256, (3, 5, 3), dtype=np.uint8)
    last = processor(Image.fromarray(cube)).pixel_values[0]
    assert torch.equal(processor(cube).pixel_values[0], last)
    assert torch.equal(processor(torch.from_numpy(cube), input_data_format="channels_last").pixel_values[0], last)
    first = processor(Image.fromarray(cube.transpose(1, 2, 0).copy())).pixel_values[0]
    assert torch.equal(processor(torch.from_numpy(cube)).pixel_values[0], first)


def test_arrays_of_floats_take_torchvisions_tensor_path():
    weights = torchvision.models.ResNet50_Weights.IMAGENET1K_V1
    processor = TorchvisionImageProcessor.from_torchvision("resnet50", weights)
    floats = torch.rand(3, 90, 120, generator=torch.Generator().manual_seed(0))
    expected = weights.transforms()(floats)
    for form in (floats, floats.numpy(), floats.permute(1, 2, 0).numpy(), floats.double().numpy()):
        assert torch.equal(processor(form).pixel_values[0], expected)
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], and this one is in \[0\.\d+, 25\d\.\d+\]. Divide"):
        processor(floats * 255)


def test_lists_batches_and_paths(tmp_path: Path):
    processor = TorchvisionImageProcessor(size=40, crop_size=32)
    images = [picture(60, 50), picture(80, 44, seed=1)]
    batch = processor(images, return_tensors="pt").pixel_values
    assert batch.shape == (2, 3, 32, 32)
    assert torch.equal(batch[1], processor(images[1]).pixel_values[0])
    images[0].save(tmp_path / "a.png")
    assert torch.equal(processor(tmp_path / "a.png").pixel_values[0], batch[0])
    assert torch.equal(processor([str(tmp_path / "a.png"), images[1]], return_tensors="pt").pixel_values, batch)
    assert isinstance(processor(images, return_tensors="np").pixel_values, np.ndarray)
    four = np.stack([np.asarray(picture(60, 50))] * 2)
    assert torch.equal(processor(four, return_tensors="pt").pixel_values[1], batch[0])
    with pytest.raises(ValueError, match="the list is empty"):
        processor([])
    with pytest.raises(ValueError, match="Not an image: int"):
        processor([1, 2])
    with pytest.raises(ValueError, match=r"Cannot read an array of shape \(5, 6, 2\)"):
        processor(np.zeros((5, 6, 2), dtype=np.uint8))
    with pytest.raises(ValueError, match="Cannot read an array of int64 from -3 to 0"):
        processor(np.zeros((5, 6, 3), dtype=np.int64) - 3 * np.eye(6, dtype=np.int64)[:5, :, None])


def test_settings_of_one_call():
    processor = TorchvisionImageProcessor(size=40, crop_size=32)
    image = picture(60, 50)
    raw = processor(image, do_normalize=False, do_rescale=False, do_resize=False, do_center_crop=False).pixel_values[0]
    assert np.array_equal(raw.permute(1, 2, 0).numpy(), np.asarray(image))
    squashed = processor(image, size={"height": 20, "width": 30}, do_center_crop=False).pixel_values[0]
    assert squashed.shape == (3, 20, 30)
    assert processor(image).pixel_values[0].shape == (3, 32, 32)
    doubled = processor(image, rescale_factor=2 / 255, do_normalize=False).pixel_values[0]
    torch.testing.assert_close(doubled, 2 * processor(image, do_normalize=False).pixel_values[0])
    with pytest.raises(ValueError, match="no setting 'do_normalise'. Did you mean 'do_normalize'"):
        processor(image, do_normalise=False)
    with pytest.raises(ValueError, match="not \\['longest_edge'\\]"):
        processor(image, size={"longest_edge": 20})
    with pytest.raises(ValueError, match=r"cannot be one batch. Turn do_center_crop on"):
        processor([image, picture(90, 50)], do_center_crop=False, return_tensors="pt")


def test_saves_and_loads_through_the_auto_class(tmp_path: Path):
    processor = TorchvisionImageProcessor.from_torchvision("swin_t", image_size=192)
    processor.save_pretrained(tmp_path)
    loaded = AutoImageProcessor.from_pretrained(tmp_path)
    assert type(loaded) is TorchvisionImageProcessor
    assert loaded.to_dict() == processor.to_dict()
    image = picture(300, 280)
    assert torch.equal(loaded(image).pixel_values[0], processor(image).pixel_values[0])
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["crop_size"] == {"height": 192, "width": 192}
    assert stored["resample"] == 3
    TorchvisionForImageClassification.from_torchvision("swin_t", None, id2label=["a", "b"]).config.save_pretrained(
        tmp_path
    )
    again = TorchvisionImageProcessor.from_torchvision("swin_t", tmp_path, image_size=96)
    assert again.crop_size == {"height": 96, "width": 96}


def test_processor_errors():
    with pytest.raises(ValueError, match="Did you mean 'resnet50'"):
        TorchvisionImageProcessor.from_torchvision("resnet-50")
    with pytest.raises(ValueError, match="multiple of 16 pixels.*Write image_size=224"):
        TorchvisionImageProcessor.from_torchvision("vit_b_16", image_size=225)
    with pytest.raises(ValueError, match="Did you mean 'IMAGENET1K_V2'"):
        TorchvisionImageProcessor.from_torchvision("resnet50", "IMAGENET_V2")


def reopened(image: Image.Image, kind: str, **options: object) -> Image.Image:
    """The image as it is read from a file of that kind."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    file.seek(0)
    return Image.open(file)


EIGHT_BIT = {
    "gray": lambda: picture(9, 7).convert("L"),
    "gray with alpha": lambda: picture(9, 7).convert("LA"),
    "bilevel": lambda: picture(9, 7).convert("1"),
    "palette": lambda: picture(9, 7).convert("P", palette=Image.Palette.ADAPTIVE),
    "rgba": lambda: Image.merge("RGBA", [*picture(9, 7).split(), picture(9, 7, 1).convert("L")]),
    "cmyk jpeg": lambda: reopened(picture(9, 7).convert("CMYK"), "JPEG"),
    "ycbcr": lambda: picture(9, 7).convert("YCbCr"),
    "hsv": lambda: picture(9, 7).convert("HSV"),
    "animated gif": lambda: reopened(
        picture(9, 7), "GIF", save_all=True, append_images=[picture(9, 7, 1), picture(9, 7, 2)]
    ),
}


@pytest.mark.parametrize("kind", EIGHT_BIT)
def test_eight_bit_modes_are_what_load_image_gives(kind: str):
    image = EIGHT_BIT[kind]()
    expected = np.asarray(load_image(EIGHT_BIT[kind]()))
    assert expected.std() > 1
    result = to_rgb(image)
    assert result.mode == "RGB"
    assert np.array_equal(np.asarray(result), expected)
    processor = TorchvisionImageProcessor(size=8, crop_size=8)
    assert torch.equal(processor(image).pixel_values[0], processor(load_image(EIGHT_BIT[kind]())).pixel_values[0])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation: int):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = reopened(picture(9, 7), "PNG", exif=exif)
    assert np.array_equal(np.asarray(to_rgb(image)), np.asarray(ImageOps.exif_transpose(image)))
    assert to_rgb(image).size == ((7, 9) if orientation >= 5 else (9, 7))


def test_animated_image_gives_its_first_frame():
    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "lime", "blue")]
    image = reopened(frames[0], "PNG", save_all=True, append_images=frames[1:])
    image.seek(2)
    assert to_rgb(image).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([[0, 128, 257, 1000, 65535]], np.uint16), [0, 0, 1, 4, 255]),
        (np.array([[0, 128, 257, 1000, 65535]], np.int32), [0, 0, 1, 4, 255]),
        (np.array([[0, 7, 255]], np.int32), [0, 7, 255]),
        (np.array([[-100, 0, 100]], np.int32), [0, 128, 255]),
        (np.array([[0, 100000]], np.int32), [0, 255]),
        (np.array([[0.0, 0.5, 1.0]], np.float32), [0, 128, 255]),
        (np.array([[-1.0, 0.0, 3.0, np.nan]], np.float32), [0, 64, 255, 64]),
        (np.array([[300.0, 300.0]], np.float32), [0, 0]),
    ],
)
def test_deeper_images_are_scaled_and_not_clipped(values: np.ndarray, expected: list[int]):
    image = Image.fromarray(values)
    assert image.mode in ("I;16", "I", "F")
    result = np.asarray(to_rgb(image))
    assert result.shape == (1, len(expected), 3)
    assert [result[0, :, channel].tolist() for channel in range(3)] == [expected] * 3


def test_sixteen_bit_png_and_array_agree():
    values = np.random.default_rng(0).integers(0, 65536, (8, 8), dtype=np.uint16)
    image = reopened(Image.fromarray(values), "PNG")
    processor = TorchvisionImageProcessor(size=8, crop_size=8)
    assert torch.equal(processor(image).pixel_values[0], processor(values).pixel_values[0])
    assert np.asarray(to_rgb(image)).std() > 50


def test_odd_images_of_the_real_set(shared_data: Path):
    folder = shared_data / "odd-images"
    skipped = ("corrupt-truncated", "decompression-bomb")
    opened = 0
    for file in sorted(
        file for kind in folder.iterdir() if kind.is_dir() and kind.name not in skipped for file in kind.iterdir()
    ):
        try:
            image = Image.open(file)
            image.load()
        except OSError:
            continue
        result = to_rgb(image)
        assert result.mode == "RGB", file
        opened += 1
    assert opened > 300
