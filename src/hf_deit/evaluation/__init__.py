"""How often a classifier is right: the metrics, one model over one dataset, the report of several."""
