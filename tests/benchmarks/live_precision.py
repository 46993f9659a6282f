"""What training in bfloat16 costs in accuracy and gains in time: the same staged runs with both precisions.

    python tests/benchmarks/live_precision.py --data FOLDER --weights FILE --size 128 --seeds 0 1 2 3 4

FOLDER is an image folder or one of parquet files; what has no validation split gets one of a fifth. FILE is a
torchvision state_dict of the architecture, or leave it out for random weights. Runs differ in `live_precision` alone;
what is frozen is in float32 in both. The gate is off, so that the last stage's best epoch counts. Prints a table with
the paired differences over the seeds, and writes JSON.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import transformers
from sklearn.metrics import f1_score

from torchthaw import (
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
    split_dataset,
)

PRECISIONS = ("float32", "bfloat16")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--subset", type=int, nargs=2, metavar=("TRAIN", "VAL"))
    parser.add_argument("--architecture", default="mobilenet_v2")
    parser.add_argument("--weights")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--plan", default="staged")
    parser.add_argument("--epochs", type=int, default=7)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--output", type=Path, default=Path("live_precision.json"))
    options = parser.parse_args()
    runs = []
    for seed in options.seeds:
        for precision in PRECISIONS:
            runs.append({"seed": seed, "precision": precision, **one_run(options, seed, precision)})
            print(json.dumps(runs[-1]), flush=True)
            options.output.write_text(json.dumps(runs, indent=2) + "\n")
    print(table(runs))


def one_run(options: argparse.Namespace, seed: int, precision: str) -> dict[str, float]:
    transformers.set_seed(seed)
    splits = load_image_dataset(options.data)
    if "validation" not in splits:
        splits = split_dataset(splits, validation=0.2, seed=seed)
    train, validation = splits["train"], splits["validation"]
    if options.subset:
        train, validation = (
            split.shuffle(seed=seed).select(range(number))
            for split, number in zip((train, validation), options.subset, strict=True)
        )
    with tempfile.TemporaryDirectory() as folder:
        trainer = ThawTrainer(
            TorchvisionForImageClassification.from_torchvision(
                options.architecture, weights=options.weights, id2label=train.features["label"].names
            ),
            ThawTrainingArguments(
                output_dir=folder, plan=options.plan, num_train_epochs=options.epochs, seed=seed, gate="off",
                frozen_precision="float32", live_precision=precision, metric_for_best_model="macro_f1",
                report_to="none", disable_tqdm=True,
            ),
            train_dataset=train, eval_dataset=validation,
            processing_class=TorchvisionImageProcessor.from_torchvision(
                options.architecture, weights=options.weights, image_size=options.size
            ),
        )  # fmt: skip
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        # In float32 for both, as a user of the saved model computes.
        output = trainer.predict(validation)
    predicted = output.predictions.argmax(1)
    return {
        "accuracy": float((predicted == output.label_ids).mean()),
        "macro_f1": float(f1_score(output.label_ids, predicted, average="macro")),
        "loss": float(output.metrics["test_loss"]),
        "seconds_of_last_stage": trainer.stage_records[-1].seconds,
    }


def table(runs: list[dict[str, Any]]) -> str:
    """Returns means over the seeds and mean paired differences with their standard errors, as Markdown."""
    lines = ["| | float32 | bfloat16 | difference |", "|---|---|---|---|"]
    for key in ("accuracy", "macro_f1", "loss", "seconds_of_last_stage"):
        exact, fast = ([run[key] for run in runs if run["precision"] == name] for name in PRECISIONS)
        pairs = [b - a for a, b in zip(exact, fast, strict=True)]
        error = statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else float("nan")
        cells = f"{statistics.mean(exact):.4f} | {statistics.mean(fast):.4f}"
        lines.append(f"| {key} | {cells} | {statistics.mean(pairs):+.4f} ± {error:.4f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
