"""Addresses of remote stores: what is understood, and what is said about the rest."""

import re

import pytest

from cache_service.config import CacheConfig
from cache_service.disk_store import DiskStore
from cache_service.remote import RecordLayout
from cache_service.store_address import (
    DiskAddress,
    MooncakeAddress,
    StoreAddressError,
    StoreOpenError,
    open_store,
    parse_store_address,
)

LAYOUT = RecordLayout(b"fingerprint 16 b", bundle_bytes=4_096, num_ranks=1)


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("disk:/cache?gb=20", DiskAddress("/cache", 20 << 30)),
        ("disk:/a b/{node}?gb=0.5", DiskAddress("/a b/{node}", 1 << 29)),
        ("mooncake:10.0.0.1:50051?segment_gb=0", MooncakeAddress("10.0.0.1:50051", 0)),
        ("mooncake:[::1]:1?segment_gb=2", MooncakeAddress("[::1]:1", 2 << 30)),
        (
            "mooncake:master:50051?protocol=rdma&devices=mlx5_0,mlx5_1&segment_gb=4",
            MooncakeAddress("master:50051", 4 << 30, "rdma", "mlx5_0,mlx5_1"),
        ),
    ],
)
def test_addresses_are_read(text, address):
    assert parse_store_address(text) == address


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "'' is neither a disk nor Mooncake; write disk:/PATH?gb=SIZE or mooncake:HOST:PORT"),
        ("s3:bucket", "neither a disk nor Mooncake"),
        ("/cache", "neither a disk nor Mooncake"),
        ("disk:cache?gb=1", "its folder 'cache' is not absolute; write disk:/PATH?gb=SIZE"),
        ("disk:/cache", "has no gb; write disk:/PATH?gb=SIZE"),
        ("disk:/cache?gb=0", "gb=0 holds no page"),
        ("disk:/cache?gb=many", "gb is 'many'; a number of GiB is needed"),
        ("disk:/cache?gb=-1", "gb is '-1'"),
        ("disk:/cache?gb=nan", "gb is 'nan'"),
        ("disk:/cache?gb=inf", "gb is 'inf'"),
        ("disk:/cache?gb=1&gb=2", "gb is given twice"),
        ("disk:/cache?size=1", "found 'size=1' after the `?`; allowed are gb=..."),
        ("disk:/cache?gb", "found 'gb' after the `?`"),
        ("mooncake:somewhere?segment_gb=1", "'somewhere' is no HOST:PORT of a master"),
        ("mooncake://host:1?segment_gb=1", "'//host:1' is no HOST:PORT"),
        ("mooncake:host:0?segment_gb=1", "no HOST:PORT"),
        ("mooncake:host:65536?segment_gb=1", "no HOST:PORT"),
        ("mooncake:host:1", "has no segment_gb"),
        ("mooncake:host:1?segment_gb=1&protocol=ib", "protocol is 'ib'; tcp and rdma are allowed"),
        ("mooncake:host:1?segment_gb=1&devices=mlx5_0", "add protocol=rdma"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_allowed(text, told):
    with pytest.raises(StoreAddressError, match=re.escape(told)) as error:
        parse_store_address(text)
    assert repr(text) in str(error.value)


def test_each_node_may_have_its_own_folder(tmp_path):
    address = DiskAddress(f"{tmp_path}/{{node}}/pages", 1 << 20)
    stores = [open_store(address, LAYOUT, memoryview(b""), node) for node in ("10.0.0.1", "10.0.0.2")]
    assert all(isinstance(store, DiskStore) for store in stores)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["10.0.0.1", "10.0.0.2"]
    for store in stores:
        assert store.close(5.0)


def test_a_store_that_cannot_be_opened_says_why(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StoreOpenError, match=r"file/store: .*; give a folder"):
        open_store(DiskAddress(f"{tmp_path}/file/store", 1 << 20), LAYOUT, memoryview(b""), "127.0.0.1")


def test_the_configuration_refuses_a_bad_address_and_a_store_without_a_host_cache():
    with pytest.raises(ValueError, match="neither a disk nor Mooncake"):
        CacheConfig(host_cache_gb=1.0, store="nowhere")
    with pytest.raises(ValueError, match="without a host cache"):
        CacheConfig(store="disk:/cache?gb=1")
    assert CacheConfig(host_cache_gb=1.0, store="disk:/cache?gb=1").store == "disk:/cache?gb=1"
