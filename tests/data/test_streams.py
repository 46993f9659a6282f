"""Streamed images: the same samples and the same views, however many workers and processes read them."""

import io
import pickle
import random
import zipfile

import numpy as np
import pytest
import torch
from accelerate.data_loader import IterableDatasetShard
from datasets import ClassLabel, Dataset, Features, Image, IterableDataset, Value, load_dataset
from torch.utils.data import DataLoader
from transformers import Trainer, TrainingArguments

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor
from torchthaw.data.augmentation import AUGMENTATIONS, Augmentation
from torchthaw.data.loading import load_image_dataset
from torchthaw.data.streams import ImageStream
from torchthaw.data.views import ImageView, collate
from torchthaw.errors import DataError

CLASSES = ["ant", "bee", "cat"]


@pytest.fixture
def processor():
    return TorchvisionImageProcessor(size={"shortest_edge": 36}, crop_size={"height": 32, "width": 32})


@pytest.fixture
def photos(make_image_folder):
    return load_image_dataset(make_image_folder(per_class=4))["train"]


def encoded(photos):
    """The photos as a Hub data set has them: bytes in parquet, and names that say nothing."""
    rows = []
    for row in photos:
        with open(row["image"]["path"], "rb") as file:  # noqa: PTH123
            rows.append({"image": {"bytes": file.read(), "path": "image.png"}, "label": row["label"]})
    return Dataset.from_list(rows, features=Features(image=Image(), label=photos.features["label"]))


def by_content(samples):
    """Samples in an order that does not depend on how they were read."""
    return sorted((int(sample["labels"]), sample["pixel_values"].numpy().tobytes()) for sample in samples)


def read(stream, **options):
    return [
        {key: value[0] for key, value in batch.items()}
        for batch in DataLoader(stream, batch_size=1, collate_fn=collate, **options)
    ]


def test_without_augmentation_it_gives_what_the_view_gives(photos, processor):
    view = ImageView(photos, processor)
    stream = ImageStream(photos.to_iterable_dataset(num_shards=3), processor)
    assert (stream.num_classes, stream.class_names) == (3, CLASSES)
    samples = list(stream)
    assert len(samples) == len(view)
    for number, sample in enumerate(samples):
        assert torch.equal(sample["pixel_values"], view[number]["pixel_values"])
        assert torch.equal(sample["labels"], view[number]["labels"])
        assert sample["labels"].dtype == torch.int64


@pytest.mark.parametrize("with_path", [True, False])
@pytest.mark.parametrize(("shards", "workers"), [(3, 2), (1, 2), (3, 3)])
def test_workers_and_shuffling_change_the_order_only(photos, processor, with_path, shards, workers):
    table = photos if with_path else encoded(photos)
    streamed = table.to_iterable_dataset(num_shards=shards)

    def samples(streamed, epoch, **options):
        stream = ImageStream(streamed, processor, AUGMENTATIONS["medium"], seed=3, stage=1)
        stream.set_epoch(epoch)
        return read(stream, **options)

    expected = by_content(samples(streamed, 2))
    assert len(expected) == len({pixels for _, pixels in expected}) == 12
    assert by_content(samples(streamed, 2, num_workers=workers)) == expected
    shuffled = streamed.shuffle(seed=7, buffer_size=5)
    alone = samples(shuffled, 2)
    assert by_content(alone) == expected
    assert [s["labels"] for s in alone] != [s["labels"] for s in samples(streamed, 2)]
    assert by_content(samples(shuffled, 2, num_workers=workers)) == expected
    assert not set(by_content(samples(streamed, 3))) & set(expected)


def test_a_view_is_a_function_of_seed_stage_epoch_and_image(photos, processor):
    def pixels(seed=3, stage=1, epoch=2, augmentation=AUGMENTATIONS["medium"]):
        stream = ImageStream(photos.to_iterable_dataset(), processor, augmentation, seed=seed, stage=stage)
        stream.set_epoch(epoch)
        return [sample["pixel_values"] for sample in stream]

    expected = pixels()
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    assert all(map(torch.equal, pixels(), expected))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]
    for other in ({"seed": 4}, {"stage": 0}, {"epoch": 1}):
        assert not any(map(torch.equal, pixels(**other), expected))


def test_an_image_that_comes_again_in_an_epoch_looks_different(photos, processor):
    crops = Augmentation()

    def samples(streamed, **options):
        return by_content(read(ImageStream(streamed, processor, crops), **options))

    once = photos.to_iterable_dataset(num_shards=3)
    twice = samples(once.repeat(2))
    assert len(set(twice)) == 24
    assert set(samples(once)) < set(twice)
    assert samples(once.repeat(2), num_workers=2) == twice
    same = encoded(photos.select([4, 4]))
    assert len(set(samples(same.to_iterable_dataset()))) == 2


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_that_outlive_the_epoch_see_the_next(photos, processor, method):
    if method not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {method} on this system")

    def new_stream():
        return ImageStream(photos.to_iterable_dataset(num_shards=2).shuffle(seed=0), processor, Augmentation())

    here, there = new_stream(), new_stream()
    loader = DataLoader(there, batch_size=None, num_workers=1, persistent_workers=True, multiprocessing_context=method)
    orders = []
    for epoch in (0, 1):
        here.set_epoch(epoch)
        there.set_epoch(epoch)
        found = list(loader)
        assert by_content(found) == by_content(here)
        orders.append([int(sample["labels"]) for sample in found])
    assert orders[0] != orders[1], "the shuffle buffer is drawn anew each epoch"
    copied = pickle.loads(pickle.dumps(here))
    assert by_content(copied) == by_content(here)


def test_each_of_several_processes_gets_its_part_of_each_batch(photos, processor):
    """What accelerate does for `dispatch_batches=False`: every process reads the stream and keeps its share."""
    streamed = photos.to_iterable_dataset(num_shards=3)
    alone = [sample["pixel_values"] for sample in ImageStream(streamed, processor, Augmentation())]
    # 12 images: with batches of 3 for each of two processes two global batches; split batches of 4, 2 for each.
    for split_batches, size, first in ((False, 3, [0, 1, 2, 6, 7, 8]), (True, 4, [0, 1, 4, 5, 8, 9])):
        for process, rows in enumerate((first, [row for row in range(12) if row not in first])):
            stream = ImageStream(streamed, processor, Augmentation())
            options = {"batch_size": size, "num_processes": 2, "split_batches": split_batches}
            part = IterableDatasetShard(stream, process_index=process, **options)
            part.set_epoch(0)
            for sample, row in zip(part, rows, strict=True):
                assert torch.equal(sample["pixel_values"], alone[row])


class Spy(torch.nn.Module):
    """Notes the images that the Trainer passes."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.seen = []

    def forward(self, pixel_values, labels=None):
        if self.training:
            self.seen += [{"pixel_values": p.cpu(), "labels": y} for p, y in zip(pixel_values, labels, strict=True)]
        return self.model(pixel_values=pixel_values, labels=labels)


@pytest.mark.parametrize("dispatch_batches", [None, False])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_trainer_passes_each_image_once_an_epoch(tmp_path, photos, processor, dispatch_batches, workers):
    model = Spy(TorchvisionForImageClassification.from_torchvision("shufflenet_v2_x0_5", None, id2label=CLASSES))
    stream = ImageStream(photos.to_iterable_dataset(num_shards=2), processor, Augmentation(), seed=5)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=3,
        accelerator_config={"dispatch_batches": dispatch_batches},
        dataloader_num_workers=workers,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    Trainer(model, arguments, train_dataset=stream, data_collator=collate).train()
    assert len(model.seen) == 24
    for epoch in (0, 1):
        expected = ImageStream(photos.to_iterable_dataset(), processor, Augmentation(), seed=5)
        expected.set_epoch(epoch)
        assert by_content(model.seen[12 * epoch : 12 * epoch + 12]) == by_content(expected)


def test_another_stage_has_its_own_views_augmentation_and_size(photos, processor):
    first = ImageStream(photos.to_iterable_dataset(), processor, Augmentation(), seed=5)
    second = first.for_stage(1)
    assert (second.stage, second.seed, second.augmentation) == (1, 5, first.augmentation)
    expected = ImageStream(photos.to_iterable_dataset(), processor, Augmentation(), seed=5, stage=1)
    assert by_content(second) == by_content(expected) != by_content(first)
    plain = first.for_stage(1, augmentation=None, image_size=48)
    view = ImageView(photos, processor.resized(48))
    for number, sample in enumerate(plain):
        assert torch.equal(sample["pixel_values"], view[number]["pixel_values"])
    assert next(iter(first.for_stage(2, image_size=48)))["pixel_values"].shape == (3, 48, 48)
    assert processor.crop_size == {"height": 32, "width": 32}
    first.set_epoch(4)
    assert by_content(first.for_stage(1)) == by_content(expected)
    with pytest.raises(DataError, match="Mixup and cutmix need a second image"):
        first.for_stage(1, augmentation=AUGMENTATIONS["strong"])


def test_labels_are_found_by_name(photos, processor):
    names = photos.features["label"].names
    labels = torch.tensor([2 - label for label in photos["label"][:]])
    words = photos.map(lambda row: {"word": names[row["label"]]}, remove_columns="label")
    other = photos.cast_column("label", ClassLabel(names=names))
    for table in (words.rename_column("word", "label"), other):
        stream = ImageStream(table.to_iterable_dataset(), processor, class_names=["cat", "bee", "ant"])
        assert torch.equal(torch.stack([sample["labels"] for sample in stream]), labels)
    kinds = [10 * label for label in photos["label"][:]]
    numbers = photos.add_column("kind", kinds)
    stream = ImageStream(numbers.to_iterable_dataset(), processor, class_names=["20", "10", "0"], label_column="kind")
    assert torch.equal(torch.stack([sample["labels"] for sample in stream]), labels)


def test_labels_that_do_not_fit(photos, processor):
    streamed = photos.to_iterable_dataset()
    with pytest.raises(DataError, match=r"Image 'bee/000.png' of the stream has the label 'bee', which .* 'bees'\?"):
        list(ImageStream(streamed, processor, class_names=["ant", "bees", "cat"]))
    with pytest.raises(DataError, match="names a class twice: 'ant', 'bee', 'ant'"):
        ImageStream(streamed, processor, class_names=["ant", "bee", "ant"])
    with pytest.raises(DataError, match="labels in column 'label' are int64, and the classes are not known"):
        ImageStream(photos.cast_column("label", Value("int64")).to_iterable_dataset(), processor)
    for missing in (-1, None):
        unlabelled = Dataset.from_list(
            [{"image": photos[0]["image"], "label": missing, "path": "a.png"}], features=photos.features
        )
        with pytest.raises(DataError, match=r"Image 'a.png' of the stream has no label"):
            list(ImageStream(unlabelled.to_iterable_dataset(), processor))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_bad_image_is_named(photos, processor, workers):
    table = encoded(photos).cast_column("image", Image(decode=False))

    def broken(row, index):
        bytes_ = b"no image" if index == 3 else row["image"]["bytes"]
        return {"image": {"bytes": bytes_, "path": None}}

    table = table.map(broken, with_indices=True, features=table.features)
    stream = ImageStream(table.to_iterable_dataset(), processor)
    name = "number 3 of worker 0" if workers else "number 3"
    with pytest.raises(DataError, match=f"Cannot use image '{name}': it is not an image that Pillow can read"):
        read(stream, num_workers=workers)


def test_images_that_are_gone_are_named(make_image_folder, processor):
    root = make_image_folder(per_class=1)
    photos = load_image_dataset(root)["train"]
    (root / "bee" / "000.png").unlink()
    with pytest.raises(DataError, match=r"Cannot use image 'bee/000.png': it cannot be read \(.*No such file"):
        list(ImageStream(photos.to_iterable_dataset(), processor))
    empty = Dataset.from_list([{"image": None, "label": 0, "path": "a.png"}], features=photos.features)
    with pytest.raises(DataError, match="Cannot use image 'a.png': it is missing"):
        list(ImageStream(empty.to_iterable_dataset(), processor))


def test_images_of_folders_and_within_archives(make_image_folder, photos, processor, tmp_path):
    expected = by_content(ImageView(photos, processor)[row] for row in range(len(photos)))
    folder = load_dataset("imagefolder", data_dir=str(tmp_path / "photos"), split="train", streaming=True)
    assert by_content(ImageStream(folder, processor)) == expected
    archive = tmp_path / "photos.zip"
    with zipfile.ZipFile(archive, "w") as writer:
        for path in photos["path"][:]:
            writer.write(tmp_path / "photos" / path, path)
    rows = [
        {"image": {"bytes": None, "path": f"zip://{row['path']}::{archive}"}, "label": row["label"]} for row in photos
    ]
    table = Dataset.from_list(rows, features=Features(image=Image(decode=False), label=photos.features["label"]))
    assert by_content(ImageStream(table.to_iterable_dataset(), processor)) == expected


def test_a_stream_of_pictures_and_other_columns(photos, processor):
    def rows():
        for picture in encoded(photos):
            yield {"photo": picture["image"], "class": picture["label"], "note": None}

    features = Features(photo=Image(), note=Value("string"), **{"class": photos.features["label"]})
    streamed = IterableDataset.from_generator(rows, features=features)
    expected = by_content(ImageView(photos, processor)[row] for row in range(len(photos)))
    assert by_content(ImageStream(streamed, processor)) == expected


def test_what_a_stream_must_say(photos, processor):
    def rows():
        yield {"image": io.BytesIO().getvalue(), "label": 0}

    with pytest.raises(DataError, match="does not say what its columns are, as after map"):
        ImageStream(IterableDataset.from_generator(rows), processor)
    with pytest.raises(DataError, match="the streamed data set has no column of images"):
        ImageStream(photos.remove_columns("image").to_iterable_dataset(), processor)
    with pytest.raises(DataError, match="Mixup and cutmix need a second image, drawn from all images"):
        ImageStream(photos.to_iterable_dataset(), processor, AUGMENTATIONS["strong"])
