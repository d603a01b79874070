"""What is watched while a run trains, so that 53 hours are not spent on numbers that went wrong in the first.

A teacher that answers NaN or the same for everything, labels that are no class, a loss or gradient that is not finite,
fp16 that overflows, a learning rate far too high, a model that learns nothing: each is seen within a few steps and
said with the step and the cause. What cannot be meant ends the run, what is doubtful is one warning.

Nothing here waits for the device: what a batch shows stays there, as a handful of scalars, until the gradient norm of
the step is read, which the trainer does anyway. Damaged images are not here but in bad_images.py.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..errors import NonFiniteError, UserError


logger = logging.getLogger(__name__)

# So many views tell a teacher that does not look from a set in which one class is frequent.
JUDGED_VIEWS = 1024
# Steps over which the student is judged, once the warm-up is over.
JUDGED_STEPS = 100
# A loss above that many times ln(classes), what a uniform guess costs, is not being learnt from.
WORSE_THAN_A_GUESS, AS_GOOD_AS_A_GUESS = 1.05, 0.98
# A gradient that many times as long as those before it. Ordinary ones of a ViT vary by a factor of ten.
EXPLODED, MEAN_OVER = 100.0, 20
# Steps with no gradient, or with one and the same loss, until that is no chance.
IDLE_STEPS = 10
# fp16's loss scale begins at 65,536 and is halved by every overflow: the first few are its search for a good one.
DOUBTFUL_SKIPS, MAX_SKIPS = 12, 25


class Health:
    """Watches one run; a resumed one starts a new watch.

    Args:
        num_labels: number of classes.
        teacher: what it is called, for messages.
        id2label: likewise the classes.
        quiet: no warnings; for all ranks but one. Errors are raised on every rank.
    """

    def __init__(
        self,
        num_labels: int,
        *,
        teacher: str | None = None,
        id2label: Mapping[int, str] | None = None,
        quiet: bool = False,
    ):
        self.guess = math.log(num_labels)
        self.teacher = teacher
        self.id2label = id2label or {}
        self.quiet = quiet
        self._told: set[str] = set()
        # of the step
        self._batches = 0
        self._losses: dict[str, Tensor] = {}
        self._broken: dict[str, Tensor] = {}
        # of the last JUDGED_VIEWS views
        self._views = 0
        self._answers, self._teachers_choice, self._labels = _Range(), _Range(), _Range()
        # of the last JUDGED_STEPS steps
        self._steps = 0
        self._sum_of_losses = 0.0
        self._students_choice = _Range()
        # of all steps
        self._mean_norm, self._norms = 0.0, 0
        self._idle = 0
        self._last_loss = math.nan
        self._skips = 0

    @torch.no_grad()
    def see_batch(
        self,
        losses: Mapping[str, Tensor],
        student_logits: Mapping[str, Tensor | None],
        teacher_logits: Tensor | None,
        labels: Tensor,
    ) -> None:
        """Notes what a forward pass gave; reads nothing from the device.

        Args:
            losses: by name, scalars, as [`distillation_loss`] returns them.
            student_logits: `(batch, classes)` by the name of the head, the class head first; None for one that is
                not there.
            teacher_logits: `(batch, classes)`, or only its decisions, `(batch,)` int64, or None.
            labels: `(batch,)` int64, or `(batch, classes)` float where they are mixed.
        """
        self._batches += 1
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0) + value.detach()
        for name, logits in (student_logits | {"teacher": teacher_logits}).items():
            if logits is not None:
                broken = ~logits.isfinite().all()
                self._broken[name] = self._broken[name] | broken if name in self._broken else broken
        self._students_choice.add(next(iter(student_logits.values())).argmax(dim=1))
        if teacher_logits is not None:
            self._views += len(labels)
            if teacher_logits.dim() == 2:
                self._answers.add(teacher_logits.float())
                teacher_logits = teacher_logits.argmax(dim=1)
            self._teachers_choice.add(teacher_logits)
            self._labels.add(labels.argmax(dim=1) if labels.dim() == 2 else labels)

    def see_step(
        self,
        step: int,
        grad_norm: Tensor | float,
        learning_rate: float,
        *,
        warmed_up: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> float:
        """Judges a step between its backward and its optimizer step; reads the gradient norm and all else at once.

        Args:
            step: its number, from 1.
            grad_norm: of all parameters, before any clipping.
            learning_rate: of this step.
            warmed_up: the warm-up is over.
            scaler: of fp16. It skips steps whose gradient is not finite, so these are only counted then.

        Returns:
            The gradient norm, for the log.

        Raises:
            FloatingPointError: the teacher's answer, or without a scaler the gradient, is not finite; fp16 has
                overflowed in 25 steps in a row.
            ValueError: the teacher gave the same logits to every one of 1,024 views.
        """
        seen = self._read(grad_norm)
        norm, losses = seen["norm"], {name: seen[name] / self._batches for name in self._losses}
        broken = [name for name in self._broken if seen[f"{name} broken"]]
        self._batches, self._losses, self._broken = 0, {}, {}
        where = f"step {step}: gradient norm {norm:.4g}, learning rate {learning_rate:.3g}, losses {_shown(losses)}"

        if "teacher" in broken:
            raise NonFiniteError(
                f"training stopped at step {step}: teacher {self.teacher!r} answered with NaN or infinity. No weight "
                "was changed in this step. Usual causes: damaged weights of the teacher, or a type of numbers too "
                "small for it (load_teacher's dtype); evaluate it with recipes/run_eval.py"
            )
        if not math.isfinite(norm):
            part = _first_broken(broken, losses)
            if scaler is None:
                raise NonFiniteError(
                    f"training stopped at {where}; not finite: {part}. No weight was changed in this step; the "
                    "checkpoints are from before it. Usual causes: a learning rate too high, a warm-up too short, "
                    "fp16 (use bf16), a damaged input"
                )
            self._count_skip(step, part, scaler.get_scale())
            return norm
        self._skips = 0

        self._judge_gradient(where, norm, losses["loss"])
        if self._views >= JUDGED_VIEWS:
            self._judge_teacher(step, seen)
        if warmed_up:
            self._steps += 1
            self._sum_of_losses += losses["class_loss"]
        if not warmed_up or self._steps >= JUDGED_STEPS:
            self._judge_student(where, seen)
        return norm

    def _read(self, grad_norm: Tensor | float) -> dict[str, float]:
        """Everything that was noted, by name, in one transfer from the device."""
        if hasattr(grad_norm, "full_tensor"):  # of FSDP2
            grad_norm = grad_norm.full_tensor()
        noted = {"norm": grad_norm} | self._losses | {f"{name} broken": flag for name, flag in self._broken.items()}
        noted |= {"student lowest": self._students_choice.low, "student highest": self._students_choice.high}
        if self._answers.high is not None:
            noted |= {"spread": (self._answers.high - self._answers.low).max(), "size": self._answers.high.abs().max()}
        if self._views:
            noted |= {"teacher lowest": self._teachers_choice.low, "teacher highest": self._teachers_choice.high}
            noted |= {"label lowest": self._labels.low, "label highest": self._labels.high}
        device = self._students_choice.low.device
        scalars = [torch.as_tensor(value, dtype=torch.float32, device=device) for value in noted.values()]
        return dict(zip(noted, torch.stack(scalars).tolist(), strict=True))

    # One judgement each

    def _count_skip(self, step: int, part: str, scale: float) -> None:
        self._skips += 1
        state = f"{self._skips} steps in a row overflowed in fp16 and were skipped; loss scale {scale:g}"
        if self._skips >= MAX_SKIPS:
            raise NonFiniteError(
                f"training stopped at step {step}: {state}; not finite: {part}. No weight was changed in these steps. "
                "Use bf16: true in place of fp16: it does not overflow; or a lower learning rate"
            )
        if self._skips >= DOUBTFUL_SKIPS or scale < 1:
            self._warn("fp16", f"step {step}: {state}; not finite: {part}. bf16: true does not overflow")

    def _judge_gradient(self, where: str, norm: float, loss: float) -> None:
        if self._norms >= MEAN_OVER and norm > EXPLODED * max(1.0, self._mean_norm):
            self._warn(
                "explosion",
                f"{where}: the gradient is {norm / self._mean_norm:,.0f} times as long as the mean of those before "
                f"({self._mean_norm:.3g}). If the loss does not come back, go on from an earlier checkpoint with a "
                "lower learning rate, a longer warm-up or max_grad_norm: 1",
            )
        self._norms += 1
        self._mean_norm += (norm - self._mean_norm) / min(self._norms, MEAN_OVER)
        self._idle = self._idle + 1 if norm == 0 or loss == self._last_loss else 0
        self._last_loss = loss
        if self._idle >= IDLE_STEPS:
            self._warn(
                "idle",
                f"{where}: for {self._idle} steps the gradient has been exactly 0 or the loss exactly the same, so "
                "nothing is learnt. Usual causes: frozen or dead weights, a learning rate of 0, fp16 (use bf16)",
            )

    def _judge_teacher(self, step: int, seen: Mapping[str, float]) -> None:
        views, labels = f"{self._views:,} views", f"{int(seen['label lowest'])} to {int(seen['label highest'])}"
        one_label = seen["label lowest"] == seen["label highest"]
        self._views, self._answers, self._teachers_choice, self._labels = 0, _Range(), _Range(), _Range()
        if "spread" in seen and seen["spread"] <= 1e-6 * max(1.0, seen["size"]):
            raise UserError(
                f"training stopped at step {step}: teacher {self.teacher!r} gave the same logits to each of {views}, "
                "so there is nothing to learn from it: its head is untrained or its weights are damaged; evaluate it "
                "with recipes/run_eval.py, or set distillation_type: none"
            )
        if seen["teacher lowest"] == seen["teacher highest"] and not one_label:
            choice = int(seen["teacher lowest"])
            self._warn(
                "teacher",
                f"step {step}: teacher {self.teacher!r} decided for class {choice} ({self.id2label.get(choice)!r}) "
                f"on all of {views}, whose labels go from {labels}. Its accuracy is that of a constant: check its "
                "mean, std and image size, and evaluate it with recipes/run_eval.py",
            )

    def _judge_student(self, where: str, seen: Mapping[str, float]) -> None:
        loss = self._sum_of_losses / max(1, self._steps)
        one_choice = seen["student lowest"] == seen["student highest"]
        steps, self._steps, self._sum_of_losses, self._students_choice = self._steps, 0, 0.0, _Range()
        if not steps:  # of the warm-up
            return
        cause = "Usual causes: a learning rate far too high, a warm-up too short, labels that do not fit the images"
        if loss > WORSE_THAN_A_GUESS * self.guess:
            self._warn(
                "learning rate",
                f"{where}: over the last {steps} steps the class loss is {loss:.4g}, above the {self.guess:.4g} of a "
                f"guess. {cause}",
            )
        elif loss > AS_GOOD_AS_A_GUESS * self.guess and one_choice:
            choice = int(seen["student lowest"])
            self._warn(
                "learning rate",
                f"{where}: over the last {steps} steps the student decided for class {choice} "
                f"({self.id2label.get(choice)!r}) on every view, and its class loss is {loss:.4g}, that of a guess "
                f"({self.guess:.4g}). {cause}",
            )

    def _warn(self, kind: str, message: str) -> None:
        """Once a run: what is true at one step is mostly true at the next."""
        if kind not in self._told and not self.quiet:
            logger.warning("%s", message)
        self._told.add(kind)


class _Range:
    """The lowest and the highest of what was seen, each column by itself; stays on the device."""

    def __init__(self):
        self.low: Tensor | None = None
        self.high: Tensor | None = None

    def add(self, values: Tensor) -> None:
        low, high = values.aminmax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def _first_broken(broken: Sequence[str], losses: Mapping[str, float]) -> str:
    """The earliest of what is not finite: what comes after it follows from it."""
    if broken:
        return " and ".join(f"the logits of the {name}" for name in broken)
    if parts := [name for name, value in losses.items() if not math.isfinite(value)]:
        return " and ".join(parts)
    return "the gradient alone (logits and losses are finite, here at least: other ranks have batches of their own)"


def _shown(losses: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in losses.items()}


# --- labels --------------------------------------------------------------------------------------------------------
# They are looked at on the host: on a GPU a label out of range is a device assert, which names nothing.
