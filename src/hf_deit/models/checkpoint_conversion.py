"""Convert weights between the Hub's names and those of the authors and timm, in both directions.

The authors' `.pth` files and timm's `deit_*`, `deit_*_distilled_*` and DeiT-shaped `vit_*` use the same tensor names,
with query, key and value in one tensor (the "original" format below). Files are read as weights only. Every tensor is
accounted for: an error names the tensors that a DeiT lacks or does not have.

Not here: the network (modeling_deit.py, whose `from_original` and `to_original` call this file), and new heads for
other classes (`from_pretrained(..., num_labels=...)` after the conversion).

Source: facebookresearch/deit models.py; timm/models/deit.py and vision_transformer.py; the names stored in the Hub's
`facebook/deit-*` repositories.
"""

from __future__ import annotations

import logging
import math
import os
import pickle
import re
from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..errors import UserError
from ..files import read_json, read_text
from .configuration_deit import STOCK_VALUES, DeiTConfig, as_pair
from .weight_files import find_file, read_weights, state_dict_of


logger = logging.getLogger(__name__)

Shape = tuple[int, ...]

# Fields that no tensor shows and all models in the original format share. A converted model must predict as before, so
# its fusion is the mean of the logits, as in the authors' code and timm, and not the paper's softmax.
ORIGINAL_VALUES = {"layer_norm_eps": 1e-6, "hidden_act": "gelu", "head_fusion": "logits"}
# Table 1 has 64 dimensions per head, and so has every ViT of these widths in timm; some of other widths do not.
HEAD_WIDTH, WIDTHS = 64, range(192, 1024 + 1)
HUB_PREFIXES = ("deit.", "vit.")  # of distilled and of plain models; the Hub stores the latter as a ViT
FILE_KEYS = ("architectures", "model_type", "dtype", "torch_dtype", "transformers_version", "_name_or_path")
MOST_NAMES = 24  # of a kind in a message; only an unrelated network has more
SHARD_INDEX = "model.safetensors.index.json"
WEIGHT_FILES = ("model.safetensors", SHARD_INDEX, "pytorch_model.bin")


class Checkpoint(NamedTuple):
    """A model under the Hub's names, and the normalisation of its pixels where the source states it."""

    config: DeiTConfig
    weights: dict[str, Tensor]
    image_mean: list[float] | None = None
    image_std: list[float] | None = None


class Row(NamedTuple):
    """One tensor of the original format: the stack, along the first dimension, of the Hub's tensors `hub`."""

    original: str
    hub: tuple[str, ...]
    shape: Shape

    def named(self, prefix: str | None) -> dict[str, Shape]:
        """Names and shapes with the Hub's `prefix`, or in the original format if `prefix` is None."""
        if prefix is None:
            return {self.original: self.shape}
        part = self.shape[0] // len(self.hub), *self.shape[1:]
        return {re.sub(r"^backbone\.", prefix, name): part for name in self.hub}


def layout(config: DeiTConfig) -> list[Row]:
    """Every tensor of the plain or the distilled classifier that `config` describes."""
    width, expanded, classes = config.hidden_size, config.intermediate_size, config.num_labels
    distilled = config.use_distillation_token
    rows = []

    def add(original: str, hub: str, *shape: int) -> None:
        rows.append(Row(original, (hub,), shape))

    def add_module(original: str, hub: str | tuple[str, ...], *shape: int, bias: bool = True) -> None:
        names = (hub,) if isinstance(hub, str) else hub
        for part, part_shape in (("weight", shape), ("bias", shape[:1]))[: 1 + bias]:
            rows.append(Row(f"{original}.{part}", tuple(f"{name}.{part}" for name in names), part_shape))

    add("cls_token", "backbone.embeddings.cls_token", 1, 1, width)
    if distilled:
        add("dist_token", "backbone.embeddings.distillation_token", 1, 1, width)
    add("pos_embed", "backbone.embeddings.position_embeddings", 1, config.num_tokens, width)
    patch = config.num_channels, *as_pair(config.patch_size)
    add_module("patch_embed.proj", "backbone.embeddings.patch_embeddings.projection", width, *patch)
    for number in range(config.num_hidden_layers):
        block, layer = f"blocks.{number}", f"backbone.encoder.layer.{number}"
        query_key_value = tuple(f"{layer}.attention.attention.{part}" for part in ("query", "key", "value"))
        add_module(f"{block}.norm1", f"{layer}.layernorm_before", width)
        add_module(f"{block}.attn.qkv", query_key_value, 3 * width, width, bias=config.qkv_bias)
        add_module(f"{block}.attn.proj", f"{layer}.attention.output.dense", width, width)
        add_module(f"{block}.norm2", f"{layer}.layernorm_after", width)
        add_module(f"{block}.mlp.fc1", f"{layer}.intermediate.dense", expanded, width)
        add_module(f"{block}.mlp.fc2", f"{layer}.output.dense", width, expanded)
    add_module("norm", "backbone.layernorm", width)
    add_module("head", "cls_classifier" if distilled else "classifier", classes, width)
    if distilled:
        add_module("head_dist", "distillation_classifier", classes, width)
    return rows


def read_checkpoint(
    source: str | os.PathLike | Mapping[str, Tensor], *, image_size: int | tuple[int, int] | None = None, **config: Any
) -> Checkpoint:
    """Read a DeiT classifier of any format; the config is inferred from the tensors.

    Width, depth, patch, channels, classes and the side of the images are inferred; the grid of patches is assumed to
    be square. A `config.json` next to the weights takes precedence. No tensor shows the number of heads: 64 dimensions
    per head are assumed, as in Table 1, for widths where all known models have them (192 to 1024, multiples of 64).

    Fields that a file does not show have the values of its origin: layer-norm epsilon 1e-6, GELU, and
    `head_fusion="logits"`, the mean that the authors' code and timm compute, so that a converted model keeps its
    published accuracy; pass `head_fusion="softmax"` for the paper's. Stochastic depth, which acts in training only, is
    the paper's 0.1 for a file, and the value in `config.json` for a Hub model.

    Args:
        source: a `.safetensors` or `.pth` file in the authors', timm's or the Hub's names; a state dict, also within
            `{"model": ...}`; a directory or Hub id with `config.json` and weights, in one file or in shards, of type
            `deit`, `vit` or timm's. A training checkpoint's averaged weights (`model_ema`) come first, if there are
            any.
        image_size: `(height, width)` in pixels of the images of this checkpoint, needed if its grid is not square.
            Other values are ignored here; resize the model afterwards.
        config: any field of [`DeiTConfig`], in place of the inferred or stored value.

    Returns:
        The config; the weights under the Hub's names, copies of the same dtype; mean and standard deviation per
        channel of pixels in [0, 1], None where unknown.

    Raises:
        ValueError: the source cannot be read without running code, or the network is not a plain or distilled DeiT
            classifier; the message lists the tensors that are missing, unexpected or of another shape.
    """
    weights, stored, pixels = _read(source)
    name = "the state dict" if isinstance(source, Mapping) else repr(os.fspath(source))
    prefix = next((prefix for prefix in HUB_PREFIXES if any(key.startswith(prefix) for key in weights)), None)

    # First infer the structure from names and numbers of dimensions, then the sizes from shapes.
    layers = {match[1] for key in weights if (match := re.match(r"(?:blocks|\w+\.encoder\.layer)\.(\d+)\.", key))}
    fields = {
        "num_hidden_layers": max(len(layers), 1),
        "use_distillation_token": any("dist" in key for key in weights),
        **(stored or {}),
        **config,
    }
    structure = ("num_hidden_layers", "use_distillation_token", "qkv_bias")
    rows = layout(DeiTConfig(**{key: fields[key] for key in structure if key in fields}))
    _compare(name, weights, rows, prefix, rank_only=True)
    # Separate query, key and value have another shape than joined ones, but that shape is not needed.
    shapes = {row.original: weights[next(iter(row.named(prefix)))].shape for row in rows}
    fields = _sizes(name, shapes, image_size, fields) | fields
    if stored is None:
        fields = ORIGINAL_VALUES | fields
        if "num_attention_heads" not in fields:
            fields["num_attention_heads"] = _heads(name, fields["hidden_size"])
    if fields.get("id2label"):
        names, classes = fields["id2label"], fields.pop("num_labels")
        if len(names) != classes:
            raise UserError(f"{name} has {classes} classes, but {len(names)} class names")
        fields["label2id"] = {label: int(number) for number, label in names.items()}
    model_config = DeiTConfig(**fields)
    rows = layout(model_config)
    _compare(name, weights, rows, prefix)
    converted = {}
    for row in rows:
        parts = [weights[name] for name in row.named(prefix)]
        if prefix is None:
            parts = parts[0].chunk(len(row.hub))
        # Copy: parts of one tensor cannot be saved separately, and training must not change the caller's tensors.
        copies = (part.detach().clone() for part in parts)
        converted |= zip(row.named(_hub_prefix(model_config)), copies, strict=True)
    types = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in converted.values()})
    if types != ["float32"]:
        logger.warning("%s is stored in %s, and stays so; train it in float32", name, " and ".join(types))
    return Checkpoint(model_config, converted, *pixels)


def _hub_prefix(config: DeiTConfig) -> str:
    return HUB_PREFIXES[0 if config.use_distillation_token else 1]


def original_weights(weights: Mapping[str, Tensor], config: DeiTConfig) -> dict[str, Tensor]:
    """A classifier's state dict under the names of the authors and timm, with query, key and value joined.

    One warning names the fields that no tensor shows and that the authors' code and timm assume to be different.

    Args:
        weights: state dict of a plain [`DeiTForImageClassification`] or a [`DeiTForImageClassificationWithTeacher`].
        config: the model's configuration.

    Returns:
        Tensors of the same dtype, detached; they share memory with the model where possible, as in a state dict.

    Raises:
        ValueError: the original format does not have such a model (one head and a distillation token), or the
            activation is not GELU.
    """
    rows, prefix = layout(config), _hub_prefix(config)
    _compare("the model", weights, rows, prefix)
    if config.hidden_act != ORIGINAL_VALUES["hidden_act"]:
        raise UserError(f"hidden_act is {config.hidden_act!r}; the authors' and timm's DeiT have 'gelu'")
    differing = []
    if config.layer_norm_eps != ORIGINAL_VALUES["layer_norm_eps"]:
        differing.append(f"layer_norm_eps {config.layer_norm_eps:g} (there 1e-6)")
    if config.hidden_size != HEAD_WIDTH * config.num_attention_heads:
        differing.append(f"num_attention_heads {config.num_attention_heads} ({HEAD_WIDTH} dimensions each in Table 1)")
    if config.use_distillation_token and config.head_fusion != ORIGINAL_VALUES["head_fusion"]:
        differing.append(f"head_fusion {config.head_fusion!r} (there the mean of both heads' logits)")
    if differing:
        logger.warning("the weights alone do not carry %s", ", ".join(differing))
    joined = {row.original: [weights[name].detach() for name in row.named(prefix)] for row in rows}
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in joined.items()}


def write_original(weights: Mapping[str, Tensor], path: str | os.PathLike) -> None:
    """Write the result of `to_original`, for timm's `checkpoint_path` or the authors' `--resume`.

    Args:
        weights: from [`original_weights`].
        path: file name that ends in `.safetensors`, or in `.pth` for the authors' `{"model": state dict}`.

    Raises:
        ValueError: the name has another ending.
    """
    path = Path(path)
    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    if path.suffix not in (".safetensors", ".pth"):
        raise UserError(f"cannot write {str(path)!r}: the name must end in .safetensors, or in .pth for the authors'")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pth":
        torch.save({"model": weights}, path)
    else:
        save_file(weights, path, metadata={"format": "pt"})


def read_class_names(path: str | os.PathLike) -> dict[int, str]:
    """Read `id2label` from a text file of class names, one per line, in the order of the classes."""
    try:
        names = read_text(path).splitlines()
    except UserError as error:
        raise UserError(f"class names {error}") from error
    names = [name.strip() for name in names if name.strip()]
    if not names:
        raise UserError(f"class names {str(path)!r} are empty: write one name per line, in the order of the classes")
    return dict(enumerate(names))


# --- Reading -----------------------------------------------------------------------------------------------------


def _read(source) -> tuple[Mapping[str, Tensor], dict | None, tuple]:
    """Read weights under the source's names, the fields of a Hub config (or None), mean and standard deviation."""
    if isinstance(source, Mapping):
        return state_dict_of(source, "the dictionary"), None, ()
    path = Path(source).expanduser()
    if path.is_file() or path.suffix in (".safetensors", ".pth", ".pt", ".bin"):
        return _read_file(path), None, ()
    where = str(path) if path.is_dir() else os.fspath(source)
    stored = _read_json(where, "config.json")
    if "architecture" in stored:  # timm's config names the network and its normalisation
        pixels = stored.get("pretrained_cfg", {})
        return _read_folder(where), None, (pixels.get("mean"), pixels.get("std"))
    if stored.get("model_type") not in ("deit", "vit"):
        raise UserError(f"{where!r} holds a model of type {stored.get('model_type')!r}; expected 'deit' or 'vit'")
    try:
        processor = _read_json(where, "preprocessor_config.json")
    except ValueError as error:
        logger.info("%s; mean and standard deviation are unknown", error)
        processor = {}
    fields = {key: value for key, value in (STOCK_VALUES | stored).items() if key not in FILE_KEYS}
    fields["use_distillation_token"] &= stored["model_type"] == "deit"
    return _read_folder(where), fields, (processor.get("image_mean"), processor.get("image_std"))


def _read_folder(where: str) -> dict[str, Tensor]:
    """Read the weights of a directory or Hub repository, in one file or in shards."""
    file = Path(find_file(where, *WEIGHT_FILES))
    if file.name != SHARD_INDEX:
        return _read_file(file)
    weights = {}
    for shard in set(_read_json(where, SHARD_INDEX).get("weight_map", {}).values()):
        weights |= _read_file(Path(find_file(where, shard)))
    return weights


def _read_file(path: Path) -> dict[str, Tensor]:
    try:
        return read_weights(path)
    except ValueError as error:
        if not isinstance(error.__cause__, pickle.UnpicklingError):
            raise
        raise UserError(
            f"{error}. If you trust the code in the checkpoint, save its tensors alone: "
            "safetensors.torch.save_file(model.state_dict(), 'weights.safetensors')"
        ) from error


def _read_json(where: str, name: str) -> dict:
    try:
        return read_json(find_file(where, name))
    except ValueError as error:
        raise UserError(f"{name} of {where!r} cannot be read: {error}") from error


# --- Inferring and checking --------------------------------------------------------------------------------------


def _sizes(name: str, shapes: Mapping[str, Shape], image_size: int | tuple[int, int] | None, known: dict) -> dict:
    """The fields of a config that follow from shapes."""
    width, channels, *patch = shapes["patch_embed.proj.weight"]
    if "image_size" not in known:
        patches = shapes["pos_embed"][1] - (2 if "dist_token" in shapes else 1)
        side = math.isqrt(max(patches, 0))
        wanted = [] if image_size is None else [size // part for size, part in zip(as_pair(image_size), patch)]
        grid = wanted if side**2 != patches and math.prod(wanted) == patches else [side, side]
        if math.prod(grid) != patches:
            raise UserError(
                f"{name} has positions for {patches} patches, not a square number: pass image_size=(height, width)"
            )
        known = known | {"image_size": _one_if_equal([count * part for count, part in zip(grid, patch)])}
    return {
        "hidden_size": width,
        "intermediate_size": shapes["blocks.0.mlp.fc1.weight"][0],
        "num_channels": channels,
        "patch_size": _one_if_equal(patch),
        "image_size": known["image_size"],
        "num_labels": shapes["head.weight"][0],
    }


def _one_if_equal(pair: list[int]) -> int | tuple[int, int]:
    return pair[0] if pair[0] == pair[1] else tuple(pair)


def _heads(name: str, width: int) -> int:
    if width not in WIDTHS or width % HEAD_WIDTH:
        raise UserError(
            f"{name} is {width} wide, and no tensor shows its number of attention heads: pass num_attention_heads. "
            f"{HEAD_WIDTH} dimensions per head are assumed only for multiples of {HEAD_WIDTH} from {WIDTHS[0]} to "
            f"{WIDTHS[-1]}"
        )
    return width // HEAD_WIDTH


def _compare(
    name: str, weights: Mapping[str, Tensor], rows: list[Row], prefix: str | None, rank_only: bool = False
) -> None:
    """Refuse weights that are not exactly the tensors of `rows`; the message names the differences."""
    expected = {key: shape for row in rows for key, shape in row.named(prefix).items()}
    wrong = []
    for key in expected.keys() & weights.keys():
        got, wanted = tuple(weights[key].shape), expected[key]
        if rank_only and len(got) != len(wanted):
            wrong.append(f"{key} {got} instead of {len(wanted)} dimensions")
        elif not rank_only and got != wanted:
            wrong.append(f"{key} {got} instead of {wanted}")
    kinds = {
        "missing": _by_block(expected.keys() - weights.keys()),
        "unexpected": _by_block(weights.keys() - expected.keys()),
        "of another shape": sorted(wrong),
    }
    if any(kinds.values()):
        shortened = {kind: names[:MOST_NAMES] for kind, names in kinds.items()}
        for kind, names in kinds.items():
            shortened[kind] += [f"and {len(names) - MOST_NAMES} more"] * (len(names) > MOST_NAMES)
        listed = "; ".join(f"{kind}: {', '.join(names)}" for kind, names in shortened.items() if names)
        kind = "distilled" if any(row.original == "dist_token" for row in rows) else "plain"
        raise UserError(f"{name} does not fit a {kind} DeiT classifier. Tensors {listed}")


def _by_block(names: Collection[str]) -> list[str]:
    """`blocks.*.ls1.gamma (0, 1, 2)` for the same tensor of several blocks; other names unchanged."""
    groups = defaultdict(dict)
    for name in names:
        number = re.search(r"\.(\d+)\.", name)
        groups[re.sub(r"\.\d+\.", ".*.", name, count=1)][int(number[1]) if number else -1] = name
    single = [name for group in groups.values() if len(group) == 1 for name in group.values()]
    several = [f"{key} ({', '.join(map(str, sorted(group)))})" for key, group in groups.items() if len(group) > 1]
    return sorted(single) + sorted(several)
