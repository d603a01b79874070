"""Tables 1, 5 and 10 of the paper, row by row.

Not here: the numbers of the tables that run as sweeps (`recipes/tables/`), and measuring (`throughput.py`).

Source: arXiv 2012.12877, Tables 1, 5 and 10.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PaperRow:
    """One row of the paper. Throughput: images per second of one V100 of 16 GB. Accuracies: top-1 in percent."""

    name: str
    model: str
    parameters: float
    image_size: int
    images_per_second: float
    imagenet: float | None = None
    real: float | None = None
    v2: float | None = None

    @property
    def spec(self) -> str:
        """The row's network as written in `ThroughputArguments.models`."""
        own_size = self.image_size == 224 and not self.model.startswith("timm:")
        return self.model if own_size else f"{self.model}@{self.image_size}"

    @property
    def family(self) -> str:
        """The family of the row; one family is one line in the picture of [`tradeoff_points`]."""
        if not self.name.startswith("DeiT"):
            return self.name.split("-")[0]
        longer = ", 1000 epochs" if "1000" in self.name else ""
        return ("DeiT distilled" if "distilled" in self.name else "DeiT") + longer


# Millions of parameters and the throughput are the paper's; a model is measured in the definition of timm, as there.
PAPER_TABLES: dict[str, tuple[PaperRow, ...]] = {
    "table1": (
        PaperRow("DeiT-Ti", "tiny", 5, 224, 2536),
        PaperRow("DeiT-S", "small", 22, 224, 940),
        PaperRow("DeiT-B", "base", 86, 224, 292),
    ),
    "table5": (
        PaperRow("ResNet-18", "timm:resnet18", 12, 224, 4458.4, 69.8, 77.3, 57.1),
        PaperRow("ResNet-50", "timm:resnet50", 25, 224, 1226.1, 76.2, 82.5, 63.3),
        PaperRow("ResNet-101", "timm:resnet101", 45, 224, 753.6, 77.4, 83.7, 65.7),
        PaperRow("ResNet-152", "timm:resnet152", 60, 224, 526.4, 78.3, 84.1, 67.0),
        PaperRow("RegNetY-4GF", "timm:regnety_040", 21, 224, 1156.7, 80.0, 86.4, 69.4),
        PaperRow("RegNetY-8GF", "timm:regnety_080", 39, 224, 591.6, 81.7, 87.4, 70.8),
        PaperRow("RegNetY-16GF", "timm:regnety_160", 84, 224, 334.7, 82.9, 88.1, 72.4),
        PaperRow("EfficientNet-B0", "timm:tf_efficientnet_b0", 5, 224, 2694.3, 77.1, 83.5, 64.3),
        PaperRow("EfficientNet-B1", "timm:tf_efficientnet_b1", 8, 240, 1662.5, 79.1, 84.9, 66.9),
        PaperRow("EfficientNet-B2", "timm:tf_efficientnet_b2", 9, 260, 1255.7, 80.1, 85.9, 68.8),
        PaperRow("EfficientNet-B3", "timm:tf_efficientnet_b3", 12, 300, 732.1, 81.6, 86.8, 70.6),
        PaperRow("EfficientNet-B4", "timm:tf_efficientnet_b4", 19, 380, 349.4, 82.9, 88.0, 72.3),
        PaperRow("EfficientNet-B5", "timm:tf_efficientnet_b5", 30, 456, 169.1, 83.6, 88.3, 73.6),
        PaperRow("EfficientNet-B6", "timm:tf_efficientnet_b6", 43, 528, 96.9, 84.0, 88.8, 73.9),
        PaperRow("EfficientNet-B7", "timm:tf_efficientnet_b7", 66, 600, 55.1, 84.3),
        # The paper prints B6's throughput for B5 RA; its network is B5's.
        PaperRow("EfficientNet-B5 RA", "timm:tf_efficientnet_b5", 30, 456, 96.9, 83.7),
        PaperRow("EfficientNet-B7 RA", "timm:tf_efficientnet_b7", 66, 600, 55.1, 84.7),
        PaperRow("KDforAA-B8", "timm:tf_efficientnet_b8", 87, 800, 25.2, 85.8),
        PaperRow("ViT-B/16", "base", 86, 384, 85.9, 77.9, 83.6),
        PaperRow("ViT-L/16", "timm:vit_large_patch16_384", 307, 384, 27.3, 76.5, 82.2),
        PaperRow("DeiT-Ti", "tiny", 5, 224, 2536.5, 72.2, 80.1, 60.4),
        PaperRow("DeiT-S", "small", 22, 224, 940.4, 79.8, 85.7, 68.5),
        PaperRow("DeiT-B", "base", 86, 224, 292.3, 81.8, 86.7, 71.5),
        PaperRow("DeiT-B↑384", "base", 86, 384, 85.9, 83.1, 87.7, 72.4),
        PaperRow("DeiT-Ti distilled", "tiny-distilled", 6, 224, 2529.5, 74.5, 82.1, 62.9),
        PaperRow("DeiT-S distilled", "small-distilled", 22, 224, 936.2, 81.2, 86.8, 70.0),
        PaperRow("DeiT-B distilled", "base-distilled", 87, 224, 290.9, 83.4, 88.3, 73.2),
        PaperRow("DeiT-Ti distilled / 1000 epochs", "tiny-distilled", 6, 224, 2529.5, 76.6, 83.9, 65.4),
        PaperRow("DeiT-S distilled / 1000 epochs", "small-distilled", 22, 224, 936.2, 82.6, 87.8, 71.7),
        PaperRow("DeiT-B distilled / 1000 epochs", "base-distilled", 87, 224, 290.9, 84.2, 88.7, 73.9),
        PaperRow("DeiT-B distilled↑384", "base-distilled", 87, 384, 85.8, 84.5, 89.0, 74.8),
        PaperRow("DeiT-B distilled↑384 / 1000 epochs", "base-distilled", 87, 384, 85.8, 85.2, 89.3, 75.2),
    ),
    "table10": (
        PaperRow("DeiT-B↑160", "base", 86, 160, 609.31, 79.9, 84.8, 67.6),
        PaperRow("DeiT-B", "base", 86, 224, 291.05, 81.8, 86.7, 71.5),
        PaperRow("DeiT-B↑320", "base", 86, 320, 134.13, 82.7, 87.2, 71.9),
        PaperRow("DeiT-B↑384", "base", 86, 384, 85.87, 83.1, 87.7, 72.4),
    ),
}
