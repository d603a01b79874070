"""Export a trained classifier as one file that runs without hf_deit: ONNX (`.onnx`) or `torch.export` (`.pt2`).

The file maps normalised pixels to one tensor of logits, with the heads fused as the config says. The file also holds
config.json (class names, fusion) and preprocessor_config.json (how an image becomes pixels). Not here: quantisation
and running the file (docs/export.md), other formats of checkpoints (checkpoint_conversion.py).

Source: the documents of torch.export and torch.onnx.
"""

from __future__ import annotations

import copy
import json
import os
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification, PreTrainedModel
from transformers.image_processing_utils import BaseImageProcessor

from ..errors import UserError
from .configuration_deit import as_pair


ONNX_PACKAGES = ("onnx", "onnxruntime", "onnxscript")
TRACED_BATCH, CHECKED_BATCHES = 2, (1, 3)
MAX_DIFFERENCE = 1e-4  # of a logit; float32 sums in another order differ by about 1e-6


class _Fused(nn.Module):
    """The classifier with its fused logits as the only output."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        return self.model(pixel_values, return_dict=True).logits


def load_for_export(source: str | os.PathLike) -> tuple[PreTrainedModel, BaseImageProcessor]:
    """Load a DeiT or ViT classifier of hf_deit or stock, and its image processor, from a directory or the Hub.

    Raises:
        ValueError: the source cannot be read, is not such a classifier, or has an untrained head.
    """
    name = os.fspath(source)
    try:
        model, report = AutoModelForImageClassification.from_pretrained(source, output_loading_info=True)
        processor = AutoImageProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"cannot export {name!r}: {reason}. Expected a directory or Hub id with config.json, model.safetensors "
            "and preprocessor_config.json; recipes/convert_checkpoint.py makes one from other files"
        ) from error
    if model.config.model_type not in ("deit", "vit"):
        raise UserError(f"{name!r} holds a model of type {model.config.model_type!r}; expected 'deit' or 'vit'")
    if report["missing_keys"]:
        raise UserError(f"{name!r} is not trained: {', '.join(sorted(report['missing_keys']))} are missing")
    return model, processor


def export_model(model: PreTrainedModel, image_processor: BaseImageProcessor, path: str | os.PathLike) -> float:
    """Write a classifier to a `.onnx` or `.pt2` file, and compare the file with PyTorch.

    The graph maps `pixel_values` `(batch, channels, height, width)`, float32, normalised, to `logits`
    `(batch, classes)`, float32; the batch size is free, the image size is the config's. The graph does not depend on
    the model's precision and attention implementation, and the model stays unchanged. The texts of config.json and
    preprocessor_config.json become ONNX metadata, or `extra_files` of a `.pt2`, under these names. Paths of this
    machine are left out.

    Args:
        model: a classifier of hf_deit, or stock's DeiT or ViT.
        image_processor: the processor saved with the model; it does not become part of the graph.
        path: the file to write.

    Returns:
        The largest difference of a logit between the file and PyTorch, at batch sizes other than the traced one.

    Raises:
        ValueError: the path has another ending, the packages for ONNX are missing, or the file differs from PyTorch
            by more than 1e-4; the file is then removed.
    """
    path = Path(path)
    if path.suffix not in (".onnx", ".pt2"):
        raise UserError(f"cannot export to {str(path)!r}: the name must end in .onnx or .pt2")
    missing = [name for name in ONNX_PACKAGES if find_spec(name) is None]
    if path.suffix == ".onnx" and missing:
        raise UserError(
            f"exporting to ONNX needs {', '.join(missing)}: pip install 'hf_deit[export]', or export to .pt2"
        )
    model = copy.deepcopy(model).cpu().float().eval()
    # The ONNX exporter translates sdpa into more nodes than eager attention has.
    model.set_attn_implementation("eager" if path.suffix == ".onnx" else "sdpa")
    facts = _facts(model, image_processor)
    pixel_values = torch.zeros(TRACED_BATCH, model.config.num_channels, *as_pair(model.config.image_size))
    program = _trace(model, pixel_values)
    path.parent.mkdir(parents=True, exist_ok=True)
    write, load = (_write_onnx, _load_onnx) if path.suffix == ".onnx" else (_write_pt2, _load_pt2)
    write(program, path, facts)
    difference = _difference(model, load(path), pixel_values.shape[1:])
    if not difference <= MAX_DIFFERENCE:  # also where it is NaN
        path.unlink()
        raise UserError(
            f"the exported {path.name} differs from PyTorch by {difference:.1e}, more than {MAX_DIFFERENCE:g}: it was "
            "removed. Try the other format, or the versions of constraints.txt"
        )
    return difference


def _facts(model: PreTrainedModel, image_processor: BaseImageProcessor) -> dict[str, str]:
    """The texts of config.json and preprocessor_config.json, by these names."""
    config = model.config.to_dict()
    config.pop("_name_or_path", None)  # a path of this machine
    config["architectures"] = [type(model).__name__]
    return {"config.json": json.dumps(config), "preprocessor_config.json": image_processor.to_json_string()}


def _trace(model: PreTrainedModel, pixel_values: Tensor) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch")
    with torch.no_grad():
        program = torch.export.export(_Fused(model), (pixel_values,), dynamic_shapes=({0: batch},))
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # it names files of this machine
    return program


def _write_pt2(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    torch.export.save(program, path, extra_files=facts)


def _load_pt2(path: Path) -> Callable[[Tensor], Tensor]:
    return torch.export.load(path).module()


def _write_onnx(program: torch.export.ExportedProgram, path: Path, facts: dict[str, str]) -> None:
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass
    from onnxscript import opset20 as op
    from onnxscript.optimizer import optimize

    def logaddexp(one, other):
        """Replace the exporter's log(exp + exp), which is minus infinity if both heads rule a class out."""
        return op.Add(op.Max(one, other), op.Log(op.Add(op.Exp(op.Neg(op.Abs(op.Sub(one, other)))), 1.0)))

    exported = torch.onnx.export(
        program,
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
        custom_translation_table={torch.ops.aten.logaddexp.default: logaddexp},
        optimize=False,
        verbose=False,
    )
    # Join query, key and value in the file: by default large weights would be joined at each start of a session.
    optimize(exported.model, input_size_limit=sys.maxsize, output_size_limit=sys.maxsize)
    ClearMetadataAndDocStringPass()(exported.model)  # the exporter's notes on every node
    for weight in exported.model.graph.initializers.values():
        weight.shape = weight.type = None  # the weight has both; given twice, onnxruntime's quantiser fails
    exported.model.metadata_props.update(facts)
    exported.save(path)


def _load_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixel_values: torch.from_numpy(session.run(["logits"], {"pixel_values": pixel_values.numpy()})[0])


@torch.no_grad()
def _difference(model: PreTrainedModel, run: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> float:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(size, *shape, generator=generator) for size in CHECKED_BATCHES]
    differences = torch.cat([run(batch) - model(batch).logits for batch in batches])
    return differences.abs().max().item()  # NaN where one is
