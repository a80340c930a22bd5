"""In which precision a device computes: bf16 where it multiplies matrices faster so, else float32."""

import torch

from trainers.errors import InputError

PRECISIONS = ("auto", "bf16", "float32")


def check_precision(precision: str):
    """Raises `InputError` for a word that is none of `PRECISIONS`."""
    if precision not in PRECISIONS:
        raise InputError(f"precision={precision!r} is not known; choose one of {', '.join(PRECISIONS)}.")


def is_bf16(precision: str, device: torch.device) -> bool:
    """Whether a device shall compute in bf16; `auto`: if it does so faster."""
    return precision == "bf16" or (precision == "auto" and computes_in_bf16(device))


def precision_name(precision: str, device: torch.device) -> str:
    """`bf16` or `float32`, as a device computes; raises `InputError` for a word that is none of `PRECISIONS`."""
    check_precision(precision)
    return "bf16" if is_bf16(precision, device) else "float32"


def probes_in_bf16(device: torch.device) -> bool:
    """Whether features that are kept, and probes of them, are computed in bf16; on a CPU they are as in a pipeline."""
    return device.type == "cuda" and computes_in_bf16(device)


def computes_in_bf16(device: torch.device) -> bool:
    """Whether a device multiplies matrices in bf16 faster than in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        # without such instructions bf16 on a CPU is two to three times slower than float32
        capabilities = torch.cpu.get_capabilities()
        return any(capabilities.get(name, False) for name in ("amx_bf16", "avx512_bf16"))
    return False
