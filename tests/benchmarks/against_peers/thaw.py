"""torchthaw's Python API, with default settings."""

import tempfile

import transformers
from common import STAGES, Clock, Task, finish

from torchthaw import (
    Stage,
    StagePlan,
    ThawTrainer,
    ThawTrainingArguments,
    TorchvisionForImageClassification,
    TorchvisionImageProcessor,
    load_image_dataset,
)

ARCHITECTURE = "mobilenet_v2"


def main() -> None:
    task = Task.from_command_line()
    clock = Clock(task)
    transformers.set_seed(task.seed)
    images = load_image_dataset(task.data)
    stages = zip(STAGES, task.epochs, strict=True)
    plan = StagePlan(tuple(Stage(stage.name, unfreeze=stage.unfreeze, epochs=epochs) for stage, epochs in stages))
    with tempfile.TemporaryDirectory() as folder:
        trainer = ThawTrainer(
            model=TorchvisionForImageClassification.from_torchvision(
                ARCHITECTURE, weights=task.weights, id2label=images["train"].features["label"].names
            ),
            args=ThawTrainingArguments(output_dir=folder, plan=plan, seed=task.seed, report_to=[], disable_tqdm=True),
            train_dataset=images["train"],
            eval_dataset=images["validation"],
            processing_class=TorchvisionImageProcessor.from_torchvision(
                ARCHITECTURE, weights=task.weights, image_size=task.size
            ),
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.train()
        clock.stop()
    for record in trainer.stage_records:
        clock.add_stage(record.name, record.epochs, record.seconds)
    records = [record.to_dict() for record in trainer.stage_records]
    weights = {name.removeprefix("backbone."): tensor for name, tensor in trainer.model.state_dict().items()}
    finish(clock, weights, ("torchthaw", "transformers", "accelerate"), records=records)


if __name__ == "__main__":
    main()
