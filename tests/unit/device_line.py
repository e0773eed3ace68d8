"""A device that is not there: what waits for it, or copies to it by the way, fails.

Tensors on "meta" have no values, so that no host can look at one. DeviceLine refuses operations that mix them
with tensors of the host, and tensors on the device that torch has made of a list, an index for one.
"""

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("meta")


class DeviceLine(TorchDispatchMode):
    """Within `with`, only its own copies cross the line between host and device."""

    is_open = False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        given, made = tensors_of((args, kwargs)), tensors_of(result)
        if not self.is_open:
            assert len({tensor.device for tensor in given + made}) < 2, (
                f"{func} goes from host to device by itself"
            )
            strange = [
                tensor for tensor in given if tensor.device == DEVICE and not hasattr(tensor, "is_known")
            ]
            assert not strange, f"{func} takes what was copied to the device by itself"
        for tensor in made:
            tensor.is_known = True
        return result

    def copy(self, target, source):
        self.crossing(lambda: target.copy_(source))

    def upload(self, values):
        return self.crossing(lambda: torch.tensor(values).to(DEVICE))

    def take(self, target, source, index):
        torch.index_select(source, 0, index, out=target)

    def to_host(self, tensor):
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def fence(self):
        return None

    def crossing(self, copy):
        self.is_open = True
        try:
            return copy()
        finally:
            self.is_open = False


def tensors_of(values):
    """Return the tensors in a tree of arguments; numbers of the host, which go with a launch, are none."""
    tensors = [leaf for leaf in tree_leaves(values) if isinstance(leaf, torch.Tensor)]
    return [tensor for tensor in tensors if tensor.ndim or tensor.device == DEVICE]
