"""Which Transfer the configuration asks for; Mooncake itself is loaded only when one is opened."""

from pathlib import Path

from cache_service.config import TransferKind
from cache_service.mooncake_library import MooncakeError, MooncakeOptions
from cache_service.mooncake_transfer import MooncakeTransfer
from cache_service.transfer import Transfer, TransferError
from cache_service.wire import OpenTransfer

_RDMA_DEVICES = Path("/sys/class/infiniband")


def transfer_opener(
    kind: TransferKind, rdma_devices: str | None, node: str, device_folder: Path = _RDMA_DEVICES
) -> OpenTransfer | None:
    """Return what opens a transfer on the node's address; None: there is to be none."""
    if kind == "off":
        return None
    options = MooncakeOptions(node, kind, rdma_devices or "")

    def open_transfer() -> Transfer:
        if kind == "rdma":
            _require_devices(rdma_devices, device_folder)
        try:
            return MooncakeTransfer(options)
        except MooncakeError as error:
            raise TransferError(str(error)) from error

    return open_transfer


def _require_devices(wanted: str | None, folder: Path) -> None:
    """Raise TransferError where a device is missing: Mooncake itself would start without one."""
    found = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    missing = [name for name in wanted.split(",") if name not in found] if wanted else []
    if missing or not found:
        raise TransferError(
            f"RDMA device {', '.join(missing) or 'of any name'} is not on this node: it has"
            f" {', '.join(found) or 'none'} ({folder}); correct --rdma-devices, or give --transfer tcp"
        )
