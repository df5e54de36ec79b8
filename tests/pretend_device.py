"""A device that this machine does not have: the CPU computes, and mixing the two is an error.

Its tensors say that they are on torch's ``meta`` device, the one device besides the CPU that every
build of torch knows, and hold one of the CPU that nobody else sees.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

DEVICE = "meta"
wrap: Callable[..., Tensor] = torch.Tensor._make_wrapper_subclass
map_leaves: Callable[[Callable[[object], object], object], Any] = tree_map


class _Memory:
    """What tensors hold on the device, views of the same memory counted once."""

    tensors: ClassVar[Counter[int]] = Counter()
    sizes: ClassVar[dict[int, int]] = {}
    peak_bytes: ClassVar[int] = 0

    @classmethod
    def hold(cls, tensor: "_There") -> None:
        storage = tensor.inner.untyped_storage()
        place = storage.data_ptr()
        cls.tensors[place] += 1
        cls.sizes[place] = storage.nbytes()
        cls.peak_bytes = max(cls.peak_bytes, sum(cls.sizes.values()))
        weakref.finalize(tensor, cls._let_go, place)

    @classmethod
    def _let_go(cls, place: int) -> None:
        cls.tensors[place] -= 1
        if not cls.tensors[place]:
            del cls.tensors[place], cls.sizes[place]


class _There(torch.Tensor):
    """A tensor on the device."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "_There":
        outer = wrap(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        assert isinstance(outer, _There)
        outer.inner = inner
        _Memory.hold(outer)
        return outer

    @classmethod
    def __torch_dispatch__(cls, operation: object, *_: object) -> object:
        """Nothing computes outside."""
        raise AssertionError(f"{operation} on the pretended device, which is not entered")


class _Lists(TorchFunctionMode):
    """Brings lists to the device and back, which torch does out of the dispatcher's sight."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Goes by way of the CPU."""
        named = dict(kwargs or {})
        if function is Tensor.tolist:
            (tensor,) = args
            assert isinstance(tensor, Tensor)
            return tensor.inner.tolist() if isinstance(tensor, _There) else tensor.tolist()
        if function is torch.tensor and named.get("device") is not None:
            device = named.pop("device")
            return function(*args, **named).to(device)
        return function(*args, **named)


class PretendDevice(TorchDispatchMode):
    """While this is entered, the device is there.

    Attributes:
        calls: How many operations it has computed.
        peak_bytes: Most that its tensors have held at once, since it was entered or reset.
    """

    def __init__(self) -> None:
        """Has computed nothing yet."""
        super().__init__()
        self.calls = 0
        self._lists = _Lists()

    @property
    def held_bytes(self) -> int:
        """What its tensors hold now."""
        return sum(_Memory.sizes.values())

    @property
    def peak_bytes(self) -> int:
        return _Memory.peak_bytes

    def reset_peak(self) -> None:
        """Forgets what was held before."""
        _Memory.peak_bytes = self.held_bytes

    def __enter__(self) -> Self:
        """Makes the device appear."""
        _Memory.peak_bytes = 0
        self._lists.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        """Makes it vanish."""
        super().__exit__(*error)
        self._lists.__exit__(*error)

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        """Computes on the CPU what all operands have on the same device."""
        leaves = tree_flatten((args, dict(kwargs or {})))[0]
        tensors = [one for one in leaves if isinstance(one, Tensor)]
        is_there = any(isinstance(one, _There) for one in tensors)
        wanted = next((one for one in leaves if isinstance(one, torch.device)), None)
        if is_there and wanted is None and operation is not torch.ops.aten.copy_.default:
            # A number in a tensor of the CPU goes with any device's.
            strangers = [one for one in tensors if not isinstance(one, _There) and one.dim()]
            assert not strangers, f"{operation} mixes devices"
        self.calls += is_there
        result = operation(*map_leaves(_inner, args), **map_leaves(_inner, kwargs or {}))
        owner = next((one for one in tensors if _inner(one) is result), None)
        if wanted is not None and (wanted.type == DEVICE) != is_there:
            moved = result if owner is None else result.clone()
            return _There(moved) if wanted.type == DEVICE else moved
        if owner is not None:  # in place, or nothing to be done
            return owner
        return map_leaves(_outer, result) if is_there else result


def _inner(value: object) -> object:
    if isinstance(value, torch.device):
        return torch.device("cpu")
    return value.inner if isinstance(value, _There) else value


def _outer(value: object) -> object:
    return _There(value) if isinstance(value, Tensor) else value
