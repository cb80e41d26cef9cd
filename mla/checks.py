"""Argument checks shared by all public functions: clear errors before anything is written.

Every message reads ``<op>: <argument> has <fact>, expected <requirement>[; <what can be done>]``.
"""

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ShapeError(ValueError):
    """Sizes, dtypes or devices of the arguments do not agree."""


class UnsupportedError(ValueError):
    """The request is understood but not available here; the message says what is."""


def bind_dims(op: str, name: str, tensor: Tensor, dims: str, sizes: dict[str, int]) -> None:
    """Bind each dim letter of ``dims`` the first time it is seen, compare it afterwards.

    Args:
        op: public name of the calling function, for the message.
        name: name of the argument.
        tensor: the argument, ``[*dims]``.
        dims: space-separated letters, such as ``"B L H C"``; an integer stands for itself.
        sizes: the letters bound so far; extended in place.

    Raises:
        ShapeError: wrong number of dims, or a letter that was bound to another size.
    """
    if not isinstance(tensor, Tensor):
        raise ShapeError(f"{op}: {name} has type {type(tensor).__name__}, expected a torch.Tensor")
    letters = dims.split()
    wanted = [int(d) if d.isdigit() else sizes.get(d) for d in letters]
    fits = len(letters) == tensor.ndim and all(
        want is None or want == have for want, have in zip(wanted, tensor.shape, strict=True)
    )
    if not fits:
        expected = ", ".join(
            d if want is None or d.isdigit() else f"{d}={want}"
            for d, want in zip(letters, wanted, strict=True)
        )
        raise ShapeError(f"{op}: {name} has shape {tuple(tensor.shape)}, expected [{expected}]")
    for letter, size in zip(letters, tensor.shape, strict=True):
        if not letter.isdigit():
            sizes.setdefault(letter, size)


def require_same(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Require the dtype and device of ``other``."""
    if tensor.dtype != other.dtype:
        raise ShapeError(
            f"{op}: {name} has dtype {tensor.dtype}, expected {other.dtype} as {other_name} has"
        )
    require_device(op, name, tensor, other_name, other)


def require_device(op: str, name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    """Require the device of ``other``."""
    if tensor.device != other.device:
        raise ShapeError(
            f"{op}: {name} has device {tensor.device}, expected {other.device} as {other_name} has"
        )


def require_int32(op: str, name: str, tensor: Tensor) -> None:
    """Require an int32 tensor, the dtype of all lengths and tables."""
    if tensor.dtype != torch.int32:
        raise ShapeError(f"{op}: {name} has dtype {tensor.dtype}, expected torch.int32")
