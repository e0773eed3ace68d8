"""The run's folder and what an own Ray cluster is given.

Checked with a stand-in for `ray`, which opens its folder to everyone as Ray does, in processes of their own,
since starting Ray changes the environment.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster.run_folder import MAX_SOCKET_PATH_LEN, RunFolder

ROOT = Path(__file__).resolve().parents[2]
RAY = """
import json, os, sys
def init(**options):
    folder = options.get("_temp_dir")
    if folder is not None:
        os.makedirs(folder, exist_ok=True)
        os.chmod(folder, 0o777)
def shutdown():
    pass
"""
START = """
import json, os, sys
from cluster.local_ray import start_local_ray
from cluster.run_folder import RunFolder
folder = RunFolder()
folder.path.joinpath("cluster.secret").write_text("secret")
start_local_ray(folder, 1, 0)
modes = {name: path.stat().st_mode & 0o777 for name, path in (("run", folder.path), ("ray", folder.ray_path))}
print(json.dumps(modes))
folder.remove()
"""


@pytest.fixture
def run(tmp_path):
    (tmp_path / "ray.py").write_text(RAY)

    def run(script, **environment):
        path = os.pathsep.join([str(tmp_path), str(ROOT)])
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONPATH": path, **environment},
            cwd=tmp_path,
            check=True,
            capture_output=True,
            text=True,
            timeout=60,
        )
        return json.loads(done.stdout)

    return run


def test_the_folder_with_the_secrets_stays_private_though_ray_opens_its_own(run):
    assert run(START) == {"run": 0o700, "ray": 0o777}


@pytest.mark.parametrize("root_len", [8, 35, 60])
def test_rays_sockets_fit_into_a_sockets_path(tmp_path, monkeypatch, root_len):
    root = Path("/tmp") / f"t{os.getpid()}".ljust(root_len - len("/tmp/"), "x")
    root.mkdir(exist_ok=True)
    monkeypatch.setattr("tempfile.tempdir", str(root))
    folder = RunFolder()
    session = f"session_2026-01-01_00-00-00_000000_{4_194_304}"
    try:
        assert len(str(folder.ray_path / session / "sockets" / "plasma_store")) <= MAX_SOCKET_PATH_LEN
        assert folder.path.is_relative_to(root) == (root_len == 8)
    finally:
        folder.remove()
        root.rmdir()
