import torch

from capsule_heads.hardware import describe_hardware, processor_name


def test_a_processor_with_its_threads():
    n = torch.get_num_threads()
    said = f"{processor_name()}, {n} thread{'s' if n > 1 else ''}"
    assert describe_hardware(torch.device("cpu")) == said
    assert describe_hardware(torch.device("cpu"), n_processes=2) == f"2 processes: {said} each"


def test_a_gpu_by_its_name(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
    assert describe_hardware(torch.device("cuda", 1)) == "GPU 1"
    assert describe_hardware(torch.device("mps")) == "mps"
