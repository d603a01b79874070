"""The ledger of damaged training images: a list in the output directory, and a limit.

Not here: noticing the damage (decoding.py), and what is seen in place of a damaged image (views.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from ..errors import UserError


logger = logging.getLogger(__name__)

FILE_NAME = "_bad_images.txt"  # Trainer uploads no name with this underscore, and it holds paths of this machine
HEADER = "index\tpath\treason\n"


class BadImages:
    """Lists each damaged image once in `_bad_images.txt`, one line `index, path, reason` separated by tabs.

    The ranks of a run append to one file, and a resumed run goes on with it. `len()` is the number of images listed.

    Args:
        output_dir: where the file lies; it comes with the first damaged image.
        num_images: size of the training set.
        max_bad_images: fraction of the set, in [0, 1], that may be damaged.
    """

    def __init__(self, output_dir: str | Path, num_images: int, max_bad_images: float = 0.001):
        self.path = Path(output_dir, FILE_NAME)
        self.num_images = num_images
        self.max_bad_images = max_bad_images
        self._listed: set[int] = set()  # may lag behind what other ranks have written

    def __len__(self) -> int:
        self._read()
        return len(self._listed)

    def record(self, bad_images: Sequence[tuple[int, str | None, str]]) -> None:
        """Notes the `(index, path, reason)` that came with a batch.

        Raises:
            ValueError: more of the set is damaged than `max_bad_images` allows.
        """
        if self._listed.issuperset(index for index, _, _ in bad_images):
            return
        self._read()
        new = {index: (path, reason) for index, path, reason in bad_images if index not in self._listed}
        if new and not self._listed:
            index, (path, reason) = next(iter(new.items()))
            logger.warning(
                "training image number %d (path %s) is damaged: %s. Its neighbour is trained on instead; all such "
                "images are listed in %s",
                *(index, _in_one_field(path or "none"), _in_one_field(reason), self.path),
            )
        self._append(new)
        if len(self._listed) / self.num_images > self.max_bad_images:
            raise UserError(
                f"{len(self._listed)} of {self.num_images} training images are damaged so far, which is more than "
                f"max_bad_images = {self.max_bad_images:g} of them; they are listed in {str(self.path)!r}: repair the "
                "set, or raise max_bad_images"
            )

    def forget(self) -> None:
        """Removes the list of an earlier run."""
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
        except FileExistsError:  # from before, or just written by another rank
            pass
        with self.path.open("a", encoding="utf-8") as file:
            for index, (path, reason) in new.items():
                file.write(f"{index}\t{_in_one_field(path or '')}\t{_in_one_field(reason)}\n")
        self._listed |= new.keys()


def _in_one_field(text: str) -> str:
    """Without tabs and line ends, and without what no file or terminal could take: names are not always text."""
    return text.translate(str.maketrans("\t\r\n", "   ")).encode("utf-8", "replace").decode("utf-8")
