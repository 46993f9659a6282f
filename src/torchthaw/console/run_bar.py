"""The bar of a run as it is drawn: one line with the bar, and its figures below, at any width of the terminal."""

from collections.abc import Callable
from dataclasses import dataclass

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderResult
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from torchthaw.console.text import as_time, encodable, in_lines, printable, shortened

_SHORTEST_BAR = 6
# Where the epoch stands among the figures.
_NARROW = 45


@dataclass
class RunBar:
    """What the bar shows.

    Attributes:
        part: What the run is of a larger one.
        seconds_left: Returns the seconds left of the run and of the stage, None for what is not known.
        stage: Name of the stage.
        doing: What is done beside training steps, if anything.
        epoch: The epoch, counted over the run, from 1 on.
        epochs: Epochs of the run.
        step: Optimizer steps that are done.
        steps: Optimizer steps of the run.
        rate: Learning rate of the head, or of the last layer group that trains.
        loss: The training loss, smoothed.
        metric: Name and value of what was validated last.
        waiting: Share of the steps' time that went by waiting for data.
    """

    part: str
    seconds_left: Callable[[], tuple[float | None, float | None]]
    stage: str = "starting"
    doing: str = ""
    epoch: int = 0
    epochs: int = 0
    step: int = 0
    steps: int = 0
    rate: float | None = None
    loss: float | None = None
    metric: tuple[str, float] | None = None
    waiting: float | None = None

    def left(self) -> str:
        """Returns the time left in words: of the run if it is known, of the stage otherwise."""
        run, stage = self.seconds_left()
        if run is not None:
            return f"{as_time(run)} left"
        return f"{'-' if stage is None else as_time(stage)} left (stage)"

    def figures(self) -> list[str]:
        """Returns what stands below the bar, in parts that belong together."""
        metric = "val -" if self.metric is None else f"val {self.metric[0]} {self.metric[1]:.4f}"
        return [
            self.left(),
            "lr -" if self.rate is None else f"lr {self.rate:.1e}",
            "loss -" if self.loss is None else f"loss {self.loss:.4f}",
            metric,
            "data wait -" if self.waiting is None else f"data wait {self.waiting:.0%}",
            *([self.doing] if self.doing else []),
        ]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws the bar, and the figures in as many lines as they take."""
        # The last column stays free: some terminals break a line when it is full.
        width = options.max_width - 1
        after = f"{100 * self.step // max(1, self.steps):3d} %"
        epochs = f"epoch {self.epoch}/{self.epochs}" if self.epochs else ""
        figures = self.figures()
        if width < _NARROW:
            figures.insert(0, epochs)
            epochs = ""
        fixed = sum(map(cell_len, (self.part, epochs, after))) + 2 * sum(map(bool, (self.part, epochs, after)))
        name = encodable(printable(self.stage), options.encoding)
        name = shortened(name, max(4, width - fixed - 2 - _SHORTEST_BAR))
        before = "  ".join(filter(None, (self.part, name, epochs)))
        room = max(1, width - cell_len(before) - cell_len(after) - 4)
        grid = Table.grid(padding=(0, 2, 0, 0))
        grid.add_row(Text(before), ProgressBar(max(1, self.steps), self.step, width=room), Text(after))
        yield grid
        for line in in_lines(filter(None, figures), width):
            yield Text(line)
