"""What profiling has found, on the terminal."""

from torchthaw.console.reporter import Reporter
from torchthaw.training.bottlenecks import PARTS
from torchthaw.training.profiling import ProfileCallback


def report_profile(profiler: ProfileCallback, reporter: Reporter) -> None:
    """Says where the time of the stages went, and what would change it."""
    if not profiler.stages:
        return
    reporter.table(
        "where the time of a training step goes",
        ("stage", "ms a step", "images/s", *PARTS, "largest operator", "steps of the stage"),
        [
            (
                stage["name"],
                f"{1000 * stage['step_seconds']:.1f}",
                f"{stage['images_per_second']:.0f}",
                *(f"{stage['shares'][part]:.0%}" for part in PARTS),
                stage["top_operators"][0]["name"] if stage["top_operators"] else "-",
                f"{stage['in_steps']:.0%}",
            )
            for stage in profiler.stages
        ],
    )
    for stage in profiler.stages:
        advice = "" if stage["advice"] is None else f". In the recipe: {stage['advice']}"
        reporter.say(f"{stage['sentence']}{advice}")
    reporter.say(f"traces and figures: {profiler.folder}; open a trace at https://ui.perfetto.dev")
