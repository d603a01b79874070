"""Writes the cards of this directory: `python model_cards/make_cards.py`. Nothing here trains or measures accuracy.

A card is put together from what is known elsewhere, so that each fact has one home: the paper's tables (Table 5 in
paper_tables.py, Tables 3 and 7 in `recipes/tables/`), `published.yaml` (the authors' numbers), the recipe (start,
teacher, settings, command), the registry of data sets, and the model itself, whose parameters are counted. The text is
in `card_template.md`. The cards have no `model-index`: the Hub shows its numbers as results of the weights beside the
card, and there are none.
"""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData

from hf_deit import (
    DataArguments,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DistillationConfig,
    ModelArguments,
    build_eval_transform,
    build_image_processor,
)
from hf_deit.data.registry import REGISTRY
from hf_deit.paper.tables import PAPER_TABLES
from hf_deit.training.model_card import LOSSES, hub_id


HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PUBLISHED = yaml.safe_load((HERE / "published.yaml").read_text("utf-8"))
TABLE_5 = {row.name.replace(" distilled", "⚗"): row for row in PAPER_TABLES["table5"]}

PAPER, AUTHORS, NOT_RUN = "the paper's", "published by the authors", "not run"
SETS = {
    "imagenet-1k": "ImageNet-1k",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "flowers102": "Flowers-102",
    "cars": "Stanford Cars",
    "inat18": "iNaturalist 2018",
    "inat19": "iNaturalist 2019",
}
TABLE_7_MODELS = ("deit_base", "deit_base_384", "deit_base_distilled", "deit_base_distilled_384")
TRANSFERRED = "deit_base_distilled"
TEACHER = "RegNetY-16GF"
GPUS = yaml.safe_load((ROOT / "recipes" / "accelerate" / "multi_gpu.yaml").read_text("utf-8"))["num_processes"]
# Keys of a recipe that a card states outside its table of settings.
STATED_ELSEWHERE = {
    *(item.name for kind in (ModelArguments, DataArguments) for item in fields(kind) if item.name != "drop_path_rate"),
    *("output_dir", "distillation_type", "per_device_train_batch_size", "gradient_accumulation_steps"),
}


def table(name: str, metric: str | None = None) -> dict[str, list[float]]:
    """The paper's numbers in a sweep's table: by the stem of a recipe those of all its rows with that metric."""
    content, found = yaml.safe_load((ROOT / "recipes" / "tables" / f"{name}.yaml").read_text("utf-8")), {}
    for row in content["rows"]:
        if row.get("metric") == metric:
            for column, number in zip(content["columns"].values(), row["paper"], strict=True):
                found.setdefault(column["recipe"].format(row.get("recipe")).split("/")[-1], []).append(number)
    return found


TABLE_3 = {head: table("3", f"eval_{head}_top1") for head in ("class", "distillation")}
TABLE_7 = table("7")
STEMS = (*PUBLISHED, *TABLE_7)


def recipe_of(stem: str) -> Path:
    """The recipe that a card is about."""
    return ROOT / "recipes" / ("transfer" if stem in TABLE_7 else "imagenet") / f"{stem}.yaml"


def paper_name(stem: str) -> str:
    """`deit_base_distilled_1000ep_384` as the paper writes it: "DeiT-B⚗↑384 / 1000 epochs"."""
    size = {"tiny": "Ti", "small": "S", "base": "B"}[stem.split("_")[1]]
    return (
        f"DeiT-{size}"
        + "⚗" * ("distilled" in stem)
        + "↑384" * stem.endswith("384")
        + " / 1000 epochs" * ("1000ep" in stem)
    )


def accuracy_rows(stem: str) -> list[tuple[str, ...]]:
    """Model, images, top-1, top-5 and whose number it is; everything as text."""
    if stem in TABLE_7:
        rows = [
            (paper_name(model), "Table 6's test images", f"{top1:.1f}", "", f"{PAPER}, Table 7")
            for model, top1 in zip(TABLE_7_MODELS, TABLE_7[stem], strict=True)
        ]
        return [*rows, ("this recipe", REGISTRY[stem].eval_split, "", "", NOT_RUN)]
    name = paper_name(stem)
    paper, fused = TABLE_5[name], name + ", heads fused" * ("distilled" in stem)
    rows = [(fused, "validation", f"{paper.imagenet:.1f}", "", f"{PAPER}, Table 5")]
    for head, numbers in TABLE_3.items():
        for top1 in numbers.get(stem, ()):
            rows.append((f"{name}, {head} head", "validation", f"{top1:.1f}", "", f"{PAPER}, Table 3"))
    for top1, title in ((paper.real, "validation, ReaL labels"), (paper.v2, "ImageNet V2, matched frequency")):
        rows.append((fused, title, f"{top1:.1f}", "", f"{PAPER}, Table 5"))
    if "authors" in PUBLISHED[stem]:
        top1, top5 = (f"{value:.3f}" for value in PUBLISHED[stem]["authors"])
        rows.append(("the authors' checkpoint", "validation, crop ratio 0.875", top1, top5, AUTHORS))
    return [*rows, ("this recipe", "validation", "", "", NOT_RUN)]


def read_header(text: str) -> dict[str, str]:
    """A recipe's first comment: `# Hardware:  8 GPUs` by its first word, lines joined."""
    found = re.findall(r"^# (\w+): +(.+(?:\n#    .+)*)", text, re.MULTILINE)
    return {name: re.sub(r"\n# +", " ", words) for name, words in found}


def settings_rows(recipe: dict) -> list[tuple[str, str, str]]:
    """Name, the recipe's value, and Table 9's, which is the default; where they differ."""
    defaults = {item.name: item.default for item in fields(DistillationConfig)}
    defaults |= {"drop_path_rate": DeiTConfig.drop_path_rate, "learning_rate": "5e-4 x batch / 512"}
    views = recipe.get("per_device_train_batch_size", defaults["per_device_train_batch_size"])
    batch_size = views * recipe.get("gradient_accumulation_steps", 1) * GPUS
    rows = [(name, value, defaults[name]) for name, value in recipe.items() if name not in STATED_ELSEWHERE]
    rows += [(f"batch size on {GPUS} GPUs", batch_size, 1024)]
    return [(name, _shown(value), _shown(paper)) for name, value, paper in rows if value != paper]


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(value)


def teacher_line(recipe: dict) -> str:
    """Which teacher the recipe takes, beside the paper's."""
    if "teacher" in recipe:
        top1 = TABLE_5[TEACHER].imagenet
        return f"`{recipe['teacher']}`; {PAPER} is a {TEACHER} of {top1} % top-1 (Tables 2 and 5)"
    if "teacher_recipe" in recipe:
        path = f"recipes/{recipe['teacher_recipe']}"
        return f"[{path}](../{path}) trains it first; the paper does not say whether Table 7 used one"
    return "none"


def build_card(stem: str) -> str:
    """The whole card of a recipe."""
    transfer = stem in TABLE_7
    known = PUBLISHED.get(stem, {})
    model = TRANSFERRED if transfer else stem
    size = model.split("_")[1]
    path = recipe_of(stem)
    recipe, header = yaml.safe_load(path.read_text("utf-8")), read_header(path.read_text("utf-8"))
    start = recipe.get("model_name_or_path")
    distilled = recipe.get("use_distillation_token", ModelArguments.use_distillation_token)
    image_size = recipe.get("image_size", DataArguments.image_size)
    dataset = recipe.get("dataset_name", DataArguments.dataset_name)
    data = REGISTRY[dataset]
    transform = build_eval_transform(image_size)

    model_class = DeiTForImageClassificationWithTeacher if distilled else DeiTForImageClassification
    fields_of_config = {"image_size": image_size, "num_labels": data.num_classes, "use_distillation_token": distilled}
    config = DeiTConfig.from_size(size, **fields_of_config)
    with torch.device("meta"):
        parameters = model_class(config).num_parameters()
    arguments = ", ".join([repr(size), *(f"{name}={value}" for name, value in fields_of_config.items())])

    front_matter = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        license="apache-2.0",
        datasets=[data.hub_id] if data.hub_id else None,
        base_model=hub_id(start),
        teacher=hub_id(recipe.get("teacher", "").replace("timm:", "timm/")),
        tags=[config.to_dict()["model_type"], "vision", "image-classification", "hf_deit", "arxiv:2012.12877"]
        + ["knowledge-distillation"] * distilled,
    )
    card = ModelCard.from_template(
        front_matter,
        template_path=str(HERE / "card_template.md"),
        stem=stem,
        transfer=transfer,
        name=paper_name(model),
        distilled=distilled,
        recipe=path.relative_to(ROOT).as_posix(),
        data=data,
        dataset=dataset,
        dataset_name=SETS[dataset],
        accuracies=accuracy_rows(stem),
        image_size=image_size,
        crop_ratio=transform.crop_ratio,
        shorter_side=build_image_processor(transform).size["shortest_edge"],
        parameters=parameters,
        config=config,
        side=config.grid_size[0],
        tokens=config.num_prefix_tokens + config.grid_size[0] * config.grid_size[1],
        count_command=f'python -c "from hf_deit import DeiTConfig, {model_class.__name__} as Model\n'
        f'print(Model(DeiTConfig.from_size({arguments})).num_parameters())"',
        start=f"`{start}`, {header['Start']}" if start else "random weights",
        loss=LOSSES[recipe.get("distillation_type", DistillationConfig.distillation_type)],
        teacher=teacher_line(recipe),
        settings=settings_rows(recipe),
        header=header,
        directory=f"my_{stem}" if "hub_id" in known else recipe["output_dir"],
        model_class=model_class.__name__,
        paper=None if transfer else TABLE_5[paper_name(stem)],
        **{name: known.get(name) for name in ("hub_id", "authors", "remark")},
    )
    return f"{card}\n"


def build_index() -> str:
    """README.md: one row a card."""
    figures = {stem: ("ImageNet-1k", TABLE_5[paper_name(stem)].imagenet, "Table 5") for stem in PUBLISHED}
    row = TABLE_7_MODELS.index(TRANSFERRED)
    figures |= {stem: (SETS[stem], numbers[row], "Table 7") for stem, numbers in TABLE_7.items()}
    rows = []
    for stem, (images, top1, source) in figures.items():
        recipe = recipe_of(stem).relative_to(ROOT).as_posix()
        name = paper_name(TRANSFERRED if stem in TABLE_7 else stem)
        rows.append(
            f"| [{stem}]({stem}.md) | [{recipe}](../{recipe}) | {name}, {images} | {top1} ({source}) | {NOT_RUN} |"
        )
    return (HERE / "index_template.md").read_text("utf-8").replace("{{ rows }}", "\n".join(rows))


def build_all() -> dict[str, str]:
    """File name to text, of everything that is written here."""
    return {f"{stem}.md": build_card(stem) for stem in STEMS} | {"README.md": build_index()}


if __name__ == "__main__":
    for name, text in build_all().items():
        (HERE / name).write_text(text, "utf-8")
    print(f"{HERE}: {len(STEMS)} cards and README.md")
