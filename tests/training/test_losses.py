"""What training minimises, against torch's own losses and losses written out."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from torchthaw import TorchvisionConfig, TorchvisionForImageClassification
from torchthaw.errors import TrainingError
from torchthaw.training.losses import TrainingLoss, minimising

CLASSES = 5
WEIGHTS = torch.tensor([0.3, 1.0, 2.5, 1.0, 0.7])


@pytest.fixture
def logits():
    torch.manual_seed(0)
    return (3 * torch.randn(12, CLASSES)).requires_grad_()


@pytest.fixture
def labels():
    return torch.randint(CLASSES, (12,), generator=torch.Generator().manual_seed(1))


def same(found, expected, logits):
    """Compares losses and their gradients."""
    gradients = [torch.autograd.grad(loss, logits, retain_graph=True)[0] for loss in (found, expected)]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_weighted_cross_entropy_is_torchs(logits, labels, weights, smoothing):
    expected = F.cross_entropy(logits, labels, weight=weights, label_smoothing=smoothing)
    same(TrainingLoss(weights, smoothing=smoothing)(logits, labels), expected, logits)


@pytest.mark.parametrize("loss", [TrainingLoss(WEIGHTS, smoothing=0.1), TrainingLoss(WEIGHTS, gamma=2.0)])
def test_a_distribution_on_one_class_is_that_class(logits, labels, loss):
    same(loss(logits, F.one_hot(labels, CLASSES).float()), loss(logits, labels), logits)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_without_weights_distributions_are_as_in_torch(logits, smoothing):
    labels = torch.softmax(torch.randn(12, CLASSES), dim=1)
    expected = F.cross_entropy(logits, labels, label_smoothing=smoothing)
    same(TrainingLoss(smoothing=smoothing)(logits, labels), expected, logits)


@pytest.mark.parametrize("gamma", [0.0, 2.0])
def test_mixing_images_mixes_their_losses_and_weights(logits, labels, gamma):
    partners, share = labels.flip(0), 0.3
    mixed = share * F.one_hot(labels, CLASSES) + (1 - share) * F.one_hot(partners, CLASSES)
    loss = TrainingLoss(WEIGHTS, gamma=gamma)
    parts = [loss(logits, ids) * WEIGHTS[ids].sum() for ids in (labels, partners)]
    weights = [WEIGHTS[ids].sum() for ids in (labels, partners)]
    expected = (share * parts[0] + (1 - share) * parts[1]) / (share * weights[0] + (1 - share) * weights[1])
    same(loss(logits, mixed), expected, logits)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("gamma", [0.5, 2.0, 5.0])
def test_focal_loss_is_what_the_paper_writes(logits, labels, gamma, weights):
    losses, alphas = [], []
    for row, label in zip(logits, labels.tolist(), strict=True):
        p = torch.exp(row[label]) / torch.exp(row).sum()
        alpha = 1.0 if weights is None else weights[label].item()
        losses.append(-alpha * (1 - p) ** gamma * torch.log(p))
        alphas.append(alpha)
    same(TrainingLoss(weights, gamma=gamma)(logits, labels), torch.stack(losses).sum() / sum(alphas), logits)


@pytest.mark.parametrize("gamma", [0.0, 0.5, 2.0])
def test_gradients_are_finite_where_an_image_is_classified_perfectly(gamma):
    logits = torch.tensor([[200.0, -200.0], [-200.0, 200.0]], requires_grad=True)
    for labels in (torch.tensor([0, 1]), torch.tensor([1, 0])):
        (gradient,) = torch.autograd.grad(TrainingLoss(gamma=gamma)(logits, labels), logits)
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("tau", [0.5, 1.0])
def test_logit_adjusted_loss_is_cross_entropy_of_shifted_logits(logits, labels, tau):
    shares = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    # Equation 10 of the paper: log(1 + sum of (share' / share)^tau * exp(f' - f) over the other classes).
    losses = [
        torch.log(
            1
            + sum(
                (shares[other] / shares[label]) ** tau * torch.exp(row[other] - row[label])
                for other in range(CLASSES)
                if other != label
            )
        )
        for row, label in zip(logits, labels.tolist(), strict=True)
    ]
    same(TrainingLoss(shift=tau * shares.log())(logits, labels), torch.stack(losses).mean(), logits)


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_several_labels_per_image(logits, weights):
    labels = (torch.rand(12, CLASSES) < 0.4).float()
    ones = torch.ones(CLASSES) if weights is None else weights
    plain = F.binary_cross_entropy_with_logits(logits, labels, weight=ones, reduction="none").sum() / (12 * ones.sum())
    same(TrainingLoss(weights, several_labels=True)(logits, labels), plain, logits)
    smooth = F.binary_cross_entropy_with_logits(logits, 0.8 * labels + 0.1, weight=ones, reduction="none").sum()
    same(TrainingLoss(weights, smoothing=0.2, several_labels=True)(logits, labels), smooth / (12 * ones.sum()), logits)
    focal = (sigmoid_focal_loss(logits, labels, alpha=-1, gamma=1.5) * ones).sum() / (12 * ones.sum())
    same(TrainingLoss(weights, gamma=1.5, several_labels=True)(logits, labels), focal, logits)


def test_parts_of_a_batch_add_up_to_the_whole(logits, labels):
    loss = TrainingLoss(WEIGHTS, gamma=1.0, smoothing=0.1)
    total = loss.weight_of(labels, CLASSES)
    torch.testing.assert_close(total, WEIGHTS[labels].sum())
    parts = [loss(logits[part], labels[part], total) for part in (slice(0, 3), slice(3, 12))]
    same(parts[0] + parts[1], loss(logits, labels), logits)


def test_half_precision_logits_give_a_full_precision_loss(logits, labels):
    loss = TrainingLoss(WEIGHTS)(logits.half(), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, TrainingLoss(WEIGHTS)(logits, labels), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    ("loss", "labels"),
    [
        (TrainingLoss(WEIGHTS), torch.zeros(12)),
        (TrainingLoss(WEIGHTS), torch.zeros(12, 1)),
        (TrainingLoss(WEIGHTS), torch.zeros(11, dtype=torch.long)),
        (TrainingLoss(WEIGHTS, several_labels=True), torch.zeros(12, dtype=torch.long)),
    ],
)
def test_labels_that_do_not_fit_are_named(logits, loss, labels):
    with pytest.raises(TrainingError, match=r"labels of shape .* do not fit logits of shape \(12, 5\)"):
        loss(logits, labels)


def test_plain_is_plain():
    assert TrainingLoss().is_plain
    for loss in (
        TrainingLoss(WEIGHTS), TrainingLoss(gamma=1.0), TrainingLoss(shift=torch.zeros(5)), TrainingLoss(smoothing=0.1),
    ):  # fmt: skip
        assert not loss.is_plain


def test_auxiliary_heads_minimise_the_same_loss_and_the_models_own_comes_back():
    torch.manual_seed(0)
    config = TorchvisionConfig(architecture="googlenet", aux_logits=True, id2label=["a", "b", "c"])
    model, heads = TorchvisionForImageClassification(config).train(), {}
    own = model.loss_function
    pixels, labels = torch.randn(3, 3, 64, 64), torch.tensor([0, 1, 2])
    loss = TrainingLoss(torch.tensor([1.0, 2.0, 4.0]))
    for name in ("fc", "aux1", "aux2"):
        getattr(model.backbone, name).register_forward_hook(lambda *call, name=name: heads.update({name: call[-1]}))
    with minimising(model, loss, total_weight=None, scale=2.0):
        found = model(pixel_values=pixels, labels=labels).loss
    expected = {name: F.cross_entropy(logits, labels, weight=loss.weights) for name, logits in heads.items()}
    torch.testing.assert_close(found, 2 * (expected["fc"] + 0.3 * (expected["aux1"] + expected["aux2"])))
    assert model.loss_function is own
    with pytest.raises(ZeroDivisionError), minimising(model, loss, total_weight=None, scale=1.0):
        raise ZeroDivisionError
    assert model.loss_function is own
