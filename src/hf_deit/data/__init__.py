"""From a dataset's name to batches of views: find the images, stream them, decode them, order them."""
