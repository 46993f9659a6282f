"""Averages of weights: the numbers, the choice on validation images, and what cannot be averaged."""

import json

import pytest
import torch
from torch import nn

from torchthaw import TorchvisionForImageClassification, TorchvisionImageProcessor
from torchthaw.errors import SharingError, ThawError
from torchthaw.sharing.soup import greedy_soup, uniform_soup, wise_ft
from torchthaw.stages.averages import average_weights

ARCHITECTURE = "shufflenet_v2_x0_5"
CLASSES = ["ant", "bee", "cat"]
FC = "backbone.fc.weight"


def save(folder, seed, *, classes=CLASSES, size=32, weights="builtin", noise=0.0):
    torch.manual_seed(seed)
    model = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, weights, id2label=classes)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * torch.randn_like(parameter)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean += noise * torch.randn_like(module.running_mean)
                module.num_batches_tracked += seed
    model.save_pretrained(folder)
    TorchvisionImageProcessor.from_torchvision(ARCHITECTURE, weights, image_size=size).save_pretrained(folder)
    return model


@pytest.fixture
def folders(tmp_path):
    paths = [tmp_path / f"run{seed}" for seed in range(3)]
    for seed, path in enumerate(paths):
        save(path, seed, noise=0.01)
    return paths


def states(folders):
    return [TorchvisionForImageClassification.from_pretrained(folder).state_dict() for folder in folders]


def nearness(target):
    """Scores a model by how near its head is to a target: a validation set of which the best weights are known."""
    return lambda model: -float((model.state_dict()[FC] - target).norm())


def test_weighted_mean_of_every_tensor(folders):
    first, second, third = states(folders)
    found = average_weights([first, second, third], [0.5, 0.25, 0.25])
    for name, tensor in found.items():
        assert tensor.dtype == first[name].dtype
        if tensor.is_floating_point():
            expected = (0.5 * first[name].double() + 0.25 * (second[name].double() + third[name].double())).float()
            assert torch.equal(tensor, expected), name
        else:
            assert torch.equal(tensor, first[name]), name


def test_uniform_soup_is_saved_as_a_model_that_loads(folders, tmp_path):
    soup = uniform_soup(folders, lambda model: 0.5)
    described = soup.save(tmp_path / "soup")
    assert described["ingredients"] == {str(folder): pytest.approx(1 / 3) for folder in folders}
    assert json.loads((tmp_path / "soup" / "soup.json").read_text()) == described
    loaded = TorchvisionForImageClassification.from_pretrained(tmp_path / "soup")
    expected = average_weights(states(folders), [1 / 3] * 3)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    assert loaded.config.class_names == CLASSES
    assert (tmp_path / "soup" / "modeling.py").is_file()
    with pytest.raises(SharingError, match="never overwrites"):
        soup.save(tmp_path / "soup")


def test_greedy_soup_keeps_what_helps_and_nothing_else(folders):
    first, second, _ = states(folders)
    # The mean of the first two is best; the third only leads away.
    score = nearness((first[FC] + second[FC]) / 2)
    soup = greedy_soup(folders, score)
    assert set(soup.ingredients) == {str(folder) for folder in folders[:2]}
    assert soup.score == pytest.approx(0, abs=1e-6)
    assert soup.score == score(soup.model)
    assert [step["kept"] for step in soup.steps] == [True, False, False, True, False]
    singles = [score(TorchvisionForImageClassification.from_pretrained(folder)) for folder in folders]
    assert [step["score"] for step in soup.steps[:3]] == sorted(singles, reverse=True)


def test_greedy_soup_is_the_best_model_where_no_average_helps(folders):
    target = states(folders)[1][FC]
    soup = greedy_soup(folders, nearness(target))
    assert soup.ingredients == {str(folders[1]): 1.0}
    assert torch.equal(soup.model.state_dict()[FC], target)
    expected = states(folders)[1]
    assert all(torch.equal(tensor, expected[name]) for name, tensor in soup.model.state_dict().items())


def test_wise_ft_between_two_saved_models(folders):
    before, after, _ = states(folders)
    soup = wise_ft(folders[0], folders[1], nearness(0.7 * before[FC] + 0.3 * after[FC]))
    assert soup.ingredients == {str(folders[0]): 0.7, str(folders[1]): 0.3}
    expected = average_weights([after, before], [0.3, 0.7])
    assert all(torch.equal(tensor, expected[name]) for name, tensor in soup.model.state_dict().items())
    assert [step["alpha"] for step in soup.steps] == [round(0.1 * i, 1) for i in range(11)]
    # Equal scores: the fine-tuned weights stay.
    assert wise_ft(folders[0], folders[1], lambda model: 1.0).ingredients[str(folders[1])] == 1


def test_wise_ft_from_pretrained_weights_keeps_the_fine_tuned_head(folders):
    soup = wise_ft("builtin", folders[1], lambda model: 1.0, alphas=[0.5])
    pretrained = TorchvisionForImageClassification.from_torchvision(ARCHITECTURE, "builtin").state_dict()
    after = states(folders)[1]
    mixed = soup.model.state_dict()
    assert torch.equal(mixed[FC], after[FC])
    name = "backbone.conv1.0.weight"
    assert mixed[name] == pytest.approx((pretrained[name] + after[name]) / 2, abs=1e-7)
    with pytest.raises(ThawError, match="nonsense"):
        wise_ft("nonsense", folders[1], lambda model: 1.0)
    with pytest.raises(SharingError, match="write numbers from 0 to 1"):
        wise_ft("builtin", folders[1], lambda model: 1.0, alphas=[0.5, 1.5])


def test_what_cannot_be_averaged_is_refused_with_the_difference(folders, tmp_path):
    save(tmp_path / "classes", 0, classes=["bee", "ant", "cat"])
    save(tmp_path / "size", 0, size=64)
    for name, message in (
        ("classes", r"their classes differ: \['ant', 'bee', 'cat'\] and \['bee', 'ant', 'cat'\]"),
        ("size", "their image processor differ"),
    ):
        for mix in (uniform_soup, greedy_soup):
            with pytest.raises(SharingError, match=message):
                mix([folders[0], tmp_path / name], lambda model: 0.0)
    with pytest.raises(SharingError, match="at least two different saved models"):
        greedy_soup([folders[0], folders[0]], lambda model: 0.0)
    with pytest.raises(SharingError, match="holds no config.json"):
        uniform_soup([folders[0], tmp_path], lambda model: 0.0)


def test_a_score_that_cannot_be_compared_is_refused(folders):
    for bad_one in range(3):
        scores = iter([0.5 if turn != bad_one else float("nan") for turn in range(3)])
        with pytest.raises(SharingError, match="is nan, which cannot be compared"):
            greedy_soup(folders[:2], lambda model, scores=scores: next(scores))
    scores = iter([0.5, float("nan")])
    with pytest.raises(SharingError, match=f"the score of {folders[1]} is nan"):
        uniform_soup(folders[:2], lambda model: next(scores))
    with pytest.raises(SharingError, match=r"the mixture of share 0.5 is inf"):
        wise_ft(folders[0], folders[1], lambda model: float("inf"), alphas=[0.5])


def test_wise_ft_refuses_itself_other_orders_and_other_problems(folders, tmp_path):
    with pytest.raises(SharingError, match="run1 cannot be mixed with itself"):
        wise_ft(folders[1], folders[1], lambda model: 1.0)
    save(tmp_path / "order", 0, classes=["bee", "ant", "cat"])
    with pytest.raises(
        SharingError, match=r"their classes differ: \['bee', 'ant', 'cat'\] and \['ant', 'bee', 'cat'\]"
    ):
        wise_ft(tmp_path / "order", folders[1], lambda model: 1.0)
    several = TorchvisionForImageClassification.from_pretrained(folders[0])
    several.config.problem_type = "multi_label_classification"
    several.save_pretrained(tmp_path / "several")
    TorchvisionImageProcessor.from_pretrained(folders[0]).save_pretrained(tmp_path / "several")
    with pytest.raises(SharingError, match="their problem_type differ"):
        uniform_soup([tmp_path / "several", folders[1]], lambda model: 1.0)


def test_other_classes_are_those_of_pretrained_weights(folders, tmp_path):
    save(tmp_path / "before", 0, classes=["x", "y"], noise=0.02)
    soup = wise_ft(tmp_path / "before", folders[1], lambda model: 1.0, alphas=[0.25])
    before, after = states([tmp_path / "before", folders[1]])
    mixed = soup.model.state_dict()
    assert torch.equal(mixed[FC], after[FC])
    name = "backbone.conv1.0.weight"
    assert mixed[name] == pytest.approx(0.75 * before[name] + 0.25 * after[name], abs=1e-6)


def test_16_bit_models_are_averaged_in_32_bits(folders, tmp_path):
    for folder in folders[:2]:
        TorchvisionForImageClassification.from_pretrained(folder).bfloat16().save_pretrained(folder)
    images = torch.zeros(1, 3, 32, 32)
    soup = uniform_soup(folders[:2], lambda model: model(pixel_values=images).logits.sum().item())
    first, second = states(folders[:2])
    assert torch.equal(soup.model.state_dict()[FC], (first[FC].float() + second[FC].float()) / 2)


def test_average_keeps_the_type_and_adds_in_more_bits():
    # In 16 bits, 256 + 1 is 256.
    states_ = [{"w": torch.tensor([256.0], dtype=torch.bfloat16), "n": torch.tensor(5)}]
    states_ += [{"w": torch.tensor([260.0], dtype=torch.bfloat16), "n": torch.tensor(9)} for _ in range(3)]
    found = average_weights(states_, [0.25] * 4)
    assert found["w"].dtype == torch.bfloat16
    assert float(found["w"]) == float(torch.tensor(259.0).bfloat16())
    assert int(found["n"]) == 5
