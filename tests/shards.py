"""Files of weights as safetensors lays them out, whose weights are zeros and take up no room."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any


def write_shard(path: Path, header: dict[str, Any]) -> None:
    """Write a file with these tensors: name -> its type, its shape and where it lies."""
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text)
    weights_end = max(tensor["data_offsets"][1] for tensor in header.values())
    os.truncate(path, 8 + len(text) + weights_end)
