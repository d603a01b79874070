"""Work that one process does for all processes of a run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, parse_flag_from_env

from .errors import UserError


T = TypeVar("T")


def on_main_process(action: Callable[[], T]) -> T:
    """Run `action` on the main process; every rank gets its result or its [`UserError`], so no rank waits for ever.

    Every rank must call this function.

    Raises:
        UserError: the error (or subclass) that `action` raised, on every rank.
    """
    outcome: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = error
    result, error = broadcast_object_list(outcome)
    if error is not None:
        raise error
    return result


def current_process() -> PartialState:
    """The rank of this process and the number of processes. Without a GPU, accelerate needs `cpu=True` for several."""
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available())
