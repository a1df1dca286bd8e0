"""Run `drmm convert` as a script, as `accelerate launch` needs it."""

import sys

from drmm_cli import main


if __name__ == "__main__":
    sys.exit(main(["convert", *sys.argv[1:]]))
