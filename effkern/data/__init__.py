"""Text in, batches of token ids out. NumPy and `tokenizers`; torch has no part in it, but in `curation`.

sources stdlib files hub     named sources of documents
collect spool                documents of one build: duplicates, split and order
tokenizer                    byte-level BPE
build folder shards manifest packing into a folder that is whole or not there
dataset order summary        reading it back: memory maps, deterministic batches, sizes
curation                     choosing what to train on, a package of its own
kernels fallback             the inner loops, from `effkern._data` or in NumPy
"""

from effkern.data.build import build_dataset
from effkern.data.dataset import PackedDataset
from effkern.data.document import Document, Skipped
from effkern.data.manifest import Manifest, load_manifest
from effkern.data.order import BatchOrder, val_batches
from effkern.data.sources import Source, resolve_sources
from effkern.data.summary import format_stats, stats

__all__ = [
    "BatchOrder",
    "Document",
    "Manifest",
    "PackedDataset",
    "Skipped",
    "Source",
    "build_dataset",
    "format_stats",
    "load_manifest",
    "resolve_sources",
    "stats",
    "val_batches",
]
