"""
Which device a run computes on, and the errors where it would be the wrong one.

    python -m pytest tests/test_devices.py
"""

import pytest
import torch

from run import devices
from run.errors import UserError

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """-> callable(version) that puts a driver of NVIDIA on this machine, which torch cannot use"""
    monkeypatch.setattr(devices, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def put(version):
        line = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {version}  Tue Jan  9 2024\n"
        devices.DRIVER.write_text(line)

    return put


def test_without_a_gpu_auto_is_the_cpu(driver):
    assert devices.choose_device("auto") == devices.choose_device("cpu") == "cpu"
    with pytest.raises(UserError, match="--device cuda"):
        devices.choose_device("cuda")


def test_with_a_gpu_auto_is_the_gpu(driver, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert devices.choose_device("auto") == devices.choose_device("cuda") == "cuda"
    assert devices.choose_device("cpu") == "cpu"


@pytest.mark.parametrize("device", ["auto", "cuda"])
@pytest.mark.parametrize(
    "version, cuda, remedies",
    [
        ("550.54.14", "13.0", ("580", "550", "driver", "cu126", "--device cpu")),
        ("580.82.07", None, ("CPUs only", "pip install", "--device cpu")),
        ("580.82.07", "13.0", ("nvidia-smi", "--device cpu")),
        ("open 550.54.14", "13.0", ("580", "550")),
    ],
)
def test_a_gpu_that_torch_cannot_use_is_an_error(
    driver, monkeypatch, device, version, cuda, remedies
):
    driver(version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(UserError) as error:
        devices.choose_device(device)
    assert all(word in str(error.value) for word in remedies), error.value
    assert devices.choose_device("cpu") == "cpu"


@pytest.mark.parametrize("value", devices.HIDDEN)
def test_a_hidden_gpu_is_none(driver, monkeypatch, value):
    driver("550.54.14")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert devices.choose_device("auto") == "cpu"


def test_several_processes_do_not_fall_back_to_the_cpu_with_a_large_model():
    with pytest.raises(UserError, match="--device cpu"):
        devices.check_fallback("auto", CPU, 8, is_toy=False)
    devices.check_fallback("cpu", CPU, 8, is_toy=False)  # it was asked for
    devices.check_fallback("auto", CPU, 8, is_toy=True)
    devices.check_fallback("auto", CPU, 1, is_toy=False)
    devices.check_fallback("auto", GPU, 8, is_toy=False)


def test_the_device_is_described(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    assert devices.describe(GPU, 8) == "8 x NVIDIA H100 80GB HBM3"
    assert "2 processes" in devices.describe(CPU, 2)
