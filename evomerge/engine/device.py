"""Devices by the names that users give them."""

from __future__ import annotations

import torch

from evomerge.errors import BadInput


def find_device(name: str) -> torch.device | None:
    """The device to compute on; None for the processor, where compiled kernels do the work.

    Raises:
        BadInput: torch knows no such device, or there is none in this machine.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"--device: '{name}' is no device of torch's, such as cpu, cuda or cuda:1") from None
    if device.type == "meta":
        raise BadInput("--device: 'meta' holds no values to compute with")
    if device.type == "cpu":
        return None
    try:
        torch.empty(1, device=device)
    except (
        RuntimeError,
        AssertionError,
        NotImplementedError,
    ) as error:  # what torch raises differs from build to build
        raise BadInput(f"--device: '{name}' cannot be used here: {str(error).splitlines()[0]}") from error
    return device
