"""Which device to compute on."""

from __future__ import annotations

from sparse_forcing.errors import ConfigError


def resolve_device(name: str, setting: str = "--device") -> str:
    """`auto` picks the GPU where there is one; a device that is not there is a ConfigError, never a silent fallback.

    Args:
        setting: what the user called it, for the error message.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()  # read back: the device `meta` computes nothing
    except (RuntimeError, AssertionError, ValueError, NotImplementedError) as error:
        reason = (str(error).splitlines() or ["unknown"])[0]
        raise ConfigError(
            f"{setting} {name}: not usable with torch {torch.__version__} here ({reason:.120})"
        ) from error
    return str(device)
