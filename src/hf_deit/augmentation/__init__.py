"""From one decoded image to a view, and from views to a mixed batch: crop, RandAugment, erasing, Mixup, CutMix."""
