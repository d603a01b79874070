"""Teachers: frozen image classifiers whose logits a DeiT learns from.

`load_teacher` turns a spec, or several, into a `Teacher`, which takes the student's pixels and answers in the
student's class order.

Not here: the forms of a spec (`classifiers.py`), the distillation losses (`losses.py`) and the training of a teacher
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

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..models.classifiers import (
    ACCEPTED_FORMS,
    FoundClassifier,
    Spec,
    class_key,
    class_names,
    class_order,
    find_classifier,
    fingerprint,
    first_line,
    logits_of,
    some_of,
)
from ..models.configuration_deit import as_pair
from .batch_norm_folding import fold_batch_norms


logger = logging.getLogger(__name__)


def load_teacher(
    spec: Spec | Sequence[Spec],
    *,
    id2label: Mapping[int, str] | None,
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | tuple[int, int] | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    compile: bool = False,
    trust_class_order: bool = False,
) -> Teacher:
    """Load one or several classifiers as one frozen teacher for a given student.

    Args:
        spec: a directory, a Hub id, `timm:<name>[?checkpoint=<file>]`, `python:<module>:<factory>` or a module (it is
            not copied, but frozen in place); see [`find_classifier`]. Of a list, or a string of them with commas, the
            teachers average their probabilities. Batch norms of what is loaded here are folded into the convolutions
            before them; a module is left as it is.
        id2label: the student's class names; None when unknown, then classes are taken in the teacher's order.
        mean: per channel, of pixels in [0, 1]: what the student's pixels are normalised with.
        std: likewise.
        image_size: feed the teacher at this size, `side` or `(height, width)`. By default it sees the student's
            resolution, or its own when it accepts no other.
        device: where it runs; by default where its weights are.
        dtype: autocast to this type; by default bfloat16 on a GPU that has it, float32 elsewhere.
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
        member = _Member(found, mean, std, image_size, device, dtype, folds=not isinstance(one, nn.Module))
        names = names or found.names  # several teachers of a nameless student follow the first
        member.match_classes(names, num_labels, trust_class_order)
        if members and member.num_labels != members[0].num_labels:
            raise ValueError(
                f"teachers {members[0].name!r} and {member.name!r} know {members[0].num_labels} and "
                f"{member.num_labels} classes: a mixture needs the same classes"
            )
        if compile:
            member.model.compile()
        members.append(member)
    return Teacher(members, dict(enumerate(names)) if names else None)


def _split(spec: Spec | Sequence[Spec]) -> list[Spec]:
    if isinstance(spec, str) and not os.path.exists(spec):
        specs = [part.strip() for part in spec.split(",") if part.strip()]
    else:
        specs = list(spec) if isinstance(spec, (list, tuple)) else [spec]
    if not specs:
        raise ValueError(f"no teacher in {spec!r}. {ACCEPTED_FORMS}")
    return specs


class Teacher(nn.Module):
    """One frozen classifier, or the average of several, seen from a student. Made by `load_teacher`.

    It is always in `eval()`, whatever the trainer around it says. Its weights are invisible to PyTorch's module tree
    (`parameters()` and `state_dict()` are empty), so no optimizer, DDP wrapper or checkpoint can pick them up, even
    when the teacher is stored as an attribute of the student; `to()` moves them nevertheless.

    Attributes:
        models: the classifiers themselves.
        name: the spec, or the class name of a module; joined by " + " in a mixture.
        num_labels: number of classes.
        num_parameters: of all classifiers together.
        sha256: fingerprint of the weights, 16 hexadecimal digits.
        id2label: class names of the logits, None when neither side has any.
    """

    def __init__(self, members: Sequence[_Member], id2label: dict[int, str] | None):
        super().__init__()
        self._members = tuple(members)  # a tuple: not registered as submodules
        self.models = tuple(member.model for member in members)
        self.name = " + ".join(member.name for member in members)
        self.num_labels = members[0].num_labels
        self.num_parameters = sum(member.num_parameters for member in members)
        digests = [member.sha256 for member in members]
        self.sha256 = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()[:16]
        self.id2label = id2label
        super().train(False)

    @torch.no_grad()  # not inference_mode: its tensors may not be saved for the student's backward
    def forward(self, pixel_values: Tensor) -> Tensor:
        """Class logits in the student's order.

        Args:
            pixel_values: float `(batch, 3, height, width)`, normalised with the student's mean and std.

        Returns:
            float32 `(batch, num_labels)` without gradient. A mixture answers with the log of the mean probability.
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


class _Member(nn.Module):
    """A frozen classifier that reads the student's pixels and answers in the student's class order."""

    def __init__(self, found: FoundClassifier, mean, std, image_size, device, dtype, folds: bool):
        super().__init__()
        self.name, self.names, self.dtype = found.name, found.names, dtype
        self.model = found.model.requires_grad_(False).eval().to(device=device, memory_format=torch.channels_last)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.sha256 = fingerprint(self.model)
        device = next((p.device for p in self.model.parameters()), device)

        mean, std = tuple(map(float, mean)), tuple(map(float, std))
        own_mean, own_std = found.mean or mean, found.std or std
        scale = shift = None
        if (own_mean, own_std) != (mean, std):  # (x * std + mean - own_mean) / own_std
            channels = list(zip(mean, std, own_mean, own_std, strict=True))
            scale = torch.tensor([[[s / own_s]] for _, s, _, own_s in channels], device=device)
            shift = torch.tensor([[[(m - own_m) / own_s]] for m, _, own_m, own_s in channels], device=device)
        self.register_buffer("scale", scale)
        self.register_buffer("shift", shift)
        self.register_buffer("class_order", None)

        self.image_size = as_pair(image_size) if image_size else None  # None: as it comes
        size = self.image_size or found.image_size or (224, 224)
        self.num_labels = self._probe(size, device).shape[1]
        if self.image_size is None and self._is_fixed(found, size, device):
            self.image_size = size
        folded = self._fold(size, device) if folds else 0
        logger.info(
            "teacher %s: pixels of mean %s, std %s, at %s; %d batch norms folded",
            *(self.name, own_mean, own_std, self.image_size or "any size", folded),
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        if self.model.training:  # someone held on to the bare model
            self.model.eval()
        pixels = pixel_values.float()
        if self.scale is not None:
            pixels = pixels * self.scale + self.shift
        if self.image_size is not None and pixels.shape[-2:] != self.image_size:
            pixels = F.interpolate(pixels, size=self.image_size, mode="bicubic", antialias=True)
        logits = logits_of(self._run(pixels)).float()
        return logits if self.class_order is None else logits.index_select(1, self.class_order)

    def _run(self, pixels: Tensor) -> Any:
        kind = pixels.device.type
        dtype = self.dtype
        if dtype is None:
            has_bfloat16 = kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
            dtype = torch.bfloat16 if has_bfloat16 else torch.float32
        with torch.autocast(kind, dtype=dtype, enabled=dtype != torch.float32):
            return self.model(pixels.contiguous(memory_format=torch.channels_last))

    @torch.no_grad()
    def _probe(self, size: tuple[int, int], device) -> Tensor:
        """Logits of a blank image: refuses at load time what would fail in the first training step."""
        try:
            output = self._run(torch.zeros(1, 3, *size, device=device))
        except Exception as error:  # whatever the foreign forward raises
            raise ValueError(
                f"teacher {self.name!r} could not read a blank 3x{size[0]}x{size[1]} image ({first_line(error)}); "
                "if it takes another size, pass image_size"
            ) from error
        logits = logits_of(output)
        if logits is None or logits.ndim != 2:
            got = f"a tensor of shape {tuple(logits.shape)}" if logits is not None else f"a {type(output).__name__}"
            raise ValueError(
                f"teacher {self.name!r} returns no class logits: got {got} for one image, expected (1, classes). "
                "Give a classifier, not a feature extractor"
            )
        return logits

    def _fold(self, size: tuple[int, int], device) -> int:
        noise = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(0))
        pixels = noise.to(device, memory_format=torch.channels_last)
        return fold_batch_norms(self.model, lambda: logits_of(self.model(pixels)))

    def _is_fixed(self, found: FoundClassifier, size: tuple[int, int], device) -> bool:
        if found.fixed_size is not None or found.image_size is None:
            return bool(found.fixed_size)
        try:
            self._probe((size[0] + 32, size[1] + 32), device)
        except ValueError:
            return True
        return False

    def match_classes(self, names: list[str] | None, num_labels: int | None, trust_class_order: bool) -> None:
        """Re-order the teacher's classes to the student's, or refuse."""
        fix = "Fine-tune the teacher on the student's dataset first: recipes/run_teacher.py"
        if num_labels is not None and self.num_labels != num_labels:
            shown = [(self.names, self.num_labels), (names, num_labels)]
            teacher, student = (f" ({some_of(side)})" if side and len(side) == n else "" for side, n in shown)
            raise ValueError(
                f"teacher {self.name!r} answers with {self.num_labels} classes{teacher}, the student has {num_labels}"
                f"{student}. {fix}"
            )
        if self.names and len(self.names) != self.num_labels:
            count = len(self.names)
            raise ValueError(f"teacher {self.name!r} names {count} classes but answers with {self.num_labels}")
        if trust_class_order or not (self.names and names):
            logger.info("teacher %s: class names not compared, taken in the student's order", self.name)
            return
        order = class_order(self.names, names)
        if order is None:
            known, wanted = set(map(class_key, self.names)), set(map(class_key, names))
            extra = [name for name in self.names if class_key(name) not in wanted] or self.names
            missing = [name for name in names if class_key(name) not in known] or names
            raise ValueError(
                f"teacher {self.name!r} has other classes than the student: {len(self.names)}, such as "
                f"{some_of(extra)}, against {len(names)}, such as {some_of(missing)}. {fix}; or pass "
                "trust_class_order=True if only the spelling differs"
            )
        if order != list(range(len(names))):
            device = next((p.device for p in self.model.parameters()), None)
            self.class_order = torch.tensor(order, device=device)
            logger.info("teacher %s: its %d classes are re-ordered to the student's", self.name, len(names))
