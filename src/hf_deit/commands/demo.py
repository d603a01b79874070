"""A page in the browser that classifies the user's own images and shows where the model looks: `hf-deit demo MODEL`.

[`Demo`] computes what the page shows, [`build_page`] is the page (gradio, the extra `demo`). Images stay on the
machine that serves the page: no share link, no analytics, and by default no other machine can connect.

Not here: the predictions (`evaluation/classifier.py`), the attention (`paper/analysis.py`), the colours
(`plots/analysis.py`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UserError


if TYPE_CHECKING:
    from gradio import Blocks  # pyright: ignore[reportMissingImports]
    from torch import Tensor

    from ..evaluation.classifier import Classifier

SHOWN_CLASSES = 5
SHOWN_SIDE = 448  # of the pictures on the page, pixels: a student's 32 would be a stamp


class Demo:
    """A model, perhaps its teacher, and what they make of one image.

    Args:
        model: directory, Hub id or another spec of [`load_classifier`].
        teacher: likewise, or None; its classes are matched with the model's.

    Attributes:
        columns: titles of the predictions: the model's heads and their fusion, then the teacher.
        layers: number of layers whose attention can be shown; 0 if the model is no DeiT or ViT.
        tokens: names of the tokens whose attention is shown.

    Raises:
        ValueError: a model cannot be read, or the teacher has other classes.
    """

    def __init__(self, model: str, teacher: str | None = None):
        from ..evaluation.classifier import load_classifier
        from ..paper.analysis import as_deit, prefix_names

        self.student = load_classifier(model)
        self.names = self.student.names or [str(number) for number in range(self.student.num_labels)]
        self.teacher = None
        if teacher is not None:
            self.teacher = load_classifier(teacher, id2label=dict(enumerate(self.names)))
        self._heads = {"model": "class"}
        if "distillation" in self.student.heads:
            fusion = self.student.own_head if self.student.own_head in ("softmax", "logits") else "softmax"
            self._heads = {"class head": "class", "distillation head": "distillation", f"fused ({fusion})": fusion}
        self.columns = [*self._heads, *(["teacher"] if self.teacher else [])]
        try:
            self._deit = as_deit(self.student.model, self.student.image_size)
        except UserError:  # a convnet, say
            self._deit, self.layers, self.tokens = None, 0, []
        else:
            self.layers, self.tokens = self._deit.config.num_hidden_layers, prefix_names(self._deit)

    def predictions(self, path: str | os.PathLike) -> list[dict[str, float]]:
        """Return for each column the probability of each class, in [0, 1], by class name.

        Raises:
            ValueError: the file is no image, or is damaged.
        """
        logits = self.student(_view(self.student, path)[1])
        chosen = [logits[head] for head in self._heads.values()]
        if self.teacher is not None:
            own = self.teacher(_view(self.teacher, path)[1])
            chosen.append(own[self.teacher.own_head])
        return [self._by_name(one.softmax(-1)[0].tolist()) for one in chosen]

    def attention(self, path: str | os.PathLike, layer: int) -> list[np.ndarray]:
        """Return for each token its mean attention in one layer, laid over the part of the image that the model sees.

        Args:
            path: an image file.
            layer: 1 is the first.

        Returns:
            `(SHOWN_SIDE, SHOWN_SIDE, 3)` uint8 for each of `tokens`.

        Raises:
            ValueError: the file is no image, or is damaged; or the model has no such layer.
        """
        from ..paper.analysis import attention_maps
        from ..plots.analysis import overlay

        if self._deit is None:
            return []
        pixels, pixel_values = _view(self.student, path)
        (maps,) = attention_maps(self._deit, pixel_values, layer)["maps"]
        return [overlay(pixels, maps[token]["mean"], SHOWN_SIDE) for token in self.tokens]

    def _by_name(self, probabilities: list[float]) -> dict[str, float]:
        found: dict[str, float] = {}
        for number, (name, probability) in enumerate(zip(self.names, probabilities, strict=True)):
            found[name if name not in found else f"{name} ({number})"] = probability  # ImageNet has two cranes
        return found


def _view(classifier: Classifier, path: str | os.PathLike) -> tuple[np.ndarray, Tensor]:
    """The evaluation view of an image file: `(size, size, 3)` uint8, and `(1, 3, size, size)` float32, normalised."""
    import torch

    from ..augmentation.mixing import normalize
    from ..augmentation.transforms import build_eval_transform
    from ..data.decoding import decode_image

    image = decode_image({"bytes": None, "path": os.fspath(path)})
    pixels = build_eval_transform(classifier.image_size, crop_ratio=classifier.crop_ratio)(image)
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return pixels, normalize(batch, classifier.mean, classifier.std)


def build_page(demo: Demo, title: str) -> Blocks:
    """Build the page.

    Raises:
        ValueError: gradio is not installed.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # gradio reads it when it is imported
    try:
        import gradio  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("the demo needs gradio, which is not installed: pip install 'hf_deit[demo]'") from error

    def show(path: str | None, layer: int) -> list:
        if path is None:
            return [None] * (len(demo.columns) + len(demo.tokens))
        try:
            return [*demo.predictions(path), *demo.attention(path, layer)]
        except UserError as error:
            raise gradio.Error(f"This image cannot be read: {error}") from error

    def look(path: str | None, layer: int) -> list:
        return demo.attention(path, layer) if path is not None else [None] * len(demo.tokens)

    with gradio.Blocks(title=title, analytics_enabled=False) as page:
        gradio.Markdown(f"## {title}\nThe image stays on the machine that serves this page.")
        with gradio.Row():
            image = gradio.Image(
                type="filepath",
                image_mode=None,
                sources=["upload", "clipboard"],
                label="image",
                height=320,
                buttons=[],
            )
            labels = [
                gradio.Label(label=column, num_top_classes=min(SHOWN_CLASSES, len(demo.names)))
                for column in demo.columns
            ]
        last = max(demo.layers, 1)
        layer = gradio.Slider(
            1, last, value=last, step=1, label="layer whose attention is shown", visible=demo.layers > 1
        )
        with gradio.Row():
            maps = [
                gradio.Image(
                    label=f"attention of the {token} token",
                    interactive=False,
                    height=320,
                    buttons=["download", "fullscreen"],  # none to share
                )
                for token in demo.tokens
            ]
        image.change(show, [image, layer], [*labels, *maps], show_progress="minimal")
        if demo.layers > 1:
            layer.release(look, [image, layer], maps, show_progress="hidden")
    return page


def main(argv: Sequence[str] | None = None) -> None:
    """Serve the demo of the model that the command line names, until it is interrupted.

    Args:
        argv: command-line arguments, without the program's name; those of this process if None.

    Raises:
        ValueError: a model cannot be read, gradio is not installed, or the port is taken.
    """
    args = parse_arguments(argv)
    page = build_page(Demo(args.model, args.teacher), title=os.path.basename(args.model.rstrip("/")))
    try:
        serve(page, args.host, args.port)
    except OSError as error:
        raise UserError(f"the demo cannot listen on {args.host}:{args.port}. Choose another --port") from error


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="hf-deit demo", description="Classify your own images in the browser and see where the model looks."
    )
    parser.add_argument("model", help="directory of a run, or Hub id")
    parser.add_argument("--teacher", help="its teacher, to show beside it: written like a model")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 lets other machines in")
    parser.add_argument("--port", type=int, default=7860)
    return parser.parse_args(argv)


def serve(page: Blocks, host: str, port: int | None, *, block: bool = True) -> str:
    """Serve a page and return its address; with `block`, only after an interruption."""
    from gradio import themes  # pyright: ignore[reportMissingImports]

    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        prevent_thread_lock=not block,
        share=False,
        ssr_mode=False,
        enable_monitoring=False,
        run_history=False,
        footer_links=[],
        max_file_size="64mb",
        theme=themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),  # none from Google
    )
    return address
