"""Images of rows: encoded bytes or files, checked by their headers when they are read, and decoded one by one.

An image stays what it was, bytes or a file, until a batch needs it. Orientation tags (EXIF) are applied, and
transparency is dropped, as the `datasets` library and most image processors do; of several frames or pages the first
is taken.
"""

import hashlib
import io
import os
import re
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from kdcli.data.columns import Columns, need_column, shape_of_value
from kdcli.data.rows import IMAGE, let_go
from kdcli.errors import InputError
from kdcli.words import counted

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "MPO", "JPEG2000", "TGA", "AVIF")
"""What is read, by Pillow's names; none that starts another program, as EPS does."""

MODES = {
    **dict.fromkeys(("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV")),
    **dict.fromkeys(("I;16", "I;16B", "I;16L", "I;16N"), 16),
}
"""Kinds of pixels that become RGB, with their bits where those are not 8."""

LARGEST = 89_478_485
"""Pixels of the largest image, Pillow's own limit: a few kilobytes may unpack to gigabytes."""

DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, MemoryError)
"""What Pillow raises for data that is missing or damaged."""

THREADS = min(8, (os.cpu_count() or 1) + 2)

AT_ONCE = 256
"""Images that one thread checks at a time."""

TAIL = 64
"""Bytes at the end of an image where the mark of its end stands."""

ORIENTATION = 0x0112
"""The tag (EXIF) that says how a camera was held."""

_OTHERS = {
    b"version https://git-lfs": ("is a pointer of Git LFS, not the image itself", "fetch it: git lfs pull"),
    b"<!doctype html": ("is a web page, not an image", "download the image again"),
    b"<html": ("is a web page, not an image", "download the image again"),
    b"<svg": ("is SVG, which has no pixels", "convert it to PNG"),
    b"<?xml": ("is XML, not an image", "convert it to PNG or JPEG"),
    b"%pdf": ("is PDF, not an image", "convert its pages to PNG or JPEG"),
    b"%!ps": ("is PostScript, not an image", "convert it to PNG or JPEG"),
}
"""How files begin that are often found in place of images: what is said of them, and what to do."""


class _Fault(Exception):
    """Why an image cannot be used, as the end of a sentence, and what to do."""

    def __init__(self, said: str, hint: str | None = None) -> None:
        super().__init__(said)
        self.hint = hint


@dataclass
class _Checked:
    """Images after a look at their headers. faults: of rows, counted from 1; several: those with more frames."""

    stamps: list[str | None] = field(default_factory=list)
    faults: list[tuple[int, str | None, _Fault]] = field(default_factory=list)
    several: list[int] = field(default_factory=list)


@cache
def _formats() -> tuple[str, ...]:
    """Return those of `FORMATS` that this Pillow has. Raises InputError without Pillow."""
    try:
        from PIL import Image
    except ImportError as error:
        raise InputError("images need Pillow, which is not installed", hint='pip install "kdcli[images]"') from error
    Image.init()
    # It warns of tags that it cannot read; nothing here needs them.
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return tuple(name for name in FORMATS if name in Image.OPEN)


def check_pillow() -> None:
    """Raise InputError where Pillow is not installed."""
    _formats()


@cache
def suffixes() -> frozenset[str]:
    """Return how names of image files end, in lower case."""
    formats = _formats()
    from PIL import Image

    return frozenset(suffix for suffix, name in Image.registered_extensions().items() if name in formats)


# From columns to images


def image_column(columns: Columns, given: str | None, source: str) -> str:
    """Return the name of the column of images: the one that is given, `image`, or the only one that has images.

    Raises InputError where there is none.
    """
    found = [name for name, column in columns.items() if any(_holds_images(part) for part in column.parts[:1])]
    name = given or ("image" if "image" in columns or len(found) != 1 else found[0])
    need_column(columns, name, "image", source)
    return name


def _holds_images(part: Any) -> bool:
    kind = getattr(part, "type", None)
    if isinstance(part, list):
        return bool(part) and isinstance(part[0], dict) and ("bytes" in part[0] or "path" in part[0])
    return kind is not None and (_is_bytes(kind) or _has_parts(kind))


def _has_parts(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and any(kind.get_field_index(name) >= 0 for name in ("bytes", "path"))


def read_images(
    columns: Columns,
    name: str,
    source: str,
    notes: list[str] | None = None,
    *,
    folder: Path | None = None,
    where: str = "task.image",
    by_row: bool = True,
) -> pa.ChunkedArray:
    """Return a column as images, of the type `IMAGE`, each with its stamp. What has been read already stays as it is.

    folder: that relative paths start from; None is the working folder. notes: takes what a user should know.
    by_row: messages name rows, not only files.
    Raises InputError, with the row or file, for what is no image that can be decoded and given to a model.
    """
    column = columns[name]
    if all(getattr(part, "type", None) == IMAGE for part in column.parts):
        return pa.chunked_array(column.parts, IMAGE)
    checked, parts = _Checked(), []
    check_pillow()
    with ThreadPoolExecutor(THREADS) as pool, warnings.catch_warnings():
        # What Pillow would warn of is refused or taken; filters are the process's, and threads share them.
        warnings.simplefilter("ignore")
        first = 1
        for part in column.parts:
            for start in range(0, len(part), 64 * AT_ONCE):
                piece = _as_images(part[start : start + 64 * AT_ONCE], first, name, source, where, folder)
                slices = [piece.slice(at, AT_ONCE) for at in range(0, len(piece), AT_ONCE)]
                for at, one in enumerate(pool.map(_check, slices)):
                    shift = first + at * AT_ONCE
                    checked.stamps += one.stamps
                    checked.faults += [(shift + place, path, fault) for place, path, fault in one.faults]
                    checked.several += [shift + place for place in one.several]
                stamps = pa.array(checked.stamps[-len(piece) :] if len(piece) else [], pa.large_string())
                data, paths, _ = piece.flatten()
                parts += [
                    pa.StructArray.from_arrays([data, paths, stamps], fields=list(IMAGE)).slice(at, AT_ONCE)
                    for at in range(0, len(piece), AT_ONCE)
                ]
                first += len(piece)
                let_go()
    if checked.faults:
        row, path, fault = checked.faults[0]
        more = f"; {len(checked.faults):,} images cannot be used" if len(checked.faults) > 1 else ""
        raise InputError(f"{_place(source, row, path, by_row)} {fault}{more}", where=where, hint=fault.hint)
    if checked.several and notes is not None:
        place = pa.chunked_array(parts, IMAGE)[checked.several[0] - 1].as_py()["path"]
        notes.append(
            f"{counted(len(checked.several), 'image')} of {source} {'has' if len(checked.several) == 1 else 'have'} "
            "several frames or pages, of which the first is taken "
            f"(first: {f'row {checked.several[0]}' if by_row or not place else place})"
        )
    return pa.chunked_array(parts, IMAGE)


def _place(source: str, row: int, path: str | None, by_row: bool) -> str:
    if not by_row and path is not None:
        return path
    return f"{source}: row {row}" + (f": {path}" if path is not None else "")


def _as_images(
    part: "pa.Array | list[Any]", first: int, name: str, source: str, where: str, folder: Path | None
) -> pa.StructArray:
    """Return values as images without stamps. Raises InputError, with the row, for what is neither bytes nor path."""
    binary, text = pa.large_binary(), pa.large_string()
    kind: Any
    if isinstance(part, pa.Array) and pa.types.is_dictionary(part.type):
        part = part.dictionary_decode()
    kind = getattr(part, "type", None)
    if isinstance(part, pa.Array) and _is_bytes(kind):
        data, paths = part.cast(binary), pa.nulls(len(part), text)
    elif isinstance(part, pa.Array) and _has_parts(kind):
        # The children alone would have values where the whole is missing.
        given = {kind.field(i).name: values for i, values in enumerate(part.flatten())}
        data = given.get("bytes", pa.nulls(len(part)))
        if not (pa.types.is_null(data.type) or _is_bytes(data.type)):
            raise InputError(f"{source}: {name!r} has {data.type} for the bytes of its images", where=where)
        data = data.cast(binary)
        paths = given.get("path", pa.nulls(len(part))).cast(text)
        if paths.null_count < len(paths):
            paths = pa.array(_placed(paths.to_pylist(), folder, data.is_null().to_pylist()), text)
    else:
        values = part.to_pylist() if isinstance(part, pa.Array) else part
        found = [_parts_of(value, row, name, source, where) for row, value in enumerate(values, first)]
        data = pa.array([one for one, _ in found], binary)
        paths = pa.array(_placed([path for _, path in found], folder, data.is_null().to_pylist()), text)
    return pa.StructArray.from_arrays([data, paths, pa.nulls(len(data), text)], fields=list(IMAGE))


def _is_bytes(kind: pa.DataType) -> bool:
    return any(
        is_one(kind)
        for is_one in (
            pa.types.is_binary,
            pa.types.is_large_binary,
            pa.types.is_binary_view,
            pa.types.is_fixed_size_binary,
        )
    )


def _parts_of(value: Any, row: int, name: str, source: str, where: str) -> tuple[bytes | None, str | None]:
    """Return the bytes and the path of an image, at least one of them None where it has none."""
    if isinstance(value, bytes):
        return value, None
    if value is None or isinstance(value, str):
        return None, value
    if isinstance(value, Mapping) and {"bytes", "path"} & value.keys():
        data, path = value.get("bytes"), value.get("path")
        if isinstance(data, bytes | None) and isinstance(path, str | None):
            return data, path
    said = shape_of_value(value) if isinstance(value, list | dict) else f"the number {value}"
    raise InputError(
        f"{source}: {name!r} of row {row} is {said}, not an image: encoded bytes, or the path of a file",
        where=where,
        hint="write images as PNG or JPEG, in files or as bytes; image = names their column",
    )


def _placed(paths: Sequence[str | None], folder: Path | None, of_files: Sequence[bool]) -> Iterator[str | None]:
    """Yield paths as seen from anywhere, where they stand for the image itself; others are names only."""
    start = str(folder or "")
    for path, of_file in zip(paths, of_files, strict=True):
        yield os.path.abspath(os.path.join(start, path)) if path and of_file and not _address(path) else path


def _address(path: str) -> str | None:
    """Return the protocol of an address on the web or in a store, data of a page included; None for a path."""
    found = re.match(r"(data):|([a-zA-Z][a-zA-Z0-9+.-]+)://", path)
    return found[1] or found[2] if found else None


# Checks of headers


def _check(images: pa.StructArray) -> _Checked:
    """Return what the headers of some images say; rows are counted from 0."""
    found = _Checked()
    data, paths, _ = images.flatten()
    for row, (content, path) in enumerate(zip(data, paths.to_pylist(), strict=True)):
        try:
            stamp, several = _check_one(content.as_py(), path)
            found.stamps.append(stamp)
            found.several += [row] if several else []
        except _Fault as fault:
            found.stamps.append(None)
            found.faults.append((row, path, fault))
    return found


def _check_one(content: bytes | None, path: str | None) -> tuple[str, bool]:
    """Return the stamp of an image, and whether it has several frames. Raises _Fault for what cannot be used."""
    if content is not None:
        if not content:
            raise _Fault("has an image of 0 bytes", "remove the row, or write its image again")
        with io.BytesIO(content) as file:
            several = _check_header(file, content)
        # The same bytes are the same image, whatever they are called.
        return hashlib.blake2b(content, digest_size=16).hexdigest(), several
    if not path:
        raise _Fault("has no image", "remove the row, or add its image")
    if (protocol := _address(path)) is not None:
        raise _Fault(
            f"is {'data inside a text' if protocol == 'data' else 'an address'}: kdcli reads files and bytes, and "
            "downloads no images",
            "download them first, and write the paths of the files",
        )
    try:
        about = os.stat(path)
        if not stat.S_ISREG(about.st_mode):
            raise _Fault("is a folder, not an image" if stat.S_ISDIR(about.st_mode) else "is no regular file")
        if not about.st_size:
            raise _Fault("is empty", "remove it, or write it again")
        with open(path, "rb") as file:
            several = _check_header(file)
    except FileNotFoundError as error:
        if os.path.islink(path):
            raise _Fault("is a link to a file that does not exist", "remove it") from error
        other = os.path.exists(path.replace("\\", "/")) and "its paths need / in place of \\"
        raise _Fault(
            "does not exist", other or "relative paths start at the folder of their table; image = names their column"
        ) from error
    except ValueError as error:
        raise _Fault(f"is no path: {error}") from error
    except OSError as error:
        raise _Fault(f"cannot be read: {error.strerror or error}") from error
    return stamp_of_file(about), several


def stamp_of_file(about: os.stat_result) -> str:
    """Return what changes with a file: its size, and its times of writing and of change, in nanoseconds.

    Files that change places keep their sizes and times of writing, which any program can set; that of change is the
    system's own.
    """
    return f"{about.st_size}-{about.st_mtime_ns}-{about.st_ctime_ns}"


def _check_header(file: Any, content: bytes | None = None) -> bool:
    """Return whether an image has several frames. content: all bytes, where they are in memory."""
    start = content[:32] if content is not None else file.read(32)
    file.seek(0)
    with _opened(file, start) as image:
        _check_pixels(image)
        several = bool(getattr(image, "is_animated", False)) and image.format != "MPO"
        if content is not None:
            end = content[-TAIL:]
        else:
            file.seek(0, os.SEEK_END)
            file.seek(-min(TAIL, file.tell()), os.SEEK_END)
            end = file.read()
        if _may_be_cut(image, end):
            _load(image)
    return several


def _opened(file: Any, start: bytes) -> "Image.Image":
    """Return an image whose header is read. Raises _Fault for what is none."""
    from PIL import Image, UnidentifiedImageError

    try:
        return Image.open(file, formats=_formats())
    except UnidentifiedImageError as error:
        for beginning, (said, hint) in _OTHERS.items():
            if start.lstrip(b"\xef\xbb\xbf \r\n\t").lower().startswith(beginning):
                raise _Fault(said, hint) from error
        if start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"mif1", b"heif"):
            raise _Fault("is HEIC, which Pillow does not read", "convert it to JPEG or PNG") from error
        raise _Fault(
            "is no image, or one of a format that is not read", f"known formats are {', '.join(_formats())}"
        ) from error
    except Image.DecompressionBombError as error:
        raise _too_large() from error
    except DAMAGE as error:
        raise _damaged(error) from error


def _too_large(pixels: int | None = None) -> _Fault:
    return _Fault(
        f"has {f'{pixels:,}' if pixels else 'more than ' + f'{2 * LARGEST:,}'} pixels; {LARGEST:,} are the most",
        "scale it down: a model reads far fewer",
    )


def _check_pixels(image: "Image.Image") -> None:
    """Raise _Fault for an image that is too large, or whose pixels cannot become RGB."""
    width, height = image.size
    if width * height > LARGEST:
        raise _too_large(width * height)
    if _bits(image) is None:
        raise _Fault(
            f"has pixels of 32 bits ({image.mode}), whose black and white are not known",
            "scale them to 8 bits a channel, and write them as PNG",
        )


def _bits(image: "Image.Image") -> int | None:
    """Return the bits of a channel; None for pixels without known limits."""
    if image.mode == "I" and image.format in ("PNG", "PPM"):
        # 16 bits, by some versions of Pillow.
        return 16
    return (MODES[image.mode] or 8) if image.mode in MODES else None


def _may_be_cut(image: "Image.Image", end: bytes) -> bool:
    """Return whether data may be missing; False where the end of the format stands at the end of the bytes."""
    ends = {"PNG": b"IEND", "JPEG": b"\xff\xd9", "MPO": b"\xff\xd9"}
    return ends.get(image.format or "", b"\0none") not in end


def _load(image: "Image.Image") -> None:
    """Decode an image, in place. Raises _Fault where data is missing or damaged."""
    try:
        image.load()
    except DAMAGE as error:
        raise _damaged(error) from error


def _damaged(error: Exception) -> _Fault:
    cut = "truncated" in str(error).lower() or isinstance(error, EOFError)
    return _Fault(f"is {'truncated' if cut else 'damaged'}: {error}", "write or download it again, or remove it")


def name_of(image: Mapping[str, Any]) -> str:
    """Return what to call an image of a row: its path, from the working folder on where it is below it, or its size."""
    path: str | None = image["path"]
    if path is None:
        return f"{len(image['bytes']):,} bytes"
    here = os.path.join(os.getcwd(), "")
    return path.removeprefix(here)


def hash_of_file(path: str) -> str | None:
    """Return the hash of a file's bytes, as the stamps of bytes have it; None where it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
    except OSError:
        return None


# Decoding


def decoded(image: Mapping[str, Any], *, row: int | None = None, mode: str = "RGB") -> "Image.Image":
    """Return an image of a row as Pillow's, upright, in `mode` ("RGB", or "L" for one channel).

    row: its number, for messages. Raises InputError for what cannot be decoded, with its file or row.
    """
    path = image["path"]
    try:
        return _decoded(image, mode)
    except _Fault as fault:
        number = f"the image of row {row + 1}" if row is not None else "the image"
        place = path if image["bytes"] is None else f"{number} ({path})" if path else number
        raise InputError(f"{place} {fault}", hint=fault.hint) from fault


def _decoded(image: Mapping[str, Any], mode: str) -> "Image.Image":
    content, path = image["bytes"], image["path"]
    if content is None:
        content = _read_again(path, image.get("stamp"))
    with io.BytesIO(content) as file:
        found = _opened(file, b"")
        _check_pixels(found)
        bits = _bits(found)
        _load(found)
    return _in_mode(_upright(found), mode, bits)


def _read_again(path: str, stamp: str | None) -> bytes:
    """Return the bytes of a file. Raises _Fault where it is another one than its stamp was taken of.

    What is kept of an image has a name made of its stamp, so other pixels must not become part of it.
    """
    try:
        with open(path, "rb") as file:
            content = file.read()
            # After reading, so that a change on the way is seen, too.
            about = os.fstat(file.fileno())
    except OSError as error:
        raise _Fault(f"cannot be read any more: {error.strerror or error}") from error
    if stamp is not None and stamp != stamp_of_file(about):
        raise _Fault("was changed after it was checked", "run it again, and leave the images as they are meanwhile")
    return content


def _upright(image: "Image.Image") -> "Image.Image":
    """Return an image turned as its orientation tag says; as it is where its tags cannot be read."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    try:
        turn = turns.get(image.getexif().get(ORIENTATION, 1))
    except Exception:
        # Damaged tags raise whatever their parser meets; pixels are whole.
        return image
    return image if turn is None else image.transpose(turn)


def _in_mode(image: "Image.Image", mode: str, bits: int | None) -> "Image.Image":
    """Return an image with other pixels: those of 16 bits scaled, transparency dropped."""
    from PIL import Image

    if bits == 16:
        import numpy as np

        # Pillow's own conversion cuts off what is above 255.
        pixels = np.asarray(image).astype(np.int64)
        image = Image.fromarray((pixels >> 8).clip(0, 255).astype(np.uint8))
    if image.mode in ("P", "PA"):
        # A palette may have shades of transparency, which Pillow warns of.
        image = image.convert("RGBA")
    return image if image.mode == mode else image.convert(mode)
