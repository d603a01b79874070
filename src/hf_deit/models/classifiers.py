"""Any image classifier from a spec: a directory, a Hub id, a timm name, a Python factory or a module.

`find_classifier` says what a spec resolves to: the model, its classes and the pixels it wants. `new_classifier` makes
one to train, of a kind that `find_classifier` reads back.

Not here: what a teacher or an evaluation makes of it (teachers.py, evaluation.py).
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import importlib
import logging
import os
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .configuration_deit import as_pair


logger = logging.getLogger(__name__)

Spec = str | os.PathLike | nn.Module

ACCEPTED_FORMS = (
    "Accepted: a directory written by save_pretrained (config.json and model.safetensors), a Hub id such as "
    "timm/regnety_160.deit_in1k, timm:<name>, timm:<name>?checkpoint=<file.safetensors or .pth>, "
    "python:<module>:<factory>, or an nn.Module"
)


@dataclass
class FoundClassifier:
    """What a spec resolves to: the model and what is known of its classes and pixels (None: not known).

    Attributes:
        model: in whatever mode it was loaded.
        name: the spec.
        names: of the classes, in their order.
        mean: per channel, of pixels in [0, 1].
        std: likewise.
        image_size: `(height, width)` in pixels.
        fixed_size: whether it takes no other.
        crop_ratio: share of the shorter side that its evaluation keeps, in (0, 1].
    """

    model: nn.Module
    name: str
    names: list[str] | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    image_size: tuple[int, int] | None = None
    fixed_size: bool | None = None
    crop_ratio: float | None = None


def find_classifier(spec: Spec) -> FoundClassifier:
    """The classifier of one spec; see `ACCEPTED_FORMS`.

    Weights are read from safetensors, or from `.pth` files without unpickling code; code that comes with a checkpoint
    is never run. `python:<module>:<factory>` is the user's own code by nature: a function without arguments, in a
    module on the PYTHONPATH, is called.

    Raises:
        ValueError: the spec cannot be read, or weights are missing.
    """
    if isinstance(spec, nn.Module):
        return _describe(spec, type(spec).__name__)
    if not isinstance(spec, (str, os.PathLike)):
        raise ValueError(f"cannot read a model from a {type(spec).__name__}. {ACCEPTED_FORMS}")
    spec = os.fspath(spec)
    if spec.startswith("timm:"):
        return _load_timm(spec)
    if spec.startswith("python:"):
        return _load_python(spec)
    return _load_transformers(spec)


def new_classifier(
    spec: str | os.PathLike,
    *,
    id2label: Mapping[int, str],
    mean: Sequence[float],
    std: Sequence[float],
    image_size: int | tuple[int, int],
    model_args: dict[str, Any] | None = None,
) -> nn.Module:
    """A trainable Transformers classifier for new classes; `load_teacher` reads what its `save_pretrained` writes.

    Args:
        spec: `timm:<name>` starts from random weights; a directory or a Hub id (`timm/<name>` for timm's) from trained
            ones, with a new head where the number of classes differs.
        id2label: names of the classes it is to learn.
        mean: what its training pixels are normalised with; kept in the config of a timm model. A model of another kind
            needs an image processor saved beside it.
        std: likewise.
        image_size: of the training pixels; likewise.
        model_args: arguments of `timm.create_model`, for `timm:` only.

    Raises:
        ValueError: the spec cannot be read.
    """
    from transformers import AutoModelForImageClassification, TimmWrapperConfig

    names = class_names(id2label, keep_generic=True)
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}
    pixels = {"mean": list(mean), "std": list(std), "input_size": [3, *as_pair(image_size)]}
    if (name := os.fspath(spec)).startswith("timm:"):
        name = name.removeprefix("timm:")
        # The wrapper draws every layer anew from normal(0, 0.02); a convnet learns faster from timm's own draw.
        initial = _create_timm_model(name, num_classes=len(names), **(model_args or {})).state_dict()
        config = TimmWrapperConfig(
            architecture=name, num_labels=len(names), model_args=model_args, pretrained_cfg=pixels, **labels
        )
        model = AutoModelForImageClassification.from_config(config)
        model.timm_model.load_state_dict(initial)
        return model
    if model_args:
        raise ValueError(f"model_args {model_args} apply to timm:<name> only, got {name!r}")
    model, _ = _from_pretrained(name, num_labels=len(names), **labels)
    if model.config.model_type == "timm_wrapper":
        model.config.label_names = names  # else the old names are saved, and lost on the next load
        model.config.pretrained_cfg = {**(getattr(model.config, "pretrained_cfg", None) or {}), **pixels}
    return model


# --- what a spec becomes ---------------------------------------------------------------------------------------------


def _describe(model: nn.Module, name: str) -> FoundClassifier:
    """Read classes and pixels off a model: from a Transformers config, or from timm's `pretrained_cfg`."""
    config = getattr(model, "config", None)
    inner = getattr(model, "timm_model", model)
    # Inside a TimmWrapper `pretrained_cfg` speaks of the architecture; the wrapper's config knows how it was trained.
    pixels = {
        **(getattr(inner, "pretrained_cfg", None) or getattr(inner, "default_cfg", None) or {}),
        **(getattr(config, "pretrained_cfg", None) or {}),
    }
    size = pixels.get("input_size", [None])[1:] or getattr(config, "image_size", None)
    return FoundClassifier(
        model,
        name,
        names=class_names(getattr(config, "id2label", None)),
        mean=_floats(pixels.get("mean")),
        std=_floats(pixels.get("std")),
        image_size=as_pair(size) if size else None,
        fixed_size=pixels.get("fixed_input_size", False) if pixels else None,
        crop_ratio=pixels.get("crop_pct"),
    )


def _load_transformers(spec: str) -> FoundClassifier:
    """A directory written by `save_pretrained`, or a Hub id."""
    model, info = _from_pretrained(spec)
    fresh = sorted(key for key in info["missing_keys"] if not key.endswith("num_batches_tracked"))
    fresh += sorted(key for key, *_ in info["mismatched_keys"])
    if fresh:
        raise ValueError(
            f"model {spec!r} has untrained weights: {some_of(fresh)} are not in its checkpoint and were "
            "drawn at random. Fine-tune it first: recipes/run_teacher.py"
        )
    found = _describe(model, spec)
    _read_image_processor(found, spec)
    return found


def _from_pretrained(spec: str, **kwargs) -> tuple[nn.Module, dict]:
    from transformers import AutoModelForImageClassification

    return load_pretrained(
        AutoModelForImageClassification,
        spec,
        dtype=torch.float32,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # the callers say what a fresh head means
        **kwargs,
    )


def load_pretrained(model_class: type, spec: str, **kwargs) -> Any:
    """`model_class.from_pretrained` of a directory or Hub id: from safetensors, without foreign code.

    Raises:
        ValueError: there is no such model, or it cannot be read; one line, whatever was raised below.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        raise ValueError(
            f"model {spec!r} is a file: name its network too, timm:<name>?checkpoint={spec}. {ACCEPTED_FORMS}"
        )
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"model directory {spec!r} has no config.json. {ACCEPTED_FORMS}")
        spec = str(path)
    elif path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise ValueError(f"model {spec!r} does not exist. {ACCEPTED_FORMS}")
    try:
        return model_class.from_pretrained(spec, use_safetensors=True, trust_remote_code=False, **kwargs)
    except Exception as error:  # Transformers, huggingface_hub and safetensors raise a dozen unrelated types
        raise ValueError(f"cannot load model {spec!r}: {first_line(error)}. {ACCEPTED_FORMS}") from error


def _read_image_processor(found: FoundClassifier, spec: str) -> None:
    """Fill in mean, std and crop ratio from the image processor saved beside a Transformers model."""
    from transformers import AutoImageProcessor, DeiTImageProcessor

    # What a TimmWrapper saves says it all; run_teacher.py leaves the processor of its evaluation beside it.
    in_config = found.model.config.model_type == "timm_wrapper"
    try:
        processor_class = DeiTImageProcessor if in_config else AutoImageProcessor
        processor = processor_class.from_pretrained(os.path.expanduser(spec), trust_remote_code=False)
    except OSError:
        if not in_config:
            logger.warning("%s has no preprocessor_config.json: mean and std are the student's, or ImageNet's", spec)
        return
    except Exception as error:  # of another kind, damaged, or with code of its own
        raise ValueError(f"cannot read the image processor of model {spec!r}: {first_line(error)}") from error
    settings = processor.to_dict()
    if settings.get("do_flip_channel_order"):
        raise ValueError(f"model {spec!r} reads BGR images: wrap it in python:<module>:<factory>")
    # A processor normalises pixels of 0..255 times rescale_factor; mean and std here are of pixels in [0, 1].
    unit = 255 * settings["rescale_factor"] if settings.get("do_rescale") else 255.0
    normalises = settings.get("do_normalize")
    found.mean = tuple(m / unit for m in settings["image_mean"]) if normalises else (0.0, 0.0, 0.0)
    found.std = tuple(s / unit for s in settings["image_std"]) if normalises else (1 / unit,) * 3
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    shorter = size.get("shortest_edge") or size.get("height")
    found.crop_ratio = settings.get("crop_pct")  # of ConvNeXt's
    if found.crop_ratio is None and settings.get("do_resize") and shorter:
        found.crop_ratio = min(1.0, crop.get("height", shorter) / shorter) if settings.get("do_center_crop") else 1.0


def _load_timm(spec: str) -> FoundClassifier:
    """`timm:<name>` with timm's published weights, or `timm:<name>?checkpoint=<file>`."""
    name, _, query = spec.removeprefix("timm:").partition("?")
    key, _, file = query.partition("=")
    if query and (key != "checkpoint" or not file):
        raise ValueError(f"model {spec!r}: expected timm:<name>?checkpoint=<file>, got {query!r} after '?'")
    if file:
        return _load_timm_checkpoint(spec, name, file)
    from timm.data import ImageNetInfo, infer_imagenet_subset

    try:
        model = _create_timm_model(name, pretrained=True)
    except ValueError:
        raise
    except Exception as error:  # no weights, no network
        raise ValueError(
            f"cannot download the weights of model {spec!r}: {first_line(error)}. Without a network give a local "
            f"file, timm:{name}?checkpoint=<file>, or a directory written by save_pretrained"
        ) from error
    found = _describe(model, spec)
    if subset := infer_imagenet_subset(model):
        found.names = ImageNetInfo(subset).label_descriptions()
    return found


def _load_timm_checkpoint(spec: str, name: str, file: str) -> FoundClassifier:
    import timm

    weights = read_weights(Path(file).expanduser())
    base = timm.get_pretrained_cfg(name, allow_unregistered=True) if timm.is_model(name.split(".")[0]) else None
    head = getattr(base, "classifier", None) or ""
    head = weights.get(f"{head if isinstance(head, str) else head[0]}.weight")  # two-headed networks list both
    model = _create_timm_model(name, **({} if head is None else {"num_classes": head.shape[0]}))
    own = model.state_dict()
    missing, unexpected = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    shapes = [
        f"{key} {tuple(weights[key].shape)} instead of {tuple(own[key].shape)}"
        for key in sorted(own.keys() & weights.keys())
        if weights[key].shape != own[key].shape
    ]
    if missing or unexpected or shapes:
        parts = {"missing": missing, "unexpected": unexpected, "of another shape": shapes}
        listed = "; ".join(f"{len(keys)} {what}: {some_of(keys)}" for what, keys in parts.items() if keys)
        raise ValueError(f"checkpoint {file!r} does not fit timm's {name}: {listed}")
    model.load_state_dict(weights)
    return _describe(model, spec)


def _create_timm_model(name: str, **kwargs) -> nn.Module:
    import timm

    if not name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}" + (f"; close ones are {', '.join(close)}" if close else ""))
    return timm.create_model(name, **kwargs)


def read_weights(path: Path) -> dict[str, Tensor]:
    """State dict of a `.safetensors` file, or of a `.pth` file of timm, DeiT's authors or plain PyTorch.

    Raises:
        ValueError: there is no such file, or it cannot be read without running code.
    """
    if not path.is_file():
        raise ValueError(f"checkpoint {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, not a checkpoint, or a pickle that would run code
        # torch's own text recommends weights_only=False: never pass that on
        what = "it holds more than weights" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise ValueError(
            f"cannot read checkpoint {str(path)!r}: {what}. Only .safetensors, and .pth files of tensors and plain "
            "values, are read"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # the averaged weights first, as timm does
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"checkpoint {str(path)!r} holds no state dict")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in content.items()}


def _load_python(spec: str) -> FoundClassifier:
    """`python:<module>:<factory>`: the user's own code."""
    module_name, _, factory_name = spec.removeprefix("python:").partition(":")
    if not module_name or not factory_name:
        raise ValueError(f"model {spec!r}: expected python:<module>:<factory>")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"model {spec!r}: {first_line(error)}. The module must be on the PYTHONPATH") from error
    model = factory()
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {spec!r}: the factory returned a {type(model).__name__}, expected an nn.Module")
    return _describe(model, spec)


def _floats(values: Sequence[float] | None) -> tuple[float, ...] | None:
    return tuple(map(float, values)) if values else None


def first_line(error: Exception) -> str:
    """The first line of an error, without its type when it has a text."""
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


# --- what a classifier answers ---------------------------------------------------------------------------------------


def logits_of(output: Any) -> Tensor | None:
    """Logits from what a classifier may return: a tensor, an output with `logits`, a tuple that starts with them."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    elif hasattr(output, "logits"):
        output = output.logits
    return output if isinstance(output, Tensor) else None


def fingerprint(model: nn.Module) -> str:
    """SHA-256 of the weights and their names, its first 16 hexadecimal digits."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# --- class names ---------------------------------------------------------------------------------------------------


def class_names(id2label: Mapping[int, str] | None, keep_generic: bool = False) -> list[str] | None:
    """Names in class order; None when there are none, or only the LABEL_0, LABEL_1, ... that Transformers makes up."""
    if not id2label:
        return None
    by_class = {int(i): str(name) for i, name in id2label.items()}
    if sorted(by_class) != list(range(len(by_class))):
        keys = some_of([str(i) for i in sorted(by_class)], 5)
        raise ValueError(f"id2label must number the classes 0 to {len(by_class) - 1}, got the keys {keys}")
    names = [by_class[i] for i in range(len(by_class))]
    generic = all(name == f"LABEL_{i}" for i, name in enumerate(names))
    return names if keep_generic or not generic else None


def class_key(name: str) -> str:
    """What is left of a name when spellings differ: "sea_snake", "Sea snake, water snake" -> "sea snake"."""
    return name.replace("_", " ").split(",")[0].strip().casefold()


def class_order(own: list[str], wanted: list[str]) -> list[int] | None:
    """For each class that is wanted its index among a classifier's own; None when they are not the same classes.

    ImageNet's classes go by WordNet ids, by all their synonyms or by the first of them, and a few share a name, so
    names that are equal in place are accepted before any permutation is looked for.
    """
    for key in (str, class_key):
        ours, theirs = ([key(name) for name in _described(names)] for names in (wanted, own))
        if ours == theirs:
            return list(range(len(ours)))
        if len(set(theirs)) == len(theirs) and set(ours) == set(theirs) and len(ours) == len(theirs):
            index = {name: i for i, name in enumerate(theirs)}
            return [index[name] for name in ours]
    return None


def _described(names: list[str]) -> list[str]:
    """WordNet ids (n01440764) as their names, which timm knows; other names as they are."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    from timm.data import ImageNetInfo

    words = {}
    for subset in ("imagenet-21k-goog", "imagenet-1k"):  # the second has one class that the first lacks
        words |= ImageNetInfo(subset).label_descriptions(as_dict=True)
    return [words.get(name, name) for name in names]


def some_of(names: Sequence[str], count: int = 3) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")
