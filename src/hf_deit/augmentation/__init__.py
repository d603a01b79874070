"""Augmentation of one decoded image (crop, RandAugment) and of a batch of views (erasing, Mixup, CutMix)."""
