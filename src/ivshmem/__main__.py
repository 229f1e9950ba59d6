"""`python -m ivshmem`."""

from .cli.main import main

raise SystemExit(main())
