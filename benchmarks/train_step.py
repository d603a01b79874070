"""A training step beside timm's and stock Transformers': `python benchmarks/train_step.py [--device cuda] [...]`.

Four tables, each of interleaved rounds: medians (slowest - fastest round), and the median of the rounds' ratios:
- student: forward, eq. 3 with given decisions, backward, AdamW; the three libraries' networks with the same weights;
- teacher: the same with a convnet that is asked in each step, beside timm's token distillation task;
- trainer: a step of DistillationTrainer without a teacher, with it, and with its recorded answers, beside a loop
  written by hand that does the same work;
- memory: the peak of a training step, what an image takes of it, and what it costs to keep fewer activations.

The networks see the same ready batch each time, the trainer views of small PNGs. "Limit" is what the ratio to timm
would be if all but our matrix products and the fused attention took no time, by a profile on a CPU.
On a GPU the arithmetic is bfloat16 under autocast, compiled as well, and the table says what share of the device's
peak the step reaches (MFU).
"""

import argparse
import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
import torch.nn.functional as F
from peers import (
    LIBRARIES,
    SIZES,
    Peer,
    autocast,
    build_peers,
    compare,
    make_pixels,
    model_fields,
    print_header,
    print_row,
    release,
    shown,
    synchronize,
    take_turns,
)
from PIL import Image
from safetensors.torch import save_file
from timm.loss import SoftTargetCrossEntropy
from timm.task import TokenDistillationTask
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from hf_deit import (
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DistillationConfig,
    DistillationTrainer,
    Mixing,
    TrainViews,
    build_train_transform,
    distillation_loss,
    load_teacher,
)
from hf_deit.augmentation.repeated_augmentation import RepeatedAugmentationSampler
from hf_deit.augmentation.transforms import IMAGENET_MEAN, IMAGENET_STD
from hf_deit.data.views import collate_views
from hf_deit.paper.machine import describe_machine, resident_memory, restart_resident_peak
from hf_deit.teachers.teacher import Teacher


DROP_PATH = 0.1  # Table 9
FACTS = ("size", "batch", "drop path")


def make_batch(size: str, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, mixed labels and the decisions of a teacher."""
    classes, generator = model_fields(size)["num_labels"], torch.Generator().manual_seed(0)
    labels = torch.rand(batch_size, classes, generator=generator).softmax(dim=1).to(device)
    decisions = torch.randint(classes, (batch_size,), generator=generator).to(device)
    return make_pixels(size, batch_size, device), labels, decisions


def our_loss(class_logits: Tensor, distillation_logits: Tensor, labels: Tensor, teacher: Tensor) -> Tensor:
    """Equation 3; of the teacher its logits or its decisions."""
    heads = class_logits, distillation_logits
    return distillation_loss(*heads, labels, teacher, distillation_type="hard", label_smoothing=0.0)["loss"]


def their_loss(class_logits: Tensor, distillation_logits: Tensor, labels: Tensor, decisions: Tensor) -> Tensor:
    """Equation 3, as one would write it beside timm or stock."""
    taught = F.cross_entropy(distillation_logits.float(), decisions)
    return 0.5 * F.cross_entropy(class_logits.float(), labels) + 0.5 * taught


def new_optimizer(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)


def training_step(
    peer: Peer, loss: Callable, batch: tuple[Tensor, ...], compiled: bool = False, teacher: Teacher | None = None
) -> Callable[[], Tensor]:
    (pixels, labels, decisions), model = batch, peer.model.train()
    optimizer = new_optimizer(model)
    two_heads = torch.compile(peer.two_heads) if compiled else peer.two_heads

    def step() -> Tensor:
        optimizer.zero_grad()
        asked = decisions if teacher is None else teacher(pixels)
        with autocast(pixels.device):
            class_logits, distillation_logits = two_heads(pixels)
        value = loss(class_logits, distillation_logits, labels, asked)
        value.backward()
        optimizer.step()
        return value

    return step


# The student alone


def compare_students(args: argparse.Namespace, device: torch.device) -> list[dict]:
    rows = []
    print_header(FACTS)
    for size in args.sizes:
        for batch_size in args.batch_sizes:
            for drop_path_rate in args.drop_paths:
                found = compare_student(size, batch_size, drop_path_rate, args, device)
                for row in found:
                    print_row(row, FACTS, device)
                rows += found
    return rows


def compare_student(
    size: str, batch_size: int, drop_path_rate: float, args: argparse.Namespace, device: torch.device
) -> list[dict]:
    batch = make_batch(size, batch_size, device)

    def new_step(name: str, peer: Peer, compiled: bool) -> Callable[[], Tensor]:
        return training_step(peer, our_loss if name == "hf_deit" else their_loss, batch, compiled)

    facts = {"size": size, "batch": batch_size, "drop path": drop_path_rate}
    return compare(facts, new_step, device, args.rounds, args.compile, drop_path_rate)


# With a teacher in each step


def compare_teachers(args: argparse.Namespace, device: torch.device) -> list[dict]:
    return [compare_teacher(size, args.batch_sizes[-1], args, device) for size in args.sizes]


def compare_teacher(size: str, batch_size: int, args: argparse.Namespace, device: torch.device) -> dict:
    network, teacher = new_teacher(args.teacher, model_fields(size)["num_labels"], device)
    batch, peers = make_batch(size, batch_size, device), build_peers(size, DROP_PATH, device)
    task = TokenDistillationTask(
        peers["timm"].model,
        network,
        criterion=SoftTargetCrossEntropy(),
        distill_type="hard",
        task_loss_weight=0.5,
        device=device,
        verbose=False,
    ).train()
    optimizer = new_optimizer(peers["timm"].model)

    def timms() -> None:
        optimizer.zero_grad()
        with autocast(device):
            value = task(batch[0], batch[1])["loss"]
        value.backward()
        optimizer.step()

    @torch.no_grad()
    def network_alone() -> None:
        with autocast(device):
            network(batch[0])

    steps = {
        "the teacher alone": lambda: teacher(batch[0]),
        "its network alone, as timm has it": network_alone,
        "hf_deit, no teacher": training_step(peers["hf_deit"], our_loss, batch),
        "hf_deit, teacher asked": training_step(peers["hf_deit"], our_loss, batch, teacher=teacher),
        "timm's task": timms,
    }
    times = take_turns(steps, args.rounds, device)
    print(f"{size}, batch {batch_size}, teacher {args.teacher}", flush=True)
    for name, seconds in times.items():
        share = median(seconds) / median(times["hf_deit, teacher asked"])
        print(f"- {name}: {shown(seconds, batch_size)} images/s, {share:.3f} x the step that asks", flush=True)
    release()
    return {"size": size, "batch": batch_size, "teacher": args.teacher, "seconds": times}


def new_teacher(name: str, num_labels: int, device: torch.device) -> tuple[torch.nn.Module, Teacher]:
    """timm's network with random weights, as it is and as our teacher."""
    network = timm.create_model(name, num_classes=num_labels).eval()
    with tempfile.TemporaryDirectory() as folder:
        save_file(network.state_dict(), Path(folder, "weights.safetensors"))
        spec = f"timm:{name}?checkpoint={folder}/weights.safetensors"
        teacher = load_teacher(spec, id2label=None, mean=IMAGENET_MEAN, std=IMAGENET_STD, device=device)
    return network.to(device), teacher


# The trainer


class EncodedNoise:
    """Small PNGs, so that decoding is neither nothing nor the bottleneck."""

    def __init__(self, num_images: int, side: int, num_labels: int):
        rng, self.rows = np.random.default_rng(0), []
        for number in range(num_images):
            file = BytesIO()
            Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(file, "PNG")
            self.rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": number % num_labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


class StepEnds(TrainerCallback):
    """When each step ended: from one to the next is a step with its loading and everything around it."""

    def __init__(self, device: torch.device):
        self.device, self.times = device, []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        synchronize(self.device)
        self.times.append(time.perf_counter())


@dataclass(frozen=True)
class ShortRun:
    """A few steps of distillation, to be done by the trainer or by hand. Both return the seconds of each step."""

    config: DeiTConfig
    views: TrainViews
    batch_size: int
    steps: int
    num_workers: int
    device: torch.device

    def by_trainer(self, teacher: Teacher | None, output_dir: Path, **settings) -> list[float]:
        torch.manual_seed(0)
        ends = StepEnds(self.device)
        args = DistillationConfig(
            output_dir=str(output_dir),
            per_device_train_batch_size=self.batch_size,
            learning_rate=1e-4,
            max_steps=self.steps,
            warmup_steps=1,
            dataloader_num_workers=self.num_workers,
            logging_steps=50,
            eval_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            bf16=self.device.type == "cuda",
            use_cpu=self.device.type == "cpu",
            optim="adamw_torch_fused",
            **settings,
        )
        DistillationTrainer(
            DeiTForImageClassificationWithTeacher(self.config),
            args,
            teacher,
            train_dataset=self.views,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            callbacks=[ends],
        ).train()
        return between(ends.times)

    def by_hand(self, teacher: Teacher | None) -> list[float]:
        """Loader, mixing, student, loss, gradient norm, AdamW, schedule: what the trainer does, and no more."""
        torch.manual_seed(0)
        model = DeiTForImageClassificationWithTeacher(self.config).to(self.device).train()
        matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (1 + math.cos(math.pi * n / self.steps)) / 2)
        mixing = Mixing(self.config.num_labels, IMAGENET_MEAN, IMAGENET_STD)
        loader = DataLoader(
            self.views,
            self.batch_size,
            sampler=RepeatedAugmentationSampler(len(self.views), 3, 0, self.batch_size),
            drop_last=True,
            collate_fn=collate_views,
            num_workers=self.num_workers,
        )
        ends = []
        for batch in islice(loader, self.steps):
            pixels, labels = batch["pixel_values"].to(self.device), batch["labels"].to(self.device)
            pixels, labels = mixing(pixels, labels, batch["view_seeds"])
            asked = None if teacher is None else teacher(pixels)
            with autocast(self.device):
                outputs = model(pixel_values=pixels)
            heads = outputs.cls_logits, outputs.distillation_logits
            kind = "label" if asked is None else "hard"
            distillation_loss(*heads, labels, asked, distillation_type=kind)["loss"].backward()
            norms = torch._foreach_norm([parameter.grad for parameter in model.parameters()])
            assert torch.stack(norms).norm().isfinite()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            synchronize(self.device)
            ends.append(time.perf_counter())
        return between(ends)


def between(ends: list[float]) -> list[float]:
    """Seconds from one end to the next, without the first two, which warm up."""
    return np.diff(ends)[2:].tolist()


def compare_trainers(args: argparse.Namespace, device: torch.device) -> list[dict]:
    return [compare_trainer(size, args.batch_sizes[-1], args, device) for size in args.sizes]


def compare_trainer(size: str, batch_size: int, args: argparse.Namespace, device: torch.device) -> dict:
    steps, fields = args.rounds + 3, model_fields(size)
    teacher = new_teacher(args.teacher, fields["num_labels"], device)[1]
    transform = build_train_transform(fields["image_size"], auto_augment=None, color_jitter=0, crop="random_resized")
    run = ShortRun(
        DeiTConfig(**fields, drop_path_rate=DROP_PATH),
        TrainViews(EncodedNoise(batch_size * steps, 32, fields["num_labels"]), transform),
        batch_size,
        steps,
        num_workers=len(os.sched_getaffinity(0)) if device.type == "cuda" else 0,
        device=device,
    )
    with tempfile.TemporaryDirectory() as folder:
        output_dir, record = Path(folder, "run"), str(Path(folder, "record"))
        run.by_trainer(teacher, output_dir, teacher_record=record)
        contestants = {
            "by hand, no teacher": partial(run.by_hand, None),
            "trainer, no teacher": partial(run.by_trainer, None, output_dir, distillation_type="label"),
            "trainer, replayed": partial(run.by_trainer, None, output_dir, teacher_replay=record),
            "by hand, teacher asked": partial(run.by_hand, teacher),
            "trainer, teacher asked": partial(run.by_trainer, teacher, output_dir),
        }
        times = {name: [] for name in contestants}
        for _ in range(3):
            for name, contestant in contestants.items():
                times[name] += contestant()
    print(f"{size}, batch {batch_size}, teacher {args.teacher}", flush=True)
    for name, seconds in times.items():
        print(f"- {name}: {shown(seconds, batch_size)} images/s", flush=True)
    for one, other in (
        ("trainer, no teacher", "by hand, no teacher"),
        ("trainer, teacher asked", "by hand, teacher asked"),
        ("trainer, replayed", "trainer, no teacher"),
        ("trainer, teacher asked", "trainer, replayed"),
    ):
        print(f"- {one} = {median(times[one]) / median(times[other]):.3f} x {other}", flush=True)
    release()
    return {"size": size, "batch": batch_size, "teacher": args.teacher, "seconds": times}


# Memory


# A library, and of how many layers one is computed again in the backward pass (0: of none).
MEMORY_KINDS = [*((library, 0) for library in LIBRARIES), ("hf_deit", 3), ("hf_deit", 2)]
MEMORY_KINDS += [(library, 1) for library in LIBRARIES]


def compare_memory(args: argparse.Namespace, device: torch.device) -> list[dict]:
    batch_size, rows = args.batch_sizes[-1], []
    print(
        f"| size | library | checkpointed layers | MB at {batch_size} images | MB an image | largest batch in "
        f"{args.memory_gb} GB | images/s | times its speed without |",
        "|" + "---|" * 8,
        sep="\n",
    )
    for size in args.sizes:
        batch = make_batch(size, batch_size, device)
        steps = {kind: memory_step(size, *kind, batch) for kind in MEMORY_KINDS}
        times = take_turns(steps, args.rounds, device)
        del steps
        release()
        for library, every in MEMORY_KINDS:
            half, peak = (peak_of(size, library, every, images, device) for images in (batch_size // 2, batch_size))
            an_image = (peak - half) / (batch_size - batch_size // 2)
            seconds, without = times[library, every], times[library, 0]
            row = {
                "size": size,
                "library": library,
                "checkpointed": {0: "none", 1: "all"}.get(every, f"one in {every}"),
                "megabytes": peak / 1e6,
                "megabytes an image": an_image / 1e6,
                # The two peaks make a line: what a batch of nothing takes, and an image.
                "largest batch": int((args.memory_gb * 1e9 - peak) / an_image) + batch_size,
                "images/s": batch_size / median(seconds),
                "speed": median(one / other for one, other in zip(without, seconds, strict=True)),
            }
            rows.append(row | {"batch": batch_size, "seconds": seconds})
            cells = (f"{cell:.2f}" if isinstance(cell, float) else f"{cell}" for cell in row.values())
            print(f"| {' | '.join(cells)} |", flush=True)
    return rows


def memory_step(size: str, library: str, every: int, batch: tuple[Tensor, ...]) -> Callable[[], Tensor]:
    """A training step; its layers are checkpointed as `every` says."""
    peer = build_peers(size, 0.0, batch[0].device).pop(library)
    if every and library == "timm":
        peer.model.set_grad_checkpointing()
    elif every:
        peer.model.activation_checkpointing_enable(every_n_layers=every)
    return training_step(peer, our_loss if library == "hf_deit" else their_loss, batch)


def peak_of(size: str, library: str, every: int, batch_size: int, device: torch.device) -> float:
    """Bytes of the model, its gradients, the optimizer's state and what a step needs besides, at their highest.

    Above what was taken before there was a model. On a CPU it takes a process of its own to know, one whose allocator
    gives back at once what is freed.
    """
    if device.type == "cuda":
        return peak_here(size, library, every, batch_size, device)
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"  # glibc's; read by the new process
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak_here, size, library, every, batch_size, device).result()


def peak_here(size: str, library: str, every: int, batch_size: int, device: torch.device) -> float:
    on_cpu, batch = device.type == "cpu", make_batch(size, batch_size, device)
    before = restart_resident_peak() if on_cpu else torch.cuda.memory_allocated(device)
    step = memory_step(size, library, every, batch)
    for _ in range(2):
        step()
    if on_cpu:
        restart_resident_peak()
    else:
        torch.cuda.reset_peak_memory_stats(device)
    step()
    return (resident_memory("VmHWM") if on_cpu else torch.cuda.max_memory_allocated(device)) - before


PARTS = {
    "student": compare_students,
    "teacher": compare_teachers,
    "trainer": compare_trainers,
    "memory": compare_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, help="default: tiny small cpu; on a GPU: base")
    parser.add_argument(
        "--batch_sizes", nargs="+", type=int, help="default: 1 8 32; on a GPU: 256. Three parts take the last only"
    )
    parser.add_argument("--drop_paths", nargs="+", type=float, default=[0.0, DROP_PATH], help="of the part 'student'")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--teacher", help="a network of timm's; default: regnety_040; on a GPU: regnety_160")
    parser.add_argument("--memory_gb", type=float, default=16, help="for the largest batch; the paper's V100 has 16")
    parser.add_argument("--compile", action="store_true", help="compiled networks too, and the best mode of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    device = torch.device(args.device)
    on_gpu = device.type == "cuda"
    args.sizes = args.sizes or (["base"] if on_gpu else ["tiny", "small", "cpu"])
    args.batch_sizes = args.batch_sizes or ([256] if on_gpu else [1, 8, 32])
    args.teacher = args.teacher or ("regnety_160" if on_gpu else "regnety_040")
    args.compile |= on_gpu
    if "memory" in args.parts and args.batch_sizes[-1] < 2:
        parser.error("the part 'memory' compares a batch with half of it: let the last of --batch_sizes be 2 or more")
    facts = describe_machine(args.device)
    print(facts, flush=True)
    results = {"machine": facts, "arguments": {name: str(value) for name, value in vars(args).items()}}
    for part in args.parts:
        print(f"\n# {part}", flush=True)
        results[part] = PARTS[part](args, device)
        if args.json:  # what is measured stays, if a later part fails
            args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
