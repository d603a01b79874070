"""Recipes, scales and a table of made-up runs, and the sweep over them."""

from pathlib import Path

import yaml

from hf_deit.paper.sweep import Sweep


FILES = {
    "imagenet/deit_base": {"model_size": "base", "output_dir": "outputs/imagenet/deit_base"},
    "imagenet/deit_base_distilled": {"model_size": "base", "teacher": "timm:big", "distillation_type": "hard"},
    "imagenet/deit_base_384": {
        "model_name_or_path": "outputs/imagenet/deit_base",
        "image_size": 384,
        "num_train_epochs": 30,
        "distillation_type": "none",
    },
    "ablations/no_erasing": {"model_size": "base", "random_erasing_prob": 0, "distillation_type": "none"},
    "ablations/taught_by_deit": {"model_size": "base", "teacher_recipe": "imagenet/other_teacher.yaml"},
    "imagenet/other_teacher": {"model_name_or_path": "timm:other"},
    "little/convnet_teacher": {"model_name_or_path": "timm:resnet10t", "num_train_epochs": 8},
    "scales/paper": {"views_per_second": 2000},
    "scales/little": {
        "epochs": 0.1,
        "image_sizes": {224: 32, 384: 48},
        "student": {"hidden_size": 96},
        "data": {"dataset_name": "cifar10"},
        "unless_said": {"random_erasing_prob": 0.1, "mix_prob": 0.5},
        "teachers": {"timm:big": "little/convnet_teacher"},
        "views_per_second": 500,
    },
    "tables/a": {
        "title": "Table A",
        "columns": {
            "224": {"recipe": "{}"},
            "384": {"recipe": "imagenet/deit_base_384", "keys": {"model_name_or_path": "outputs/{}"}},
        },
        "rows": [
            {
                "name": "none",
                "recipe": "imagenet/deit_base",
                "keys": {"distillation_type": "none"},
                "paper": [81.8, "-"],
            },
            {"name": "erasing", "recipe": "ablations/no_erasing", "paper": [4.3, 0.1]},
            {
                "name": "token",
                "recipe": "imagenet/deit_base_distilled",
                "metric": "eval_class_top1",
                "paper": [83.0, "-"],
            },
            {"name": "other", "recipe": "ablations/taught_by_deit", "paper": [82.0, "-"]},
        ],
        "leave_out": {"little": ["other"]},
    },
}


def write_recipes(folder: Path) -> None:
    """Write [`FILES`] below `folder / "recipes"`."""
    for name, keys in FILES.items():
        path = folder / "recipes" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(keys))


def made_up_sweep(scale, seeds=(0, 1)) -> Sweep:
    """The sweep of table "a", whose recipes are in the working directory."""
    return Sweep("a", scale, seeds, recipes="recipes", results="results")
