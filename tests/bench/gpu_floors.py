"""What the card itself can do: the floors that the engine's figures are measured against, in the same run."""

import statistics
import time

import torch

GB = 1e9


def measure_floors(device: torch.device, *, is_quick: bool) -> dict[str, float | str]:
    """Return GB/s of reading and copying device memory, of copies from and to the host, and bf16 TFLOP/s.

    `read_gb_s` is the best of a sum, a maximum and a copy (bytes read and written): the stricter floor.
    """
    side, num_bytes, num_rounds = (512, 64 << 20, 3) if is_quick else (8_192, 8 << 30, 15)
    found: dict[str, float | str] = {}
    found |= _reads(device, num_bytes, num_rounds)
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    found["bf16_tflop_s"] = 2 * side**3 / _seconds(lambda: a @ b, device, num_rounds) / 1e12
    return found | _host_copies(device, min(num_bytes, 1 << 30), num_rounds)


def _reads(device: torch.device, num_bytes: int, num_rounds: int) -> dict[str, float]:
    source = torch.randn(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    readers = {
        "sum": (lambda: source.sum(), num_bytes),
        "max": (lambda: source.max(), num_bytes),
        "copy": (lambda: target.copy_(source), 2 * num_bytes),
    }
    found = {
        f"{name}_gb_s": moved / _seconds(call, device, num_rounds) / GB
        for name, (call, moved) in readers.items()
    }
    return found | {"read_gb_s": max(found.values())}


def _host_copies(device: torch.device, num_bytes: int, num_rounds: int) -> dict[str, float]:
    """Copies of pinned memory: up, down, and both at once, each direction on a stream of its own."""
    is_cuda = device.type == "cuda"
    here = [torch.ones(num_bytes, dtype=torch.uint8, pin_memory=is_cuda) for _ in range(2)]
    there = [torch.ones(num_bytes, dtype=torch.uint8, device=device) for _ in range(2)]

    def up() -> None:
        there[0].copy_(here[0], non_blocking=True)

    def down() -> None:
        here[1].copy_(there[1], non_blocking=True)

    found = {
        "host_to_device_gb_s": num_bytes / _seconds(up, device, num_rounds) / GB,
        "device_to_host_gb_s": num_bytes / _seconds(down, device, num_rounds) / GB,
    }
    if is_cuda:
        other = torch.cuda.Stream(device)

        def both() -> None:
            main = torch.cuda.current_stream(device)
            other.wait_stream(main)
            up()
            with torch.cuda.stream(other):
                down()
            main.wait_stream(other)

        found["both_ways_gb_s"] = 2 * num_bytes / _seconds(both, device, num_rounds) / GB
    return found


def _seconds(call, device: torch.device, num_rounds: int) -> float:
    """Return the median time of a call, by the device's own clock."""
    for _ in range(3):
        call()
    times = []
    for _ in range(num_rounds):
        if device.type == "cuda":
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            began.record()
            call()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended) / 1000)
        else:
            began_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - began_s)
    return statistics.median(times)
