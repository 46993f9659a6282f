"""The recipe's `forgetting`: images of the task that the weights were pretrained for."""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class ForgettingRecipe(BaseModel):
    """Images by which is measured, after training, what the backbone still knows of its source task.

    Attributes:
        data: A folder of images, a parquet file or folder, or a data set on the Hub; its classes are some of those of
            the pretrained weights.
        split: Which of its splits; None takes `validation`, else `test`, else `train`.
        names: What classes of the images are called in the weights, where not the same: `{ants: ant}`.
        config: The Hub data set's configuration.
        revision: The Hub data set's revision.
        image_column: Column of images; None finds it.
        label_column: Column of labels; None finds it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: str = Field(min_length=1)
    split: str | None = None
    names: dict[str | int, str | int] = {}
    config: str | None = None
    revision: str | None = None
    image_column: str | None = None
    label_column: str | None = None


def written_out(value: Any) -> Any:
    """Returns the section that a single text, the data, stands for; anything else as it is."""
    return {"data": value} if isinstance(value, str) else value
