"""CUDA graphs of the pretended device: launches are noted while a function runs, and made again.

As with a real graph, nothing of Python or the host runs again, results land where they did the
first time, and what the launches read besides is not kept alive: who replays must hold it. Nothing
is there before the first launch, and no more what another recording left, whose memory it shares.
What a stream cannot do while it is recorded is an error here, too.
"""

import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from tests.pretend_device import DEVICE

map_leaves: Callable[[Callable[[object], object], object], Any] = tree_map
_WAITS_FOR_RESULTS = {"_local_scalar_dense", "nonzero", "masked_select", "bincount", "equal"}
_LEAVES_MEMORY_AS_IT_IS = {"empty", "empty_like", "empty_strided", "new_empty"}


class Recorder:
    """Records passes, as :data:`lowmem.compute.recorded_passes.Record`.

    Attributes:
        recorded: How many passes have been recorded.
        replayed: How many times one has been made again.
    """

    def __init__(self) -> None:
        """Has recorded nothing yet."""
        self.recorded = self.replayed = 0
        self._all: list[_Noting] = []

    def __call__(self, run: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        """Runs a function and notes its launches."""
        with _Noting() as launches:
            result = run()
        launches.spoil()
        self._all.append(launches)
        self.recorded += 1

        def launch() -> None:
            self.replayed += 1
            for other in self._all:
                if other is not launches:
                    other.spoil()
            launches.make_again()

        return launch, result


class _Noting(TorchDispatchMode):
    """Notes what is launched on the pretended device while this is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._launches: list[tuple[Any, Any, Any, list[Any]]] = []
        self._made: dict[int, Tensor] = {}
        self._results: list[Tensor] = []  # but for views of what was there before

    def __torch_dispatch__(
        self,
        operation: Any,
        types: Sequence[type],
        args: tuple[object, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        named = dict(kwargs or {})
        leaves = tree_flatten((args, named))[0]
        tensors = [one for one in leaves if isinstance(one, Tensor)]
        there = [one for one in tensors if one.device.type == DEVICE]
        wanted = next((one for one in leaves if isinstance(one, torch.device)), None)
        name = operation._schema.name.removeprefix("aten::").rstrip("_")
        is_there = bool(there) if wanted is None else wanted.type == DEVICE
        moves = wanted is not None and tensors and bool(there) != is_there
        copies = name == "copy" and 0 < len(there) < len(tensors)
        picks = name in ("index", "index_put") and any(
            one.dtype == torch.bool for one in tensors[1:]
        )
        if (there and name in _WAITS_FOR_RESULTS) or moves or copies or picks:
            raise RuntimeError(f"{name} is not permitted when the stream is capturing")
        result = operation(*args, **named)
        if is_there:
            made = [one for one in tree_flatten(result)[0] if isinstance(one, Tensor)]
            own = [one for one in made if not any(one is other for other in tensors)]
            noted = map_leaves(self._note, (args, named))
            self._launches.append((operation, *noted, own if self._writes(name) else []))
            self._made |= {id(one): one for one in own}
            before = {_place(one) for one in there}
            self._results += [one for one in own if _place(one) not in before]
        return result

    def make_again(self) -> None:
        """Launches everything in the same order, into the same memory."""
        for operation, args, kwargs, made in self._launches:
            again = operation(*map_leaves(_found, args), **map_leaves(_found, kwargs))
            fresh = [one for one in tree_flatten(again)[0] if isinstance(one, Tensor)]
            for old, new in zip(made, fresh, strict=bool(made)):
                old.copy_(new)

    def spoil(self) -> None:
        """What was made is another's memory now."""
        for result in self._results:
            if result.is_floating_point():
                result.fill_(torch.nan)

    def _note(self, value: object) -> object:
        """A tensor that was there before is not held."""
        outside = isinstance(value, Tensor) and id(value) not in self._made
        return weakref.ref(value) if outside else value

    @staticmethod
    def _writes(name: str) -> bool:
        return name not in _LEAVES_MEMORY_AS_IT_IS


def _place(tensor: Any) -> int:
    """Where a tensor's memory begins."""
    place: int = tensor.inner.untyped_storage().data_ptr()
    return place


def _found(value: object) -> object:
    if not isinstance(value, weakref.ref):
        return value
    tensor = value()
    assert tensor is not None, "a recorded pass reads what has been let go"
    return tensor
