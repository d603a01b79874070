"""Read weights from a file without running code, and compute the fingerprint of weights."""

from __future__ import annotations

import argparse
import hashlib
import io
import logging
import os
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.hub import cached_file

from ..errors import UserError, first_line, printable, some_of
from ..files import read_json


logger = logging.getLogger(__name__)


# Where checkpoints keep the weights; the averaged ones come first, as in timm.
CONTAINERS = ("state_dict_ema", "model_ema", "ema_state_dict", "state_dict", "model", "model_state_dict", "net")
WRAPPERS = r"^(module\.|_orig_mod\.)+"  # of DDP and torch.compile
# How files begin that are taken for checkpoints, and what they are.
NOT_WEIGHTS = {
    b"version https://git-lfs": "it is a Git LFS pointer, not the file itself; run git lfs pull",
    b"<": "it is a web page or XML, not a checkpoint; download the file itself",
    b"{": "it is JSON text, not a checkpoint; give the file of the weights",
    b"\x89HDF": "it is an HDF5 file, as of Keras; convert it to .safetensors",
    b"\x1f\x8b": "it is compressed by gzip; unpack it",
    b"\x93NUMPY": "it is a NumPy array; save a state dict",
}


# Attention by the names of Transformers' own code; any other name is that of a kernel, code that would be downloaded.
ATTENTION = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3", "flash_attention_4")
_INDEX = "model.safetensors.index.json"
_JSON_FILES = ("config.json", "preprocessor_config.json", "processor_config.json", _INDEX)


def check_attention(name: Any, where: str) -> None:
    """Refuse an attention implementation that is not Transformers' own.

    Args:
        name: as given: a name, or names by part of the network; None is the default.
        where: it stands, for the message.

    Raises:
        UserError: it is none of [`ATTENTION`].
    """
    for one in name.values() if isinstance(name, Mapping) else [name]:
        if one is not None and one not in ATTENTION:
            raise UserError(
                f"{where} is {printable(repr(one))}; expected one of {', '.join(ATTENTION)}: any other name is a "
                "kernel, code that would be downloaded"
            )


def check_json_of(where: str) -> None:
    """Check the JSON files of a directory, or of a Hub repository, that say how a model is loaded.

    Raises:
        UserError: one is too large, damaged, names code to download, or a shard outside the directory.
    """
    for name in _JSON_FILES:
        try:
            file = find_file(where, name)
        except UserError:  # Transformers says whether the model needs it
            continue
        content = read_json(file)
        if not isinstance(content, Mapping):
            raise UserError(f"{str(file)!r} is a {type(content).__name__}; expected keys and values")
        if name == _INDEX:
            shards = content.get("weight_map")
            shards = shards.values() if isinstance(shards, Mapping) else [None]
            for shard in shards:
                if not isinstance(shard, str) or shard != os.path.basename(shard):
                    raise UserError(
                        f"{str(file)!r} is damaged: {printable(repr(shard))} is no name of a file beside it"
                    )
        for part in _mappings(content):
            for key in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
                check_attention(part.get(key), f"{key} in {str(file)!r}")


def _mappings(content: Any) -> Iterator[Mapping]:
    """All mappings in the content of a JSON file, however deep."""
    stack = [content]
    while stack:
        if isinstance(one := stack.pop(), Mapping):
            yield one
            stack += one.values()
        elif isinstance(one, list):
            stack += one


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a `.safetensors` file, or of a `.pth` file of timm, DeiT's authors or plain PyTorch.

    Prefixes of wrappers are taken off the names: `module.`, `_orig_mod.`, and `model.` where all names have it.

    Raises:
        ValueError: the file does not exist, is no checkpoint, or cannot be read without running code.
    """
    if not path.is_file():
        what = "is no regular file" if path.exists() else "does not exist"
        raise UserError(f"checkpoint {str(path)!r} {what}")
    only = "Only .safetensors, and .pth files of tensors and plain values, are read"
    with path.open("rb") as file:
        start = file.read(64)
    text = start.removeprefix(b"\xef\xbb\xbf").lstrip()
    known = (what for begin, what in NOT_WEIGHTS.items() if text.lower().startswith(begin.lower()))
    # The length of its header comes first.
    is_safetensors = start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size
    what = "it is empty; copy or download it again" if not text else None if is_safetensors else next(known, None)
    if what:
        raise UserError(f"cannot read checkpoint {str(path)!r}: {what}. {only}")
    try:
        if is_safetensors or (path.suffix == ".safetensors" and not start.startswith((b"PK", b"\x80"))):
            from safetensors.torch import load_file

            content = load_file(path)
        else:
            # Training scripts store their arguments. PyTorch judges a path by its ending, an open file by its content.
            with torch.serialization.safe_globals([argparse.Namespace]), path.open("rb") as file:
                content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, not a checkpoint, or a pickle that would run code
        # PyTorch's own message recommends weights_only=False, which would run code: do not show it
        what = first_line(error)
        if isinstance(error, pickle.UnpicklingError):
            what = "it holds more than weights"
            if not start.startswith((b"PK", b"\x80")):
                what = f"it is no checkpoint (it begins with {start[:12]!r})"
                error = ValueError(what)
        elif "TorchScript" in str(error):
            what = "it is a TorchScript program; load it in a factory, python:<module>:<factory>"
        raise UserError(f"cannot read checkpoint {str(path)!r}: {what}. {only}") from error
    return state_dict_of(content, f"checkpoint {str(path)!r}")


def state_dict_of(content: Any, name: str) -> dict[str, Tensor]:
    """The tensors of a loaded checkpoint, under the names that its network gives them.

    Args:
        content: a state dict, or a dictionary that holds one: of timm, DeiT's authors, Lightning or a tutorial.
        name: of the checkpoint, for messages.

    Raises:
        ValueError: it holds no state dict, or several and none under a usual name.
    """
    whole, inner = content, content
    while inner is not None:
        content = inner
        inner = None
        if isinstance(content, Mapping) and not _is_state_dict(content):
            held = {key: value for key, value in content.items() if isinstance(value, Mapping)}
            usual = [key for key in CONTAINERS if held.get(key)]
            others = [key for key, value in held.items() if _is_state_dict(value)]
            if usual or len(others) == 1:
                inner = held[(usual or others)[0]]
    if not _is_state_dict(content):
        keys = some_of([str(key) for key in content], 6) if isinstance(content, Mapping) else ""
        got = f"its keys are {keys}" if keys else f"it is an empty {type(content).__name__}"
        if not isinstance(content, Mapping):
            got = f"it is a {type(content).__name__}"
        raise UserError(f"{name} holds no state dict: {got}; expected tensors by name, or {', '.join(CONTAINERS)}")
    weights = {re.sub(WRAPPERS, "", key): value for key, value in content.items()}
    if isinstance(whole, Mapping) and "pytorch-lightning_version" in whole:  # beside the network: losses and metrics
        kept = {key: value for key, value in weights.items() if key.startswith(("model.", "net."))}
        if left := sorted(weights.keys() - kept.keys()) if kept else []:
            logger.warning("%s: %d tensors beside the network are left out: %s", name, len(left), some_of(left))
            weights = kept
    for prefix in ("model.", "net.", "timm_model."):
        if all(key.startswith(prefix) for key in weights):
            weights = {re.sub(WRAPPERS, "", key.removeprefix(prefix)): value for key, value in weights.items()}
    return weights


def _is_state_dict(content: Any) -> bool:
    return isinstance(content, Mapping) and bool(content) and all(isinstance(v, Tensor) for v in content.values())


def stored_types(where: str) -> set[str]:
    """The floating-point types, such as "float16", in the safetensors of a directory or a downloaded Hub repository.

    Without such a file there are none.
    """
    from safetensors import safe_open

    try:
        file = Path(find_file(where, "model.safetensors", _INDEX))
    except UserError:
        return set()
    files = [file]
    if file.name == _INDEX:
        shards = set(read_json(file)["weight_map"].values())
        files = [Path(find_file(where, shard)) for shard in shards]
    types: set[str] = set()
    for one in files:
        with safe_open(one, "pt") as tensors:
            types |= {tensors.get_slice(name).get_dtype() for name in tensors.keys()}
    names = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
    return {names.get(kind, kind) for kind in types if kind.startswith(("F", "BF"))}


def fingerprint(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights and their names, types and shapes."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        _add(digest, name.removeprefix("_orig_mod."), value)
    if isinstance(model, torch.jit.ScriptModule):  # a frozen program's weights are constants of its code
        with zipfile.ZipFile(io.BytesIO(model.save_to_buffer())) as archive:
            for entry in sorted(archive.namelist()):
                if re.search(r"/(data|constants)/\d+$", entry):
                    digest.update(archive.read(entry))
    return digest.hexdigest()[:16]


def _add(digest: Any, name: str, value: Any) -> None:
    """Add one entry of a state dict; those of quantised networks are more than tensors."""
    if isinstance(value, (tuple, list)):
        for number, part in enumerate(value):
            _add(digest, f"{name}.{number}", part)
    elif isinstance(value, torch.ScriptObject):
        _add(digest, name, value.__getstate__())  # pyright: ignore[reportAttributeAccessIssue]
    elif not isinstance(value, Tensor):
        digest.update(f"{name} {value!r}".encode())
    else:
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        if value.is_quantized:
            per_channel = value.qscheme() in (torch.per_channel_affine, torch.per_channel_affine_float_qparams)
            scale = value.q_per_channel_scales().tolist() if per_channel else value.q_scale()
            zero = value.q_per_channel_zero_points().tolist() if per_channel else value.q_zero_point()
            digest.update(f"{scale} {zero}".encode())
            value = value.int_repr()
        digest.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def find_file(where: str, *names: str) -> str:
    """The path of the first of `names` that a directory or Hub repository has; Hub files are downloaded."""
    reasons = []
    for name in names:
        try:
            if (file := cached_file(where, name)) is not None:
                return file
            reasons.append(f"it has no {name}")  # Transformers returns None for a directory without config.json
        except (OSError, ValueError) as error:
            reasons.append(str(error).strip().partition("\n")[0])
    raise UserError(f"cannot read {where!r} as a file, directory or Hub id: {reasons[0]}")
