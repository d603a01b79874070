"""List the damaged training images in the output directory, and stop the run if there are too many.

Damage is detected in decoding.py; views.py replaces a damaged image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError, printable


logger = logging.getLogger(__name__)

FILE_NAME = "_bad_images.txt"  # the file holds local paths; Trainer does not upload names with a leading underscore
HEADER = "index\tpath\treason\n"


class BadImages:
    """Lists each damaged image once in `_bad_images.txt`, one line `index, path, reason` separated by tabs.

    All ranks of a run append to this file, and a resumed run continues it. `len()` is the number of images listed.

    Args:
        output_dir: directory of the file, which is created with the first damaged image.
        num_images: number of training images.
        max_bad_images: fraction of the training images that may be damaged, in [0, 1].
    """

    def __init__(self, output_dir: str | Path, num_images: int, max_bad_images: float = 0.001):
        self.path = Path(output_dir, FILE_NAME)
        self.num_images = num_images
        self.max_bad_images = max_bad_images
        self._listed: set[int] = set()  # may lack images that other ranks have listed

    def __len__(self) -> int:
        self._read()
        return len(self._listed)

    def record(self, bad_images: Sequence[tuple[int, str | None, str]]) -> None:
        """List the damaged images of a batch, given as `(index, path, reason)`.

        Raises:
            ValueError: more training images are damaged than `max_bad_images` allows.
        """
        if self._listed.issuperset(index for index, _, _ in bad_images):
            return
        self._read()
        new = {index: (path, reason) for index, path, reason in bad_images if index not in self._listed}
        if new and not self._listed:
            index, (path, reason) = next(iter(new.items()))
            logger.warning(
                "training image number %d (path %s) is damaged: %s. The next intact image replaces it; all damaged "
                "images are listed in %s",
                *(index, _in_one_field(path or "none"), _in_one_field(reason), self.path),
            )
        self._append(new)
        if len(self._listed) / self.num_images > self.max_bad_images:
            raise UserError(
                f"{len(self._listed)} of {self.num_images} training images are damaged so far, more than the "
                f"fraction max_bad_images = {self.max_bad_images:g}; they are listed in {str(self.path)!r}. Repair "
                "the dataset, or raise max_bad_images"
            )

    def forget(self) -> None:
        """Delete the list that an earlier run left in the output directory."""
        self.path.unlink(missing_ok=True)
        self._listed.clear()

    def _read(self) -> None:
        if self.path.exists():
            with self.path.open(encoding="utf-8", errors="replace") as file:
                numbers = [line.partition("\t")[0] for line in file]
            self._listed |= {int(number) for number in numbers if number.isdigit()}

    def _append(self, new: dict[int, tuple[str | None, str]]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with self.path.open("x", encoding="utf-8") as file:
                file.write(HEADER)
        except FileExistsError:  # written by an earlier run or by another rank
            pass
        with self.path.open("a", encoding="utf-8") as file:
            for index, (path, reason) in new.items():
                file.write(f"{index}\t{_in_one_field(path or '')}\t{_in_one_field(reason)}\n")
        self._listed |= new.keys()


def _in_one_field(text: str) -> str:
    """Make the path or fault of a damaged image one field of a line: no tabs, no line ends, valid UTF-8."""
    return printable(text)
