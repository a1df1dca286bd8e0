"""Run `drmm evaluate` as a script, as `accelerate launch` needs it."""

import sys

from drmm_cli import main


if __name__ == "__main__":
    sys.exit(main(["evaluate", *sys.argv[1:]]))
