"""The machine: resident memory and its peak, and the description in reports."""

import platform

import pytest
import torch

from hf_deit.paper.machine import describe_machine, device_name, free_memory, resident_memory, restart_resident_peak


@pytest.mark.skipif(platform.system() != "Linux", reason="reads /proc")
def test_the_peak_of_resident_memory_is_that_since_the_restart():
    del_me = torch.ones(40_000_000)  # 160 MB
    assert resident_memory("VmRSS") >= 160e6
    del del_me
    before = restart_resident_peak()
    assert resident_memory("VmHWM") - before < 20e6, "the peak before the restart still counts"
    torch.ones(60_000_000).sum()
    assert resident_memory("VmHWM") - before == pytest.approx(240e6, rel=0.1)
    assert resident_memory("VmRSS") - before < 20e6
    assert free_memory() > 10e6


def test_a_system_without_proc_has_no_figures(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError("/proc")

    monkeypatch.setattr("hf_deit.paper.machine.Path.read_text", missing)
    monkeypatch.setattr("hf_deit.paper.machine.Path.write_text", missing)
    assert restart_resident_peak() is None and free_memory() is None
    assert device_name("cpu").startswith(platform.machine())


def test_a_report_names_device_threads_and_version():
    facts = describe_machine("cpu")
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["device"] == device_name("cpu") and f"{facts['threads']} thread" in facts["device"]
    assert facts["load_average"] is None or facts["load_average"] >= 0
