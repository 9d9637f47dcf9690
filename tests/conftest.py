"""Set before anything imports torch or transformers."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # every model here is built on the spot
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # or tokenizers warns in every forked or spawned child
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tensors are small: a second thread mostly waits for the first
