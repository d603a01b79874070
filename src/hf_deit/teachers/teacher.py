"""Teachers: frozen image classifiers whose logits a DeiT learns from.

`load_teacher` turns a spec, or several, into a `Teacher`, which takes the student's pixels and returns logits in the
student's class order.

Not here: the forms of a spec (`models/classifiers.py`), what every frozen classifier shares
(`models/frozen_classifier.py`), the distillation losses (`losses.py`) and the training of a teacher
(`recipes/run_teacher.py`).

Source: paper, section 4 (a teacher is "a convnet, or a mixture of classifiers"; in fine-tuning it works at the
student's resolution) and section 5.2, Table 2 (a convnet teaches better than a transformer).
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from ..models.class_names import class_names
from ..models.classifiers import ACCEPTED_FORMS, FoundClassifier, Spec, find_classifier, logits_of
from ..models.configuration_deit import as_pair
from ..models.frozen_classifier import FrozenClassifier
from .batch_norm_folding import fold_batch_norms


logger = logging.getLogger(__name__)


def load_teacher(
    spec: Spec | Sequence[Spec],
    *,
    id2label: Mapping[int, str] | None,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | tuple[int, int] | None = None,
    student_size: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    trust_class_order: bool = False,
) -> Teacher:
    """Load one or several classifiers as one frozen teacher for a given student.

    Args:
        spec: a directory, a Hub id, `timm:<name>[?checkpoint=<file>]`, `python:<module>:<factory>`, or a module, which
            is frozen in place and not copied; see [`find_classifier`]. A list, or a string with commas, makes a
            mixture that averages the teachers' probabilities. Batch norms of a model that is loaded here are folded
            into the convolutions before them; a module keeps its batch norms.
        id2label: the student's class names. None means unknown names: the classes keep the teacher's order.
        mean: per channel, of pixels in [0, 1]: the mean that the student's pixels are normalised with.
        std: per channel, likewise the standard deviation.
        image_size: resize the student's normalised pixels to this size for the teacher, `side` or `(height, width)`,
            by bicubic interpolation (PyTorch's, a = -0.5 and antialiased, which is Pillow's filter without rounding to
            bytes; values are not clipped). By default the teacher sees the student's resolution, or its own when it
            accepts no other.
        student_size: size of the student's pixels, likewise: the teacher is tried at it. By default it is tried at its
            own size, or at 224.
        device: where the teacher runs; by default where its weights are.
        dtype: autocast to this type; by default bfloat16 on a GPU that supports bfloat16, float32 elsewhere.
        compile: `torch.compile` each model.
        trust_class_order: do not compare class names: the teacher's class i is the student's class i.

    Raises:
        ValueError: the spec cannot be read, weights are missing, the model returns no class logits, or its classes are
            not the student's.
    """
    if isinstance(spec, Teacher):
        return spec
    names = class_names(id2label)
    num_labels = len(id2label) if id2label else None
    members = []
    for one in _split(spec):
        found = find_classifier(one)
        folds = not isinstance(one, nn.Module)
        member = _Member(found, mean, std, (image_size, student_size), device, dtype, folds)
        names = names or found.names  # several teachers of a nameless student follow the first
        matched = member.match_classes(names, num_labels, trust_class_order)
        logger.info("teacher %s: its %d classes are matched %s", member.name, member.num_labels, matched)
        if members and member.num_labels != members[0].num_labels:
            raise UserError(
                f"teachers {members[0].name!r} and {member.name!r} have {members[0].num_labels} and "
                f"{member.num_labels} classes: a mixture needs the same classes"
            )
        if compile:
            member.model.compile()
        members.append(member)
    return Teacher(members, dict(enumerate(names)) if names else None, as_pair(image_size) if image_size else None)


def _split(spec: Spec | Sequence[Spec]) -> list[Spec]:
    if isinstance(spec, str) and not os.path.exists(spec):
        specs: list[Any] = [part.strip() for part in spec.split(",") if part.strip()]
    else:
        specs = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    if not specs:
        raise UserError(f"no teacher in {spec!r}. {ACCEPTED_FORMS}")
    return specs


class Teacher(nn.Module):
    """One frozen classifier, or the average of several, seen from a student. Made by `load_teacher`.

    A teacher stays in `eval()`, also when a trainer calls `train()` on it. Its weights are invisible to PyTorch's
    module tree (`parameters()` and `state_dict()` are empty), so no optimizer, DDP wrapper or checkpoint can pick them
    up, even when the teacher is stored as an attribute of the student; `to()` moves the weights nevertheless.

    Attributes:
        models: the classifiers themselves.
        name: the spec, or the class name of a module; joined by " + " in a mixture.
        num_labels: number of classes.
        num_parameters: number of parameters of all classifiers together.
        sha256: fingerprint of the weights, 16 hexadecimal digits.
        id2label: class names of the logits, None when neither teacher nor student has names.
        image_size: `(height, width)` that was asked for; None: each classifier's choice.
    """

    replays: str | None = None
    record_on_hub: str | None = None

    def __init__(
        self,
        members: Sequence[_Member],
        id2label: dict[int, str] | None,
        image_size: tuple[int, int] | None = None,
    ):
        super().__init__()
        self._members = tuple(members)  # a tuple: not registered as submodules
        self.models = tuple(member.model for member in members)
        self.name = " + ".join(member.name for member in members)
        self.num_labels = members[0].num_labels
        self.num_parameters = sum(member.num_parameters for member in members)
        digests = [member.sha256 for member in members]
        self.sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        self.id2label = id2label
        self.image_size = image_size
        super().train(False)

    @property
    def classifier(self) -> Teacher:
        """Itself; see [`TeacherOutputs`]."""
        return self

    def commit(self, steps: int) -> None:
        """Nothing is recorded; see [`TeacherOutputs`]."""

    def describe(self) -> str:
        """One line for the start of a run."""
        return f"{self.name}, {self.num_parameters / 1e6:.2f}M parameters"

    @torch.no_grad()  # not inference_mode: its tensors may not be saved for the student's backward
    def forward(self, pixel_values: Tensor, view_ids: np.ndarray | None = None) -> Tensor:
        """Class logits in the student's order.

        Args:
            pixel_values: float `(batch, 3, height, width)`, normalised with the student's mean and std.
            view_ids: not used; see [`TeacherOutputs`].

        Returns:
            float32 `(batch, num_labels)` without gradient; for a mixture the log of the mean probability.
        """
        if len(self._members) == 1:
            return self._members[0](pixel_values)
        log_probabilities = torch.stack([F.log_softmax(member(pixel_values), dim=-1) for member in self._members])
        return torch.logsumexp(log_probabilities, dim=0) - math.log(len(self._members))

    def train(self, mode: bool = True) -> Teacher:
        """Stay in evaluation mode: a trainer's `model.train()` must not move batch-norm statistics."""
        return super().train(False)

    def _apply(self, fn, recurse: bool = True) -> Teacher:
        for member in self._members:
            member._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{self.name!r}, num_labels={self.num_labels}, num_parameters={self.num_parameters:,}"


class _Member(FrozenClassifier):
    """A frozen classifier that reads the student's pixels and returns logits in the student's class order."""

    role = "teacher"
    owner_of_classes = "student"
    size_option = "image_size (teacher_image_size in a recipe)"
    remedy = "Fine-tune the teacher on the student's dataset first: recipes/run_teacher.py"

    def __init__(self, found: FoundClassifier, mean, std, sizes, device, dtype, folds: bool):
        super().__init__(found, device)
        self.dtype = dtype
        device = self.device

        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        own_mean, own_std = found.mean or mean, found.std or std
        scale = shift = None
        if (own_mean, own_std) != (mean, std):  # (x * std + mean - own_mean) / own_std
            channels = list(zip(mean, std, own_mean, own_std, strict=True))
            scale = torch.tensor([[[s / own_s]] for _, s, _, own_s in channels], device=device)
            shift = torch.tensor([[[(m - own_m) / own_s]] for m, _, own_m, own_s in channels], device=device)
        self.scale: Tensor | None
        self.shift: Tensor | None
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)

        image_size, student_size = (as_pair(size) if size else None for size in sizes)
        size, self.num_labels = self._first_readable(found, image_size, student_size)
        self.image_size = image_size  # None: the size of the student's pixels
        if image_size is None and (student_size not in (None, size) or self._is_fixed(found, size)):
            self.image_size = size
        folded = self._fold(size) if folds else 0
        logger.info(
            "teacher %s: pixels of mean %s, std %s, at %s; %d batch norms folded",
            *(self.name, own_mean, own_std, self.image_size or "any size", folded),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.model.training:  # a caller that kept the bare model may have switched it to training
            self.model.eval()
        pixels = pixel_values.float()
        if self.scale is not None and self.shift is not None:
            pixels = pixels * self.scale + self.shift
        if self.image_size is not None and pixels.shape[-2:] != self.image_size:
            pixels = F.interpolate(pixels, size=self.image_size, mode="bicubic", antialias=True)
        logits = self._logits(self.run(pixels)).float()
        if logits.shape != (len(pixels), self.num_labels):
            raise UserError(
                f"teacher {self.name!r} returned logits of shape {tuple(logits.shape)} for {len(pixels)} images; "
                f"expected {(len(pixels), self.num_labels)}, as when it was loaded"
            )
        return self.in_wanted_order(logits)

    def run(self, pixel_values: Tensor) -> Any:
        kind = pixel_values.device.type
        dtype, stored = self.dtype, self.weights_type
        pixel_values = pixel_values.to(stored)
        if dtype is None and stored != torch.float32:
            dtype = torch.float32  # no autocast: the network has a type of its own
        if dtype is None:
            has_bfloat16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if has_bfloat16 else torch.float32
        with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            return self.model(pixel_values.contiguous(memory_format=torch.channels_last))

    def _first_readable(self, found: FoundClassifier, image_size, student_size) -> tuple[tuple[int, int], int]:
        """The first size that the network reads, and the number of its classes: asked for, the student's, its own."""
        own, usual = found.image_size, (224, 224)
        if image_size is not None:
            sizes = [image_size]
        elif student_size is None or (found.fixed_size and own):
            sizes = [own or usual]
        else:
            sizes = list(dict.fromkeys([student_size, own or usual]))
        refusal = None
        for size in sizes:
            try:
                num_labels = self._logits(self.probe(size)).shape[1]
            except UserError as error:
                refusal = refusal or error
                continue
            if refusal is not None and (own is None or found.fixed_size is False):
                logger.warning(
                    "teacher %s cannot read the student's %s pixels: it gets them resized to %s. %s",
                    *(self.name, "x".join(map(str, sizes[0])), "x".join(map(str, size))),
                    "If it was trained at another size, let its factory set config.image_size or default_cfg",
                )
            return size, num_labels
        assert refusal is not None
        raise refusal

    def _logits(self, output: Any) -> Tensor:
        logits = logits_of(output)
        if logits is None:  # it returned some when it was loaded
            raise UserError(
                f"teacher {self.name!r} returned a {type(output).__name__}; expected logits of shape (images, classes)"
            )
        return logits

    def _fold(self, size: tuple[int, int]) -> int:
        noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        pixels = noise.to(self.device, memory_format=torch.channels_last)
        if isinstance(self.model, torch._dynamo.OptimizedModule):  # compiled already
            return 0
        return fold_batch_norms(self.model, lambda: self._logits(self.model(pixels)))

    def _is_fixed(self, found: FoundClassifier, size: tuple[int, int]) -> bool:
        if found.fixed_size is not None:
            return found.fixed_size
        try:
            self.probe((size[0] + 32, size[1] + 32))
        except ValueError:
            return True
        return False

    def _check_count(self, names: Sequence[str] | None, num_labels: int | None) -> None:
        super()._check_count(names, num_labels)
        if self.names and len(self.names) != self.num_labels:
            raise UserError(
                f"teacher {self.name!r} names {len(self.names)} classes, but its logits have {self.num_labels}"
            )
