"""The machine: what networks run on, and what it is called in records and results."""

import os
import platform
from pathlib import Path

import torch

__all__ = ["accelerator_or_cpu", "describe_hardware", "processor"]


def accelerator_or_cpu() -> torch.device:
    """What a process that generates or scores computes on: the current accelerator, the CPU where there is none."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found or torch.device("cpu")


def processor() -> str:
    """The processor's model, as Linux names it, such as "AMD EPYC 7B13"; elsewhere its kind."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name" and value.strip():
                return value.strip()
    return platform.processor() or platform.machine()


def describe_hardware(device: torch.device, num_processes: int) -> str:
    """What a run was computed on, such as "8 x NVIDIA H200" or "2 processes of 1 thread on AMD EPYC 7B13 (4 cores)".

    Args:
        device: Of this process.
        num_processes: Of the run.
    """
    if device.type == "cuda":
        return f"{num_processes} x {torch.cuda.get_device_name(device)}"
    if device.type != "cpu":
        return f"{num_processes} x {device.type}"
    threads = torch.get_num_threads()
    processes = f"{num_processes} process{'es' * (num_processes > 1)} of {threads} thread{'s' * (threads > 1)}"
    return f"{processes} on {processor()} ({os.cpu_count()} cores)"
