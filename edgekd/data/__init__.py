"""Data sets: reading, checking, converting, fetching, making; and the loader that feeds training."""

from edgekd.data.reading import detect_format, list_splits, read_dataset

__all__ = ["detect_format", "list_splits", "read_dataset"]
