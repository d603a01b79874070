"""The paper's own tables and figures: their numbers, the sweeps that repeat them, throughput and analysis."""
