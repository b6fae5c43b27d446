"""Which extra of the package brings a library that is missing: `pip install 'effkern[train]'`.

The package itself needs torch alone; commands, the trainer and the data path say here what else they want.
"""

# Names as they are imported. The first extra that has a library is the one to install.
EXTRAS = {
    "train": ("numpy", "tokenizers", "safetensors", "tyro", "rich", "matplotlib", "tensorboard", "zstandard", "tomli"),
    "datasets": ("datasets",),
    "curation": ("rensa",),
    "hf": ("transformers", "accelerate"),
    "eval": ("lm_eval",),
    "wandb": ("wandb",),
    "triton": ("triton",),
    "bench": ("psutil",),
}


def advice(error: BaseException) -> str | None:
    """What to install after `error`, as one sentence; None if it is not the missing library of an extra."""
    if not isinstance(error, ModuleNotFoundError):
        return None
    library = (error.name or "").partition(".")[0]
    extra = next((extra for extra, libraries in EXTRAS.items() if library in libraries), None)
    return extra and f"{library} is not installed, which the extra {extra} brings: pip install 'effkern[{extra}]'"
