"""Commands. What JAX would answer with a traceback on its import, before any of them begins, is refused here."""

import os
import sys

_count = os.environ.get("JAX_NUM_CPU_DEVICES", "-1")
if not (_count == "-1" or _count.isdecimal() and 0 < int(_count) < 2**31):
    print(f"error: JAX_NUM_CPU_DEVICES = {_count!r}: must be a number from 1, or unset", file=sys.stderr)
    sys.exit(2)
