"""FrozenClassifier: any image classifier with fixed weights, tried on a blank image, its classes in a wanted order.

Teachers (`teachers/teacher.py`) and evaluated models (`evaluation/classifier.py`) are the two kinds. Not here: how a
spec becomes a model (`classifiers.py`), and which pixels each kind feeds to it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, first_line, some_of
from .class_names import class_key, class_names, match_class_names, repeated_name
from .classifiers import FoundClassifier, logits_of
from .weight_files import fingerprint


logger = logging.getLogger(__name__)


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

    role = "model"  # what messages call the network, what names its classes, the remedy, the option of its size
    owner_of_classes = "dataset"
    remedy = "Fine-tune the model on this dataset first"
    size_option = "image_size"
    num_labels: int
    numbers_are_names = True  # whether "0", "1", "2", ... in this order are names to compare

    def __init__(self, found: FoundClassifier, device: torch.device | str | None = None):
        super().__init__()
        self.name, self.names, self._own_size = found.name, found.names, found.image_size
        try:
            self.model = _frozen(found.model, device)
            self.num_parameters = _number_of_parameters(self.model)
            self.sha256 = fingerprint(self.model)
        except Exception as error:  # a network of a foreign kind may raise anything
            raise UserError(
                f"{self.role} {self.name!r} is a {type(found.model).__name__} that cannot be frozen "
                f"({first_line(error)}). Give the network itself, a float32 nn.Module"
            ) from error
        self.register_buffer("class_order", None)
        self._device_of_buffers = device

    @property
    def device(self) -> torch.device | str | None:
        """The device of the weights; of a network without weights the one given."""
        return next((parameter.device for parameter in self.model.parameters()), self._device_of_buffers)

    @property
    def weights_type(self) -> torch.dtype:
        """The floating-point type of the weights, which the pixels are given in."""
        types = (parameter.dtype for parameter in self.model.parameters() if parameter.is_floating_point())
        return next(types, torch.float32)

    def run(self, pixel_values: Tensor) -> Any:
        """Run the network on `(batch, 3, height, width)` and return its output as it comes."""
        return self.model(pixel_values.to(self.weights_type))

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
        if isinstance(self.model, (torch.jit.ScriptModule, torch.fx.GraphModule)):
            self._try_a_batch(size)
        return output

    def _try_a_batch(self, size: tuple[int, int]) -> None:
        """Refuse a traced or exported program of one batch size, or one that was recorded in training mode.

        `eval()` does not change what was recorded. In training an image's logits depend on the others of its batch or
        on chance.
        """
        generator = torch.Generator().manual_seed(0)
        image, other = torch.randn(2, 3, *size, generator=generator).to(self.device)
        try:
            outputs: list[Any] = [
                logits_of(self.run(torch.stack([image, beside]))) for beside in (other, 3 * other + 1)
            ]
            rows = [logits[0] for logits in outputs]
        except Exception as error:
            raise UserError(
                f"{self.role} {self.name!r} reads one image, but not two ({_cause(error)}). Export it with a "
                "dynamic batch dimension"
            ) from error
        if not (rows[0] - rows[1]).abs().max() <= 0.1 * rows[0].abs().max():
            raise UserError(
                f"{self.role} {self.name!r} gives an image other logits in another batch: it was recorded in training "
                "mode. Call eval() before the network is traced or exported"
            )

    @contextmanager
    def must_read(self, size: tuple[int, int]) -> Iterator[None]:
        """Turn whatever the network's own code raises in this block into one line about the image size."""
        try:
            yield
        except Exception as error:  # the foreign code may raise anything
            own = "x".join(map(str, self._own_size)) if self._own_size else "not known"
            raise UserError(
                f"{self.role} {self.name!r} could not read a blank {size[0]}x{size[1]} image ({_cause(error)}). "
                f"The network's own size: {own}. If it takes another size, set default_cfg = "
                "{'input_size': (3, height, width)} on the network, or pass " + self.size_option
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
        own, wanted = self.names or (), names or ()
        match = match_class_names(own, wanted) if own and wanted else None
        if match is None:
            sides = {self.role: own, self.owner_of_classes: wanted}
            if nameless := [side for side, its_names in sides.items() if not self._are_names(its_names)]:
                if nameless == [self.role]:
                    logger.warning(
                        "%s %r has no class names: its classes are taken by position for %s. Check their order, and "
                        "set trust_class_order if it is right",
                        *(self.role, self.name, some_of(wanted)),
                    )
                return f"by position: the {nameless[0]} has no class names"
            raise self._other_classes(own, wanted)
        order, doubt = match
        if doubt:
            pairs = [(own[i], name) for i, name in zip(order, wanted, strict=True)]
            shown = some_of([f"{its!r} for {name!r}" for its, name in pairs if its != name])
            logger.warning("%s %r: class names %s: %s", self.role, self.name, doubt, shown)
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
        for side, its_names in ((self.role, own), (self.owner_of_classes, names)):
            if (repeated := repeated_name(its_names)) is not None:
                return UserError(
                    f"{self.role} {self.name!r}: the {side} names more than one class {repeated!r}, apart from case "
                    "and blanks, so that classes cannot be matched by name. Rename them; or set "
                    "trust_class_order=True if both orders are the same"
                )
        known, wanted = set(map(class_key, own)), set(map(class_key, names))
        extra = [name for name in own if class_key(name) not in wanted] or own
        missing = [name for name in names if class_key(name) not in known] or names
        return UserError(
            f"{self.role} {self.name!r} has other classes than the {self.owner_of_classes}: {len(own)}, such "
            f"as {some_of(extra)}, against {len(names)}, such as {some_of(missing)}. {self.remedy}; or set "
            "trust_class_order=True if only the spelling differs"
        )


def _cause(error: Exception) -> str:
    """One line of an error; TorchScript's names the cause in its last one."""
    lines = str(error).strip().splitlines()
    return lines[-1] if len(lines) > 1 and "TorchScript" in lines[0] else first_line(error)


def _frozen(model: Any, device: torch.device | str | None) -> nn.Module:
    for parameter in model.parameters():
        parameter.requires_grad_(False)  # a TorchScript module has no requires_grad_()
    try:
        model.eval()
    except NotImplementedError:  # of torch.export: its mode is part of the program, see `_try_a_batch`
        model.train = model.eval = lambda mode=False: model
        for module in model.modules():
            module.training = False
    return model.to(device=device, memory_format=torch.channels_last)


def _number_of_parameters(model: nn.Module) -> int:
    """Count the parameters; quantised weights are no parameters to PyTorch."""

    def quantised(value: Any) -> int:
        if isinstance(value, (tuple, list)):
            return sum(map(quantised, value))
        return value.numel() if isinstance(value, Tensor) and value.is_quantized else 0

    return sum(parameter.numel() for parameter in model.parameters()) + quantised(list(model.state_dict().values()))
