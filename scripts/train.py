"""Run `drmm train` as a script, as `accelerate launch` needs it."""

import sys

from drmm_cli import main


if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
