"""`python -m drmm_hf` is `drmm`."""

from .cli import main


raise SystemExit(main())
