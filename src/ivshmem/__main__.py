"""`python -m ivshmem`."""

from .cli import main

raise SystemExit(main())
