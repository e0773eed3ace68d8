"""RunFolder: one run's private folder: Ray's session (own cluster) and the secrets handed to the actors.

Made and removed by the CLI's or the job's process. Secrets travel as files of mode 600, never in arguments.
"""

import os
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from cache_service.curve import new_cluster_secret, write_cluster_secret
from cluster.config import ClusterConfig

MAX_SOCKET_PATH_LEN = 107
SOCKET_BELOW_LEN = 64
"""How far below its folder Ray puts UNIX sockets: `/session_DATE_TIME_PID/sockets/plasma_store`."""
RAY_FOLDER = "ray"


class RunFolder:
    """A folder `eyrie-UID-PID-RANDOM` under the user's temporary folder (or /tmp, see below), mode 700."""

    def __init__(self) -> None:
        root = Path(tempfile.gettempdir())
        name = f"eyrie-{os.getuid()}-{os.getpid()}-{secrets.token_hex(3)}"
        if len(str(root / name / RAY_FOLDER)) + SOCKET_BELOW_LEN > MAX_SOCKET_PATH_LEN:
            root = Path("/tmp")
        _sweep(root)
        self.path = root / name
        self.path.mkdir(mode=0o700)
        self.ray_path = self.path / RAY_FOLDER
        """Where an own Ray cluster lives: Ray opens its folder to everyone (mode 777)."""
        self.ray_path.mkdir()
        self._keys_file: Path | None = None

    def place_secrets(self, config: ClusterConfig, api_keys: Sequence[str]) -> tuple[Path, Path]:
        """Return the files of the cluster secret and of the API keys, written where the user has none."""
        secret_file = config.secret_file
        if secret_file is None:
            secret_file = self.path / "cluster.secret"
            write_cluster_secret(secret_file, new_cluster_secret())
        keys_file = self.path / "api.keys"
        keys_file.touch(mode=0o600)
        keys_file.write_text("".join(f"{key}\n" for key in api_keys), encoding="utf-8")
        self._keys_file = keys_file
        return secret_file, keys_file

    def forget_keys(self) -> None:
        """Remove the API keys written here: who needs them has read them. Idempotent.

        The cluster secret stays: actors that are started again read it, and `eyrie cache`.
        """
        if self._keys_file is not None:
            self._keys_file.unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove the folder. Idempotent."""
        shutil.rmtree(self.path, ignore_errors=True)


def _sweep(root: Path) -> None:
    """Remove the folders of this user's runs whose process was killed."""
    for folder in root.glob(f"eyrie-{os.getuid()}-*-*"):
        pid = folder.name.split("-")[2]
        if pid.isdecimal() and not psutil.pid_exists(int(pid)):
            shutil.rmtree(folder, ignore_errors=True)
