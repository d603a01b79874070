"""Settings of a measurement that takes no time."""

from hf_deit.paper.throughput import ThroughputArguments


def arguments(**fields) -> ThroughputArguments:
    return ThroughputArguments(**({"device": "cpu", "batch_size": 2, "runs": 1, "turns": 1, "warm_up": 0} | fields))
