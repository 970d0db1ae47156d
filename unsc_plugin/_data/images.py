"""Encoded images to uint8 pixels: all at once when they fit into memory, else on access."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unsc_plugin.errors import DataError

IN_MEMORY_BYTES = 2 * 1024**3
CHUNK = 1024


@dataclass(frozen=True)
class EncodedImages:
    """A column of undecoded images, `{bytes, path}` each, and the rows of it that count."""

    rows: Any  # a `datasets.Dataset`; it pickles by path when it lies on disk
    column: str
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.positions)

    def __getitem__(self, positions: np.ndarray) -> EncodedImages:
        return replace(self, positions=self.positions[positions])

    def cells(self, positions: np.ndarray) -> list[Any]:
        """Return the cells at `positions` as stored."""
        found: list[Any] = list(self.rows[self.positions[positions].tolist()][self.column])
        return found


@dataclass(frozen=True)
class PixelFormat:
    """Channels, height and width of every image of a data set; `resize` if they must change."""

    channels: int
    height: int
    width: int
    resize: bool

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.channels, self.height, self.width

    @classmethod
    def of(cls, images: EncodedImages, options: Mapping[str, Any]) -> PixelFormat:
        """Return the format of the first image, with `size` and `channels` from `options`.

        Raises:
            DataError: an unknown option, or one with a value that makes no sense.
        """
        strange = set(options) - {"size", "channels"}
        if strange:
            raise DataError(f"expected args size and channels for images, got {sorted(strange)}")
        size, channels = options.get("size"), options.get("channels")
        if channels not in (None, 1, 3) or not (size is None or (type(size) is int and size > 0)):
            raise DataError(f"expected size ≥ 1 and channels 1 or 3, got {size!r} and {channels!r}")
        with _open(images.cells(np.array([0]))[0], 0) as first:
            grey = first.mode in ("1", "L", "LA")
            width, height = first.size
        return cls(
            channels or (1 if grey else 3), size or height, size or width, resize=size is not None
        )


@dataclass(frozen=True)
class ImageDecoder:
    """Positions of a split to `pixel_values` uint8 (n, C, H, W); works in worker processes."""

    images: EncodedImages
    format: PixelFormat

    def __call__(self, positions: Tensor) -> dict[str, Tensor]:
        """Return the pixels of these rows.

        Raises:
            DataError: an image that cannot be read, or of another size than the first one.
        """
        at = positions.cpu().numpy()
        out = np.empty((len(at), *self.format.shape), np.uint8)
        for row, cell in enumerate(self.images.cells(at) if len(at) else []):
            out[row] = _pixels(cell, self.format, int(at[row]))
        return {"pixel_values": torch.from_numpy(out)}

    def all(self) -> Tensor:
        """Return the pixels of every row, uint8 (N, C, H, W)."""
        out = torch.empty((len(self.images), *self.format.shape), dtype=torch.uint8)
        for start in range(0, len(out), CHUNK):
            chunk = torch.arange(start, min(start + CHUNK, len(out)))
            out[chunk] = self(chunk)["pixel_values"]
        return out


def _pixels(cell: Any, wanted: PixelFormat, row: int) -> np.ndarray:
    with _open(cell, row) as image:
        if image.mode.startswith(("I", "F")):
            raise DataError(
                f"expected 8-bit images, got mode {image.mode} in row {row}; convert it"
            )
        try:
            flat = image.convert("L" if wanted.channels == 1 else "RGB")
        except (OSError, SyntaxError) as error:
            raise DataError(f"image in row {row} cannot be decoded: {error}") from None
    if wanted.resize:
        flat = flat.resize((wanted.width, wanted.height), Image.Resampling.BILINEAR)
    if flat.size != (wanted.width, wanted.height):
        raise DataError(
            f"expected {wanted.width}×{wanted.height} pixels as in row 0, got "
            f"{flat.width}×{flat.height} in row {row}; to resize, set args: {{size: N}}"
        )
    pixels = np.asarray(flat, np.uint8)
    return pixels[None] if wanted.channels == 1 else pixels.transpose(2, 0, 1)


def _open(cell: Any, row: int) -> Image.Image:
    data = cell if isinstance(cell, bytes) else (cell or {}).get("bytes")
    place = None if isinstance(cell, bytes) else (cell or {}).get("path")
    if data is None and not place:
        raise DataError(f"expected an image in row {row}, got nothing; remove the row")
    try:
        return Image.open(io.BytesIO(data) if data is not None else str(place))
    except (OSError, SyntaxError) as error:
        raise DataError(f"image in row {row} cannot be opened: {error}") from None
