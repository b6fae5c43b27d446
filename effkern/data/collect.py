"""From sources to the spool: bytes counted, duplicates dropped, what cannot be used listed."""

from collections.abc import Callable, Sequence

from effkern.data.document import Skipped
from effkern.data.sources import Source
from effkern.data.spool import DocumentSpool, Losses

Progress = Callable[[str, int, int], None]

# Under a byte limit, documents too long for what is left are passed over this many times, then the source ends.
MAX_PASSED_OVER = 64


def collect(sources: Sequence[Source], spool: DocumentSpool, max_bytes: int | None, progress: Progress) -> Losses:
    """Read the sources into the spool.

    Args:
        sources: read in this order; of equal documents the first stays.
        max_bytes: limit on the UTF-8 bytes taken. The sources share it evenly, and what one leaves over goes to
            those after it. Documents are taken whole or not at all.
        progress: called with ("read", bytes so far, `max_bytes` or 0 where the total is unknown).
    """
    losses = Losses()
    for index, source in enumerate(sources):
        stop = None
        if max_bytes is not None:
            stop = spool.num_bytes + (max_bytes - spool.num_bytes) // (len(sources) - index)
        _collect_one(source, index, spool, losses, stop, lambda: progress("read", spool.num_bytes, max_bytes or 0))
    return losses


def _collect_one(
    source: Source, index: int, spool: DocumentSpool, losses: Losses, stop: int | None, tick: Callable[[], None]
) -> None:
    passed_over = 0
    for item in source.read():
        if isinstance(item, Skipped):
            losses.skip(index, source.name, item.name, item.reason)
            continue
        try:
            text = item.text.encode()
        except UnicodeEncodeError:
            # JSON can spell half of a surrogate pair, which no UTF-8 text holds.
            losses.skip(index, source.name, item.name, "not UTF-8: lone surrogate")
            continue
        if not text.strip():
            losses.skip(index, source.name, item.name, "empty")
        elif stop is not None and spool.num_bytes + len(text) > stop:
            passed_over += 1
            if passed_over == MAX_PASSED_OVER:
                return
        elif not spool.add(item, text, index):
            losses.duplicates[index] += 1
        tick()
