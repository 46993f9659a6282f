"""How much too good figures are when images that belong together are torn apart by the split.

    python tests/benchmarks/leaking_splits.py FOLDER --weights FILE [--backbone mobilenet_v2] [--size 128]

Accuracy of two classifiers on the frozen features of a backbone, over five folds made by image, by image with copies
kept together (as the audit finds them), and by group where the folder has a groups.csv.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from torchthaw import audit_dataset, fold_dataset, load_image_dataset
from torchthaw.auditing import backbone_features
from torchthaw.console import Reporter

CLASSIFIERS = {
    "nearest neighbour": lambda: KNeighborsClassifier(1),
    "logistic regression": lambda: make_pipeline(StandardScaler(), LogisticRegression(max_iter=300, C=0.01)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    options = parser.parse_args()
    dataset = load_image_dataset(options.folder)
    copies = audit_dataset(dataset).copies
    features, _ = backbone_features(
        dataset, Reporter(), backbone=options.backbone, weights=options.weights, image_size=options.size
    )
    row_of = {path: row for row, path in enumerate(dataset["train"]["path"])}
    labels = np.array(dataset["train"]["label"])
    ways: dict[str, dict] = {"by image": {"by": "image"}, "copies together": {"by": "image", "together": copies}}
    if "group" in dataset["train"].column_names:
        ways["by group"] = {"by": "group"}
    print(f"{len(labels)} images, {sum(map(len, copies))} of them in {len(copies)} sets of copies")
    for way, arguments in ways.items():
        for name, make in CLASSIFIERS.items():
            accuracies = []
            for seed in options.seeds:
                hits = 0
                for fold in fold_dataset(dataset, folds=5, seed=seed, **arguments):
                    train, validation = (_rows(fold[split]["path"], row_of) for split in ("train", "validation"))
                    predicted = make().fit(features[train], labels[train]).predict(features[validation])
                    hits += int((predicted == labels[validation]).sum())
                accuracies.append(hits / len(labels))
            low, high = min(accuracies), max(accuracies)
            print(f"{way:<18}{name:<22}{np.mean(accuracies):.3f} ({low:.3f} - {high:.3f})", flush=True)


def _rows(paths: Sequence[str], row_of: dict[str, int]) -> list[int]:
    return [row_of[path] for path in paths]


if __name__ == "__main__":
    main()
