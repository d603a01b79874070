"""Look into trained models: `python recipes/run_analysis.py [recipe.yaml] --models a,b [--key value ...]`.

What they decide: Table 4, accuracy and agreement with the teacher by class, confusions. What is inside a DeiT: how
alike its two tokens are, where they look, its filters and positions. Every picture lies in `output_dir`, and beside it
its numbers as JSON. `--help` lists the keys.
"""

import json
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from hf_deit import (
    AnalysisArguments,
    agreement_by_class,
    as_deit,
    attention_maps,
    build_eval_transform,
    confusion,
    deciders_of,
    disagreement,
    disagreement_table,
    eval_pixels,
    exit_clearly,
    ground_truth,
    load_classifier,
    load_image_dataset,
    parse_recipe,
    patch_filters,
    plot_attention,
    plot_attention_heads,
    plot_by_class,
    plot_confusion,
    plot_disagreement,
    plot_patch_filters,
    plot_position_similarity,
    plot_token_similarity,
    position_similarity,
    predict,
    short_names,
    spread_evenly,
    token_similarity,
)


KINDS = (AnalysisArguments,)


def write(folder: Path, name: str, numbers: dict, **plots: Callable) -> None:
    """The numbers as JSON, and pictures of what the JSON holds: of that name, or of the name and a plot's own."""
    stem = re.sub(r"[^\w.-]+", "-", name)
    text = json.dumps(numbers, ensure_ascii=False)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{stem}.json").write_text(text + "\n", "utf-8")
    for suffix, plot in plots.items():
        plot(folder / f"{stem}{'' if suffix == 'plot' else '_' + suffix}.png", **json.loads(text))


def main(argv: list[str] | None = None) -> None:
    # 1. What to do
    (args,) = parse_recipe(KINDS, argv)
    folder = Path(args.output_dir)
    images = load_image_dataset(**args.loading(), splits=("eval",))["eval"]
    truth = ground_truth(images["label"])
    class_names = list(images.features["label"].names)

    # 2. What the models decide
    names = short_names(args.models)
    teacher = names[args.models.index(args.teacher)] if args.teacher else None
    reading = {"batch_size": args.batch_size, "num_workers": args.num_workers}
    classifiers, ratios, heads = {}, {}, {}
    for name, spec in zip(names, args.models):
        classifiers[name] = load_classifier(
            spec,
            id2label=dict(enumerate(class_names)),
            image_size=args.image_size,
            trust_class_order=args.trust_class_order,
        )
        predictions = predict(classifiers[name], images, crop_ratio=args.crop_ratio, **reading)
        heads[name] = deciders_of(name, predictions.best_classes, is_teacher=name == teacher)
        ratios[name] = predictions.crop_ratio

    deciders = [decider for name in names for decider in heads[name]]
    table = disagreement([truth, *deciders])
    write(folder, "disagreement", table, plot=plot_disagreement)
    (folder / "disagreement.md").write_text(disagreement_table(**table), "utf-8")
    print(disagreement_table(**table))
    accuracy = {"quantity": "accuracy"} | agreement_by_class(deciders, truth, class_names, truth.decisions)
    write(folder, "accuracy_by_class", accuracy, plot=plot_by_class)
    if teacher is not None:
        students = [decider for name in names if name != teacher for decider in heads[name]]
        agreement = agreement_by_class(students, heads[teacher][-1], class_names, truth.decisions)
        agreement["quantity"] = "agreement with the teacher"
        write(folder, "teacher_agreement_by_class", agreement, plot=plot_by_class)
    for name in names:
        mistaken = confusion(heads[name][-1], class_names, truth.decisions)
        write(folder, f"confusion_{name}", mistaken, plot=plot_confusion)

    # 3. What is inside them
    similarities = []
    shown = torch.utils.data.Subset(images, spread_evenly(args.attention_images, len(images)))
    for name, classifier in classifiers.items():
        try:
            model = as_deit(classifier.model, classifier.image_size)
        except ValueError as error:
            print(f"{name}: no attention, tokens, filters or positions to show: {error}")
            continue
        transform = build_eval_transform(classifier.image_size, crop_ratio=ratios[name])
        views = partial(eval_pixels, transform=transform, mean=classifier.mean, std=classifier.std, model=model)
        if model.config.use_distillation_token:
            batches = (pixel_values for _, pixel_values in views(images, **reading))
            similarities.append({"model": name} | token_similarity(model, batches))
        else:
            print(f"{name}: one token, so no similarity of two")
        ((pixels, pixel_values),) = views(shown, batch_size=len(shown))
        captions = [f"{class_names[shown[i]['label']]}  (no. {shown.indices[i]})" for i in range(len(shown))]
        named = {"model": name}
        maps = named | {"captions": captions} | attention_maps(model, pixel_values, args.attention_layer)
        draw, draw_heads = (partial(plot, images=pixels) for plot in (plot_attention, plot_attention_heads))
        write(folder, f"attention_{name}", maps, plot=draw, heads=draw_heads)
        write(folder, f"filters_{name}", named | patch_filters(model), plot=plot_patch_filters)
        write(folder, f"positions_{name}", named | position_similarity(model), plot=plot_position_similarity)
    if similarities:
        write(folder, "token_similarity", {"series": similarities}, plot=plot_token_similarity)
    print(f"pictures and numbers are in {folder}")


if __name__ == "__main__":
    exit_clearly(main)
