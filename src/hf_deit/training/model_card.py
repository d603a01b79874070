"""The model card: README.md of a finished run, front matter for the Hub included.

Pure functions of plain facts, which publishing.py collects; the text is in model_card_template.md. Nothing
here measures, trains or uploads. A card goes public, so what names a place on this machine is cut to its last part,
and names, which may be somebody else's, stay text: no Markdown, HTML, front matter or code comes of them.

Source: the front matter is the Hub's model card specification (huggingface/hub-docs, modelcard.md).
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData


TEMPLATE = Path(__file__).with_name("model_card_template.md")
LOSSES = {
    "hard": "labels and the teacher's decisions (eq. 3)",
    "soft": "labels and the teacher's probabilities (eq. 2)",
    "label": "labels, by both heads",
    "none": "labels",
}
HUB_ID = re.compile(r"\w[\w.-]*/[\w.-]+")
# Of the facts, those that the template shows as they are.
SHOWN_NAMES = ("name", "architecture", "head_fusion", "dataset_terms", "eval_split")
# An absolute path inside a word, `~/` and `C:\\` included; not the slashes of `owner/name` or of `https://`.
ABSOLUTE_PATH = re.compile(
    r"""(?<![\w./~])(?:~|[A-Za-z]:)?[\\/](?![\\/])  # where it begins
    (?:[^,=?"']*[\\/])?([^\\/,=?"']+)[\\/]?  # directories, the last part, perhaps a slash""",
    re.VERBOSE,
)


@dataclass(frozen=True, kw_only=True)
class CardFacts:
    """What a card says of one run.

    Attributes:
        name: of the model.
        model_id: what `from_pretrained` takes: the Hub id, or a directory.
        license: one of the Hub's identifiers.
        model_type: of config.json.
        architecture: class of the model, and for timm's which of them.
        image_size: side of the views, pixels; None where it is not known.
        crop_ratio: share of the shorter side that the evaluation's crop keeps; None where it is not known.
        head_fusion: of a model with two heads, else None.
        base_model: checkpoint that training started from: Hub id or path.
        dataset: registry name, Hub id or path.
        dataset_id: its Hub id where it has one.
        dataset_terms: what the makers of the set say, in a few words.
        eval_split: where the split has a name.
        distillation_type: as in `DistillationConfig`.
        teacher: its specs, joined by " + ".
        teacher_sha256: fingerprint of its weights, 16 hexadecimal digits.
        teacher_replayed: what of its answers came from a record, such as "decisions"; None where it was asked.
        metrics: `eval_top1`, `eval_class_top1`, `teacher_top5`, ... as fractions in [0, 1]; all of the weights that
            the card stands beside.
        settings: by name, this run's value and the paper's where they differ.
        ema_decay: of the moving average, which is evaluated and not saved.
        epochs, steps: trained so far, of `planned_steps`.
        command: the words of the command line, the script first.
        processes: that trained together.
        versions: by library.
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
    dataset: str | None = None
    dataset_id: str | None = None
    dataset_terms: str | None = None
    eval_split: str | None = None
    num_train_images: int
    num_eval_images: int
    bad_images: int = 0
    distillation_type: str
    teacher: str | None = None
    teacher_sha256: str | None = None
    teacher_parameters: int | None = None
    teacher_replayed: str | None = None
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
    """The whole card; `str()` of it is README.md."""
    command = public_command(facts.command, facts.processes)
    return ModelCard.from_template(
        _front_matter(facts),
        template_path=str(TEMPLATE),
        facts=replace(facts, **{name: as_text(getattr(facts, name)) for name in SHOWN_NAMES}),
        accuracies=accuracy_rows(facts.metrics),
        dataset=as_text(public_name(facts.dataset)),
        teacher=as_text(public_name(facts.teacher)),
        base_model=as_text(public_name(facts.base_model)),
        fused_unlike_stock=facts.head_fusion not in (None, "logits"),
        loss=LOSSES[facts.distillation_type],
        settings={as_text(name): tuple(map(_shown, values)) for name, values in facts.settings.items()},
        command=command,
        # longer than any inside, which would end the block
        fence="`" * max([3, *(1 + len(ticks) for ticks in re.findall("`+", command))]),
    )


def _front_matter(facts: CardFacts) -> ModelCardData:
    teachers = [hub_id(spec) for spec in (facts.teacher or "").split(" + ")]
    distilled = facts.distillation_type in ("hard", "soft")
    tags = [facts.model_type, "vision", "image-classification", "hf_deit", *facts.tags]
    return ModelCardData(
        model_name=facts.name,
        library_name="transformers",
        pipeline_tag="image-classification",
        license=facts.license,
        datasets=[facts.dataset_id] if facts.dataset_id else None,
        base_model=hub_id(facts.base_model),
        teacher=[teacher for teacher in teachers if teacher] or None,  # of ours: the Hub has no such relation
        tags=tags + ["knowledge-distillation"] * distilled,
        metrics=["accuracy"] if facts.metrics else None,
        eval_results=_eval_results(facts),
    )


def _eval_results(facts: CardFacts) -> list[EvalResult] | None:
    """The student's accuracies for `model-index`; the teacher's are another model's."""
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
            for k, value in zip((1, 5), accuracies, strict=True)
            if title != "teacher"
        ]
    return results or None


def accuracy_rows(metrics: Mapping[str, float]) -> dict[str, tuple[float, float]]:
    """Title to top-1 and top-5, as fractions, of what was measured. What the model answers comes first."""
    prefixes = {
        "both heads, fused" if "eval_class_top1" in metrics else "model": "eval",
        "class head": "eval_class",
        "distillation head": "eval_distillation",
        "moving average": "eval_ema",
        "teacher": "teacher",
    }
    return {
        title: (metrics[f"{prefix}_top1"], metrics[f"{prefix}_top5"])
        for title, prefix in prefixes.items()
        if f"{prefix}_top1" in metrics
    }


# --- what may be said in public ------------------------------------------------------------------------------------


def hub_id(spec: str | None) -> str | None:
    """`owner/name` where the spec is one, and not a path on this machine."""
    return spec if spec and HUB_ID.fullmatch(spec) and not Path(spec).exists() else None


def public_name(spec: str | None) -> str | None:
    """A data set, checkpoint or teacher without the directories it lies in; several teachers are joined by " + "."""
    if spec is None:
        return None
    return " + ".join(_without_directories(one) for one in spec.split(" + "))


def _without_directories(spec: str) -> str:
    kind, mark, file = spec.partition("?checkpoint=")
    if mark:
        return f"{kind}{mark}{Path(file).name}"
    return spec if spec.startswith(("timm:", "python:")) or hub_id(spec) else Path(spec).name or spec


def public_command(words: Sequence[str], processes: int = 1) -> str:
    """The command line, to be pasted into a shell: without tokens, and absolute paths cut to their last part."""
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
    """A name on one line, in which nothing is Markdown, HTML or the end of a table's cell or of `code`."""
    if name is None:
        return None
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in name).split())
    return re.sub(r"([\\\[\]<>|])", r"\\\1", line.replace("`", "'"))


def _shown(value: object) -> str:
    if value is None:
        return "unset"
    return f"{value:g}" if isinstance(value, float) else as_text(str(value))
