"""Where a model runs."""

from __future__ import annotations

import torch

from longread.config import UserError


def find_device(name: str | torch.device) -> torch.device:
    """The device called `name`; "auto" is a GPU if there is one. Raises `UserError` if it cannot be used."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name).cpu()  # "meta" holds no numbers
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0].partition(". ")[0]
        if "device string" in reason:  # a list of all that torch has ever known
            reason = "there is no such device"
        raise UserError(f"device {name} cannot be used ({reason}); give auto, cpu, cuda or cuda:1") from None
    return torch.device(name)
