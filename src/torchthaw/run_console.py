"""What a training run says before and after its progress bar: the plan, and what came out."""

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from rich.text import Text

from torchthaw.console import Reporter
from torchthaw.single_run import Job
from torchthaw.stages.plan import Stage
from torchthaw.training.augmented_figures import difference_line
from torchthaw.training.diagnosis import Finding
from torchthaw.training.trainer import ThawTrainer

# What the linear probe chooses.
BY_PROBE = "by the probe"


def announce(job: Job, trainer: ThawTrainer, reporter: Reporter) -> None:
    """Says what will be trained on what, and shows the plan."""
    recipe, data = job.recipe, job.data
    sizes = ", ".join(f"{len(images)} {split}" for split, images in data.splits.items())
    reporter.say(f"{recipe.backbone} ({recipe.weights or 'random weights'}), {len(data.class_names)} classes, {sizes}")
    groups = list(trainer.model.layer_groups())
    probes = any(stage.solver == "probe" for stage in trainer.plan.stages)
    rows = []
    for stage in trainer.plan.stages:
        rates = stage.learning_rates(groups)
        length = f"{stage.steps} steps" if stage.steps else f"{stage.epochs} epochs"
        trained = _trained(list(rates), groups)
        if stage.adapters is not None:
            trained += f" (LoRA of rank {stage.adapters.rank})"
        length = "linear probe" if stage.solver == "probe" else length
        shown = _shown_rates(stage, rates, has_probe=probes)
        chooses = stage.by_probe and probes and stage.batch_norm == "auto"
        policy = BY_PROBE if chooses else trainer.batch_norm_policy(stage)
        rows.append((stage.name, trained, length, shown, policy))
    chosen = f"best weights by validation {job.metric}" if "validation" in data.splits else "no validation"
    reporter.table(
        f"plan: {trainer.plan.name}, {chosen}",
        ("stage", "trains", "length", "learning rates", "BatchNorm"),
        rows,
        words=("trains", "BatchNorm"),
    )
    reporter.say(
        f"Frozen groups run as in inference: BatchNorm statistics, dropout and stochastic depth. Gate: {recipe.gate}."
    )
    for sentence in trainer.balance.sentences(job.metric):
        reporter.say(sentence)


def report(job: Job, results: Mapping[str, Any], reporter: Reporter) -> None:
    """Says what came out, where it is, and what can be done with it."""
    stages = results["stages"]
    metric = results["metric"].replace("macro_f1", "macro F1").replace("_", " ")
    reporter.table(
        f"what each stage reached: validation {metric} before -> after, 95 % interval of the gain",
        (
            "stage",
            "trained parameters",
            "seconds",
            "images/s",
            metric,
            "result",
            "data wait",
            "peak memory",
            "epochs",
        ),
        [
            (
                stage["name"],
                f"{stage['trainable_parameters']:,}",
                f"{stage['seconds']:.1f}",
                _shown(stage["step_images_per_second"], ".0f"),
                gain_cell(stage),
                Text("kept", style="green") if stage["accepted"] else Text("rolled back", style="yellow"),
                _shown(stage["data_wait_share"], ".0%"),
                _shown(stage["peak_memory_mb"], ",.0f", " MiB"),
                stage["epochs"],
            )
            for stage in stages
        ],
        words=("result",),
        optional=("data wait", "peak memory", "epochs"),
    )
    for stage in stages:
        for sentence in filter(None, (_on_frozen_part(stage), _on_live_part(stage))):
            reporter.say(sentence)
    for split in ("validation", "test"):
        if split in results:
            reporter.say(f"{split}: {figures_line(results[split])}")
    if "forgetting" in results:
        reporter.say(forgetting_line(results["forgetting"]))
    if "differences" in results.get("tta", {}):
        reporter.say(f"validation: {difference_line(results['tta'], results['metric'])}; --tta in predict and evaluate")
    for finding in results.get("diagnosis", ()):
        reporter.say(Finding(**finding).sentence)
    files = "the model, README.md (its card), report.html, results.json, plots/, predictions/"
    reporter.say(f"saved to {job.output}: {files}")
    reporter.say("next:")
    for command in next_commands(job):
        reporter.paste(f"  {command}")


def figures_line(figures: Mapping[str, Any]) -> str:
    """Writes the figures of a split in a line: accuracy first, or where images may have several labels mAP."""
    several = "map" in figures
    key, name = ("map", "mAP") if several else ("accuracy", "accuracy")
    (low, high), method = figures[f"{key}_interval"], figures["interval_method"]
    more = f", all labels right {figures['accuracy']:.4f}" if several else ""
    return (
        f"{name} {figures[key]:.4f} (95 % interval {low:.3f} to {high:.3f}, {method}), "
        f"macro F1 {figures['macro_f1']:.4f}{more}, {figures['num_images']} images"
    )


def forgetting_line(found: Mapping[str, Any]) -> str:
    """Writes in a line what the backbone still scores on its source task."""
    what = f"forgetting: {found['data']} ({found['split']}, {found['num_images']} images)"
    if "problem" in found:
        return f"{what} could not be measured: {found['problem']}"
    interval = found["interval"]
    limits = "" if interval is None else f" (95 % interval {interval[0]:+.4f} to {interval[1]:+.4f})"
    return (
        f"{what} with the pretrained head: accuracy {found['before']['accuracy']:.4f} -> "
        f"{found['after']['accuracy']:.4f}, {found['difference']:+.4f}{limits}"
    )


def gain_cell(stage: Mapping[str, Any]) -> Text:
    """Returns the metric before and after a stage, and below it the interval of the difference, as far as known."""
    comparison, best = stage["comparison"], stage["best_metric"]
    if best is None:
        return Text("-")
    if comparison is None:
        return Text(f"{best:.4f}")
    change = f"{comparison['before']:.4f} -> {comparison['after']:.4f}"
    if comparison["interval"] is None:
        return Text(f"{change}\n{comparison['difference']:+.4f}")
    low, high = comparison["interval"]
    return Text(f"{change}\n{low:+.4f} to {high:+.4f}")


def next_commands(job: Job) -> list[str]:
    """Returns command lines to go on with; what is in capitals is to be filled in."""
    output = shlex.quote(str(job.output))
    commands = [f"torchthaw predict {output} PHOTOS"]
    if "validation" in job.data.splits:
        commands.append(f"torchthaw evaluate {output} --per-class")
    if job.recipe.push.repo is None:
        commands.append(f"torchthaw push {output} USER/NAME")
    return [*commands, f"python: pipeline('image-classification', model={str(job.output)!r})"]


def _shown_rates(stage: Stage, rates: Mapping[str, float], *, has_probe: bool) -> str:
    if stage.solver == "probe":
        return "-"
    if stage.by_probe and has_probe:
        return BY_PROBE
    low, high = min(rates.values()), max(rates.values())
    return f"{low:.1e} - {high:.1e}" if len(rates) > 1 else f"{high:.1e}"


def _trained(live: Sequence[str], groups: Sequence[str]) -> str:
    """Names the layer groups that train; a row of many by its ends."""
    if len(live) > 1 and len(live) == len(groups):
        return "everything"
    first = groups.index(live[0])
    if len(live) > 3 and list(live) == list(groups[first : first + len(live)]):
        return f"{live[0]} to {live[-1]}"
    return " ".join(live)


def _shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def _on_frozen_part(stage: Mapping[str, Any]) -> str | None:
    """Says what a stage saved by what it kept frozen."""
    frozen = stage["frozen_part"]
    if not frozen:
        return None
    cached = " and ".join(frozen["cached"])
    what = f"computed once for {cached} images" if cached else "computed without a graph, anew for each batch"
    dtype = "float32" if frozen["dtype"] == "float32" else f"{frozen['dtype']} (for training)"
    return f"{stage['name']}: frozen layers up to {frozen['border']} in {dtype}, {what}"


def _on_live_part(stage: Mapping[str, Any]) -> str | None:
    """Says what a stage trained in, where that is not what the weights are in."""
    if stage["live_dtype"] in (None, "float32"):
        return None
    return f"{stage['name']}: what trains is computed in {stage['live_dtype']}, weights and head in float32"
