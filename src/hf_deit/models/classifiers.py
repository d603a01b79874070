"""Any image classifier from a spec: a directory, a Hub id, a timm name, a Python factory or a module.

`find_classifier` loads the model of a spec, with its class names and the normalisation of its pixels. `new_classifier`
makes a model to train, of a kind that `find_classifier` reads back.

Not here: freezing the model and matching its classes (frozen_classifier.py).
"""

from __future__ import annotations

import difflib
import importlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from ..errors import UserError, first_line, some_of
from ..files import read_json
from .class_names import class_names
from .configuration_deit import as_pair
from .weight_files import check_attention, check_json_of, find_file, read_weights, stored_types


logger = logging.getLogger(__name__)

Spec = str | os.PathLike | nn.Module

ACCEPTED_FORMS = (
    "Accepted: a directory written by save_pretrained (config.json and model.safetensors), a Hub id such as "
    "timm/regnety_160.deit_in1k, timm:<name>, timm:<name>?checkpoint=<file.safetensors or .pth>, "
    "python:<module>:<factory>, or an nn.Module"
)


@dataclass
class FoundClassifier:
    """The model of a spec, and the facts known about its classes and pixels (None: unknown).

    Attributes:
        model: the network, in training or evaluation mode.
        name: the spec.
        names: class names in the order of the classes.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        image_size: `(height, width)` in pixels.
        fixed_size: True if the network accepts no other size.
        crop_ratio: share of the shorter side that the model's evaluation keeps, in (0, 1].
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
    """Load the classifier of one spec; see `ACCEPTED_FORMS`.

    Weights are read from safetensors, or from `.pth` files without unpickling code; code that comes with a checkpoint
    never runs. `python:<module>:<factory>` is the user's own code: the factory, a function without arguments in a
    module on the PYTHONPATH, is called.

    Raises:
        ValueError: the spec cannot be read, or weights are missing.
    """
    if isinstance(spec, torch.export.ExportedProgram):
        spec = spec.module()
    if isinstance(spec, nn.Module):
        return _describe(spec, type(spec).__name__)
    if not isinstance(spec, (str, os.PathLike)):
        raise UserError(f"cannot read a model from a {type(spec).__name__}. {ACCEPTED_FORMS}")
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
) -> Any:
    """Make a trainable Transformers classifier for new classes; `load_teacher` reads its `save_pretrained` directory.

    Args:
        spec: `timm:<name>` starts from random weights; a directory or a Hub id (`timm/<name>` for timm's) starts from
            trained weights, with a new head if the number of classes differs.
        id2label: names of the classes to learn.
        mean: the mean that the training pixels are normalised with; kept in the config of a timm model. A model of
            another kind needs an image processor saved in its directory.
        std: the standard deviation of that normalisation; kept likewise.
        image_size: size of the training pixels; kept likewise.
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
        # The wrapper initialises every layer from normal(0, 0.02); a convnet learns faster from timm's own init.
        initial = _create_timm_model(name, num_classes=len(names), **(model_args or {})).state_dict()
        config = TimmWrapperConfig(
            architecture=name, num_labels=len(names), model_args=model_args, pretrained_cfg=pixels, **labels
        )
        model = AutoModelForImageClassification.from_config(config)
        model.timm_model.load_state_dict(initial)
        return model
    if model_args:
        raise UserError(f"model_args {model_args} apply to timm:<name> only, got {name!r}")
    model, _ = _from_pretrained(name, num_labels=len(names), **labels)
    if model.config.model_type == "timm_wrapper":
        model.config.label_names = names  # otherwise the old names are saved, and these lost at the next load
        model.config.pretrained_cfg = {**(getattr(model.config, "pretrained_cfg", None) or {}), **pixels}
    return model


# --- reading a spec --------------------------------------------------------------------------------------------------


def _describe(model: nn.Module, name: str) -> FoundClassifier:
    """Read class names and pixel normalisation from a Transformers config or timm's `pretrained_cfg`."""
    config = getattr(model, "config", None)
    inner = getattr(model, "timm_model", model)
    # Inside a TimmWrapper `pretrained_cfg` describes the architecture; the wrapper's config describes the training.
    pixels = {
        **(_mapping(getattr(inner, "pretrained_cfg", None)) or _mapping(getattr(inner, "default_cfg", None))),
        **_mapping(getattr(config, "pretrained_cfg", None)),
    }
    size = pixels.get("input_size", [None])[1:] or getattr(config, "image_size", None)
    patches = getattr(inner, "patch_embed", None)
    if getattr(patches, "strict_img_size", False):  # timm's, made with another img_size than its pretrained_cfg says
        size = getattr(patches, "img_size", None) or size
    return FoundClassifier(
        model,
        name,
        names=class_names(getattr(config, "id2label", None)),
        mean=_per_channel(name, "mean", pixels.get("mean")),
        std=_per_channel(name, "std", pixels.get("std")),
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
        raise UserError(
            f"model {spec!r} has untrained weights: {some_of(fresh)} are not in its checkpoint and have "
            "random values. Fine-tune the model first: recipes/run_teacher.py"
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
        ignore_mismatched_sizes=True,  # the callers decide about new heads
        **kwargs,
    )


def load_pretrained(model_class: type, spec: str, **kwargs) -> Any:
    """Call `model_class.from_pretrained` on a directory or Hub id, with safetensors only and without foreign code.

    The weights are float32, whatever type they are stored in, unless `dtype` is given: small steps vanish in half
    precision.

    Raises:
        ValueError: the model does not exist or cannot be read; the message is one line for every kind of error.
    """
    path = Path(spec).expanduser()
    if path.is_file():
        raise UserError(f"model {spec!r} is a file, not a directory: {_what_to_do_with_a_file(path)}")
    if path.is_dir():
        _check_directory(spec, path)
        spec = str(path)
    elif path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") > 1:
        raise UserError(f"model {spec!r} does not exist: there is no such directory{_did_you_mean(path)}")
    check_attention(kwargs.get("attn_implementation"), "attn_implementation")
    check_json_of(spec)
    level = logging.INFO if "dtype" in kwargs else logging.WARNING  # a caller that names a type knows it
    kwargs.setdefault("dtype", torch.float32)
    kwargs |= _arguments_for_timm(spec)
    try:
        model = model_class.from_pretrained(spec, use_safetensors=True, trust_remote_code=False, **kwargs)
    except Exception as error:  # Transformers, huggingface_hub and safetensors raise a dozen unrelated types
        why = first_line(error).rstrip(".")
        if not path.is_dir():
            why = f"there is no such directory{_did_you_mean(path)}, and from the Hub: {why}"
        raise UserError(f"cannot load model {spec!r}: {why}") from error
    if kwargs["dtype"] == torch.float32 and (stored := stored_types(spec) - {"float32"}):
        types = " and ".join(sorted(stored))
        logger.log(level, "model %s is stored in %s and was loaded in float32, to train in it", spec, types)
    return model


def _arguments_for_timm(spec: str) -> dict[str, dict]:
    """What to change in the config of a network that timm itself saved (`save_for_hf` of 1.0.31).

    It also stores the number of classes among the arguments of `create_model`, and Transformers' wrapper then gives it
    twice, which is a TypeError.
    """
    try:
        arguments = read_json(find_file(spec, "config.json")).get("model_args")
    except UserError:  # Transformers says what is wrong
        return {}
    if not isinstance(arguments, Mapping) or "num_classes" not in arguments:
        return {}
    return {"model_args": {name: value for name, value in arguments.items() if name != "num_classes"}}


def _check_directory(spec: str, path: Path) -> None:
    """Refuse a directory that holds no model, or one whose weights are stored in a form that only a package reads."""
    if not (path / "config.json").is_file():
        inside = sorted(child.parent.name for child in path.glob("*/config.json"))
        hint = f"; {spec.rstrip('/')}/{inside[-1]} has one" if inside else ""
        raise UserError(
            f"model directory {spec!r} has no config.json{hint}. Give a directory written by save_pretrained "
            "(config.json and model.safetensors)"
        )
    config = read_json(path / "config.json")
    quantised = config.get("quantization_config") if isinstance(config, dict) else None
    if quantised:
        method = quantised.get("quant_method", "method not stated") if isinstance(quantised, Mapping) else quantised
        raise UserError(
            f"the weights of model {spec!r} are stored quantised ({method}), and only that method's own package reads "
            "them: give the checkpoint that was quantised, or return the loaded network from python:<module>:<factory>"
        )


def _what_to_do_with_a_file(path: Path) -> str:
    factory = "return the loaded network from python:<module>:<factory>"
    if path.suffix == ".onnx":
        return f"an ONNX graph runs in onnxruntime, not in PyTorch; wrap its session in an nn.Module and {factory}"
    if path.suffix in (".pt2", ".ptc", ".jit"):
        return f"a program may run code when it is loaded, so only your own code loads it: {factory}"
    return f"name the network that the weights are for, timm:<name>?checkpoint={path}, or {factory}"


def _did_you_mean(path: Path) -> str:
    """Name the existing path that is nearest to one that does not exist, if one is near."""
    missing = next(part for part in reversed((path, *path.parents)) if not part.exists())
    try:
        beside = [child.name for child in missing.parent.iterdir() if child.is_dir()]
    except OSError:
        return ""
    close = difflib.get_close_matches(missing.name, beside, n=1)
    return f" (did you mean {str(missing.parent / close[0] / path.relative_to(missing))!r}?)" if close else ""


def _read_image_processor(found: FoundClassifier, spec: str) -> None:
    """Fill in mean, std and crop ratio from the image processor saved with a Transformers model."""
    import transformers
    from transformers import AutoImageProcessor, DeiTImageProcessor

    # A TimmWrapper's own config is complete; run_teacher.py also saves the processor of its evaluation.
    in_config = found.model.config.model_type == "timm_wrapper"
    path = os.path.expanduser(spec)
    try:
        stored, _ = DeiTImageProcessor.get_image_processor_dict(path)
        kind = stored.get("image_processor_type") or stored.get("feature_extractor_type") or ""
        if in_config and kind.startswith("TimmWrapper"):
            return
        # The Auto class reads the config instead.
        processor_class = getattr(transformers, kind, DeiTImageProcessor) if in_config else AutoImageProcessor
        processor = processor_class.from_pretrained(path, trust_remote_code=False)
    except OSError:
        if not in_config:
            logger.warning("%s has no preprocessor_config.json: using the student's mean and std, or ImageNet's", spec)
        return
    except Exception as error:  # of another kind, damaged, or with code of its own
        raise UserError(f"cannot read the image processor of model {spec!r}: {first_line(error)}") from error
    found.mean, found.std = processor_pixels(processor, spec)
    settings = processor.to_dict()
    size, crop = settings.get("size") or {}, settings.get("crop_size") or {}
    shorter = size.get("shortest_edge") or size.get("height")
    found.crop_ratio = settings.get("crop_pct")  # of ConvNeXt's
    if found.crop_ratio is None and settings.get("do_resize") and shorter:
        found.crop_ratio = min(1.0, crop.get("height", shorter) / shorter) if settings.get("do_center_crop") else 1.0


def processor_pixels(processor: Any, spec: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Find what an image processor does to pixels, by running it.

    Many of Transformers' processors have an arithmetic of their own (EfficientNet's normalises twice).
    A random image without resizing and cropping shows mean and standard deviation; a plain image of one colour, with
    both, shows whether anything is padded.

    Args:
        processor: of any class of Transformers.
        spec: of the model, for messages.

    Returns:
        Mean and standard deviation per channel, of pixels in [0, 1].

    Raises:
        ValueError: the processor does more than to shift and scale each channel, or is not for single RGB images.
    """
    random = np.random.default_rng(0)
    noise = random.integers(0, 256, (64, 64, 3), dtype=np.uint8)
    plain = np.full((64, 64, 3), (40, 120, 200), dtype=np.uint8)
    steps = {name: False for name in ("do_resize", "do_center_crop") if hasattr(processor, name)}
    try:
        seen, whole = (
            np.asarray(processor(images=Image.fromarray(image), return_tensors="pt", **options)["pixel_values"], float)
            for image, options in ((noise, steps), (plain, {}))
        )
    except Exception as error:  # of audio, pairs of images, patches: may raise anything
        raise _processor_refusal(processor, spec, f"it cannot read one image ({first_line(error)})") from error
    if seen.shape != (1, 3, 64, 64) or whole.ndim != 4:
        raise _processor_refusal(processor, spec, f"it makes pixels of shape {seen.shape} of a 64x64 image")
    image, seen = (noise / 255).reshape(-1, 3), seen[0].reshape(3, -1).T
    stated = _stated_pixels(processor)
    fits = [np.polyfit(image[:, channel], seen[:, channel], 1) for channel in range(3)]
    measured = [_rounded(-shift / scale) for scale, shift in fits], [_rounded(1 / scale) for scale, _ in fits]
    for mean, std in (stated, measured):
        if mean is None or std is None or not (np.isfinite([*mean, *std]).all() and min(std) > 0):
            continue
        tolerance = 1e-3 * np.maximum(1, 1 / np.array(std))
        rounding = 2 / 255 / np.array(std)[:, None, None]  # of a resized image
        colour = (plain[0, 0] / 255 - mean) / std
        if (np.abs((image - mean) / std - seen) > tolerance).any():
            continue
        if (np.abs(whole[0] - colour[:, None, None]) > rounding + 1e-3).any():
            raise _processor_refusal(processor, spec, "it pads images, or changes their colours by the size")
        return tuple(map(float, mean)), tuple(map(float, std))
    flips = " (BGR)" if np.abs(np.corrcoef(image[:, 0], seen[:, 2])[0, 1]) > 0.99 else ""
    raise _processor_refusal(processor, spec, f"it does more than shift and scale red, green and blue{flips}")


def _stated_pixels(processor: Any) -> tuple:
    """Mean and std by a processor's settings, as most processors use them; these are exact, measured ones are not."""
    settings = processor.to_dict()
    # A processor normalises pixels of 0..255 times rescale_factor; mean and std here are of pixels in [0, 1].
    unit = 255 * (settings.get("rescale_factor") or 0) if settings.get("do_rescale") else 255.0
    mean, std = (0.0,) * 3, (1.0,) * 3
    if settings.get("do_normalize"):
        mean, std = settings.get("image_mean"), settings.get("image_std")
    if not unit or any(not isinstance(values, (tuple, list)) or len(values) != 3 for values in (mean, std)):
        return None, None
    return tuple(m / unit for m in mean), tuple(s / unit for s in std)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}") if abs(value) > 1e-6 else 0.0


def _processor_refusal(processor: Any, spec: str, why: str) -> UserError:
    return UserError(
        f"the image processor of model {spec!r}, {type(processor).__name__}, cannot be expressed as a mean and a std: "
        f"{why}. Wrap the model with its arithmetic in python:<module>:<factory>"
    )


def _load_timm(spec: str) -> FoundClassifier:
    """Load `timm:<name>` with timm's published weights, or `timm:<name>?checkpoint=<file>`."""
    name, _, query = spec.removeprefix("timm:").partition("?")
    key, _, file = query.partition("=")
    if query and (key != "checkpoint" or not file):
        raise UserError(f"model {spec!r}: expected timm:<name>?checkpoint=<file>, got {query!r} after '?'")
    if file:
        return _load_timm_checkpoint(spec, name, file)
    from timm.data import ImageNetInfo, infer_imagenet_subset

    try:
        model = _create_timm_model(name, pretrained=True)
    except ValueError:
        raise
    except Exception as error:  # no weights, no network
        raise UserError(
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
        raise UserError(f"checkpoint {file!r} does not fit timm's {name}: {listed}")
    model.load_state_dict(weights)
    return _describe(model, spec)


def _create_timm_model(name: str, **kwargs) -> nn.Module:
    import timm

    if not name.startswith(("hf-hub:", "hf_hub:")) and not timm.is_model(name.split(".")[0]):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise UserError(f"timm has no model {name!r}" + (f"; close ones are {', '.join(close)}" if close else ""))
    return timm.create_model(name, **kwargs)


def _load_python(spec: str) -> FoundClassifier:
    """Call the user's own factory, `python:<module>:<factory>`."""
    module_name, _, factory_name = spec.removeprefix("python:").partition(":")
    if not module_name or not factory_name:
        raise UserError(f"model {spec!r}: expected python:<module>:<factory>")
    try:
        factory = getattr(importlib.import_module(module_name), factory_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"model {spec!r}: {first_line(error)}. The module must be on the PYTHONPATH") from error
    model = factory()
    if isinstance(model, torch.export.ExportedProgram):
        model = model.module()
    if not isinstance(model, nn.Module):
        raise UserError(f"model {spec!r}: the factory returned a {type(model).__name__}, expected an nn.Module")
    return _describe(model, spec)


def _mapping(stated: Any) -> dict:
    """timm's pretrained_cfg as a dictionary; something else of that name is not timm's."""
    if is_dataclass(stated) and not isinstance(stated, type):
        stated = asdict(stated)
    return dict(stated) if isinstance(stated, Mapping) else {}


def _per_channel(model: str, what: str, values: Any) -> tuple[float, ...] | None:
    if values is None:
        return None
    try:
        floats = tuple(map(float, values))
    except (TypeError, ValueError):
        floats = ()
    if len(floats) != 3 or not np.isfinite(floats).all() or (what == "std" and min(floats) <= 0):
        raise UserError(
            f"model {model!r}: {what} in its pretrained_cfg is {values!r}, expected three numbers of red, green and "
            "blue in [0, 1]. Correct pretrained_cfg"
        )
    if max(floats) > 1:
        logger.warning("model %s: %s %s in its pretrained_cfg is taken for pixels in [0, 1]", model, what, floats)
    return floats


# --- outputs ---------------------------------------------------------------------------------------------------------


def logits_of(output: Any) -> Tensor | None:
    """The logits in a classifier's output: a tensor, an output with `logits`, or a tuple that starts with logits."""
    if isinstance(output, Mapping):
        output = output.get("logits")
    elif isinstance(output, (tuple, list)) and output:
        output = output[0]
    elif hasattr(output, "logits"):
        output = output.logits
    return output if isinstance(output, Tensor) else None
