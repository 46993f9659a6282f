"""What settings against imbalance do to a new head: macro F1, balanced accuracy and accuracy on validation images.

    python tests/benchmarks/class_imbalance.py --data FOLDER --weights FILE --epochs 4 10 30

FOLDER has a folder for each class; FILE is a torchvision state_dict of the backbone. The features of every image are
computed once, not augmented; then a head is trained on them for each setting, number of epochs and seed. Each seed has
its own stratified split, so that validation images are as uneven as training images, and differences from training
without any setting are paired. Prints means with standard errors of the differences, and writes a JSON document.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, f1_score
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor, load_image_dataset
from torchthaw.data.class_sampler import ClassSampler
from torchthaw.data.views import ImageView, collate
from torchthaw.training.balanced_training import make_training_loss
from torchthaw.training.imbalance import ImbalanceSettings, settle

SETTINGS = {
    "none": {},
    "class_weights: sqrt": {"class_weights": "sqrt"},
    "class_weights: balanced": {"class_weights": "balanced"},
    "sampling: sqrt": {"sampling": "sqrt"},
    "sampling: balanced": {"sampling": "balanced"},
    "loss: focal": {"loss": "focal"},
    "loss: logit_adjusted, 0.5": {"loss": "logit_adjusted", "logit_adjustment": 0.5},
    "loss: logit_adjusted": {"loss": "logit_adjusted"},
}
METRICS = {
    "macro F1": lambda labels, predicted: f1_score(labels, predicted, average="macro"),
    "balanced accuracy": balanced_accuracy_score,
    "accuracy": accuracy_score,
}
BATCH_SIZE, DROPOUT = 32, 0.2


def features_of(options: argparse.Namespace) -> tuple[torch.Tensor, np.ndarray, list[str]]:
    """Returns the input of the final layer for each image, shape (N, features), class ids and class names."""
    images = load_image_dataset(options.data)["train"]
    names = images.features["label"].names
    model = TorchvisionForImageClassification.from_torchvision(options.backbone, options.weights, id2label=names)
    model.eval()
    processor = TorchvisionImageProcessor.from_torchvision(options.backbone, options.weights, image_size=options.size)
    found = []
    head = list(model.layer_groups()["head"].modules.values())[-1]
    head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
    with torch.inference_mode():
        for batch in DataLoader(ImageView(images, processor), batch_size=64, collate_fn=collate):
            model(pixel_values=batch["pixel_values"])
    return torch.cat(found).clone(), np.array(images["label"]), names


def train_head(features: torch.Tensor, labels: np.ndarray, names: list[str], settings: dict, epochs: int, seed: int):
    """Trains a new head with AdamW and cosine decay."""
    torch.manual_seed(seed)
    balance = settle(ImbalanceSettings(**settings), labels=labels, class_names=names, several_labels=False)
    loss = make_training_loss(balance, 0.0, several_labels=False, device=torch.device("cpu"))
    head = nn.Linear(features.shape[1], len(names))
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * -(-len(labels) // BATCH_SIZE))
    sampler = ClassSampler(labels, settings["sampling"], seed=seed) if "sampling" in settings else None
    random, targets = np.random.default_rng(seed), torch.tensor(labels)
    for epoch in range(epochs):
        if sampler is None:
            order = random.permutation(len(labels))
        else:
            sampler.set_epoch(epoch)
            order = np.array(list(sampler))
        for rows in np.split(order, range(BATCH_SIZE, len(order), BATCH_SIZE)):
            logits = head(nn.functional.dropout(features[rows], DROPOUT))
            optimizer.zero_grad()
            loss(logits, targets[rows]).backward()
            optimizer.step()
            schedule.step()
    return head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--epochs", type=int, nargs="+", default=[4, 10, 30])
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--validation", type=float, default=0.3)
    parser.add_argument("--json", type=Path, default=Path("class_imbalance.json"))
    options = parser.parse_args()
    features, labels, names = features_of(options)
    runs = []
    for epochs in options.epochs:
        for seed in range(options.seeds):
            train, validation = train_test_split(
                np.arange(len(labels)), test_size=options.validation, stratify=labels, random_state=seed
            )
            for name, settings in SETTINGS.items():
                head = train_head(features[train], labels[train], names, settings, epochs, seed)
                with torch.inference_mode():
                    predicted = head(features[validation]).argmax(dim=1).numpy()
                figures = {metric: float(score(labels[validation], predicted)) for metric, score in METRICS.items()}
                runs.append({"epochs": epochs, "seed": seed, "settings": name, **figures})
        print(f"\n{epochs} epochs, {options.seeds} splits\n| settings | {' | '.join(METRICS)} |\n|---|" + "---|" * 3)
        for name in SETTINGS:
            cells = [cell(runs, epochs, name, metric) for metric in METRICS]
            print(f"| `{name}` | {' | '.join(cells)} |", flush=True)
    options.json.write_text(json.dumps({"counts": np.bincount(labels).tolist(), "runs": runs}, indent=2))


def cell(runs: list[dict], epochs: int, name: str, metric: str) -> str:
    """Returns the mean, and the mean difference from training without any setting with its standard error."""

    def values(wanted: str) -> np.ndarray:
        return np.array([run[metric] for run in runs if run["epochs"] == epochs and run["settings"] == wanted])

    if name == "none":
        return f"{values(name).mean():.3f}"
    gains = values(name) - values("none")
    error = gains.std(ddof=1) / np.sqrt(len(gains))
    return f"{values(name).mean():.3f} ({gains.mean():+.3f} +- {error:.3f})"


if __name__ == "__main__":
    main()
