"""FrozenClassifier: any image classifier with fixed weights, tried on a blank image, its classes in a wanted order.

Teachers (`teachers/teacher.py`) and evaluated models (`evaluation/classifier.py`) are the two kinds. Not here: how a
spec becomes a model (`classifiers.py`), and which pixels each kind feeds to it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line, some_of
from .class_names import class_key, class_names, class_order
from .classifiers import FoundClassifier, logits_of
from .weight_files import fingerprint


class FrozenClassifier(nn.Module):
    """A classifier in `eval()` whose weights need no gradient. A subclass may override `run`.

    Args:
        found: from [`find_classifier`]; its model is frozen in place.
        device: where the model goes; None leaves it where it is.

    Attributes:
        model: the network, in the channels-last memory format.
        name: the spec.
        names: the network's own class names, in its order; None when unknown.
        num_labels: number of classes in the logits; the subclass sets it from what `probe` returns.
        num_parameters: number of the network's parameters.
        sha256: fingerprint of the weights as they were loaded, 16 hexadecimal digits.
        class_order: for each wanted class the network's number of that class; None where the two orders are equal.
    """

    role = "model"  # the three words that messages use for the network, for what names the classes, and for the remedy
    owner_of_classes = "dataset"
    remedy = "Fine-tune the model on this dataset first"
    num_labels: int
    numbers_are_names = True  # whether "0", "1", "2", ... in this order are names to compare

    def __init__(self, found: FoundClassifier, device: torch.device | str | None = None):
        super().__init__()
        self.name, self.names, self._own_size = found.name, found.names, found.image_size
        model: Any = found.model  # PyTorch's stubs do not know to() with a memory format
        self.model = model.requires_grad_(False).eval().to(device=device, memory_format=torch.channels_last)
        self.num_parameters = sum(parameter.numel() for parameter in self.model.parameters())
        self.sha256 = fingerprint(self.model)
        self.register_buffer("class_order", None)
        self._device_of_buffers = device

    @property
    def device(self) -> torch.device | str | None:
        """The device of the weights; of a network without weights the one given."""
        return next((parameter.device for parameter in self.model.parameters()), self._device_of_buffers)

    def run(self, pixel_values: Tensor) -> Any:
        """Run the network on `(batch, 3, height, width)` and return its output as it comes."""
        return self.model(pixel_values)

    @torch.no_grad()
    def probe(self, size: tuple[int, int]) -> Any:
        """Run the network on one blank image, so that a misfit is reported at load time and not in the first batch.

        Args:
            size: `(height, width)` in pixels.

        Returns:
            The output of `run`; [`logits_of`] finds `(1, classes)` logits in it.

        Raises:
            ValueError: the network does not accept this size, or its output holds no class logits.
        """
        with self.must_read(size):
            output = self.run(torch.zeros(1, 3, *size, device=self.device))
        logits = logits_of(output)
        if logits is None or logits.ndim != 2:
            got = f"a tensor of shape {tuple(logits.shape)}" if logits is not None else f"a {type(output).__name__}"
            raise UserError(
                f"{self.role} {self.name!r} returns no class logits: got {got} for one image, expected (1, classes). "
                "Give a classifier, not a feature extractor"
            )
        return output

    @contextmanager
    def must_read(self, size: tuple[int, int]) -> Iterator[None]:
        """Turn whatever the network's own code raises in this block into one line about the image size."""
        try:
            yield
        except Exception as error:  # the foreign code may raise anything
            own = "x".join(map(str, self._own_size)) if self._own_size else "not known"
            raise UserError(
                f"{self.role} {self.name!r} could not read a blank {size[0]}x{size[1]} image ({first_line(error)}). "
                f"The network's own size: {own}. If it takes another size, pass image_size"
            ) from error

    def match_classes(self, names: Sequence[str] | None, num_labels: int | None, trust_class_order: bool) -> str:
        """Re-order the network's classes to the wanted ones.

        Where one side has no names, the i-th class of the network is taken for the i-th wanted class.

        Args:
            names: of the wanted classes, in order; None when unknown.
            num_labels: number of wanted classes; None when unknown.
            trust_class_order: do not compare names.

        Returns:
            How the classes were matched, in words: "by name", "by name, re-ordered" or "by position" and why.

        Raises:
            ValueError: the network has another number of classes, or other classes.
        """
        self._check_count(names, num_labels)
        if trust_class_order:
            return "by position (trust_class_order)"
        order = class_order(self.names, names) if self.names and names else None
        if order is None:
            sides = {self.role: self.names, self.owner_of_classes: names}
            if nameless := [side for side, its_names in sides.items() if not self._are_names(its_names)]:
                return f"by position: the {nameless[0]} has no class names"
            raise self._other_classes(self.names or (), names or ())
        if order == sorted(order):
            return "by name"
        self.class_order = torch.tensor(order, device=self.device)
        return "by name, re-ordered"

    def in_wanted_order(self, logits: Tensor) -> Tensor:
        """`(batch, classes)` logits of the network, re-ordered to the wanted classes."""
        return logits if self.class_order is None else logits.index_select(1, self.class_order)

    def _check_count(self, names: Sequence[str] | None, num_labels: int | None) -> None:
        if num_labels is None or self.num_labels == num_labels:
            return
        shown = [(self.names, self.num_labels), (names, num_labels)]
        own, others = (f" ({some_of(side)})" if side and len(side) == count else "" for side, count in shown)
        raise UserError(
            f"{self.role} {self.name!r} has {self.num_labels} classes{own}, the {self.owner_of_classes} has "
            f"{num_labels}{others}. {self.remedy}"
        )

    def _are_names(self, names: Sequence[str] | None) -> bool:
        if not names or class_names(dict(enumerate(names))) is None:
            return False
        return self.numbers_are_names or any(name != str(number) for number, name in enumerate(names))

    def _other_classes(self, own: Sequence[str], names: Sequence[str]) -> UserError:
        known, wanted = set(map(class_key, own)), set(map(class_key, names))
        extra = [name for name in own if class_key(name) not in wanted] or own
        missing = [name for name in names if class_key(name) not in known] or names
        return UserError(
            f"{self.role} {self.name!r} has other classes than the {self.owner_of_classes}: {len(own)}, such "
            f"as {some_of(extra)}, against {len(names)}, such as {some_of(missing)}. {self.remedy}; or set "
            "trust_class_order=True if only the spelling differs"
        )
