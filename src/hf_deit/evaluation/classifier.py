"""The classifier that an evaluation runs: ours, stock Transformers' or timm's, with every head it has.

`load_classifier` reads a checkpoint in the forms that `load_teacher` takes. Every model sees the images at its own
size, with its own crop ratio, mean and standard deviation, unless `image_size` or `crop_ratio` is given.

Not here: running the classifier over images (`predict.py`), the evaluation during a training run
(`training/distillation_trainer.py`), and comparisons between models (`paper/analysis.py`). Images are always resized
as in the paper (shorter side, bicubic, central square), also for models whose authors squash the image or resize it
bilinearly.

Source: section 5.2 of the paper (Table 3's class head, distillation head and fusion); facebookresearch/deit models.py
for the other fusion.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import torch
from torch import Tensor, nn

from ..augmentation.transforms import IMAGENET_MEAN, IMAGENET_STD
from ..errors import UserError
from ..models.class_names import class_names
from ..models.classifiers import FoundClassifier, Spec, find_classifier, logits_of
from ..models.frozen_classifier import FrozenClassifier
from ..models.modeling_deit import (
    DeiTForImageClassificationWithTeacherOutput,
    DeiTPreTrainedModel,
    fuse_heads,
)


# The predictions of a model with two heads: each head, and two fusions of both (see `fuse_heads`). The head of a model
# with one head is called "class".
HEADS = ("class", "distillation", "softmax", "logits")


def load_classifier(
    spec: Spec,
    *,
    id2label: dict[int, str] | None = None,
    image_size: int | None = None,
    trust_class_order: bool = False,
) -> Classifier:
    """Load a classifier whose logits are in the order of a dataset's classes.

    Classes are matched by name, as for a teacher: the same classes in another order are re-ordered. Where one side has
    no names (numbers, or LABEL_0, LABEL_1, ...), the model's i-th class is taken for the dataset's i-th class.

    Args:
        spec: directory or Hub id, `timm:<name>`, `timm:<name>?checkpoint=<file>`, `python:<module>:<factory>`, or a
            module; see [`load_teacher`].
        id2label: the dataset's classes; None: the model's own, in its order.
        image_size: side in pixels to evaluate at, by default the model's own. Position embeddings are resized.
        trust_class_order: do not compare names: the model's i-th class is the dataset's i-th class.

    Raises:
        ValueError: the spec cannot be read, weights are missing, the model returns no class logits or does not accept
            that size, or its classes are not the dataset's.
    """
    found = find_classifier(spec)
    own_size = found.image_size or (224, 224)
    if image_size is None and own_size[0] != own_size[1]:
        raise UserError(f"model {found.name!r} reads images of {own_size}; views are square: pass image_size")
    return Classifier(found, image_size or own_size[0], id2label, trust_class_order)


class Classifier(FrozenClassifier):
    """A frozen classifier in `eval()`, and what is needed to feed it. Made by [`load_classifier`].

    Attributes:
        name: the spec.
        model: the network.
        heads: the predictions it has, of `HEADS`: all four, or `("class",)`.
        own_head: the one that the model itself calls `logits`.
        image_size: side of its images, pixels.
        crop_ratio: share of the shorter side that the model's evaluation keeps; None: unknown.
        mean, std: per channel, of pixels in [0, 1].
        classes_matched: how the model's classes were matched with the dataset's, in words.
        sha256: fingerprint of the weights as they were loaded.
    """

    remedy = "Fine-tune the model on this dataset first, or evaluate it on its own dataset"
    numbers_are_names = False

    def __init__(
        self,
        found: FoundClassifier,
        image_size: int,
        id2label: dict[int, str] | None = None,
        trust_class_order: bool = False,
    ):
        super().__init__(found)
        self.image_size = image_size
        self.crop_ratio = survive_rounding(found.crop_ratio, image_size)
        self.mean, self.std = found.mean or IMAGENET_MEAN, found.std or IMAGENET_STD
        size = image_size, image_size
        if found.image_size not in (None, size):
            with self.must_read(size):
                self._resize()
        logits = self._by_head(self.probe(size))
        self.num_labels = logits["class"].shape[1]
        self.classes_matched = "its own"
        if id2label is not None:
            names = class_names(id2label, keep_generic=True) or []
            self.classes_matched = self.match_classes(names, len(names), trust_class_order)
        self.heads = HEADS if "distillation" in logits else HEADS[:1]
        fusion = getattr(getattr(self.model, "config", None), "head_fusion", "logits")
        self.own_head = fusion if len(self.heads) > 1 else "class"
        self.eval()

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        """Logits, or log-probabilities, of each head.

        Args:
            pixel_values: float32 `(batch, 3, height, width)`, normalised with this model's mean and std.

        Returns:
            float32 `(batch, classes)` by head, in the dataset's order of classes.
        """
        by_head = self._by_head(self.run(pixel_values))
        logits = {head: self.in_wanted_order(value.float()) for head, value in by_head.items()}
        if "distillation" in logits:
            logits |= {way: fuse_heads(logits["class"], logits["distillation"], way) for way in HEADS[2:]}
        return logits

    def run(self, pixel_values: Tensor) -> Any:
        """The model's output; for timm's two-headed models, which return only the mean, an output with both heads."""
        inner: Any = getattr(self.model, "timm_model", self.model)
        if not isinstance(getattr(inner, "head_dist", None), nn.Module):
            return self.model(pixel_values.to(self.weights_type))
        logits = {}
        hooks = [
            module.register_forward_hook(lambda *call, name=name: logits.update({name: call[-1]}))
            for name, module in {"cls_logits": inner.head, "distillation_logits": inner.head_dist}.items()
        ]
        try:
            output = self.model(pixel_values.to(self.weights_type))
        finally:
            for hook in hooks:
                hook.remove()
        return DeiTForImageClassificationWithTeacherOutput(logits=logits_of(output), **logits)

    def _by_head(self, output: Any) -> dict[str, Tensor]:
        if getattr(output, "distillation_logits", None) is not None:
            return {"class": output.cls_logits, "distillation": output.distillation_logits}
        logits: Any = logits_of(output)  # the probe refuses a network that returns none
        return {"class": logits}

    def _resize(self) -> None:
        """Prepare the model for `image_size`."""
        inner: Any = getattr(self.model, "timm_model", self.model)
        if isinstance(inner, DeiTPreTrainedModel):  # ours; every model of Transformers has the method, as a refusal
            inner.resize_position_embeddings(self.image_size)
        elif hasattr(inner, "set_input_size"):  # timm's transformers
            inner.set_input_size(self.image_size)
        elif "interpolate_pos_encoding" in inspect.signature(self.model.forward).parameters:  # stock's
            self.model.register_forward_pre_hook(
                lambda model, args, options: (args, options | {"interpolate_pos_encoding": True}), with_kwargs=True
            )


def survive_rounding(crop_ratio: float | None, image_size: int) -> float | None:
    """The crop ratio, nudged where rounding would lose a pixel: `int(384 / (384 / 438))` must be 438, not 437."""
    if crop_ratio is None:
        return None
    exact = image_size / crop_ratio
    return math.nextafter(crop_ratio, 0) if int(exact) < round(exact, 6) == round(exact) else crop_ratio
