"""The columns of a parquet file: which hold the images and labels, and reading them without holding the file.

A struct is stored as one column per field, so the paths of the images are read without the images.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shards.errors import UserError
from shards.sources.base import make_distinct

if TYPE_CHECKING:
    import pyarrow
    import pyarrow.parquet

_IMAGE_NAMES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture")
_LABEL_NAMES = ("label", "labels", "fine_label", "class", "cls", "target")
"""Column names taken without asking, the first that is there."""

_LISTED_ROWS = 16384
"""Labels and paths held in memory at a time."""

_IMAGE_ROWS = 128
_IMAGE_BYTES = 16 << 20
"""Images held in memory at a time, and their expected size; pages are as large as the file's writer made them."""

_BUFFER_BYTES = 1 << 20
"""Pyarrow reads a column this much at a time; without it, a whole row group, which may be the whole file."""


@dataclass(frozen=True)
class Part:
    """One parquet file of a split."""

    path: Path
    rows: int
    image_bytes: int
    """Uncompressed size of the column of images."""
    size: int
    mtime_ns: int
    footer: str
    """Digest of the file's size and footer, which says where and how large every block is."""

    def origin(self, columns: Columns) -> dict[str, Any]:
        """What tells a copy of its images from one of another file or version."""
        identity = {"name": self.path.name, "size": self.size, "mtime_ns": self.mtime_ns, "footer": self.footer}
        return identity | {"column": columns.image_leaf}


@dataclass(frozen=True)
class Columns:
    """What is read of each file."""

    image: str
    image_leaf: str
    """The column of bytes inside `image`, or `image` itself."""
    path_leaf: str | None
    """Of the file name inside `image`."""
    label: str
    text_labels: bool
    """Whether labels are names and not numbers."""
    names: tuple[str, ...] | None
    """Of the classes, from the metadata."""


_NOT_EMBEDDED = (
    "The images are not in the parquet files: at most their paths are, on the machine that wrote them.",
    "Write them again with the images in them, as Dataset.push_to_hub of the library datasets does.",
)


def check_pyarrow() -> None:
    """Refuse to go on without pyarrow.

    Raises:
        UserError: with the command that installs it.
    """
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(
            "parquet: pyarrow, which reads these files, is not installed",
            "Install it with: pip install 'onehour[parquet]'",
        ) from error


@contextmanager
def open_parquet(path: Path) -> Iterator[pyarrow.parquet.ParquetFile]:
    """A parquet file whose damage is a `UserError`."""
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
            yield file
    except (OSError, pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UserError(
            f"{path}: not a parquet file, or damaged: {str(error).strip().partition(chr(10))[0]}", "Download it again."
        ) from error


def find_columns(path: Path, schema: pyarrow.Schema, image: str | None, label: str | None) -> Columns:
    """The columns of images and labels: those named, else the only ones that can be meant.

    Raises:
        UserError: listing the columns, if there is none or no only one, or the one named holds something else.
    """
    features = _features(schema)
    image = _choose(path, schema, "--image-column", image, "images", _IMAGE_NAMES, _holds_images, features, "Image")
    label = _choose(
        path, schema, "--label-column", label, "labels", _LABEL_NAMES, _holds_labels, features, "ClassLabel"
    )
    kind = schema.field(image).type
    fields = [kind.field(i).name for i in range(kind.num_fields)]
    names = features.get(label, {}).get("names")
    return Columns(
        image,
        f"{image}.bytes" if fields else image,
        f"{image}.path" if "path" in fields else None,
        label,
        _is_text(schema.field(label).type),
        make_distinct(list(map(str, names))) if isinstance(names, list) and names else None,
    )


def _features(schema: pyarrow.Schema) -> dict[str, dict[str, Any]]:
    """What the library ``datasets`` wrote about the columns; empty for files of other writers."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (KeyError, ValueError, TypeError, AttributeError):
        return {}


def _choose(
    path: Path,
    schema: pyarrow.Schema,
    option: str,
    wanted: str | None,
    what: str,
    names: tuple[str, ...],
    fits: Callable[[pyarrow.DataType], bool],
    features: dict[str, dict[str, Any]],
    feature: str,
) -> str:
    """The column named by the option, else the one its name, the metadata or its type single out."""
    columns = "Columns: " + ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is not None:
        if wanted not in schema.names:
            raise UserError(f"{option} {wanted}: {path} has no such column", columns)
        if not fits(schema.field(wanted).type):
            raise UserError(f"{option} {wanted}: this column of {path} holds no {what}", columns)
        return wanted
    fitting = [field.name for field in schema if fits(field.type)]
    typed = [name for name in fitting if features.get(name, {}).get("_type") == feature]
    named = [name for name in names if name in fitting][:1]
    for choice in (named, typed, fitting):
        if len(choice) == 1:
            return choice[0]
    count = "no" if not fitting else "more than one"
    raise UserError(f"{path}: {count} column could hold the {what}", columns, f"Name one with {option}.")


def _holds_images(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        index = kind.get_field_index("bytes")
        if index < 0:
            return False
        kind = kind.field(index).type
    return types.is_binary(kind) or types.is_large_binary(kind) or types.is_binary_view(kind)


def _holds_labels(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    return types.is_integer(kind) or _is_text(kind)


def _is_text(kind: pyarrow.DataType) -> bool:
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)


def inspect_file(path: Path, first: Path, columns: Columns) -> Part:
    """Take a file's sizes from its footer.

    Raises:
        UserError: if its columns are not those of the first file, or it says that it holds no images.
    """
    with open_parquet(path) as file:
        found = find_columns(path, file.schema_arrow, columns.image, columns.label)
        if found != columns:
            what = "class names" if found.names != columns.names else "columns"
            raise UserError(
                f"{path}: its {what} are not those of {first}", "All files must come from one version of the data set."
            )
        metadata = file.metadata
        leaves = [metadata.schema.column(i).path for i in range(metadata.num_columns)]
        groups = [
            metadata.row_group(i).column(leaves.index(columns.image_leaf)) for i in range(metadata.num_row_groups)
        ]
        for group in groups:
            statistics = group.statistics
            if statistics is not None and statistics.has_null_count and statistics.null_count:
                raise UserError(
                    f"{path}: {statistics.null_count:,} of {metadata.num_rows:,} rows have no image: "
                    f"{columns.image_leaf} is null",
                    *_NOT_EMBEDDED,
                )
        stat = path.stat()
        return Part(
            path,
            metadata.num_rows,
            sum(group.total_uncompressed_size for group in groups),
            stat.st_size,
            stat.st_mtime_ns,
            _footer_digest(path, metadata.serialized_size),
        )


def _footer_digest(path: Path, footer_bytes: int) -> str:
    """Of the file's size and its end: the metadata, their length in 4 bytes, and ``PAR1``."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - footer_bytes - 8))
        return hashlib.sha256(b"%d " % size + file.read()).hexdigest()[:16]


def distinct_labels(path: Path, column: str) -> set[Any]:
    """The values of the label column: int or str, and None if there are nulls."""
    found: set[Any] = set()
    with open_parquet(path) as file:
        for batch in file.iter_batches(_LISTED_ROWS, columns=[column], use_threads=False):
            found.update(batch.column(0).unique().to_pylist())
    return found


def read_labels(part: Part, columns: Columns) -> Iterator[tuple[Any, str | None]]:
    """Label and path of each row; without a column of paths, None."""
    leaves = [columns.label, *filter(None, [columns.path_leaf])]
    with open_parquet(part.path) as file:
        for batch in file.iter_batches(_LISTED_ROWS, columns=leaves, use_threads=False):
            labels = batch.column(columns.label).to_pylist()
            paths = [None] * len(labels)
            if columns.path_leaf is not None:
                paths = _select_field(batch, columns.image, columns.path_leaf).to_pylist()
            yield from zip(labels, paths, strict=True)


def read_images(part: Part, columns: Columns) -> Iterator[pyarrow.Buffer]:
    """The images of a file in the order of its rows.

    Raises:
        UserError: if the file is not the one that was inspected, or naming the row, if one has no image.
    """
    mean = part.image_bytes // max(1, part.rows)
    rows = max(1, min(_IMAGE_ROWS, _IMAGE_BYTES // max(1, mean)))
    row = 0
    with open_parquet(part.path) as file:
        if _footer_digest(part.path, file.metadata.serialized_size) != part.footer:
            raise UserError(
                f"{part.path}: changed since it was listed",
                "Run the same command again when nothing writes to the source any more.",
            )
        for batch in file.iter_batches(rows, columns=[columns.image_leaf], use_threads=False):
            for value in _select_field(batch, columns.image, columns.image_leaf):
                if not value.is_valid:
                    raise UserError(f"{part.path}: row {row:,}: {columns.image_leaf} is null", *_NOT_EMBEDDED)
                row += 1
                yield value.as_buffer()


def _select_field(batch: pyarrow.RecordBatch, column: str, leaf: str) -> pyarrow.Array:
    """A column, or a field of a column of structs; null where the struct is."""
    import pyarrow.compute

    array = batch.column(column)
    return array if leaf == column else pyarrow.compute.struct_field(array, leaf[len(column) + 1 :])
