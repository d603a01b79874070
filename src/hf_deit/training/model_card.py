"""The model card: README.md of a finished run, front matter for the Hub included.

The functions here are pure: publishing.py collects the facts, and model_card_template.md holds the text. A card is
public, so a path on this machine is cut to its last part, and names, which a stranger may have chosen, are escaped:
they cannot become Markdown, HTML, front matter or code.

Source: the front matter is the Hub's model card specification (huggingface/hub-docs, modelcard.md).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from ..arguments import HUB_ID


TEMPLATE = Path(__file__).with_name("model_card_template.md")
LOSSES = {
    "hard": "labels and the teacher's decisions (eq. 3)",
    "soft": "labels and the teacher's probabilities (eq. 2)",
    "label": "labels, by both heads",
    "none": "labels",
}
# Facts that the template shows unchanged, and that are therefore escaped.
SHOWN_NAMES = ("name", "architecture", "adapter", "head_fusion", "dataset_terms", "eval_split")
# Matches an absolute path inside a word, `~/` and `C:\\` included, but not the slashes of `owner/name` or `https://`.
ABSOLUTE_PATH = re.compile(
    r"""(?<![\w./~])(?:~|[A-Za-z]:)?[\\/](?![\\/])  # where it begins
    (?:[^,=?"']*[\\/])?([^\\/,=?"']+)[\\/]?  # directories, the last part, perhaps a slash""",
    re.VERBOSE,
)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """Facts of one run that its card states.

    Attributes:
        name: name of the model.
        model_id: argument of `from_pretrained`: a Hub id or a directory.
        license: license of the weights, one of the Hub's identifiers.
        model_type: `model_type` of config.json.
        architecture: class of the model, and for timm models the timm name.
        image_size: side of the views, pixels; None if unknown.
        crop_ratio: fraction of the shorter side that the evaluation crop keeps; None if unknown.
        head_fusion: head fusion of a model with two heads, else None.
        base_model: checkpoint that training started from: Hub id or path.
        adapter: kind of PEFT's adapter that was trained, such as "LORA"; None if the model itself was.
        adapter_parameters: number of parameters that were trained.
        base_id: with an adapter, argument of `from_pretrained` for the model it belongs to; "" if that has no name.
        is_ours: whether the model's class is one of hf_deit.
        dataset: registry name, Hub id or path of the dataset.
        dataset_id: Hub id of the dataset, if it has one.
        dataset_terms: terms of the dataset's makers, in a few words.
        eval_split: name of the evaluation split, if it has one.
        held_out: whether none of the evaluation images is known to be a training image.
        trained_on: evaluation images that are training images too.
        data: sentences about the images, see [`DatasetSummary.sentences`].
        taught_before: teachers and training sets, by name, of the earlier part of a run that resumed with others.
        distillation_type: as in `DistillationConfig`.
        teacher: specs of the teachers, joined by " + ".
        teacher_sha256: fingerprint of the teacher's weights, 16 hexadecimal digits.
        teacher_replayed: kind of teacher outputs that were replayed from a record, such as "decisions"; None if the
            teacher was run in training.
        teacher_record: name of the record on the Hub that was replayed, and its commit; None for one on a disk.
        metrics: `eval_top1`, `eval_class_top1`, `teacher_top5`, ... as fractions in [0, 1], measured with the weights
            that are published with the card.
        settings: this run's value and the paper's, by name, for settings that differ.
        ema_decay: decay of the moving average, which is evaluated and not saved.
        epochs, steps: length of the training so far, out of `planned_steps`.
        command: arguments of the command line, the script first.
        processes: number of processes that trained together.
        versions: version by library.
    """

    name: str
    model_id: str
    license: str
    tags: Sequence[str] = ()
    model_type: str
    architecture: str
    num_parameters: int
    num_classes: int
    image_size: int | None
    crop_ratio: float | None = None
    head_fusion: str | None = None
    base_model: str | None = None
    adapter: str | None = None
    adapter_parameters: int = 0
    base_id: str | None = None
    is_ours: bool = True
    dataset: str | None = None
    dataset_id: str | None = None
    dataset_terms: str | None = None
    eval_split: str | None = None
    held_out: bool = False
    trained_on: int = 0
    data: Sequence[str] = ()
    num_train_images: int
    num_eval_images: int
    bad_images: int = 0
    taught_before: Sequence[Mapping[str, str]] = ()
    distillation_type: str
    teacher: str | None = None
    teacher_sha256: str | None = None
    teacher_parameters: int | None = None
    teacher_replayed: str | None = None
    teacher_record: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    settings: Mapping[str, tuple[object, object]] = field(default_factory=dict)
    ema_decay: float | None = None
    epochs: float
    steps: int
    planned_steps: int
    command: Sequence[str] = ()
    processes: int = 1
    versions: Mapping[str, str] = field(default_factory=dict)


def build_model_card(facts: CardFacts) -> ModelCard:
    """Build the model card; `str()` of the card is README.md."""
    command = public_command(facts.command, facts.processes)
    return ModelCard.from_template(
        _front_matter(facts),
        template_path=str(TEMPLATE),
        facts=replace(facts, **{name: as_text(getattr(facts, name)) for name in SHOWN_NAMES}),
        accuracies=accuracy_rows(facts.metrics),
        dataset=as_text(public_name(facts.dataset)),
        teacher=as_text(public_name(facts.teacher)),
        teacher_record=_link_to_record(facts.teacher_record) or "the record of an earlier run",
        base_model=as_text(public_name(facts.base_model)),
        taught_before=[
            "; ".join(f"{as_text(name)} {as_text(public_name(value))}" for name, value in entry.items())
            for entry in facts.taught_before
        ],
        fused_unlike_stock=facts.head_fusion not in (None, "logits"),
        data=list(map(as_text, facts.data)),
        loss=LOSSES[facts.distillation_type],
        settings={as_text(name): tuple(map(_shown, values)) for name, values in facts.settings.items()},
        command=command,
        # longer than any run of backticks inside, which would end the code block
        fence="`" * max([3, *(1 + len(ticks) for ticks in re.findall("`+", command))]),
    )


def _link_to_record(record: str | None) -> str | None:
    if record is None:
        return None
    name, _, commit = record.partition(" at commit ")
    repository = name.partition("@")[0]
    return f"[{repository}](https://huggingface.co/datasets/{repository}/tree/{commit})"


def _front_matter(facts: CardFacts) -> ModelCardData:
    teachers = [hub_id(spec) for spec in (facts.teacher or "").split(" + ")]
    distilled = facts.distillation_type in ("hard", "soft")
    tags = [facts.model_type, "vision", "image-classification", "hf_deit", *facts.tags]
    tags += [facts.adapter.lower()] if facts.adapter else []
    return ModelCardData(
        model_name=facts.name,
        library_name="peft" if facts.adapter else "transformers",
        pipeline_tag="image-classification",
        license=facts.license,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        base_model=hub_id(facts.base_model),
        teacher=[teacher for teacher in teachers if teacher] or None,  # a key of hf_deit: the Hub has no such relation
        tags=tags + ["knowledge-distillation"] * distilled,
        metrics=["accuracy"] if facts.metrics else None,
        eval_results=_eval_results(facts),
    )


def _eval_results(facts: CardFacts) -> list[EvalResult] | None:
    """Return the student's accuracies for `model-index`, without those of the teacher, which is another model."""
    dataset = public_name(facts.dataset) or "unnamed"
    results = []
    for title, accuracies in accuracy_rows(facts.metrics).items():
        results += [
            EvalResult(
                task_type="image-classification",
                task_name="Image classification",
                dataset_type=facts.dataset_id or dataset,
                dataset_name=dataset,
                dataset_split=facts.eval_split,
                metric_type="accuracy",
                metric_name=f"top-{k} accuracy" + ("" if title == "model" else f", {title}"),
                metric_value=value,
            )
            for k, value in zip((1, 5), accuracies, strict=False)
            if title != "teacher"
        ]
    return results or None


def accuracy_rows(metrics: Mapping[str, float]) -> dict[str, list[float]]:
    """Return top-1 and, of more than five classes, top-5 by row title, as fractions; the model's own output first."""
    prefixes = {
        "both heads, fused" if "eval_class_top1" in metrics else "model": "eval",
        "class head": "eval_class",
        "distillation head": "eval_distillation",
        "moving average": "eval_ema",
        "teacher": "teacher",
    }
    return {
        title: [metrics[f"{prefix}_{rate}"] for rate in ("top1", "top5") if f"{prefix}_{rate}" in metrics]
        for title, prefix in prefixes.items()
        if f"{prefix}_top1" in metrics
    }


# --- what may be said in public ------------------------------------------------------------------------------------


def hub_id(spec: str | None) -> str | None:
    """Return `spec` if it is a Hub id, `owner/name`, and not a path on this machine; else None."""
    return spec if spec and HUB_ID.fullmatch(spec) and not Path(spec).exists() else None


def public_name(spec: str | None) -> str | None:
    """Return a dataset, checkpoint or teacher without its directories; several teachers are joined by " + "."""
    if spec is None:
        return None
    return " + ".join(_without_directories(one) for one in spec.split(" + "))


def _without_directories(spec: str) -> str:
    kind, mark, file = spec.partition("?checkpoint=")
    if mark:
        return f"{kind}{mark}{Path(file).name}"
    return spec if spec.startswith(("timm:", "python:")) or hub_id(spec) else Path(spec).name or spec


def public_command(words: Sequence[str], processes: int = 1) -> str:
    """Return the shell command, without tokens and with absolute paths cut to their last part."""
    if not words:
        return ""
    kept, skip = [], False
    for word in words:
        option = word.startswith("--") and word.split("=")[0].endswith("_token")
        if not option and not skip:
            kept.append(ABSOLUTE_PATH.sub(r"\1", word))
        skip = option and "=" not in word
    return f"accelerate launch --num_processes {processes} {shlex.join(kept)}"


def as_text(name: str | None) -> str | None:
    """Escape a name into one line of plain text: no Markdown, no HTML, no end of a table cell or of `code`."""
    if name is None:
        return None
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    return re.sub(r"([\\\[\]<>|])", r"\\\1", line.replace("`", "'"))


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else str(as_text(str(value)))
