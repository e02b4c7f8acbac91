"""What Python does first in every process of the tests: it collects garbage far more rarely.

An engine's processes import millions of objects that stay, and by default the collector looks
through all of them again and again: a fifth of the time that importing vLLM takes. A reader's own
processes start without this; what is tested is the same.
"""

from __future__ import annotations

import gc

gc.set_threshold(100_000, 50, 1000)
