"""Run `drmm benchmark` as a script, as `accelerate launch` needs it."""

import sys

from drmm_cli import main


if __name__ == "__main__":
    sys.exit(main(["benchmark", *sys.argv[1:]]))
