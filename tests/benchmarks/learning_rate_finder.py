"""What the learning-rate finder suggests, against a grid of rates that were trained with.

    python tests/benchmarks/learning_rate_finder.py --data FOLDER --weights FILE --seeds 0 1 2

FOLDER has train/ and val/ with a folder for each class; FILE is a torchvision state_dict of the backbone. The plan is
`two_phase`: the head, then all layers, whose rates keep the plan's ratios (`layer_decay`) while the top one is that of
the grid. Rates of the head are tried alone; those of all layers after the head at the plan's own rate. The gate is off,
and figures are those of the last epoch. Prints a table for each stage, with what two rules read off the range test of
each seed, and writes a JSON document.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import transformers

from torchthaw import (
    Stage,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
)

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
HEAD = Stage("head", "head", epochs=3, learning_rate=1e-3)
ALL = Stage("all", "all", epochs=4, learning_rate=3e-4, layer_decay=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--weights", required=True)
    parser.add_argument("--backbone", default="mobilenet_v2")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--rates", type=float, nargs="*", default=RATES)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--json", type=Path, default=Path("learning_rate_finder.json"))
    options = parser.parse_args()
    runs: list[dict[str, Any]] = []
    for stage in (HEAD, ALL):
        before = [] if stage is HEAD else [HEAD]
        for rate in options.rates:
            for seed in options.seeds:
                plan = [*before, dataclasses.replace(stage, learning_rate=rate)]
                runs.append({"stage": stage.name, "rate": rate, "seed": seed, **trained(options, plan, seed)})
                print(json.dumps(runs[-1]), flush=True)
                options.json.write_text(json.dumps({"runs": runs}, indent=2))
    tests = [found for seed in options.seeds for found in range_tests(options, seed)]
    options.json.write_text(json.dumps({"runs": runs, "range_tests": tests}, indent=2))
    for stage in (HEAD, ALL):
        print(table(stage, runs, tests), end="\n\n")


def new_trainer(options: argparse.Namespace, plan: list[Stage], seed: int, folder: str) -> ThawTrainer:
    transformers.set_seed(seed)
    splits = load_image_dataset(options.data)
    trainer = ThawTrainer(
        TorchvisionForImageClassification.from_torchvision(
            options.backbone, weights=options.weights, id2label=splits["train"].features["label"].names
        ),
        ThawTrainingArguments(
            output_dir=folder, plan=plan, seed=seed, gate="off", load_best_model_at_end=False, report_to="none",
            disable_tqdm=True, save_strategy="no",
        ),
        train_dataset=splits["train"],
        eval_dataset=splits["validation"],
        processing_class=TorchvisionImageProcessor.from_torchvision(
            options.backbone, weights=options.weights, image_size=options.size
        ),
    )  # fmt: skip
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def trained(options: argparse.Namespace, plan: list[Stage], seed: int) -> dict[str, float | None]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = new_trainer(options, plan, seed, folder)
        trainer.train()
        last = [line for line in trainer.state.log_history if "eval_loss" in line][-1]
    return {"accuracy": last["eval_accuracy"], "loss": last["eval_loss"]}


def range_tests(options: argparse.Namespace, seed: int) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = new_trainer(options, [HEAD, ALL], seed, folder)
        found = [trainer.find_lr(stage, lead_steps=200) for stage in ("head", "all")]
    return [{"seed": seed, **test.to_dict()} for test in found]


def table(stage: Stage, runs: list[dict[str, Any]], tests: list[dict[str, Any]]) -> str:
    """Returns accuracy and loss of each rate, mean (lowest - highest) over the seeds, as Markdown."""
    lines = [f"| rate, stage {stage.name} | validation accuracy | validation loss |", "|---|---|---|"]
    for rate in sorted({run["rate"] for run in runs if run["stage"] == stage.name}):
        chosen = [run for run in runs if (run["stage"], run["rate"]) == (stage.name, rate)]
        cells = []
        for key in ("accuracy", "loss"):
            values = [run[key] for run in chosen]
            cells.append(f"{statistics.mean(values):.3f} ({min(values):.3f} - {max(values):.3f})")
        lines.append(f"| {rate:.0e} | {' | '.join(cells)} |")
    mine = [test for test in tests if test["stage"] == stage.name]
    steepest = ["none" if test["suggestion"] is None else f"{test['suggestion']:.1e}" for test in mine]
    tenths = ["none" if test["minimum"] is None else f"{test['minimum'] / 10:.1e}" for test in mine]
    lines += [
        "",
        f"Steepest fall (what is suggested): {', '.join(steepest)}; a tenth of the minimum: {', '.join(tenths)}.",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
