"""Read weights from a file without running code, and compute the fingerprint of weights."""

from __future__ import annotations

import argparse
import hashlib
import pickle
import re
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers.utils import cached_file

from ..errors import UserError, first_line


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a `.safetensors` file, or of a `.pth` file of timm, DeiT's authors or plain PyTorch.

    Raises:
        ValueError: the file does not exist, or cannot be read without running code.
    """
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} does not exist")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        with torch.serialization.safe_globals([argparse.Namespace]):  # training scripts store their arguments
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # truncated, not a checkpoint, or a pickle that would run code
        # PyTorch's own message recommends weights_only=False, which would run code: do not show it
        what = "it holds more than weights" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise UserError(
            f"cannot read checkpoint {str(path)!r}: {what}. Only .safetensors, and .pth files of tensors and plain "
            "values, are read"
        ) from error
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):  # the averaged weights first, as timm does
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise UserError(f"checkpoint {str(path)!r} holds no state dict")
    return {re.sub(r"^(module\.|_orig_mod\.)+", "", key): value for key, value in content.items()}


def fingerprint(model: nn.Module) -> str:
    """The first 16 hexadecimal digits of the SHA-256 of all weights and their names, types and shapes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


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
