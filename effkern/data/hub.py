"""Data sets of the optional `datasets` package, streamed."""

from collections.abc import Iterator

from effkern.data.document import Document, Skipped


class HubSource:
    """hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT (split "train" unless named); one document per row.

    Rows are streamed, so that `max_bytes` ends the download as well.
    """

    def __init__(self, name: str, text_field: str = "text") -> None:
        parts = name.removeprefix("hf:").split(":")
        if not parts[0] or len(parts) > 3:
            raise ValueError(f"sources: must read hf:NAME[:CONFIG[:SPLIT]], got {name!r}")
        try:
            from datasets import load_dataset
        except ImportError as error:
            message = f'sources: {name} needs the optional package datasets: pip install "effkern[datasets]"'
            raise ImportError(message) from error
        self.name = name
        self.text_field = text_field
        self._load = load_dataset
        self._dataset, self._config, self._split = (*parts, "", "")[:3]

    def read(self) -> Iterator[Document | Skipped]:
        rows = self._load(self._dataset, self._config or None, split=self._split or "train", streaming=True)
        for number, row in enumerate(rows):
            text = row.get(self.text_field)
            if isinstance(text, str):
                yield Document(f"row {number}", text)
            elif text is None and self.text_field in row:
                yield Skipped(f"row {number}", "empty")
            else:
                fields = sorted(row)
                raise ValueError(f"{self.name}, row {number}: must have a text field {self.text_field!r}, got {fields}")
