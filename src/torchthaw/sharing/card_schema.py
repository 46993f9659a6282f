"""What a card needs of `results.json`, `config.json` and `audit.json`, with types."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

_Count = Annotated[int, Field(ge=0)]
_Interval = tuple[float, float]


class _Part(BaseModel):
    # Strict: a number in quotes is a mistake. Keys that this version does not know are passed over.
    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")


class ClassFigures(_Part):
    """Figures of one class in one split."""

    precision: float
    recall: float
    f1: float
    support: _Count
    average_precision: float | None = None


class SplitFigures(_Part):
    """Figures of one split, as `classification_metrics` or `multilabel_metrics` gives them."""

    accuracy: float
    num_images: _Count
    map: float | None = None
    macro_f1: float | None = None
    micro_f1: float | None = None
    balanced_accuracy: float | None = None
    loss: float | None = None
    ece: float | None = None
    hamming_loss: float | None = None
    map_interval: _Interval | None = None
    accuracy_interval: _Interval | None = None
    macro_f1_interval: _Interval | None = None
    interval_method: str | None = None
    per_class: dict[str, ClassFigures] = {}


class Comparison(_Part):
    """The selection metric before and after a stage on the same images."""

    metric: str
    before: float | None = None
    after: float | None = None
    difference: float | None = None
    interval: _Interval | None = None
    p_value: float | None = None


class Probe(_Part):
    """What a linear probe found."""

    macro_f1: float | None = None
    held_out_images: _Count | None = None


class StageResult(_Part):
    """What became of a stage."""

    name: str
    epochs: float | None = None
    steps: _Count | None = None
    seconds: float | None = None
    trainable_parameters: _Count | None = None
    best_metric: float | None = None
    learning_rates: dict[str, float] = {}
    batch_norm: str | None = None
    accepted: bool | None = None
    reason: str | None = None
    comparison: Comparison | None = None
    frozen_unchanged: bool | None = None
    ended_early: str | None = None
    probe: Probe | None = None
    chosen: str | None = None
    selection: str = "best"


class ModelFacts(_Part):
    """Facts about the saved network."""

    sha256: str | None = None
    parameters: _Count | None = None
    image_size: _Count | None = None
    plan: str | None = None


class SplitOrigin(_Part):
    """How a split came about: `origin` is "given", "cut off" or "the rest"; `share` is what was asked for."""

    origin: str | None = None
    share: float | None = None
    counts: dict[str, _Count] = {}


class DataFacts(_Part):
    """Where the images came from and how they were split."""

    source: str | None = None
    hub: bool = False
    config: str | None = None
    revision: str | None = None
    splits: dict[str, SplitOrigin] = {}
    split_by: str | None = None
    method: str | None = None


class DroppedImage(_Part):
    """An image that was left out."""

    path: str
    reason: str


class GateRule(_Part):
    """What decided after each stage."""

    gate: str
    min_gain: float = 0.0
    on_reject: str | None = None


class Hardware(_Part):
    """What the run ran on."""

    device: str | None = None
    cores: _Count | None = None
    platform: str | None = None


class SavedFolderCheck(_Part):
    """The check of the saved folder in a new process without torchthaw."""

    images: _Count
    largest_difference: float


class Diagnosis(_Part):
    """A finding about the course of the training."""

    signal: str
    evidence: str | None = None
    advice: str | None = None


class BeforeAfter(_Part):
    """A figure before and after calibration, and on the split that it was fitted on, cross-fitted."""

    before: float
    after: float
    cross_fitted: float | None = None


class Calibration(_Part):
    """What was done to the scores, and figures of each split; `problem` says why nothing was."""

    method: str | None = None
    temperature: float | None = None
    problem: str | None = None
    fitted_on: str | None = None
    num_images: _Count | None = None
    ece: dict[str, BeforeAfter] = {}
    loss: dict[str, BeforeAfter] = {}
    brier: dict[str, BeforeAfter] = {}


class Distance(_Part):
    """How far the backbone is from the weights that training started from, as a share of their norm."""

    backbone: float
    groups: dict[str, float] = {}


class Share(_Part):
    """A share of images that are right."""

    accuracy: float
    interval: _Interval | None = None


class Forgetting(_Part):
    """What the backbone scored on its source task before and after training; `problem` says why it is not known."""

    data: str
    split: str | None = None
    num_images: _Count
    num_classes: _Count | None = None
    left_out: _Count = 0
    problem: str | None = None
    before: Share | None = None
    after: Share | None = None
    difference: float | None = None
    interval: _Interval | None = None
    p_value: float | None = None
    forgotten: _Count | None = None
    gained: _Count | None = None


class TestTimeAugmentation(_Part):
    """Figures of each split with test-time augmentation, and paired differences from those without, by metric."""

    method: str
    views: _Count
    validation: SplitFigures | None = None
    test: SplitFigures | None = None
    differences: dict[str, Comparison] = {}


class TestLook(_Part):
    """One time that the test images were measured: when, in UTC, and by which command."""

    time: str
    by: str | None = None


class Spread(_Part):
    """A figure over the folds of a cross-validation; `std` is the sample standard deviation."""

    mean: float
    std: float
    values: tuple[float, ...]


class CrossValidation(_Part):
    """What the folds of a cross-validation reached, one by one and all their validation images together."""

    folds: _Count
    split_by: str | None = None
    metric: str | None = None
    figures: dict[str, Spread] = {}
    pooled: SplitFigures | None = None


class Imbalance(_Part):
    """What training did about uneven classes."""

    class_weights: str | None = None
    sampling: str | None = None
    loss: str | None = None
    logit_adjustment: float | None = None


class Finding(_Part):
    """One finding of the data audit: `verdict` is "pass", "warn" or "fail"."""

    name: str
    verdict: str
    count: _Count | None = None
    summary: str | None = None
    advice: str | None = None


class Audit(_Part):
    """What the data audit found."""

    verdict: str | None = None
    findings: tuple[Finding, ...] = ()


class Results(_Part):
    """`results.json`, as far as a card needs it.

    `weights` names what the network was initialised with: a member of torchvision's enums, a file, a folder, a Hub
    repository (with its slash) or `builtin`.
    """

    backbone: str | None = None
    weights: str | None = None
    seed: int | None = None
    metric: str | None = None
    thresholds: float | str | None = None
    num_images: dict[str, _Count] = {}
    dropped_images: tuple[DroppedImage, ...] = ()
    validation: SplitFigures | None = None
    test: SplitFigures | None = None
    gate: GateRule | None = None
    stages: tuple[StageResult, ...] = ()
    seconds_total: float | None = None
    peak_memory_mb: float | None = None
    versions: dict[str, str] = {}
    model: ModelFacts = ModelFacts()
    data: DataFacts = DataFacts()
    test_reads: _Count | None = None
    test_looks: tuple[TestLook, ...] = ()
    command: str | None = None
    date: str | None = None
    hardware: Hardware | None = None
    saved_folder: SavedFolderCheck | None = None
    diagnosis: tuple[Diagnosis, ...] = ()
    emissions_kg: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    emissions_source: str = "codecarbon"
    calibration: Calibration | None = None
    tta: TestTimeAugmentation | None = None
    cross_validation: CrossValidation | None = None
    audit: Audit | None = None
    imbalance: Imbalance | None = None
    distance_from_start: Distance | None = None
    forgetting: Forgetting | None = None

    @property
    def measured(self) -> dict[str, SplitFigures]:
        """The splits that have figures."""
        splits = {"validation": self.validation, "test": self.test}
        return {name: figures for name, figures in splits.items() if figures is not None}


class ModelConfig(_Part):
    """`config.json`, as far as a card needs it; `auto_map` is there if the folder brings its own code."""

    architecture: str
    id2label: dict[str, str]
    image_size: _Count | None = None
    auto_map: dict[str, Any] | None = None
    problem_type: str | None = None
    thresholds: tuple[float, ...] | None = None

    @property
    def several_labels(self) -> bool:
        """Whether an image may have several labels."""
        return self.problem_type == "multi_label_classification"

    @property
    def class_names(self) -> list[str]:
        """Names of the classes in the order of the logits."""
        return [self.id2label[key] for key in sorted(self.id2label, key=lambda key: (len(key), key))]
