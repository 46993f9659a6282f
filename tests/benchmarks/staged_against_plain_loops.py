"""Validation accuracy of `torchthaw train staged` beside hand-written loops, same weights, images, epochs and batches.

    python tests/benchmarks/staged_against_plain_loops.py --data FOLDER --weights FILE --seeds 0 1 2

FOLDER has train/ and val/ with a folder for each class; FILE is a torchvision state_dict of the backbone. Prints a
table and writes a JSON document. The loops use torch and torchvision alone. As torchthaw does, every loop validates
after each epoch and reports its best one.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torchvision
from safetensors.torch import load_file
from torch import nn
from torchvision.transforms import v2

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
BATCH = 32
EPOCHS = 7


class InMemory(torch.utils.data.Dataset):
    """An image folder whose pictures are decoded once."""

    def __init__(self, folder: Path, transform: Callable) -> None:
        files = torchvision.datasets.ImageFolder(str(folder))
        self.items = [files[index] for index in range(len(files))]
        self.classes = files.classes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        picture, label = self.items[index]
        return self.transform(picture), label


def load(folder: Path, size: int) -> tuple[InMemory, InMemory]:
    to_tensor = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    augment = v2.Compose([v2.RandomResizedCrop(size, scale=(0.35, 1.0)), v2.RandomHorizontalFlip(), *to_tensor])
    plain = v2.Compose([v2.Resize(round(size * 256 / 224)), v2.CenterCrop(size), *to_tensor])
    return InMemory(folder / "train", augment), InMemory(folder / "val", plain)


def new_model(weights: str | None, classes: int) -> nn.Module:
    model = torchvision.models.mobilenet_v2()
    if weights is not None:
        model.load_state_dict(load_file(weights))
    model.classifier[1] = nn.Linear(model.last_channel, classes)
    return model


def train(
    model: nn.Module, images: InMemory, validation: InMemory, groups: list[dict], epochs: int, *, frozen_norms: bool
) -> float:
    trained = {id(p) for group in groups for p in group["params"]}
    for parameter in model.parameters():
        parameter.requires_grad_(id(parameter) in trained)
    loader = torch.utils.data.DataLoader(images, BATCH, shuffle=True)
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    best = 0.0
    for _ in range(epochs):
        model.train()
        if frozen_norms:
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.eval()
        for pixels, labels in loader:
            loss = nn.functional.cross_entropy(model(pixels), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
        best = max(best, accuracy(model, validation))
    return best


def staged_by_hand(model: nn.Module, *images: InMemory) -> float:
    head, last, rest = model.classifier, model.features[14:], model.features[:14]
    one = [{"params": list(head.parameters()), "lr": 1e-3}]
    two = [{"params": list(head.parameters()), "lr": 3e-4}, {"params": list(last.parameters()), "lr": 1e-4}]
    three = [*two, {"params": list(rest.parameters()), "lr": 3e-5}]
    plan = ((one, 3), (two, 2), (three, 2))
    return max(train(model, *images, groups, epochs, frozen_norms=True) for groups, epochs in plan)


def head_only(model: nn.Module, *images: InMemory) -> float:
    groups = [{"params": list(model.classifier.parameters()), "lr": 1e-3}]
    return train(model, *images, groups, EPOCHS, frozen_norms=True)


def everything_at_once(model: nn.Module, *images: InMemory) -> float:
    return train(model, *images, [{"params": list(model.parameters()), "lr": 1e-3}], EPOCHS, frozen_norms=False)


def accuracy(model: nn.Module, images: InMemory) -> float:
    model.eval()
    with torch.inference_mode():
        right = sum(
            int((model(pixels).argmax(1) == labels).sum())
            for pixels, labels in torch.utils.data.DataLoader(images, BATCH)
        )
    return right / len(images)


def torchthaw(arguments: argparse.Namespace, seed: int) -> float:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "torchthaw", "train", "staged", "--data", str(arguments.data), "--backbone"]
        command += [
            "mobilenet_v2",
            "--weights",
            str(arguments.weights),
            "--output",
            f"{folder}/out",
            "--json",
            "--quiet",
        ]
        command += ["--set", f"seed={seed}", "--set", f"image_size={arguments.size}"]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)["validation"]["accuracy"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--output", type=Path, default=Path("staged_against_plain_loops.json"))
    arguments = parser.parse_args()
    images, validation = load(arguments.data, arguments.size)
    loops: dict[str, tuple[Callable, str | None]] = {
        "staged, written by hand": (staged_by_hand, str(arguments.weights)),
        "head only": (head_only, str(arguments.weights)),
        "everything at once, 1e-3, BatchNorm training": (everything_at_once, str(arguments.weights)),
        "from scratch, 1e-3": (everything_at_once, None),
    }
    results: dict[str, list[float]] = {"torchthaw train staged": []}
    for seed in arguments.seeds:
        results["torchthaw train staged"].append(torchthaw(arguments, seed))
        for name, (loop, weights) in loops.items():
            torch.manual_seed(seed)
            model = new_model(weights, len(images.classes))
            results.setdefault(name, []).append(loop(model, images, validation))
        print(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.3f}" for name, values in results.items()), flush=True)
    print("\n| what | validation accuracy, median | lowest - highest |\n|---|---|---|")
    for name, values in results.items():
        print(f"| {name} | {statistics.median(values):.3f} | {min(values):.3f} - {max(values):.3f} |")
    arguments.output.write_text(
        json.dumps({"seeds": arguments.seeds, "size": arguments.size, "accuracy": results}, indent=2)
    )


if __name__ == "__main__":
    main()
