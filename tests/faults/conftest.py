"""These tests need what `pip install effkern[train]` and psutil bring; elsewhere they are not collected."""

from importlib.util import find_spec

if not all(find_spec(name) for name in ("numpy", "tokenizers", "safetensors", "rich", "psutil", "resource")):
    collect_ignore_glob = ["test_*.py"]
