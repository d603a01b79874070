"""Everything of a training run: options, trainer, checkpoints, health, model card and the Hub."""
