"""The cache's sealed JSON as dictionaries, for tests that read or change it."""

import json
from pathlib import Path
from typing import Any

from mlfusion.system import disk


def read_json(path: Path) -> dict[str, Any]:
    return json.loads(disk.unsealed(path.read_bytes()))


def sealed(body: dict[str, Any]) -> str:
    return disk.sealed(json.dumps(body, indent=1, ensure_ascii=False))
