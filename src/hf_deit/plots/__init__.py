"""Every picture, drawn with matplotlib from plain numbers."""
