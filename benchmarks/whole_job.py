"""A whole distillation beside timm's and a Trainer's: `python benchmarks/whole_job.py --dataset my_data/cifar10`.

The student of the small scales (96 wide, 4 layers, patches of 8 of 32 pixels) learns from the same images, for as many
epochs, in the same batches, with the same crop, flip, smoothing, optimizer and schedule, and is evaluated once on the
same images:

- hf_deit: `hf-deit distill`, as a user starts it; the report, the card and the saved model are its own;
- timm: its token distillation task in the loop of its train.py, with its loader, optimizer, schedule and validation;
- stock: Transformers' DeiT and Trainer with cross-entropy alone, as its example for image classification is written:
  what training costs without a teacher.

Each job is a process of its own, from its first import to its end, on as many cores as `--threads` says. The teacher,
a small convnet, is trained before (or is there: `--teacher`). Jobs of a seed follow each other, each seed in another
order; ratios are paired by seed. Peak memory is that of a job's largest process. The rivals read decoded arrays, as
torchvision's CIFAR10 has them; hf_deit decodes its files. `--images 512 --epochs 1 --teacher_epochs 1 --seeds 0` is a
try of a minute.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean, median


ROOT = Path(__file__).resolve().parents[1]
JOBS = ("hf_deit", "timm", "stock")
SHAPE = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3}
IMAGE_SIZE, PATCH_SIZE, DROP_PATH = 32, 8, 0.1
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LEARNING_RATE, MIN_LR, WARMUP_LR, WEIGHT_DECAY, SMOOTHING = 2e-3, 1e-5, 1e-6, 0.05, 0.1
# Of hf_deit, beside what its recipes say: the scale `starved`.
KEYS = {
    **{"image_size": IMAGE_SIZE, "crop_ratio": 1.0},
    **{"auto_augment": "none", "color_jitter": 0, "random_crop": "padded", "mix_prob": 0, "random_erasing_prob": 0},
    **{"num_repeats": 1, "learning_rate": LEARNING_RATE, "min_lr": MIN_LR, "eval_strategy": "no"},
    **{"save_strategy": "no", "disable_tqdm": True, "report_to": "none"},
}
TEACHER = ROOT / "recipes" / "starved" / "convnet_teacher.yaml"


# What the jobs have in common: imports are inside, so that no job pays for another's


def prepare(args: argparse.Namespace, folder: Path) -> None:
    """The images, encoded for hf_deit and as arrays for the others."""
    import numpy as np
    from datasets import ClassLabel, Image, load_dataset

    files = {split: str(args.dataset / f"{split}.parquet") for split in ("train", "test")}
    if missing := [file for file in files.values() if not Path(file).exists()]:
        raise SystemExit(f"{missing[0]} is not there: --dataset takes a folder with train.parquet and test.parquet")
    (folder / "images").mkdir()
    for split, limit in (("train", args.images), ("test", args.eval_images)):
        rows = load_dataset("parquet", data_files=files[split], split="train", cache_dir=str(folder / "cache"))
        rows = rows.shuffle(seed=0).select(range(min(limit, len(rows))))
        image = next(name for name, feature in rows.features.items() if isinstance(feature, Image))
        label = next(name for name, feature in rows.features.items() if isinstance(feature, ClassLabel))
        rows = rows.select_columns([image, label]).rename_columns({image: "image", label: "label"})
        rows.to_parquet(str(folder / "images" / f"{split}.parquet"))
        np.save(folder / f"{split}_pixels.npy", np.stack([np.asarray(row.convert("RGB")) for row in rows["image"]]))
        np.save(folder / f"{split}_labels.npy", np.asarray(rows["label"]))


def command(settings: dict, *words: object, **keys: object) -> list[str]:
    flags = [str(part) for name, value in keys.items() for part in (f"--{name}", value)]
    return [
        *map(str, words),
        *flags,
        "--dataset_name",
        f"{settings['folder']}/images",
        "--seed",
        str(settings["seed"]),
    ]


def arrays(settings: dict, split: str):
    import numpy as np

    return (np.load(f"{settings['folder']}/{split}_{part}.npy") for part in ("pixels", "labels"))


class Arrays:
    """Decoded images as torchvision's CIFAR10 gives them: a PIL image through `transform`, and its label."""

    def __init__(self, settings: dict, split: str, transform=None):
        self.pixels, self.labels = arrays(settings, split)
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int):
        from PIL import Image

        image = Image.fromarray(self.pixels[index])
        return (image if self.transform is None else self.transform(image)), int(self.labels[index])


# The jobs: settings -> accuracy in [0, 1], and the seconds of the training alone


def run_teacher(settings: dict) -> dict:
    """Train the convnet that teaches all."""
    from hf_deit.commands.teacher import main

    epochs = settings["teacher_epochs"]
    keys = KEYS | {"num_train_epochs": epochs, "warmup_epochs": min(5, epochs // 2)}
    keys |= {"per_device_train_batch_size": settings["batch_size"], "dataloader_num_workers": settings["workers"]}
    found = main(command(settings, TEACHER, **keys, output_dir=settings["output"]))
    return {"accuracy": found["eval_top1"], "train_seconds": found["train_runtime"]}


def run_hf_deit(settings: dict) -> dict:
    from hf_deit.commands.distill import main

    keys = KEYS | SHAPE | {"patch_size": PATCH_SIZE, "drop_path_rate": DROP_PATH}
    keys |= {"num_train_epochs": settings["epochs"], "warmup_epochs": settings["warmup_epochs"]}
    keys |= {"per_device_train_batch_size": settings["batch_size"], "dataloader_num_workers": settings["workers"]}
    keys |= {"teacher": settings["teacher"], "output_dir": settings["output"]}
    found = main(command(settings, ROOT / "recipes" / "imagenet" / "deit_tiny_distilled.yaml", **keys))
    return {"accuracy": found["eval_top1"], "train_seconds": found["train_runtime"]}


def run_timm(settings: dict) -> dict:
    """timm's train.py: `--kd-distill-type hard --task-loss-weight 0.5 --sched-on-updates --opt-kwargs fused=True`."""
    import timm
    import torch
    from timm.data import create_loader
    from timm.loss import LabelSmoothingCrossEntropy
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.task import TokenDistillationTask
    from timm.utils import AverageMeter, accuracy, random_seed
    from torchvision.transforms import RandomCrop

    random_seed(settings["seed"])
    device, numbers = torch.device("cpu"), {"mean": MEAN, "std": STD}
    model = timm.create_model(
        "deit_tiny_distilled_patch16_224",
        img_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        embed_dim=SHAPE["hidden_size"],
        depth=SHAPE["num_hidden_layers"],
        num_heads=SHAPE["num_attention_heads"],
        num_classes=settings["classes"],
        drop_path_rate=DROP_PATH,
        pretrained_cfg_overlay=numbers,
    )
    common = {
        "input_size": (3, IMAGE_SIZE, IMAGE_SIZE),
        "batch_size": settings["batch_size"],
        "num_workers": settings["workers"],
        "device": device,
        **numbers,
    }
    train_loader = create_loader(
        Arrays(settings, "train"),
        is_training=True,
        color_jitter=0,
        interpolation="bicubic",
        **common,
    )
    # As DeiT's main.py does for 32 pixels
    train_loader.dataset.transform.transforms[0] = RandomCrop(IMAGE_SIZE, padding=4)
    eval_loader = create_loader(Arrays(settings, "test"), crop_pct=1.0, interpolation="bicubic", **common)
    task = TokenDistillationTask(
        model,
        teacher_in_timm(settings["teacher"], settings["classes"]),
        criterion=LabelSmoothingCrossEntropy(SMOOTHING),
        distill_type="hard",
        task_loss_weight=0.5,
        device=device,
        verbose=False,
    )
    optimizer = create_optimizer_v2(model, opt="adamw", lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=True)
    updates = len(train_loader)
    schedule, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=settings["epochs"],
        warmup_epochs=settings["warmup_epochs"],
        warmup_lr=WARMUP_LR,
        min_lr=MIN_LR,
        step_on_epochs=False,
        updates_per_epoch=updates,
    )
    begin, done = time.perf_counter(), 0
    for epoch in range(settings["epochs"]):
        losses = AverageMeter()
        task.train()
        optimizer.zero_grad()
        for pixels, labels in train_loader:
            loss = task(pixels, labels)["loss"]
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(labels))
            done += 1
            optimizer.zero_grad()
            schedule.step_update(num_updates=done, metric=losses.avg)
        schedule.step(epoch + 1)
    train_seconds = time.perf_counter() - begin
    model.eval()
    top1 = AverageMeter()
    with torch.inference_mode():
        for pixels, labels in eval_loader:
            top1.update(accuracy(model(pixels), labels)[0].item(), len(labels))
    torch.save(model.state_dict(), settings["output"])
    return {"accuracy": top1.avg / 100, "train_seconds": train_seconds}


def teacher_in_timm(folder: str | Path, classes: int):
    """The convnet that `hf-deit teacher` saved as timm's own network, for timm's task."""
    import timm
    from safetensors.torch import load_file

    described = json.loads(Path(folder, "config.json").read_text("utf-8"))
    model = timm.create_model(described["architecture"], num_classes=classes, **(described.get("model_args") or {}))
    weights = load_file(Path(folder, "model.safetensors"))
    model.load_state_dict({name.removeprefix("timm_model."): tensor for name, tensor in weights.items()})
    model.pretrained_cfg.update({name: tuple(described["pretrained_cfg"][name]) for name in ("mean", "std")})
    return model


def run_stock(settings: dict) -> dict:
    import torch
    from torchvision.transforms import Compose, Normalize, RandomCrop, RandomHorizontalFlip, ToTensor
    from transformers import DeiTConfig, DeiTForImageClassification, Trainer, TrainingArguments, set_seed

    set_seed(settings["seed"])
    config = DeiTConfig(
        **SHAPE,
        intermediate_size=4 * SHAPE["hidden_size"],
        image_size=IMAGE_SIZE,
        patch_size=PATCH_SIZE,
        num_labels=settings["classes"],
    )
    end = [ToTensor(), Normalize(MEAN, STD)]
    train = Arrays(settings, "train", Compose([RandomCrop(IMAGE_SIZE, padding=4), RandomHorizontalFlip(), *end]))

    def collate(rows: list) -> dict:
        return {
            "pixel_values": torch.stack([row[0] for row in rows]),
            "labels": torch.tensor([row[1] for row in rows]),
        }

    warmup = settings["warmup_epochs"] * (len(train) // settings["batch_size"])
    trainer = Trainer(
        DeiTForImageClassification(config),
        TrainingArguments(
            output_dir=settings["output"],
            num_train_epochs=settings["epochs"],
            per_device_train_batch_size=settings["batch_size"],
            per_device_eval_batch_size=settings["batch_size"],
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            label_smoothing_factor=SMOOTHING,
            lr_scheduler_type="cosine",
            warmup_steps=warmup,
            max_grad_norm=0,
            optim="adamw_torch_fused",
            dataloader_num_workers=settings["workers"],
            dataloader_drop_last=True,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            seed=settings["seed"],
        ),
        data_collator=collate,
        train_dataset=train,
        eval_dataset=Arrays(settings, "test", Compose(end)),
        compute_metrics=lambda found: {"accuracy": (found.predictions.argmax(-1) == found.label_ids).mean().item()},
    )
    trained = trainer.train().metrics["train_runtime"]
    trainer.args.dataloader_drop_last = False  # or the last images would not be evaluated
    found = trainer.evaluate()["eval_accuracy"]
    trainer.save_model()
    return {"accuracy": found, "train_seconds": trained}


RUNS = {"teacher": run_teacher, "hf_deit": run_hf_deit, "timm": run_timm, "stock": run_stock}


# One process each


def start(job: str, settings: dict, threads: int) -> dict:
    """Run a job in a process of its own: wall and CPU seconds and peak megabytes beside what it found."""
    place = Path(settings["folder"], f"{job}-{settings['seed']}-{threads}")
    settings = {**settings, "output": str(place), "result": f"{place}.json"}
    cores = sorted(os.sched_getaffinity(0))[:threads]
    limits = {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    limits["HF_DATASETS_CACHE"] = f"{settings['folder']}/cache"  # the teacher's run has filled it, or the first seed's
    words = [sys.executable, __file__, "--job", job, "--settings", json.dumps(settings)]
    with open(f"{place}.log", "w+") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(
            words, stdout=log, stderr=log, env=os.environ | limits, preexec_fn=lambda: os.sched_setaffinity(0, cores)
        )
        _, status, used = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begin
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{job}, seed {settings['seed']}, ended with {process.returncode}:\n{log.read()[-3000:]}")
    found = json.loads(Path(settings["result"]).read_text("utf-8"))
    measured = {"wall": wall, "cpu": used.ru_utime + used.ru_stime, "megabytes": used.ru_maxrss * 1024 / 1e6}
    return {"job": job, "seed": settings["seed"], "threads": threads, **measured, **found}


# The table


def interval(values: list[float]) -> str:
    """The mean, with its 95 % interval by Student's t where there are several."""
    from scipy import stats

    if len(values) < 2:
        return f"{mean(values):+.2f}"
    around = mean(values)
    deviation = math.sqrt(sum((value - around) ** 2 for value in values) / (len(values) - 1))
    return f"{around:+.2f} ± {stats.t.ppf(0.975, len(values) - 1) * deviation / math.sqrt(len(values)):.2f}"


def table(rows: list[dict], jobs: list[str]) -> str:
    """Medians over the seeds; the ratio of CPU seconds and the difference in accuracy, of hf_deit to the job."""
    lines = [
        "| threads | job | wall s | CPU s | of it training, wall s | peak MB | top-1 % | hf_deit's CPU s / these | "
        "hf_deit's top-1 - this |",
        "|---|---|--:|--:|--:|--:|---|---|---|",
    ]
    for threads in dict.fromkeys(row["threads"] for row in rows):
        found = {job: [row for row in rows if (row["job"], row["threads"]) == (job, threads)] for job in jobs}
        for job, theirs in found.items():
            cells = [threads, job]
            cells += [f"{median(row[name] for row in theirs):,.1f}" for name in ("wall", "cpu", "train_seconds")]
            cells += [f"{max(row['megabytes'] for row in theirs):,.0f}"]
            cells += [", ".join(f"{100 * row['accuracy']:.1f}" for row in theirs)]
            if job != "hf_deit" and "hf_deit" in found:
                pairs = list(zip(found["hf_deit"], theirs, strict=True))
                ratios = [ours["cpu"] / other["cpu"] for ours, other in pairs]
                cells += [f"{median(ratios):.2f} ({min(ratios):.2f} - {max(ratios):.2f})"]
                cells += [interval([100 * (ours["accuracy"] - other["accuracy"]) for ours, other in pairs])]
            else:
                cells += ["", ""]
            lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main() -> None:
    if sys.argv[1:2] == ["--job"]:
        job, settings = sys.argv[2], json.loads(sys.argv[4])
        Path(settings["result"]).write_text(json.dumps(RUNS[job](settings)))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", type=Path, required=True, help="folder with train.parquet and test.parquet")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--images", type=int, default=5000, help="to train on; 5000")
    parser.add_argument("--eval_images", type=int, default=10_000)
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--warmup_epochs", type=int, help="default: an eighth of the epochs")
    parser.add_argument("--batch_size", type=int, default=128)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", nargs="+", type=int, default=[1], help="cores of a job; several are run in turns")
    parser.add_argument("--workers", type=int, default=0, help="processes that load, of each job")
    parser.add_argument(
        "--teacher", type=Path, help="its folder, as hf-deit teacher writes it; default: trained first"
    )
    parser.add_argument("--teacher_epochs", type=int, default=100)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    args = parser.parse_args()
    cores = len(os.sched_getaffinity(0))
    if max(args.threads) > cores or min(args.threads) < 1:
        parser.error(f"--threads is {args.threads}; this process may use {cores} cores")
    if not args.batch_size <= args.images or args.epochs < 1:
        parser.error(f"an epoch of {args.images} images has no batch of {args.batch_size}, or there is no epoch")
    import numpy as np

    from hf_deit.paper.machine import describe_machine

    arguments = {name: str(value) for name, value in vars(args).items()}
    results = {"machine": describe_machine("cpu"), "arguments": arguments, "teacher": None, "jobs": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(args, folder)
        settings = {
            "folder": name,
            "classes": int(max(np.load(folder / f"{split}_labels.npy").max() for split in ("train", "test"))) + 1,
            "workers": args.workers,
            "batch_size": args.batch_size,
            "epochs": args.epochs,
            "warmup_epochs": args.epochs // 8 if args.warmup_epochs is None else args.warmup_epochs,
            "teacher_epochs": args.teacher_epochs,
            "teacher": str(args.teacher or folder / f"teacher-0-{max(args.threads)}"),
        }
        if args.teacher is None:
            results["teacher"] = start("teacher", {**settings, "seed": 0}, max(args.threads))
            print(f"the teacher: top-1 {results['teacher']['accuracy']:.1%}\n", flush=True)
        for place, seed in enumerate(args.seeds):
            for threads in args.threads:
                turn = place % len(args.jobs)
                for job in args.jobs[turn:] + args.jobs[:turn]:
                    row = start(job, {**settings, "seed": seed}, threads)
                    results["jobs"].append(row)
                    shown = {key: round(value, 4) if isinstance(value, float) else value for key, value in row.items()}
                    print(shown, flush=True)
                    if args.json:
                        args.json.write_text(json.dumps(results, indent=1))
    print(f"\n{table(results['jobs'], args.jobs)}")


if __name__ == "__main__":
    main()
