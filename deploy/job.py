"""Serves a model under `ray job submit` on an existing cluster: `python -m deploy.job --config FILE [flags]`.

The same as `eyrie serve --ray-address auto`. Clean-up does not depend on this process: the actors and their
placement groups belong to its Ray job and end with it, however it ends (a stopped job gets 3 s).
"""

import sys

from cluster.__main__ import app

JOINED = ("--ray-address", "auto")
"""The cluster that runs the job."""


def main() -> None:
    """Run `eyrie serve` with this job's arguments on this job's cluster."""
    app(["serve", *JOINED, *sys.argv[1:]])


if __name__ == "__main__":
    main()
