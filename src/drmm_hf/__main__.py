"""`python -m drmm_hf` is `drmm`."""

from drmm_cli import main


raise SystemExit(main())
