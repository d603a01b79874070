"""Turn a dataset name into batches of views: find, stream, decode and order the images."""
