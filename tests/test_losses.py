"""losses.py against eq. 2 and eq. 3, written out here with logarithms and sums, values and gradients."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from hf_deit import distillation_loss, soft_target_cross_entropy
from hf_deit.losses import inverse_class_weights


BATCH, CLASSES = 6, 5


def softmax(logits):
    exponentials = (logits - logits.max(dim=1, keepdim=True).values).exp()
    return exponentials / exponentials.sum(dim=1, keepdim=True)


def smooth(labels, epsilon):
    """Rows that sum to one: the label keeps 1 - ε, and ε is shared by all classes."""
    targets = labels.double() if labels.dim() == 2 else torch.eye(CLASSES, dtype=torch.double)[labels]
    return targets * (1 - epsilon) + epsilon / CLASSES


def cross_entropy(logits, targets):
    return -(targets * softmax(logits).log()).sum(dim=1).mean()


def reference_loss(class_logits, taught_logits, labels, teacher_logits, kind, alpha, temperature, epsilon, reduction):
    class_loss = cross_entropy(class_logits, smooth(labels, epsilon))
    if kind == "hard":
        decisions = torch.eye(CLASSES, dtype=torch.double)[teacher_logits.argmax(dim=1)]
        taught_loss = cross_entropy(taught_logits, decisions)
    elif kind == "label":
        taught_loss = cross_entropy(taught_logits, smooth(labels, epsilon))
    else:
        teacher, student = softmax(teacher_logits / temperature), softmax(taught_logits / temperature)
        divergence = (teacher * (teacher.log() - student.log())).sum()
        taught_loss = temperature**2 * divergence / {"batchmean": BATCH, "numel": BATCH * CLASSES}[reduction]
    return (1 - alpha) * class_loss + alpha * taught_loss


@pytest.fixture
def logits():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(BATCH, CLASSES, generator=generator) * 3 for _ in range(3)]


@pytest.fixture(params=["labels", "mixed labels"])
def labels(request):
    generator = torch.Generator().manual_seed(1)
    if request.param == "labels":
        return torch.randint(CLASSES, (BATCH,), generator=generator)
    return torch.rand(BATCH, CLASSES, generator=generator).softmax(dim=1)


@pytest.mark.parametrize("epsilon", [0.0, 0.1])
@pytest.mark.parametrize("has_token", [True, False])
@pytest.mark.parametrize(
    "kind, alpha, reduction",
    [
        ("hard", 0.5, "batchmean"),
        ("hard", 0.3, "batchmean"),
        ("label", 0.5, "batchmean"),
        ("soft", 0.1, "batchmean"),
        ("soft", 0.1, "numel"),
    ],
)
def test_loss_and_gradients_equal_the_papers_equations(logits, labels, kind, alpha, reduction, has_token, epsilon):
    class_logits, token_logits, teacher_logits = logits
    ours = [class_logits.clone().requires_grad_(), token_logits.clone().requires_grad_()]
    loss = distillation_loss(
        ours[0],
        ours[1] if has_token else None,
        labels,
        teacher_logits,
        distillation_type=kind,
        alpha=alpha,
        temperature=2.5,
        label_smoothing=epsilon,
        kl_reduction=reduction,
    )["loss"]
    loss.backward()

    theirs = [class_logits.double().requires_grad_(), token_logits.double().requires_grad_()]
    expected = reference_loss(
        theirs[0], theirs[int(has_token)], labels, teacher_logits.double(), kind, alpha, 2.5, epsilon, reduction
    )
    expected.backward()

    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    for mine, reference in zip(ours[: 1 + has_token], theirs, strict=False):
        torch.testing.assert_close(mine.grad.double(), reference.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["hard", "soft", "label"])
def test_each_term_reaches_its_own_head_only(logits, kind):
    class_logits, token_logits = (value.requires_grad_() for value in logits[:2])
    labels = torch.arange(BATCH) % CLASSES
    parts = distillation_loss(class_logits, token_logits, labels, logits[2], distillation_type=kind)
    by_class = torch.autograd.grad(
        parts["class_loss"], (class_logits, token_logits), retain_graph=True, allow_unused=True
    )
    by_teacher = torch.autograd.grad(parts["distillation_loss"], (class_logits, token_logits), allow_unused=True)
    assert by_class[1] is None and by_teacher[0] is None
    assert by_class[0].abs().sum() > 0 and by_teacher[1].abs().sum() > 0


def test_decisions_teach_what_the_logits_they_come_from_teach(logits):
    labels = torch.arange(BATCH) % CLASSES
    decisions = torch.tensor([row.index(max(row)) for row in logits[2].tolist()])
    for token in (logits[1], None):
        parts, expected = (distillation_loss(logits[0], token, labels, told) for told in (decisions, logits[2]))
        assert all(torch.equal(parts[name], expected[name]) for name in expected)


def test_no_gradient_flows_into_the_teacher(logits):
    teacher_logits = logits[2].requires_grad_()
    loss = distillation_loss(
        logits[0].requires_grad_(), None, torch.zeros(BATCH, dtype=int), teacher_logits, distillation_type="soft"
    )
    loss["loss"].backward()
    assert teacher_logits.grad is None


@pytest.mark.parametrize("kind, weight", [("hard", 0.5), ("label", 0.5), ("soft", 0.1)])
def test_default_weights_are_the_papers(logits, kind, weight):
    parts = distillation_loss(logits[0], logits[1], torch.zeros(BATCH, dtype=int), logits[2], distillation_type=kind)
    expected = (1 - weight) * parts["class_loss"] + weight * parts["distillation_loss"]
    torch.testing.assert_close(parts["loss"], expected)


def test_without_a_teacher_the_loss_is_the_class_term(logits):
    labels = torch.arange(BATCH) % CLASSES
    parts = distillation_loss(logits[0], None, labels, distillation_type="none", label_smoothing=0.1)
    assert parts.keys() == {"loss", "class_loss"}
    expected = cross_entropy(logits[0].double(), smooth(labels, 0.1))
    assert parts["loss"].item() == pytest.approx(expected.item(), abs=1e-6)


def test_half_precision_logits_give_a_float32_loss(logits):
    half = [value.bfloat16() for value in logits]
    labels = torch.arange(BATCH) % CLASSES
    loss = distillation_loss(half[0], half[1], labels, half[2], distillation_type="soft")["loss"]
    full = distillation_loss(half[0].float(), half[1].float(), labels, half[2].float(), distillation_type="soft")[
        "loss"
    ]
    assert loss.dtype == torch.float32 and torch.equal(loss, full)


def test_soft_target_cross_entropy_equals_the_sum(logits):
    targets = softmax(logits[1])
    expected = cross_entropy(logits[0].double(), targets.double())
    assert soft_target_cross_entropy(logits[0], targets).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"distillation_type": "harder"}, "'harder'; choose one of none, soft, hard, label"),
        ({"teacher_logits": None}, "needs teacher_logits"),
        ({"teacher_logits": torch.zeros(BATCH, CLASSES + 1)}, r"\(6, 6\).*\(6, 5\)"),
        ({"teacher_logits": torch.zeros(BATCH)}, r"\(6,\).*\(6, 5\)"),
        ({"teacher_logits": torch.zeros(BATCH + 1, dtype=int)}, r"\(7,\).*\(6, 5\)"),
        (
            {"teacher_logits": torch.zeros(BATCH, dtype=int), "distillation_type": "soft"},
            "got decisions, which only 'hard' accepts",
        ),
        ({"distillation_type": "soft", "kl_reduction": "mean"}, "'mean'; choose one of batchmean, numel"),
    ],
)
def test_bad_arguments_are_refused_by_name(logits, arguments, message):
    arguments = {"teacher_logits": logits[2]} | arguments
    with pytest.raises(ValueError, match=message):
        distillation_loss(logits[0], logits[1], torch.zeros(BATCH, dtype=int), **arguments)


def test_the_loss_is_the_sum_that_equation_3_writes_to_the_last_bit():
    generator = torch.Generator().manual_seed(0)
    for alpha in torch.rand(50, generator=generator).tolist():
        logits, taught, teacher = torch.randn(3, 4, 7, generator=generator)
        parts = distillation_loss(logits, taught, torch.arange(4), teacher, alpha=alpha)
        expected = (1 - alpha) * parts["class_loss"] + alpha * parts["distillation_loss"]
        assert torch.equal(parts["loss"], expected)


# --- class weights -----------------------------------------------------------------------------------------------


def test_inverse_class_weights_are_those_of_scikit_learn():
    labels = np.repeat([0, 1, 3], [50, 5, 20])
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    weights = inverse_class_weights(np.bincount(labels, minlength=5))
    np.testing.assert_allclose(weights[[0, 1, 3]], expected, rtol=1e-6)
    assert weights[2] == weights[4] == 0 and weights.dtype == torch.float32
    assert weights[labels].mean() == pytest.approx(1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("mixed", [False, True])
def test_class_weights_reach_the_labels_and_not_the_teacher(smoothing, mixed):
    generator = torch.Generator().manual_seed(0)
    one, other, teacher = torch.randn(3, 12, 4, generator=generator)
    labels, weights = torch.arange(12) % 4, torch.tensor([0.2, 3.0, 1.0, 0.5])
    targets = 0.7 * F.one_hot(labels, 4) + 0.3 * F.one_hot(labels.flip(0), 4) if mixed else labels
    parts = distillation_loss(one, other, targets, teacher, label_smoothing=smoothing, class_weights=weights)
    stock = torch.nn.CrossEntropyLoss(weights, label_smoothing=smoothing, reduction="sum")
    torch.testing.assert_close(parts["class_loss"], stock(one, targets) / 12)
    torch.testing.assert_close(parts["distillation_loss"], F.cross_entropy(other, teacher.argmax(1)))
    torch.testing.assert_close(parts["loss"], (parts["class_loss"] + parts["distillation_loss"]) / 2)
    both = distillation_loss(
        one, other, targets, distillation_type="label", label_smoothing=smoothing, class_weights=weights
    )
    torch.testing.assert_close(both["distillation_loss"], stock(other, targets) / 12)


def test_weighted_losses_do_not_depend_on_how_a_step_is_cut_into_batches():
    logits, labels = torch.randn(12, 4, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 4
    weights = {"class_weights": torch.tensor([0.2, 3.0, 1.0, 0.5]), "distillation_type": "none"}
    whole = distillation_loss(logits, None, labels, **weights)["loss"]
    parts = [0, 1, 2, 4, 5, 6], [3, 7, 8, 9, 10, 11]  # the heaviest class is in one of them twice, in the other once
    halves = [distillation_loss(logits[part], None, labels[part], **weights)["loss"] for part in parts]
    torch.testing.assert_close(sum(halves) / 2, whole)
