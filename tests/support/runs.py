"""Tiny runs: a student, a teacher and the trainer around them, on `tiny_images`.

A subprocess started by torchrun imports this file for its pieces.
"""

import pyarrow.parquet as parquet
import torch
from torch import nn

from hf_deit import (
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DistillationConfig,
    DistillationTrainer,
    EvalViews,
    TrainViews,
    build_eval_transform,
    build_image_processor,
    build_train_transform,
    load_teacher,
)
from hf_deit.data.streaming import StreamedImages


# A subprocess started by torchrun imports this file for its pieces.
NO_CHANCE = {"mixup_alpha": 0, "cutmix_alpha": 0, "random_erasing_prob": 0, "auto_augment": "none", "color_jitter": 0}


class ConvTeacher(nn.Module):
    """Five layers, batch norm among them: statistics that must not move."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.layers = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.head = nn.Linear(8, 3)
        for parameter in self.parameters():
            nn.init.normal_(parameter, generator=generator)

    def forward(self, pixels):
        return self.head(self.layers(pixels))


def student(two_heads=True, **fields):
    torch.manual_seed(0)
    kind = DeiTForImageClassificationWithTeacher if two_heads else DeiTForImageClassification
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16, "patch_size": 4}
    names = {0: "red", 1: "green", 2: "blue"}
    return kind(
        DeiTConfig(**(sizes | {"drop_path_rate": 0, "use_distillation_token": two_heads, "id2label": names} | fields))
    )


def trainer(
    images, output_dir, model=None, teacher="convnet", callbacks=None, kind=DistillationTrainer, options=None, **fields
):
    fields = {
        "output_dir": str(output_dir),
        "use_cpu": True,
        "num_train_epochs": 1,
        "warmup_epochs": 0,
        "learning_rate": 1e-3,
        "per_device_train_batch_size": 8,
        "per_device_eval_batch_size": 8,
        "dataloader_num_workers": 0,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    } | fields
    args = DistillationConfig(**fields)
    train_views = TrainViews(images["train"], build_train_transform(16, **args.transform_options()), args.view_seed)
    eval_views = EvalViews(images["eval"], build_eval_transform(16))
    processor = build_image_processor(eval_views.transform)
    if teacher == "convnet":
        teacher = load_teacher(
            ConvTeacher(), id2label=None, mean=processor.image_mean, std=processor.image_std, image_size=16
        )
    return kind(
        model or student(),
        args,
        teacher,
        train_dataset=train_views,
        eval_dataset=eval_views,
        processing_class=processor,
        callbacks=callbacks,
        **options or {},
    )


def streamed(images, folder):
    """The training images in parquet files, read in blocks of 5."""
    files = []
    for number, rows in enumerate((range(0, 30), range(30, 48))):
        files.append(str(folder / f"{number}.parquet"))
        table = images["train"].data.table.slice(rows.start, len(rows))
        parquet.write_table(table, files[-1], row_group_size=5)
    stream = StreamedImages(files, images["train"].features, image_column="image", label_column="label")
    return images | {"train": stream}
