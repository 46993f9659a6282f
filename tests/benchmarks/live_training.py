"""How near `ThawTrainer` on JPEGs comes to a loop over one batch that lies on the device; made for GPUs.

    python tests/benchmarks/live_training.py --output live.json
    python tests/benchmarks/live_training.py --architectures resnet18 --images 64 --batch 8 --size 64 --epochs 2

For each architecture, random weights: images/s of a bare loop that trains all layers on one batch in memory; of a stage
of `ThawTrainer` that trains all layers on JPEGs, in its steps after the first epoch, with the share of them that waits
for data; and the seconds of ten epochs of a head stage, from features computed once and through the backbone for every
view. Where there is CUDA, all in bfloat16 autocast. The JPEGs, 500 x 375, are drawn, and cached as users' images are,
in an empty cache. Prints a table and writes JSON. Leave the machine alone meanwhile.
"""

import argparse
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from image_loading import draw
from parts_against_limits import device, now, one_step, seconds
from transformers import PrinterCallback, TrainerCallback, set_seed

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
)

COLUMNS = ("synthetic images/s", "live images/s", "live / synthetic", "waiting for data", "head live / cached")


class Epochs(TrainerCallback):
    """Notes when epochs begin and end, and how long batches were waited for until then."""

    def __init__(self) -> None:
        self.begins: list[tuple[float, float]] = []
        self.ends: list[tuple[float, float]] = []

    def on_epoch_begin(self, args: Any, state: Any, *_args: Any, **_kwargs: Any) -> None:
        self.begins.append((now(), getattr(state, "data_wait_seconds", 0.0)))

    def on_epoch_end(self, args: Any, state: Any, *_args: Any, **_kwargs: Any) -> None:
        self.ends.append((now(), state.data_wait_seconds))

    def after_the_first(self) -> tuple[float, float]:
        """Returns seconds in the epochs after the first, and how many of them waited for data."""
        spans = list(zip(self.begins, self.ends, strict=True))[1:]
        return sum(end - begin for (begin, _), (end, _) in spans), sum(end - begin for (_, begin), (_, end) in spans)


def stage(options: argparse.Namespace, architecture: str, data: Any, **settings: Any) -> tuple[Any, Epochs]:
    """Trains one stage; returns its record and its epochs."""
    set_seed(0)
    shape = {"image_size": options.size} if architecture.startswith("vit") else {}
    model = TorchvisionForImageClassification.from_torchvision(architecture, None, id2label=["a", "b"], **shape)
    epochs = Epochs()
    with tempfile.TemporaryDirectory() as folder:
        trainer = ThawTrainer(
            model=model,
            args=ThawTrainingArguments(
                output_dir=folder, plan=[Stage("stage", learning_rate=1e-5, **settings)],
                per_device_train_batch_size=options.batch, per_device_eval_batch_size=options.batch,
                bf16=device().type == "cuda", eval_strategy="no", save_strategy="no", load_best_model_at_end=False,
                gate="off", disable_tqdm=True, report_to="none",
            ),
            train_dataset=data,
            processing_class=TorchvisionImageProcessor.from_torchvision(architecture, None, image_size=options.size),
            callbacks=[epochs],
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.stage_records[0], epochs


def compare(options: argparse.Namespace, architecture: str, data: Any) -> dict[str, float]:
    bare = argparse.Namespace(architectures=[architecture], weights=None, batch=options.batch)
    step = seconds(one_step(bare, options.size, "all", "eval", True, True, None), options.repeats)
    _, epochs = stage(options, architecture, data, unfreeze="all", epochs=options.epochs, batch_norm="eval",
                      augmentation="light")  # fmt: skip
    spent, waited = epochs.after_the_first()
    heads = [
        stage(options, architecture, data, unfreeze="head", epochs=options.head_epochs, augmentation=augmentation)[0]
        for augmentation in ("none", "light")
    ]
    synthetic, live = options.batch / step, len(data) * (options.epochs - 1) / spent
    figures = (synthetic, live, live / synthetic, waited / spent, heads[1].seconds / heads[0].seconds)
    return dict(zip(COLUMNS, figures, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architectures", nargs="+", default=["resnet50", "efficientnet_v2_s", "vit_b_16"])
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=4, help="Of the live stage; the first is not counted.")
    parser.add_argument("--head-epochs", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=20, help="Steps of the synthetic loop.")
    parser.add_argument("--output", type=Path, default=Path("live_training.json"))
    options = parser.parse_args()
    if options.epochs < 2:
        parser.error(f"--epochs is {options.epochs}, and the first is not counted; write 2 or more")
    name = torch.cuda.get_device_name() if device().type == "cuda" else device().type
    result: dict[str, Any] = {"device": name, "cores": os.cpu_count(), "torch": torch.__version__, "figures": {}}
    result["settings"] = {key: value for key, value in vars(options).items() if key != "output"}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHTHAW_CACHE"] = str(Path(folder, "cache"))
        data = draw(Path(folder, "images"), options.images, 500, 375)
        print(f"| {name}, {options.size} px | {' | '.join(COLUMNS)} |\n|---|{'---|' * len(COLUMNS)}", flush=True)
        for architecture in options.architectures:
            figures = result["figures"][architecture] = compare(options, architecture, data)
            print(f"| {architecture} | {' | '.join(f'{value:.2f}' for value in figures.values())} |", flush=True)
            options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
