"""What one process of several does for all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from .errors import UserError


T = TypeVar("T")


def by_one_process(action: Callable[[], T]) -> T:
    """The main process does it, and all hear the result, be it a refusal: nobody is left waiting.

    Called by every rank.

    Raises:
        UserError: what the action raised, or a subclass of it, on every rank.
    """
    answer: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            answer[0] = action()
        except UserError as error:
            answer[1] = error
    result, refusal = broadcast_object_list(answer)
    if refusal is not None:
        raise refusal
    return result
