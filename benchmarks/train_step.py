"""A training step beside timm's and stock Transformers': `python benchmarks/train_step.py [--device cuda] [...]`.

Four tables, each of interleaved rounds; medians, slowest and fastest round, ratios:
- student: forward, eq. 3 with given decisions, backward, AdamW; the three libraries' networks with the same weights;
- teacher: the same with a convnet that is asked in each step, beside timm's token distillation task;
- trainer: a step of DistillationTrainer without a teacher, with it, and with its recorded answers, beside a loop
  written by hand that does the same work;
- memory: the peak of a training step above what was taken before there was a model, each in a process of its own.

Everything but the trainer sees the same ready batch. On a GPU the arithmetic is bfloat16 under autocast, and the table
says what share of the device's peak the matrix products are (MFU).
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np
import timm
import torch
import torch.nn.functional as F
from peers import DEFAULTS, SIZES, Peer, build_peers, release, shown, synchronize, take_turns
from timm.loss import SoftTargetCrossEntropy
from timm.task import TokenDistillationTask
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from transformers import TrainerCallback

from hf_deit import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    DistillationConfig,
    DistillationTrainer,
    Mixing,
    RepeatedAugmentationSampler,
    TrainViews,
    build_train_transform,
    collate_views,
    describe_machine,
    distillation_loss,
    load_teacher,
)


DROP_PATH = 0.1  # Table 9
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L4": 121e12}  # dense bfloat16, NVIDIA's data sheets


def make_batch(size: str, batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pixels, mixed labels and the decisions of a teacher."""
    fields, generator = DEFAULTS | SIZES[size], torch.Generator().manual_seed(0)
    pixels = torch.randn(batch_size, 3, fields["image_size"], fields["image_size"], generator=generator)
    labels = torch.rand(batch_size, fields["num_labels"], generator=generator).softmax(dim=1)
    decisions = torch.randint(fields["num_labels"], (batch_size,), generator=generator)
    return tuple(tensor.to(device) for tensor in (pixels, labels, decisions))


def autocast(device: torch.device):
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def our_loss(class_logits: Tensor, distillation_logits: Tensor, labels: Tensor, decisions: Tensor) -> Tensor:
    heads = class_logits, distillation_logits
    return distillation_loss(*heads, labels, decisions, distillation_type="hard", label_smoothing=0.0)["loss"]


def their_loss(class_logits: Tensor, distillation_logits: Tensor, labels: Tensor, decisions: Tensor) -> Tensor:
    """Equation 3, as one would write it beside timm or stock."""
    taught = F.cross_entropy(distillation_logits.float(), decisions)
    return 0.5 * F.cross_entropy(class_logits.float(), labels) + 0.5 * taught


def training_step(peer: Peer, loss: Callable, batch: tuple[Tensor, ...], compiled: bool) -> Callable[[], Tensor]:
    device, model = batch[0].device, peer.model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)
    two_heads = torch.compile(peer.two_heads) if compiled else peer.two_heads

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast(device):
            class_logits, distillation_logits = two_heads(batch[0])
        value = loss(class_logits, distillation_logits, *batch[1:])
        value.backward()
        optimizer.step()
        return value

    return step


# The student alone


def compare_students(args, device: torch.device) -> list[dict]:
    rows = []
    for size in args.sizes:
        for batch_size in args.batch_sizes:
            for rate in (0.0, DROP_PATH):
                results = {}
                batch = make_batch(size, batch_size, device)
                for compiled in (False, True)[: 1 + args.compile]:
                    peers = build_peers(size, rate, device)
                    steps = {
                        name: training_step(peer, our_loss if name == "hf_deit" else their_loss, batch, compiled)
                        for name, peer in peers.items()
                    }
                    if not rate:
                        losses = {name: float(step().detach()) for name, step in steps.items()}
                        worst = max(abs(value - losses["hf_deit"]) for value in losses.values())
                        assert worst < (0.05 if device.type == "cuda" else 1e-4), losses
                    results["compiled" if compiled else "eager"] = take_turns(steps, args.rounds, device)
                    flops = flops_of(peers["timm"], batch, device)
                    del peers, steps
                    release()
                rows += speed_rows(results, {"size": size, "batch": batch_size, "drop path": rate}, batch_size, flops)
                print_last(rows, len(results) + (len(results) > 1), device)
    return rows


def flops_of(peer: Peer, batch: tuple[Tensor, ...], device: torch.device) -> int:
    """Of a forward and a backward pass of the network as the paper has it: of timm's, which leaves nothing out."""
    with FlopCounterMode(display=False) as counter, autocast(device):
        sum(logits.sum() for logits in peer.two_heads(batch[0])).backward()
    return counter.get_total_flops()


def speed_rows(results: dict[str, dict[str, list[float]]], facts: dict, batch_size: int, flops: int) -> list[dict]:
    """One row a mode, and one for the best mode of each where there are two."""
    if len(results) > 1:
        results = results | {
            "best of each": {
                name: min((times[name] for times in results.values()), key=median) for name in results["eager"]
            }
        }
    return [
        facts
        | {"mode": mode, "flops": flops, "images": batch_size, "seconds": times}
        | {
            f"against {name}": median(seconds) / median(times["hf_deit"])
            for name, seconds in times.items()
            if name != "hf_deit"
        }
        for mode, times in results.items()
    ]


def print_last(rows: list[dict], count: int, device: torch.device) -> None:
    for row in rows[-count:]:
        names = [name for name in ("hf_deit", "timm", "stock") if name in row["seconds"]]
        speeds = [f"{name} {shown(row['seconds'][name], row['images'])}" for name in names]
        ratios = [f"{row[f'against {name}']:.3f} x {name}" for name in names[1:]]
        line = [f"{row['size']} b{row['batch']} drop path {row['drop path']} {row['mode']}", *speeds, *ratios]
        peak = device.type == "cuda" and peak_flops(device)
        if peak:
            line.append(f"MFU {row['flops'] / median(row['seconds']['hf_deit']) / peak:.1%}")
        print(" | ".join(line), flush=True)


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)


# With a teacher in each step


def compare_teachers(args, device: torch.device) -> list[dict]:
    rows = []
    for size in args.sizes:
        fields, batch_size = DEFAULTS | SIZES[size], args.batch_sizes[-1]
        network = timm.create_model(args.teacher, num_classes=fields["num_labels"]).to(device).eval()
        teacher = load_teacher(network, id2label=None, mean=IMAGENET_MEAN, std=IMAGENET_STD)
        batch = make_batch(size, batch_size, device)
        peers = build_peers(size, DROP_PATH, device)
        alone = training_step(peers["hf_deit"], our_loss, batch, compiled=False)
        taught = training_step(
            peers["hf_deit"],
            lambda one, two, labels, decisions, batch=batch, teacher=teacher: our_loss(
                one, two, labels, teacher(batch[0])
            ),
            batch,
            compiled=False,
        )
        task = TokenDistillationTask(
            peers["timm"].model,
            network,
            criterion=SoftTargetCrossEntropy(),
            distill_type="hard",
            task_loss_weight=0.5,
            device=device,
            verbose=False,
        ).train()
        optimizer = torch.optim.AdamW(peers["timm"].model.parameters(), lr=1e-5, weight_decay=0.05, fused=True)

        def timms(task=task, optimizer=optimizer, batch=batch):
            optimizer.zero_grad()
            with autocast(device):
                value = task(batch[0], batch[1])["loss"]
            value.backward()
            optimizer.step()

        steps = {"hf_deit, no teacher": alone, "hf_deit, teacher asked": taught, "timm's task": timms}
        times = take_turns(steps, args.rounds, device)
        rows.append({"size": size, "batch": batch_size, "teacher": args.teacher, "seconds": times})
        print(f"{size} b{batch_size}, teacher {args.teacher}", flush=True)
        for name, seconds in times.items():
            share = median(seconds) / median(times["hf_deit, teacher asked"])
            print(f"  {name}: {shown(seconds, batch_size)} images/s, {share:.3f} x the step that asks", flush=True)
        del peers, steps, alone, taught, task, optimizer, timms
        release()
    return rows


# The trainer


class StepTimes(TrainerCallback):
    """Seconds from the end of one step to the end of the next: with the loader and everything around."""

    def __init__(self, device: torch.device):
        self.device, self.ends = device, []

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        self.ends.append(time.perf_counter())


class EncodedNoise:
    """Small PNGs, so that decoding is neither nothing nor the bottleneck."""

    def __init__(self, num_images: int, side: int, num_labels: int):
        from io import BytesIO

        from PIL import Image

        rng, self.rows = np.random.default_rng(0), []
        for number in range(num_images):
            file = BytesIO()
            Image.fromarray(rng.integers(0, 255, (side, side, 3), np.uint8)).save(file, "PNG")
            self.rows.append({"image": {"bytes": file.getvalue(), "path": None}, "label": number % num_labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict:
        return self.rows[index]


def compare_trainer(args, device: torch.device) -> list[dict]:
    rows = []
    for size in args.sizes:
        fields, batch_size = DEFAULTS | SIZES[size], args.batch_sizes[-1]
        steps = args.rounds + 3
        side, classes = fields["image_size"], fields["num_labels"]
        images = EncodedNoise(batch_size * steps, 32, classes)
        views = TrainViews(
            images, build_train_transform(side, auto_augment=None, color_jitter=0, crop="random_resized")
        )
        config = DeiTConfig(**fields, intermediate_size=4 * fields["hidden_size"], drop_path_rate=DROP_PATH)
        network = timm.create_model(args.teacher, num_classes=classes).to(device).eval()
        teacher = load_teacher(network, id2label=None, mean=IMAGENET_MEAN, std=IMAGENET_STD)

        def trainer_steps(folder, teacher, size_args=(config, views, batch_size, steps), **settings) -> list[float]:
            config, views, batch_size, steps = size_args
            torch.manual_seed(0)
            times = StepTimes(device)
            arguments = DistillationConfig(
                output_dir=str(folder / "run"),
                per_device_train_batch_size=batch_size,
                learning_rate=1e-4,
                max_steps=steps,
                warmup_steps=1,
                dataloader_num_workers=0,
                logging_steps=50,
                eval_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                bf16=device.type == "cuda",
                use_cpu=device.type == "cpu",
                optim="adamw_torch_fused",
                **settings,
            )
            trainer = DistillationTrainer(
                DeiTForImageClassificationWithTeacher(config),
                arguments,
                teacher,
                train_dataset=views,
                mean=IMAGENET_MEAN,
                std=IMAGENET_STD,
                callbacks=[times],
            )
            trainer.train()
            return np.diff(times.ends)[2:].tolist()

        def by_hand(teacher, size_args=(config, views, batch_size, steps)) -> list[float]:
            """Loader, mixing, student, loss, gradient norm, AdamW, schedule: what the trainer does, and no more."""
            config, views, batch_size, steps = size_args
            torch.manual_seed(0)
            model = DeiTForImageClassificationWithTeacher(config).to(device).train()
            matrices = [parameter for parameter in model.parameters() if parameter.dim() > 1]
            others = [parameter for parameter in model.parameters() if parameter.dim() <= 1]
            groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
            optimizer = torch.optim.AdamW(groups, lr=1e-4, fused=True)
            schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: (1 + math.cos(math.pi * n / steps)) / 2)
            mixing = Mixing(config.num_labels, IMAGENET_MEAN, IMAGENET_STD)
            sampler = RepeatedAugmentationSampler(len(views), 3, 0, batch_size)
            loader = DataLoader(views, batch_size, sampler=sampler, drop_last=True, collate_fn=collate_views)
            ends = []
            for batch in islice(loader, steps):
                pixels, labels = batch["pixel_values"].to(device), batch["labels"].to(device)
                pixels, labels = mixing(pixels, labels, batch["view_seeds"])
                asked = teacher(pixels) if teacher is not None else None
                with autocast(device):
                    outputs = model(pixel_values=pixels)
                heads = outputs.cls_logits, outputs.distillation_logits
                kind = "label" if asked is None else "hard"
                distillation_loss(*heads, labels, asked, distillation_type=kind)["loss"].backward()
                norms = torch._foreach_norm([parameter.grad for parameter in model.parameters()])
                assert torch.stack(norms).norm().isfinite()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                synchronize(device)
                ends.append(time.perf_counter())
            return np.diff(ends)[2:].tolist()

        with tempfile.TemporaryDirectory() as folder:
            folder = Path(folder)
            record = folder / "record"
            trainer_steps(folder, teacher, teacher_record=str(record))
            contestants = {
                "by hand, no teacher": lambda by_hand=by_hand: by_hand(None),
                "trainer, no teacher": lambda run=trainer_steps, folder=folder: run(
                    folder, None, distillation_type="label"
                ),
                "trainer, replayed": lambda run=trainer_steps, folder=folder, record=record: run(
                    folder, None, teacher_replay=str(record)
                ),
                "by hand, teacher asked": lambda by_hand=by_hand, teacher=teacher: by_hand(teacher),
                "trainer, teacher asked": lambda run=trainer_steps, folder=folder, teacher=teacher: run(
                    folder, teacher
                ),
            }
            times = {name: [] for name in contestants}
            for _ in range(3):
                for name, run in contestants.items():
                    times[name] += run()
        rows.append({"size": size, "batch": batch_size, "teacher": args.teacher, "seconds": times})
        print(f"{size} b{batch_size}, teacher {args.teacher}", flush=True)
        for name, seconds in times.items():
            print(f"  {name}: {shown(seconds, batch_size)} images/s", flush=True)
        for one, other in (
            ("trainer, no teacher", "by hand, no teacher"),
            ("trainer, teacher asked", "by hand, teacher asked"),
            ("trainer, replayed", "trainer, no teacher"),
            ("trainer, teacher asked", "trainer, replayed"),
        ):
            print(f"  {one} = {median(times[one]) / median(times[other]):.3f} x {other}", flush=True)
        release()
    return rows


# Memory


def peak_of(name: str, size: str, batch_size: int, device_name: str, answer) -> None:
    device = torch.device(device_name)
    batch = make_batch(size, batch_size, device)
    before = resident("VmRSS") if device.type == "cpu" else torch.cuda.memory_allocated(device)
    peer = build_peers(size, 0.0, device).pop(name)
    step = training_step(peer, our_loss if name == "hf_deit" else their_loss, batch, compiled=False)
    for _ in range(2):
        step()
    synchronize(device)
    if device.type == "cpu":
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        step()
        answer.put(resident("VmHWM") - before)
    else:
        torch.cuda.reset_peak_memory_stats(device)
        step()
        answer.put(torch.cuda.max_memory_allocated(device) - before)


def resident(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{key}:")).split()[1])


def compare_memory(args, device: torch.device) -> list[dict]:
    context, rows = get_context("spawn"), []
    for size in args.sizes:
        peaks = {}
        for name in ("hf_deit", "timm", "stock"):
            answer = context.Queue()
            process = context.Process(target=peak_of, args=(name, size, args.batch_sizes[-1], str(device), answer))
            process.start()
            peaks[name] = answer.get(timeout=600) / 1e6
            process.join()
        rows.append({"size": size, "batch": args.batch_sizes[-1], "megabytes": peaks})
        others = ", ".join(f"{name} {peak:.0f} MB ({peaks['hf_deit'] / peak:.2f})" for name, peak in peaks.items())
        print(f"{size} b{args.batch_sizes[-1]}: {others}", flush=True)
    return rows


PARTS = {
    "student": compare_students,
    "teacher": compare_teachers,
    "trainer": compare_trainer,
    "memory": compare_memory,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["tiny", "small", "cpu"])
    parser.add_argument("--batch_sizes", nargs="+", type=int, default=[1, 8, 32], help="the last is for all parts")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--teacher", default="regnety_040", help="a network of timm's, with random weights")
    parser.add_argument("--compile", action="store_true", help="compiled networks too, and the best mode of each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    device = torch.device(args.device)
    facts = describe_machine(args.device)
    print(facts, flush=True)
    results = {"machine": facts, "arguments": {name: str(value) for name, value in vars(args).items()}}
    for part in args.parts:
        print(f"\n# {part}", flush=True)
        results[part] = PARTS[part](args, device)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
