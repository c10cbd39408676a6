"""``python -m verl_fl_overlay``."""

from verl_fl_overlay.cli import main

raise SystemExit(main())
