"""Measure throughput: images per second, parameters, multiply-adds and memory of image classifiers in one run.

The paper's protocol: "For each model we take the largest possible batch size for the usual resolution of the model and
calculate the average time over 30 runs to process that batch." Two things are added. The models take turns, so that a
machine which slows down slows all of them; and float32 means float32 for every layer, while PyTorch on its own lets
convolutions, but not matrix products, round to TF32 on a GPU, which would favour the convnets.

Not here: building the models (`recipes/run_throughput.py`), the input pipeline (`benchmarks/`), the paper's numbers
(`tables.py`), the report (`tradeoff.py`), the picture (`plots/tables.py`).

Source: arXiv 2012.12877, captions of Tables 1 and 5.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass

import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..arguments import option
from ..errors import UserError
from .machine import device_name, free_memory, release_memory, resident_memory, restart_resident_peak
from .tradeoff import paper_rows


logger = logging.getLogger(__name__)

PRECISIONS = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# On a CPU a larger batch is worth it while it raises images per second by this factor.
WORTHWHILE = 1.05


@dataclass
class ThroughputArguments:
    """The models to measure, and the protocol."""

    models: str = option(
        "table1",
        "Models, with commas: tiny, small-distilled, base@384 (ours), stock:base (Transformers'), timm:resnet50@288; "
        "whole tables of the paper: table1, table5, table10; or trained models: directories and Hub ids.",
    )
    image_size: int | None = option(
        None, "Side of the images of models named without @<pixels>. Unset: 224, or the trained model's own."
    )
    reference: str | None = option(None, "Model that the ratios compare with. Unset: the first.")
    device: str | None = option(None, "'cpu', 'cuda' or 'cuda:1'. Unset: the GPU if the machine has one.")
    precision: str = option(
        "float32",
        "Precision of weights and pixels: 'float32', 'tf32' (float32, rounded products; GPU), 'bfloat16', 'float16'.",
    )
    torch_compile: bool = option(False, "Compile each model at its batch size.")
    channels_last: bool = option(
        False, "Store weights and pixels with the channel innermost: often faster for convnets."
    )
    batch_size: int | None = option(None, "Batch size of all models. Unset: searched for each model.")
    max_batch_size: int = option(1024, "Largest batch size of the search.")
    runs: int = option(30, "Timed batches of each model. Paper: 30.")
    turns: int = option(5, "Spread the runs of a model over this many turns; the models take turns.")
    warm_up: int = option(2, "Untimed batches at the start of a turn.")
    output_dir: str = option("outputs/throughput", "Folder for throughput.json, throughput.md and tradeoff.png.")

    def __post_init__(self):
        if self.precision not in PRECISIONS:
            raise UserError(f"precision is {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        for name in ("image_size", "batch_size", "max_batch_size", "runs", "turns"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")
        if self.warm_up < 0:
            raise UserError(f"warm_up is {self.warm_up}; it must be at least 0")
        self.device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            kind = torch.device(self.device).type
        except RuntimeError as error:
            raise UserError(f"device is {self.device!r}; use 'cpu', 'cuda' or 'cuda:<number>'") from error
        if kind not in ("cpu", "cuda"):
            raise UserError(f"device is {self.device!r}; throughput is measured on 'cpu' and 'cuda' only")
        if kind == "cuda" and not torch.cuda.is_available():
            raise UserError(f"device is {self.device!r}, but PyTorch sees no GPU; use --device cpu")
        if kind == "cpu" and self.precision == "tf32":
            raise UserError("precision 'tf32' exists on GPUs only; use float32 or bfloat16 on the CPU")

    @property
    def rule(self) -> str:
        """The rule that chose the batch size, in words for the reader of the table."""
        if self.batch_size is not None:
            return f"{self.batch_size}, given"
        if torch.device(self.device).type == "cuda":
            return f"the largest that fits the GPU's memory, at most {self.max_batch_size}"
        return (
            f"doubled while that raises images/s by {WORTHWHILE - 1:.0%} and half of the free memory suffices, "
            f"at most {self.max_batch_size}"
        )


@dataclass(frozen=True)
class Throughput:
    """The measurement of one model.

    Args:
        name: name of the model, as given.
        image_size: side of the images, pixels.
        parameters: number of parameters.
        macs: multiply-adds in one image, each counted as one (papers often call that number FLOPs), of convolutions
            and matrix products, attention's included.
        batch_size: images in one run.
        peak_memory: bytes of weights, pixels and activations at their peak. GPU: the memory that PyTorch allocated.
            CPU: the weights, and the growth of the process's resident memory in one run; None off Linux.
        seconds: time of each run.
    """

    name: str
    image_size: int
    parameters: int
    macs: int
    batch_size: int
    peak_memory: int | None
    seconds: tuple[float, ...]

    @property
    def images_per_second(self) -> float:
        """The paper's figure: the batch size over the mean time."""
        return self.batch_size / statistics.fmean(self.seconds)

    @property
    def median_images_per_second(self) -> float:
        """The batch size over the median time, which a few disturbed runs do not change."""
        return self.batch_size / statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Interquartile range of the times over their median; 0 for a single run."""
        if len(self.seconds) < 2:
            return 0.0
        lower, middle, upper = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return (upper - lower) / middle


def measure_throughput(models: Mapping[str, tuple[nn.Module, int]], args: ThroughputArguments) -> list[Throughput]:
    """Measure classifiers, which take turns.

    A model has the device's memory to itself in its turn. Gradients are off, and a run ends when the device has
    finished. The search for the batch size uses the model before compilation.

    Args:
        models: by name, `(module, side of its images in pixels)`; a module takes `(batch, 3, side, side)`. The modules
            are not copied: they change to `eval()` and to the precision of `args`, and end on the CPU.
        args: the protocol; `models`, `reference` and `output_dir` are not read.

    Raises:
        ValueError: there are no models, or not even a single image fits one of them.
    """
    if not models:
        raise UserError("no models to measure; give at least one")
    with _arithmetic(args):
        measurements = [_Measurement(name, *model, args) for name, model in models.items()]
        for measurement in measurements:
            measurement.prepare()
        for turn in range(args.turns):
            count = args.runs // args.turns + (turn < args.runs % args.turns)
            for measurement in measurements if count else ():
                measurement.take_turn(count)
    return [measurement.result() for measurement in measurements]


def largest_batch_size(run: Callable[[int], object], at_most: int) -> int:
    """The largest batch that `run` processes without running out of memory, by doubling and then bisection.

    Args:
        run: a function that is called with batch sizes in [1, `at_most`].
        at_most: largest batch size to try.

    Raises:
        ValueError: if a batch of one does not fit.
    """

    def fits(size: int) -> bool:
        try:
            run(size)
        except RuntimeError as error:  # cuDNN and the CPU's allocator raise a plain RuntimeError
            if not (isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)):
                raise
            fitted = False
        else:
            fitted = True
        release_memory()  # after the except block, as the error holds the tensors of the failed run
        return fitted

    fitting, size = 0, 1
    while fits(size):
        fitting = size
        if size == at_most:
            return size
        size = min(2 * size, at_most)
    if not fitting:
        raise UserError("not even one image fits the memory; choose a smaller model or image size")
    failing = size
    while failing - fitting > 1:
        middle = (fitting + failing) // 2
        fitting, failing = (middle, failing) if fits(middle) else (fitting, middle)
    return fitting


def saturating_batch_size(trial: Callable[[int], tuple[float, int | None]], memory: int | None, at_most: int) -> int:
    """The batch size for a CPU: doubled while that raises the throughput and the batch fits.

    A CPU has so much memory that the largest batch would take too long, and says nothing about throughput.

    Args:
        trial: batch size -> (images per second, peak memory in bytes or None).
        memory: bytes that a batch may take. A batch is expected to take twice the bytes of half the batch.
        at_most: largest batch size to try.
    """
    size = 1
    rate, peak = trial(size)
    while 2 * size <= at_most and (memory is None or peak is None or 2 * peak <= memory):
        faster, peak = trial(2 * size)
        if faster < WORTHWHILE * rate:
            break
        size, rate = 2 * size, faster
    return size


def count_macs(model: nn.Module, pixels: Tensor) -> int:
    """Multiply-adds of one forward pass, each counted as one, without element-wise work and normalisations."""
    # PyTorch counts no operations in its fused attention for CPUs, so attention is computed as matrix products here.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(pixels)
    return counter.get_total_flops() // 2


class _Measurement:
    """The state of one model during [`measure_throughput`]."""

    def __init__(self, name: str, model: nn.Module, image_size: int, args: ThroughputArguments):
        self.name, self.image_size, self.args = name, image_size, args
        self.device, self.dtype = torch.device(args.device), PRECISIONS[args.precision]
        self.layout = torch.channels_last if args.channels_last else torch.contiguous_format
        self.model = model.eval().to("cpu", self.dtype)
        if args.channels_last:  # converting to contiguous would undo a layout that the model chose itself
            self.model.to(memory_format=torch.channels_last)
        self.forward: Callable[[Tensor], object] = self.model
        self.seconds: list[float] = []

    def prepare(self) -> None:
        """Count multiply-adds, find the batch size, compile, and measure the memory."""
        args = self.args
        with self.on_device():
            self.macs = count_macs(self.model, self.pixels(1))
            if args.batch_size is not None:
                self.batch_size = args.batch_size
            elif self.device.type == "cuda":
                self.batch_size = largest_batch_size(self.run_once, args.max_batch_size)
            else:
                memory = free_memory()
                self.batch_size = saturating_batch_size(self.trial, memory and memory // 2, args.max_batch_size)
            if args.torch_compile:
                # Without isolation the models share one cache of eight entries, and the ninth silently stays eager.
                self.forward = torch.compile(self.model, dynamic=False, isolate_recompiles=True)
            self.run_once(self.batch_size)
            self.peak_memory = self.peak(self.batch_size)
        logger.info("%s: %d pixels, batch of %d", self.name, self.image_size, self.batch_size)

    def take_turn(self, count: int) -> None:
        """Warm up, then time `count` runs."""
        with self.on_device():
            pixels = self.pixels(self.batch_size)
            for _ in range(self.args.warm_up):
                self.run(pixels)
            self.seconds += [self.run(pixels) for _ in range(count)]
        logger.info("%s: %.1f images/s", self.name, self.batch_size * count / sum(self.seconds[-count:]))

    def result(self) -> Throughput:
        parameters = sum(p.numel() for p in self.model.parameters())
        return Throughput(
            *(self.name, self.image_size, parameters, self.macs, self.batch_size, self.peak_memory),
            tuple(self.seconds),
        )

    @contextmanager
    def on_device(self) -> Iterator[None]:
        self.model.to(self.device)
        try:
            yield
        finally:
            self.model.to("cpu")
            release_memory()

    def pixels(self, batch_size: int) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(0)
        shape = (batch_size, 3, self.image_size, self.image_size)
        noise = torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)
        return noise.contiguous(memory_format=self.layout)

    @torch.inference_mode()
    def run(self, pixels: Tensor) -> float:
        """Seconds of one batch."""
        self.synchronize()
        start = time.perf_counter()
        self.forward(pixels)
        self.synchronize()
        return time.perf_counter() - start

    def run_once(self, batch_size: int) -> float:
        return self.run(self.pixels(batch_size))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def trial(self, batch_size: int) -> tuple[float, int | None]:
        """Images per second, by the faster of two runs, and the peak memory of a third run."""
        pixels = self.pixels(batch_size)
        seconds = min(self.run(pixels), self.run(pixels))
        del pixels
        return batch_size / seconds, self.peak(batch_size)

    def peak(self, batch_size: int) -> int | None:
        """`Throughput.peak_memory`."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.run_once(batch_size)
            return torch.cuda.max_memory_allocated(self.device)
        before = restart_resident_peak()
        self.run_once(batch_size)
        if before is None:
            return None
        tensors = {t.data_ptr(): t.nbytes for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(tensors.values()) + resident_memory("VmHWM") - before


@contextmanager
def _arithmetic(args: ThroughputArguments) -> Iterator[None]:
    """Round alike in every layer and use cuDNN's fastest convolutions on a GPU; change nothing on a CPU."""
    if torch.device(args.device).type != "cuda":
        yield
        return
    rounding = nullcontext()
    if PRECISIONS[args.precision] is torch.float32:
        rounding = torch.backends.flags(fp32_precision="tf32" if args.precision == "tf32" else "ieee")
    benchmark = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        with rounding:
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark


def throughput_rows(results: Sequence[Throughput], reference: str | None = None) -> list[dict]:
    """Results ready for JSON, with the paper's throughput.

    Args:
        results: the results of one run; the models of two runs did not take turns, so no ratio compares them.
        reference: name of the model that `ratio` compares with; the first if None.

    Returns:
        For each result its fields and `images_per_second`, `median_images_per_second`, `spread`, `ratio` (images per
        second over the reference's) and `paper_images_per_second` (None where the paper has none).

    Raises:
        ValueError: if no result has the name `reference`.
    """
    by_name = {result.name: result for result in results}
    reference = results[0].name if reference is None else reference
    if reference not in by_name:
        raise UserError(f"reference is {reference!r}; it must be one of the measured models: {', '.join(by_name)}")
    base = by_name[reference].images_per_second
    rows = []
    for result in results:
        paper = paper_rows(result.name, result.image_size)
        figures = {
            "images_per_second": result.images_per_second,
            "median_images_per_second": result.median_images_per_second,
            "spread": result.spread,
            "ratio": result.images_per_second / base,
            "paper_images_per_second": paper[0].images_per_second if paper else None,
        }
        rows.append(asdict(result) | figures)
    return rows


def throughput_table(rows: Sequence[Mapping], args: ThroughputArguments) -> str:
    """The rows of [`throughput_rows`] as Markdown, after a description of the measurement."""
    reference = args.reference or rows[0]["name"]
    titles = ["model", "pixels", "params (M)", "GMACs", "batch", "images/s", "median", "spread", f"x {reference}"]
    titles += ["memory (MB)", "images/s, the paper's V100"]
    lines = ["| " + " | ".join(titles) + " |", "|---" + "|---:" * (len(titles) - 1) + "|"]
    for row in rows:
        memory, paper = row["peak_memory"], row["paper_images_per_second"]
        cells = [
            *(row["name"], str(row["image_size"]), f"{row['parameters'] / 1e6:.1f}", f"{row['macs'] / 1e9:.2f}"),
            *(str(row["batch_size"]), f"{row['images_per_second']:.1f}", f"{row['median_images_per_second']:.1f}"),
            *(f"{row['spread']:.1%}", f"{row['ratio']:.3f}"),
            "not measured" if memory is None else f"{memory / 1e6:.0f}",
            "-" if paper is None else f"{paper:g}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    how = ", ".join(
        [args.precision, "compiled" if args.torch_compile else "eager"] + ["channels last"] * args.channels_last
    )
    notes = [
        f"Measured here: {device_name(args.device)}, {how}, forward pass without gradients.",
        f"images/s: batch over the mean time of {args.runs} runs in {args.turns} turns (median: over the median time; "
        "spread: interquartile range of the times over their median). The last column is the paper's.",
        f"Batch size: {args.rule}. GMACs: 10^9 multiply-adds an image, each counted as one. Memory: weights, pixels "
        "and activations at their peak.",
    ]
    return "\n\n".join([*notes, "\n".join(lines)]) + "\n"
