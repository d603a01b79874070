"""Health checks during training, so that a run of 53 hours does not fail in the first and go unnoticed.

The checks find, within a few steps, teacher outputs that are NaN or constant, a loss or gradient that is not finite,
fp16 overflow, a learning rate far too high and a model that learns nothing. A fatal problem stops the run; a doubtful
one logs a single warning. Every message names the step and the usual causes.

No check waits for the device: the facts of a batch stay there, as a few scalars, until the trainer reads the gradient
norm of the step. Damaged images are handled in data/decoding.py, labels in data/labels.py.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from ..errors import NonFiniteError, UserError


logger = logging.getLogger(__name__)

# After this many views a teacher that ignores its input can be told from a dataset dominated by one class.
JUDGED_VIEWS = 1024
# Number of steps over which the student is judged, after the warm-up.
JUDGED_STEPS = 100
# Class loss relative to ln(classes), the loss of a uniform guess: above the first the student gets worse, above the
# second it has learnt nothing.
WORSE_THAN_A_GUESS, AS_GOOD_AS_A_GUESS = 1.05, 0.98
# Ratio of a gradient norm to the mean of those before it, and the steps of that mean. Healthy norms of a ViT vary by a
# factor of ten.
EXPLODED, MEAN_OVER = 100.0, 20
# Consecutive steps with a zero gradient or an identical loss after which coincidence is ruled out.
IDLE_STEPS = 10
# Skipped steps in a row before a warning and before an error. fp16's loss scale starts at 65,536 and is halved by
# every overflow, so the first few skips only search for a good scale.
DOUBTFUL_SKIPS, MAX_SKIPS = 12, 25


# A run's pace is that of its steps from the second to this one; so many hours on a CPU are warned of.
PACE_STEPS, LONG_HOURS = 3, 6


class Pace(TrainerCallback):
    """Logs a short run often enough, and says after a few steps how long the run will take."""

    def on_train_begin(self, args, state, control, **kwargs):
        """Have at least ten log lines, unless `logging_steps` was set."""
        if args.logs_by_default:
            state.logging_steps = max(1, min(state.logging_steps, state.max_steps // 10))
        self.steps, self.since = 0, 0.0

    def on_step_end(self, args, state, control, **kwargs):
        """Print the time that the steps so far promise; on a CPU warn of many hours."""
        self.steps += 1
        if self.steps == 1:  # which starts the workers and compiles
            self.since = time.perf_counter()
        elif self.steps == PACE_STEPS and state.is_world_process_zero:
            step = (time.perf_counter() - self.since) / (PACE_STEPS - 1)
            seconds = step * (state.max_steps - state.global_step)
            print(f"{'pace':<11}{step:.2g} s a step, about {duration(seconds)} to go", flush=True)
            if args.device.type == "cpu" and seconds > LONG_HOURS * 3600:
                logger.warning(
                    "on this CPU the run takes about %s. Use a GPU, or a smaller model_size, image_size or "
                    "num_train_epochs; hf-deit init writes a recipe that a CPU can bear",
                    duration(seconds),
                )


def duration(seconds: float) -> str:
    """Return a time span in its two largest units, for people: '2 days 3 h', '5 min'."""
    minutes, hours = round(seconds / 60), round(seconds / 3600)
    if minutes < 1:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if hours < 48:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{hours // 24} days {hours % 24} h"


class Health:
    """Health checks of one run; a resumed run starts with empty statistics.

    Args:
        num_labels: number of classes.
        teacher: name of the teacher, for messages.
        id2label: names of the classes, for messages.
        quiet: log no warnings; set on all ranks but one. Errors are raised on every rank.
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
        self._warned: set[str] = set()
        # over the batches of this step
        self._batches = 0
        self._losses: dict[str, Tensor] = {}
        self._broken: dict[str, Tensor] = {}
        # over the last JUDGED_VIEWS views
        self._views = 0
        self._answers, self._teachers_choice, self._labels = _Range(), _Range(), _Range()
        # over the last JUDGED_STEPS steps
        self._steps = 0
        self._sum_of_losses = 0.0
        self._students_choice = _Range()
        # over all steps
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
        """Accumulate statistics of one forward pass; reads nothing from the device.

        Args:
            losses: scalars by name, as [`distillation_loss`] returns them.
            student_logits: `(batch, classes)` by the name of the head, the class head first; None for a head that the
                model does not have.
            teacher_logits: teacher outputs: logits `(batch, classes)`, decisions `(batch,)` int64, or None.
            labels: `(batch,)` int64, or `(batch, classes)` float for mixed labels.
        """
        self._batches += 1
        for name, value in losses.items():
            self._losses[name] = self._losses.get(name, 0) + value.detach()
        for name, logits in {**student_logits, "teacher": teacher_logits}.items():
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

    @property
    def has_seen_a_batch(self) -> bool:
        """Whether `see_batch` was called in this step."""
        return self._batches > 0

    def see_step(
        self,
        step: int,
        grad_norm: Tensor | float,
        learning_rate: float,
        *,
        warmed_up: bool = True,
        scaler: torch.amp.GradScaler | None = None,
    ) -> float:
        """Check a step between its backward and its optimizer step, with one read from the device.

        Args:
            step: number of the step, from 1.
            grad_norm: gradient norm over all parameters, before clipping.
            learning_rate: learning rate of this step.
            warmed_up: True once the warm-up is over.
            scaler: gradient scaler of fp16, which skips steps whose gradient is not finite; with a scaler such steps
                are counted instead of stopping the run.

        Returns:
            The gradient norm, for the log.

        Raises:
            FloatingPointError: the teacher outputs are not finite; without a scaler, the gradient is not finite; fp16
                overflowed in 25 steps in a row.
            ValueError: the teacher's logits were the same for each of 1,024 views.
        """
        if not self.has_seen_a_batch:  # a subclass's own compute_loss
            norm = float(grad_norm)
            if not math.isfinite(norm) and scaler is None:
                raise NonFiniteError(
                    f"training stopped at step {step}: gradient norm {norm}, learning rate {learning_rate:.3g}. No "
                    "weight was changed in this step"
                )
            return norm
        seen = self._read(grad_norm)
        norm, losses = seen["norm"], {name: seen[name] / self._batches for name in self._losses}
        broken = [name for name in self._broken if seen[f"{name} broken"]]
        self._batches, self._losses, self._broken = 0, {}, {}
        where = f"step {step}: gradient norm {norm:.4g}, learning rate {learning_rate:.3g}, losses {_shown(losses)}"

        if "teacher" in broken:
            raise NonFiniteError(
                f"training stopped at step {step}: the outputs of teacher {self.teacher!r} contain NaN or infinity. "
                "No weight was changed in this step. Usual causes: damaged teacher weights, or a dtype of too small a "
                "range (load_teacher's dtype); evaluate the teacher with recipes/run_eval.py"
            )
        if not math.isfinite(norm):
            part = _first_broken(broken, losses)
            if scaler is None:
                raise NonFiniteError(
                    f"training stopped at {where}; not finite: {part}. No weight was changed in this step, and all "
                    "checkpoints are older. Usual causes: a learning rate too high, a warm-up too short, fp16 (use "
                    "bf16), a damaged input"
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
        """Return all accumulated statistics by name, in one transfer from the device."""
        norm: Any = grad_norm
        if hasattr(norm, "full_tensor"):  # a DTensor, from FSDP2
            norm = norm.full_tensor()
        noted = {"norm": norm} | self._losses | {f"{name} broken": flag for name, flag in self._broken.items()}
        noted |= {"student lowest": self._students_choice.low, "student highest": self._students_choice.high}
        if self._answers.high is not None:
            noted |= {"spread": (self._answers.high - self._answers.low).max(), "size": self._answers.high.abs().max()}
        if self._views:
            noted |= {"teacher lowest": self._teachers_choice.low, "teacher highest": self._teachers_choice.high}
            noted |= {"label lowest": self._labels.low, "label highest": self._labels.high}
        device = self._students_choice.low.device
        scalars = [torch.as_tensor(value, dtype=torch.float32, device=device) for value in noted.values()]
        return dict(zip(noted, torch.stack(scalars).tolist(), strict=True))

    # One check each

    def _count_skip(self, step: int, part: str, scale: float) -> None:
        self._skips += 1
        state = f"{self._skips} steps in a row overflowed in fp16 and were skipped; loss scale {scale:g}"
        if self._skips >= MAX_SKIPS:
            raise NonFiniteError(
                f"training stopped at step {step}: {state}; not finite: {part}. No weight was changed in these steps. "
                "Use bf16: true in place of fp16, because bf16 does not overflow, or lower the learning rate"
            )
        if self._skips >= DOUBTFUL_SKIPS or scale < 1:
            self._warn("fp16", f"step {step}: {state}; not finite: {part}. bf16: true does not overflow")

    def _judge_gradient(self, where: str, norm: float, loss: float) -> None:
        if self._norms >= MEAN_OVER and norm > EXPLODED * max(1.0, self._mean_norm):
            self._warn(
                "explosion",
                f"{where}: the gradient norm is {norm / self._mean_norm:,.0f} times the mean of the steps before "
                f"({self._mean_norm:.3g}). If the loss does not recover, resume from an earlier checkpoint with a "
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
                "the student learns nothing. Usual causes: frozen or dead weights, a learning rate of 0, fp16 (use "
                "bf16)",
            )

    def _judge_teacher(self, step: int, seen: Mapping[str, float]) -> None:
        views, labels = f"{self._views:,} views", f"{int(seen['label lowest'])} to {int(seen['label highest'])}"
        one_label = seen["label lowest"] == seen["label highest"]
        self._views, self._answers, self._teachers_choice, self._labels = 0, _Range(), _Range(), _Range()
        if "spread" in seen and seen["spread"] <= 1e-6 * max(1.0, seen["size"]):
            raise UserError(
                f"training stopped at step {step}: the logits of teacher {self.teacher!r} are the same for each of "
                f"{views}, so its head is untrained or its weights are damaged; evaluate the teacher with "
                "recipes/run_eval.py, or set distillation_type: none"
            )
        if seen["teacher lowest"] == seen["teacher highest"] and not one_label:
            choice = int(seen["teacher lowest"])
            self._warn(
                "teacher",
                f"step {step}: teacher {self.teacher!r} predicted class {choice} ({self.id2label.get(choice)!r}) for "
                f"all of {views}, whose labels range from {labels}. Check the teacher's mean, std and image size, and "
                "evaluate the teacher with recipes/run_eval.py",
            )

    def _judge_student(self, where: str, seen: Mapping[str, float]) -> None:
        loss = self._sum_of_losses / max(1, self._steps)
        one_choice = seen["student lowest"] == seen["student highest"]
        steps, self._steps, self._sum_of_losses, self._students_choice = self._steps, 0, 0.0, _Range()
        if not steps:  # still in the warm-up
            return
        cause = "Usual causes: a learning rate far too high, a warm-up too short, labels that do not match the images"
        if loss > WORSE_THAN_A_GUESS * self.guess:
            self._warn(
                "learning rate",
                f"{where}: the mean class loss of the last {steps} steps is {loss:.4g}, above the {self.guess:.4g} of "
                f"a uniform guess. {cause}",
            )
        elif loss > AS_GOOD_AS_A_GUESS * self.guess and one_choice:
            choice = int(seen["student lowest"])
            self._warn(
                "learning rate",
                f"{where}: over the last {steps} steps the student predicted class {choice} "
                f"({self.id2label.get(choice)!r}) for every view, and its mean class loss is {loss:.4g}, that of a "
                f"uniform guess ({self.guess:.4g}). {cause}",
            )

    def _warn(self, kind: str, message: str) -> None:
        """Log a warning of each kind once per run, because the same problem usually lasts for many steps."""
        if kind not in self._warned and not self.quiet:
            logger.warning("%s", message)
        self._warned.add(kind)


class _Range:
    """Running minimum and maximum of each column, kept on the device."""

    def __init__(self):
        self.low: Any = None
        self.high: Any = None

    def add(self, values: Tensor) -> None:
        low, high = values.aminmax(dim=0)
        self.low = low if self.low is None else torch.minimum(self.low, low)
        self.high = high if self.high is None else torch.maximum(self.high, high)


def _first_broken(broken: Sequence[str], losses: Mapping[str, float]) -> str:
    """Name the earliest quantity that is not finite, because later ones follow from it."""
    if broken:
        return " and ".join(f"the logits of the {name}" for name in broken)
    if parts := [name for name, value in losses.items() if not math.isfinite(value)]:
        return " and ".join(parts)
    return "the gradient alone (logits and losses are finite on this rank; other ranks see other batches)"


def _shown(losses: Mapping[str, float]) -> dict[str, float]:
    return {name: float(f"{value:.5g}") for name, value in losses.items()}
