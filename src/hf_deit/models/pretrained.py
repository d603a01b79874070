"""Load a DeiT from any checkpoint of a DeiT or ViT: account for every tensor, resize the positions.

Not here: checkpoints under the names of the authors and timm (checkpoint_conversion.py).
"""

from __future__ import annotations

import copy
import logging
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.core_model_loading import WeightRenaming

from ..errors import UserError
from .configuration_deit import DeiTConfig
from .weight_files import check_attention


logger = logging.getLogger(__name__)
# Arguments that locate a checkpoint on the Hub: its weights as well as its config.json.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# Tensors that the checkpoint or the network may lack: heads, stock's pooler, the distillation token, and the mask
# token and decoder of stock's masked-image model.
HEADS = re.compile(r"^(cls_|distillation_)?classifier\.")
OPTIONAL = re.compile(rf"{HEADS.pattern}|(^|\.)pooler\.|(^|\.)(distillation_token|mask_token)$|^decoder\.")


def resample_positions(positions: Tensor, old_grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample position embeddings to another grid of patches; return the same tensor where the grids are equal.

    Bicubic keeps the norm of the vectors, bilinear would shrink it (section 3 of the paper). Not antialiased and
    `align_corners=False`, as in the authors' fine-tuning (timm antialiases, which differs when the grid shrinks).

    Args:
        positions: `(1, prefix tokens + rows * columns, width)`, any float dtype; the prefix is left untouched.
        old_grid: (rows, columns) of `positions`.
        new_grid: (rows, columns) of the result.

    Returns:
        `(1, prefix tokens + new rows * new columns, width)` of the same dtype.

    Source: facebookresearch/deit main.py (`--finetune`).
    """
    if old_grid == new_grid:
        return positions
    num_prefix_tokens = positions.shape[1] - math.prod(old_grid)
    prefix, patches = positions.split([num_prefix_tokens, math.prod(old_grid)], dim=1)
    patches = patches.unflatten(1, old_grid).permute(0, 3, 1, 2).float()
    patches = F.interpolate(patches, size=new_grid, mode="bicubic", align_corners=False)
    return torch.cat([prefix, patches.flatten(2).transpose(1, 2).to(prefix.dtype)], dim=1)


@contextmanager
def hold_loading_report() -> Iterator[None]:
    """Hold back Transformers' table of tensors that did not match, and log it only if loading fails."""
    loader, held = logging.getLogger("transformers.modeling_utils"), []

    def hold(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in str(record.msg)
        if is_report:
            held.append(record)
        return not is_report

    loader.addFilter(hold)
    try:
        yield
    except Exception:
        loader.removeFilter(hold)
        for record in held:
            loader.handle(record)
        raise
    finally:
        loader.removeFilter(hold)


def names_of(names: Iterable[str]) -> str:
    """The sorted names with commas; names that differ only in the number of the layer appear once."""
    return ", ".join(sorted({re.sub(r"\.\d+\.", ".*.", name) for name in names}))


class LoadsAnyDeiT(PreTrainedModel):
    """The part of our models that reads checkpoints. The backbone keeps its positions in `embeddings`."""

    config_class = DeiTConfig
    base_model_prefix = "deit"
    _head_names: dict[str, str] = {}  # from another class's name of the class head to ours

    def __init__(self, config: DeiTConfig):
        super().__init__(config)
        if not config.use_distillation_token:
            self.base_model_prefix = "vit"  # its name on the Hub

    def _check_and_adjust_attn_implementation(self, attn_implementation, *args, **kwargs):
        """As in Transformers, without kernels that would be downloaded: also `set_attn_implementation` comes here."""
        check_attention(attn_implementation, "attn_implementation")
        return super()._check_and_adjust_attn_implementation(attn_implementation, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, config=None, **kwargs):
        """Load a model as in Transformers, from a DeiT or ViT checkpoint of hf_deit or stock, with any heads.

        These may differ from the checkpoint: `image_size` (the positions in the weights are resized); `num_labels` or
        `id2label` (the heads are new); the class and `use_distillation_token` (the class head stays; the distillation
        token, its position and its head are new or dropped). One logged line names the new and the unused tensors.

        Raises:
            ValueError: other tensors do not fit; the message names them, also with `ignore_mismatched_sizes=True`.
                With `output_loading_info=True` missing and unused tensors are only reported to the caller.
        """
        source, given = pretrained_model_name_or_path, isinstance(config, PreTrainedConfig)
        where = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
        if given:
            config = DeiTConfig.from_stock(config)
            image_size, num_heads = config.image_size, config.num_attention_heads
        else:
            image_size, num_heads = kwargs.pop("image_size", None), kwargs.get("num_attention_heads")
        stored = {}
        if source is not None and (image_size or num_heads):
            # Rows, columns and the number of heads cannot be inferred from shapes, so they come from config.json.
            try:
                stored, _ = DeiTConfig.get_config_dict(source if given or config is None else config, **where)
            except OSError:
                if not given:
                    raise  # with a config in the call, weights without config.json are enough
        if num_heads and num_heads != stored.get("num_attention_heads", num_heads):
            raise UserError(
                f"num_attention_heads is {num_heads}, but {source} was trained with {stored['num_attention_heads']}: "
                "with other heads its weights compute another function. Leave num_attention_heads out"
            )
        if given:
            config.image_size = stored.get("image_size", image_size)
        # Our tensor names are the Hub's; the loader adds the prefix of the class.
        names = {r"^(?:deit|vit)\.": "", **cls._head_names, **(kwargs.pop("key_mapping", None) or {})}
        with_report = kwargs.pop("output_loading_info", False)
        # _account_for judges the shapes, more strictly than Transformers, whose flag accepts any new weight.
        kwargs |= {"key_mapping": names, "output_loading_info": True, "ignore_mismatched_sizes": True}
        with hold_loading_report():
            model, report = super().from_pretrained(source, *model_args, config=config, **kwargs)
        # Without this, saving would undo the renaming of tensors.
        conversions = getattr(model, "_weight_conversions", None) or []
        model._weight_conversions = [each for each in conversions if not isinstance(each, WeightRenaming)] or None
        if model._account_for(report, source, only_shapes=with_report):
            files = where | {name: kwargs[name] for name in ("variant", "use_safetensors") if name in kwargs}
            model._take_positions(source, key_mapping=names, **files)
        if image_size:
            model.resize_position_embeddings(image_size)
        return (model, report) if with_report else model

    def _account_for(self, report: dict[str, set], source: str | None, only_shapes: bool) -> bool:
        """Log one line that names new and unused tensors; refuse tensors that do not fit.

        Args:
            report: Transformers' loading info.
            source: the checkpoint; None for a state dict.
            only_shapes: refuse misfitting shapes only, and not missing or unknown tensors.

        Returns:
            True if `_take_positions` must still copy the positions, for a checkpoint with one token more or less.
        """
        new, unused = set(report["missing_keys"]), set(report["unexpected_keys"])
        shapes = {name: (tuple(stored), tuple(own)) for name, stored, own in report["mismatched_keys"]}
        positions = {name for name in shapes if name.endswith("position_embeddings")}
        if source is None or not any(name.endswith("distillation_token") for name in new | unused):
            positions = set()
        new_heads = {name for name, (old, own) in shapes.items() if HEADS.search(name) and old[1:] == own[1:]}
        misfits = {
            "missing": names_of(name for name in new if not OPTIONAL.search(name)),
            "not in the network": names_of(name for name in unused if not OPTIONAL.search(name)),
            "of another shape": names_of(
                f"{name} {old} instead of {own}"
                for name, (old, own) in shapes.items()
                if name not in new_heads | positions
            ),
        }
        if misfits["of another shape"] or (any(misfits.values()) and not only_shapes):
            raise UserError(
                f"the weights of {source or 'the state dict'} do not fit {type(self).__name__} with this config: "
                + "; ".join(f"{what}: {names}" for what, names in misfits.items() if names)
                + ". Only num_labels, image_size and use_distillation_token may differ from the checkpoint's config"
            )
        new |= new_heads
        if positions:
            (new if self.config.use_distillation_token else unused).add("the distillation token's position")
        if new or unused:
            lines = {"new, not trained": names_of(new), "not used": names_of(unused)}
            text = "; ".join(f"{what}: {names}" for what, names in lines.items() if names)
            logger.warning("%s from %s: %s", type(self).__name__, source or "a state dict", text)
        return bool(positions)

    @torch.no_grad()
    def _take_positions(self, source: str, **kwargs) -> None:
        """Copy the positions of the class token and the patches from a checkpoint with one token more or less."""
        config = copy.deepcopy(self.config)
        config.use_distillation_token = not config.use_distillation_token
        with hold_loading_report():
            other = super(LoadsAnyDeiT, type(self.base_model)).from_pretrained(
                source, config=config, add_pooling_layer=False, **kwargs
            )
        old, new = other.embeddings.position_embeddings, self.base_model.embeddings.position_embeddings
        new[:, :1] = old[:, :1]
        new[:, self.config.num_prefix_tokens :] = old[:, config.num_prefix_tokens :]

    def resize_position_embeddings(self, image_size: int | tuple[int, int]) -> None:
        """Prepare the model for images of `image_size` pixels: side or `(height, width)`.

        The positions of the patches are resampled bicubically, the positions of the tokens stay, and
        `config.image_size` is updated. The weights do not change if the grid of patches is the same. Build the
        optimizer afterwards.

        Raises:
            ValueError: if `image_size` is not a multiple of the patch.

        Source: section 3 of the paper, "fine-tuning at different resolution".
        """
        old_size, old_grid = self.config.image_size, self.config.grid_size
        self.config.image_size = image_size
        try:
            self.config.check()
        except ValueError:
            self.config.image_size = old_size
            raise
        embeddings = self.base_model.embeddings
        old = embeddings.position_embeddings
        new = resample_positions(old, old_grid, self.config.grid_size)
        if new is not old:
            embeddings.position_embeddings = nn.Parameter(new.detach(), requires_grad=old.requires_grad)
