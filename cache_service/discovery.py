"""Finds the CacheServers of this node: each writes into its arena's header where it listens."""

from pathlib import Path

from cache_service import arena_format
from cache_service.arena_files import SHARED_MEMORY, arena_path, header_word
from cache_service.arena_format import ArenaIdentity
from cache_service.processes import ProcessId


def find_endpoints(cluster_id: str, folder: Path = SHARED_MEMORY) -> list[str]:
    """Return the endpoints of a cluster's live servers on this node, one for each node address."""
    begin, end = arena_path(cluster_id, "_", folder).name.split("_")
    endpoints = []
    for path in sorted(folder.glob(f"{begin}*{end}")):
        try:
            with path.open("rb") as file:
                header = file.read(arena_format.HEADER_BYTES)
        except OSError:
            continue
        words = (arena_format.OWNER_PID_WORD, arena_format.OWNER_START_WORD, arena_format.PORT_WORD)
        pid, ticks, port = (header_word(header, word) for word in words)
        if ArenaIdentity.unpack(header).spec is not None and port and ProcessId(pid, ticks).is_alive():
            node = path.name[len(begin) : -len(end)]
            endpoints.append(f"tcp://{node}:{port}")
    return endpoints
