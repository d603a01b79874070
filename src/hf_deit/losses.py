"""The training objectives of the paper, as pure functions of logits.

Eq. 2 (soft distillation), eq. 3 (hard distillation) and the cross-entropy against soft targets that Mixup and CutMix
need. The functions know no model, teacher or trainer, and compute in float32 whatever the dtype of the logits.

Source: Touvron et al. 2021 (arXiv 2012.12877), section 4; facebookresearch/deit losses.py for the conventions.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UserError


DISTILLATION_TYPES = ("none", "soft", "hard", "label")
KL_REDUCTIONS = ("batchmean", "numel")
CLASS_WEIGHTINGS = ("none", "inverse")


def default_alpha(distillation_type: str) -> float:
    """The paper's weight of the distillation term: λ = 0.1 for "soft" (section 6), 0 for "none", else 1/2 (eq. 3)."""
    return {"none": 0.0, "soft": 0.1}.get(distillation_type, 0.5)


def inverse_class_weights(counts: Sequence[int] | np.ndarray) -> Tensor:
    """Weights that make the classes of a dataset count alike in the loss: images / (classes x images of the class).

    Their mean over the images is 1, so that the loss keeps its scale. A class without images has the weight 0 and is
    not among the classes counted.

    Args:
        counts: images of each class, `(classes,)`.

    Returns:
        float32 `(classes,)`.

    Source: class_weight="balanced" of scikit-learn.
    """
    images = torch.as_tensor(np.asarray(counts), dtype=torch.float64)
    present = images > 0
    return torch.where(present, images.sum() / (present.sum() * images.clamp(min=1)), 0).float()


def soft_target_cross_entropy(
    logits: Tensor, targets: Tensor, label_smoothing: float = 0.0, class_weights: Tensor | None = None
) -> Tensor:
    """Cross-entropy against a distribution over classes, mean over the batch.

    Args:
        logits: `(batch, classes)`, any float dtype.
        targets: `(batch, classes)`, float, each row sums to 1, as [`Mixing`] returns them.
        label_smoothing: in [0, 1), the share of each row that moves to the uniform distribution.
        class_weights: `(classes,)`, factor of each class in each row's sum over classes.

    Returns:
        Scalar, float32, nats.

    Raises:
        ValueError: if the two shapes differ.
    """
    if logits.shape != targets.shape:
        raise UserError(
            f"soft targets have shape {tuple(targets.shape)}, logits {tuple(logits.shape)}; expected (batch, classes)"
        )
    return F.cross_entropy(logits.float(), targets.float(), class_weights, label_smoothing=label_smoothing)


def _true_label_loss(logits: Tensor, labels: Tensor, label_smoothing: float, class_weights: Tensor | None) -> Tensor:
    if labels.dim() != 1:
        return soft_target_cross_entropy(logits, labels, label_smoothing, class_weights)
    if class_weights is None:
        return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing)
    # PyTorch's mean divides by the weights of the batch: the gradient would depend on how a step is cut into batches.
    total = F.cross_entropy(logits.float(), labels, class_weights, label_smoothing=label_smoothing, reduction="sum")
    return total / len(labels)


def _soft_distillation(logits: Tensor, teacher_logits: Tensor, temperature: float, kl_reduction: str) -> Tensor:
    """τ² KL(teacher ‖ student) at temperature τ: the second term of eq. 2 without its λ.

    The paper writes the two softmaxes in the other order; the direction here is that of Hinton et al. and of the
    authors' code. The authors' code divides by batch x classes ("numel"), which is 1000 times smaller on ImageNet.
    """
    divergence = F.kl_div(
        F.log_softmax(logits.float() / temperature, dim=1),
        F.log_softmax(teacher_logits.float() / temperature, dim=1),
        reduction="sum",
        log_target=True,
    )
    count = logits.shape[0] if kl_reduction == "batchmean" else logits.numel()
    return divergence * (temperature**2 / count)


def distillation_loss(
    class_logits: Tensor,
    distillation_logits: Tensor | None,
    labels: Tensor,
    teacher_logits: Tensor | None = None,
    *,
    distillation_type: str = "hard",
    alpha: float | None = None,
    temperature: float = 3.0,
    label_smoothing: float = 0.1,
    kl_reduction: str = "batchmean",
    class_weights: Tensor | None = None,
) -> dict[str, Tensor]:
    """Compute the loss of one batch and its parts: `(1 - alpha) * class_loss + alpha * distillation_loss`.

    The class head always learns the (smoothed) true label. The second term reaches only the distillation head, or the
    class head if the student has no distillation token (Table 3, "usual" and "hard" rows).

    Args:
        class_logits: `(batch, classes)`, from the class token.
        distillation_logits: `(batch, classes)` from the distillation token, or None for a student without one.
        labels: `(batch,)` int64 in [0, classes), or `(batch, classes)` float soft targets.
        teacher_logits: `(batch, classes)`, required by "soft" and "hard"; no gradient flows into them. "hard" also
            accepts the teacher's decisions, `(batch,)` int64.
        distillation_type: "hard" (eq. 3), "soft" (eq. 2), "label" (the second term is the true label too: the
            two-class-token control of section 4), "none" (the class term only).
        alpha: weight of the second term in [0, 1]; None selects [`default_alpha`].
        temperature: τ > 0 of eq. 2; "soft" only.
        label_smoothing: ε in [0, 1), applied to true labels only, never to the teacher's.
        kl_reduction: "batchmean", or "numel" for the scaling of the authors' released code; "soft" only.
        class_weights: `(classes,)`, float32, factor of each class in the loss of the true labels (see
            [`inverse_class_weights`]), mixed and smoothed ones too. What the teacher says is not weighted: the weights
            correct the counts of the labels. The weighted losses are summed and divided by the batch, not by its
            weights.

    Returns:
        `loss`, `class_loss` and, unless the type is "none", `distillation_loss`: float32 scalars, nats, batch means.

    Raises:
        ValueError: unknown type or reduction, missing or misshapen teacher logits.

    Source: eq. 2, eq. 3, section 4 and section 6 of the paper; facebookresearch/deit losses.py.
    """
    if distillation_type not in DISTILLATION_TYPES:
        raise UserError(f"distillation_type is {distillation_type!r}; choose one of {', '.join(DISTILLATION_TYPES)}")
    class_loss = _true_label_loss(class_logits, labels, label_smoothing, class_weights)
    if distillation_type == "none":
        return {"loss": class_loss, "class_loss": class_loss}

    taught_logits = class_logits if distillation_logits is None else distillation_logits
    if distillation_type == "label":
        taught_loss = _true_label_loss(taught_logits, labels, label_smoothing, class_weights)
    else:
        if teacher_logits is None:
            raise UserError(
                f"distillation_type={distillation_type!r} needs teacher_logits; pass teacher_logits, or use 'none' or "
                "'label'"
            )
        are_decisions = teacher_logits.dim() == 1 and teacher_logits.dtype == torch.int64
        if are_decisions and distillation_type != "hard":
            raise UserError(
                f"distillation_type={distillation_type!r} needs teacher_logits of shape (batch, classes); got "
                "decisions, which only 'hard' accepts"
            )
        expected = taught_logits.shape[:1] if are_decisions else taught_logits.shape
        if teacher_logits.shape != expected:
            raise UserError(
                f"teacher_logits have shape {tuple(teacher_logits.shape)}, the student's "
                f"{tuple(taught_logits.shape)}; teacher and student must see the same batch and know the same classes"
            )
        teacher_logits = teacher_logits.detach()
        if distillation_type == "hard":
            decisions = teacher_logits if are_decisions else teacher_logits.argmax(dim=1)
            taught_loss = F.cross_entropy(taught_logits.float(), decisions)
        elif kl_reduction in KL_REDUCTIONS:
            taught_loss = _soft_distillation(taught_logits, teacher_logits, temperature, kl_reduction)
        else:
            raise UserError(f"kl_reduction is {kl_reduction!r}; choose one of {', '.join(KL_REDUCTIONS)}")

    if alpha is None:
        alpha = default_alpha(distillation_type)
    return {
        "loss": (1 - alpha) * class_loss + alpha * taught_loss,
        "class_loss": class_loss,
        "distillation_loss": taught_loss,
    }
