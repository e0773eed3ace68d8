"""What `--transfer` and `--rdma-devices` open, and the errors of nodes that have not got it."""

import pytest

from cache_service.transfer import TransferError
from cache_service.transfer_choice import transfer_opener


def test_off_opens_nothing():
    assert transfer_opener("off", None, "127.0.0.1") is None


@pytest.mark.parametrize(
    ("devices", "wanted", "text"),
    [
        ([], None, r"RDMA device of any name is not on this node: it has none"),
        (
            ["mlx5_0"],
            "mlx5_0,mlx5_1",
            r"RDMA device mlx5_1 is not on this node: it has mlx5_0 .*--transfer tcp$",
        ),
    ],
)
def test_rdma_without_its_devices_is_refused(tmp_path, devices, wanted, text):
    for name in devices:
        (tmp_path / name).mkdir()
    for folder in {tmp_path, tmp_path / "none"} if not devices else {tmp_path}:
        opener = transfer_opener("rdma", wanted, "127.0.0.1", folder)
        with pytest.raises(TransferError, match=text):
            opener()
