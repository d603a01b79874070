"""The DeiT, any other classifier by its name, and their checkpoints in every format that is read or written."""
