"""The arithmetic of averages, against plain loops."""

import numpy as np
import pytest
import torch
from torch import nn

from torchthaw.stages.averages import WeightAverage, ema_decay, interpolate, measure_batch_norm
from torchthaw.stages.snapshots import all_tensors, live_names


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))


def moves(model, number):
    """Changes all weights and statistics, as steps of training do; yields them each time, in float64."""
    random = torch.Generator().manual_seed(1)
    for _ in range(number):
        with torch.no_grad():
            for tensor in all_tensors(model).values():
                tensor += torch.randn(tensor.shape, generator=random) if tensor.is_floating_point() else 1
        yield {name: tensor.detach().double().clone() for name, tensor in all_tensors(model).items()}


@pytest.mark.parametrize("highest", [0.999, 0.4])
def test_exponential_moving_average(highest):
    model = network()
    average = WeightAverage("ema", highest)
    average.begin(model, live_names(model))
    expected = {name: tensor.detach().double().clone() for name, tensor in all_tensors(model).items()}
    for number, weights in enumerate(moves(model, 20), start=1):
        average.update()
        decay = min(highest, (1 + number) / (10 + number))
        for name, tensor in weights.items():
            counts = name.endswith("num_batches_tracked")
            expected[name] = tensor if counts else decay * expected[name] + (1 - decay) * tensor
    assert average.averages.keys() == expected.keys()
    for name, tensor in average.averages.items():
        torch.testing.assert_close(tensor.double(), expected[name], atol=1e-5, rtol=1e-5)


def test_the_average_reaches_back_over_a_tenth_of_the_steps_until_the_decay_is_reached():
    assert [ema_decay(update, 0.999) for update in (1, 8, 90)] == pytest.approx([2 / 11, 0.5, 0.91])
    assert ema_decay(8_000, 0.999) < 0.999 == ema_decay(9_000, 0.999)


def test_equal_mean_with_the_last_statistics():
    model = network()
    average = WeightAverage("swa", 0.5)
    average.begin(model, live_names(model))
    seen = []
    for weights in moves(model, 5):
        average.update()
        seen.append(weights)
    for name, tensor in average.averages.items():
        last = "running" in name or "num_batches" in name
        expected = seen[-1][name] if last else torch.stack([weights[name] for weights in seen]).mean(dim=0)
        torch.testing.assert_close(tensor.double(), expected, atol=1e-6, rtol=1e-6)


def test_averages_stand_in_the_model_for_a_while():
    model = network()
    average = WeightAverage("swa", 0.5)
    average.begin(model, live_names(model))
    before = model[0].weight.detach().clone()
    with average.in_model(model):
        assert torch.equal(model[0].weight, before), "there is no average yet"
    list(moves(model, 1))
    average.update()
    trained = next(iter(moves(model, 1)))["0.weight"].float()

    def validate():
        with average.in_model(model):
            with average.in_model(model):
                assert torch.equal(model[0].weight, average.averages["0.weight"])
            assert torch.equal(average.replaced["0.weight"], trained), "entering twice changes nothing"
            raise RuntimeError("it broke")

    with pytest.raises(RuntimeError, match="it broke"):
        validate()
    assert torch.equal(model[0].weight, trained)
    assert average.replaced == {}


def test_a_model_that_was_moved_since_is_still_averaged():
    """As `accelerate` does it before the first step; on several processes on the CPU too."""
    model = network()
    average = WeightAverage("ema", 0.5)
    average.begin(model, live_names(model))
    for tensor in model.parameters():
        tensor.data = tensor.data.clone()
    model[1].running_mean = model[1].running_mean.clone()
    before = {name: tensor.clone() for name, tensor in average.averages.items()}
    list(moves(model, 1))
    average.update()
    assert [name for name in before if torch.equal(before[name], average.averages[name])] == []


def test_statistics_are_those_of_all_images_whatever_the_batches():
    model = network().train()
    model[1].running_mean.fill_(7.0)
    images = torch.randn(11, 4, generator=torch.Generator().manual_seed(2))
    counted, momentum = model[1].num_batches_tracked.clone(), model[1].momentum

    def passes():
        for batch in images.split([6, 5]):
            model(batch)
            yield len(batch)

    measure_batch_norm(model, passes())
    with torch.no_grad():
        values = model[0](images).double().numpy()
    batches = [values[:6], values[6:]]
    mean = values.mean(axis=0)
    squares = sum(len(batch) * (batch.var(axis=0, ddof=1) + batch.mean(axis=0) ** 2) for batch in batches) / 11
    np.testing.assert_allclose(model[1].running_mean, mean, atol=1e-6)
    np.testing.assert_allclose(model[1].running_var, squares - mean**2, atol=1e-6)
    assert torch.equal(model[1].num_batches_tracked, counted)
    assert model[1].momentum == momentum
    assert model[1].training


def test_the_best_share_and_of_equal_ones_the_largest():
    before, after = {"weight": torch.zeros(2)}, {"weight": torch.ones(2)}
    seen = {}

    def score(alpha, weights):
        seen[alpha] = weights["weight"].tolist()
        return {0.25: 1.0, 0.5: 3.0, 0.75: 3.0, 1.0: float("nan")}[alpha]

    best, scores = interpolate(before, after, [1.0, 0.5, 0.25, 0.75], score)
    assert best == 0.75
    assert list(scores) == [0.25, 0.5, 0.75, 1.0]
    assert seen == {alpha: [alpha, alpha] for alpha in scores}
