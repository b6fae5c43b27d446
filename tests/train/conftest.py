"""These tests need what `pip install effkern[train]` brings; elsewhere (a bare GPU machine) they are not collected."""

from importlib.util import find_spec

if all(find_spec(name) for name in ("numpy", "tokenizers", "safetensors", "tyro", "rich", "matplotlib", "tensorboard")):
    from tests.train.fixtures import base, dataset, salt, teacher, text

    __all__ = ["base", "dataset", "salt", "teacher", "text"]
else:
    collect_ignore_glob = ["test_*.py"]
