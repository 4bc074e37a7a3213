"""The splits of a user's own images: folders of classes, tables of files or encoded bytes, or a set of the hub."""

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.compute as pc

from kdcli.data.columns import Column, Columns
from kdcli.data.files import READABLE, read_file
from kdcli.data.images import THREADS, hash_of_file, image_column, read_images, suffixes
from kdcli.data.own import files_of, placed_at, read_splits
from kdcli.data.rows import IMAGE, TEXT
from kdcli.errors import InputError
from kdcli.files import expanded
from kdcli.words import counted

if TYPE_CHECKING:
    from kdcli.recipe.schema import TaskSection

SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
"""How folders of splits are called, as the `datasets` library has it."""

JUNK = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
"""Files that systems leave in folders, beside those whose names begin with a dot."""

AT_MOST = 2**30
"""Bytes of files that are read to find images which two splits share."""


def read_image_splits(section: "TaskSection", column: str | None, base: Path, notes: list[str]) -> tuple[dict, str]:
    """Return splits as `read_splits` does, with a checked column of images. column: its name, if the recipe has one.

    A folder of `data` may hold one of each split; else its folders are classes. Raises InputError for what is no image.
    """
    splits: dict[str, Columns]
    if section.hub is not None:
        found, source = read_splits(section, base, notes)
        splits = {name: _with_images(rows, column, f"{source} {name}", notes) for name, rows in found.items()}
    elif section.data is not None:
        source, place = section.data, placed_at(section.data, base, "task.data")
        folders = _folders_of_splits(place, "task.data") if place.is_dir() else {}
        if folders:
            splits = {name: read_image_folder(folder, "task.data", notes) for name, folder in folders.items()}
        else:
            splits = {"train": read_images_of(section.data, base, section, column, "task.data", notes)}
        _check_classes(splits, section, "task.data", notes)
    elif section.train is not None:
        source, splits = section.train, {}
        for name, (path, where) in files_of(section).items():
            splits[name] = read_images_of(path, base, section, column, where, notes)
        _check_classes(splits, section, "task.train", notes)
    else:
        return read_splits(section, base, notes)
    if len(splits) > 1:
        _note_shared(splits, column, notes)
    return splits, source


def read_images_of(
    path: str, base: Path, section: "TaskSection", column: str | None, where: str, notes: list[str]
) -> Columns:
    """Return the columns of a table of images, or `image` and `label` of a folder of classes; images are checked.

    base: the folder that relative paths start from; those in a table start at its own. section: says how text files are
    written. Raises InputError.
    """
    place = placed_at(path, base, where)
    if place.is_dir():
        if folders := _folders_of_splits(place, where):
            raise InputError(
                f"{place} has folders of splits: {', '.join(path.name for path in folders.values())}",
                where=where,
                hint=f"name one of them: {next(reversed(folders.values()))}",
            )
        return read_image_folder(place, where, notes)
    if place.suffix.lower() in suffixes():
        raise InputError(
            f"{place} is one image", where=where, hint="give a folder with a folder for each class, or a table of paths"
        )
    table = read_file(place, where, delimiter=section.delimiter, encoding=section.encoding, notes=notes)
    return _with_images(table, column, path, notes, folder=place.parent)


def _with_images(
    table: Columns, column: str | None, source: str, notes: list[str], *, folder: Path | None = None
) -> Columns:
    name = image_column(table, column, source)
    return {**table, name: Column(read_images(table, name, source, notes, folder=folder).chunks)}


# Folders


def read_image_files(places: Sequence[str], where: str, notes: list[str], *, folder: Path | None = None) -> Column:
    """Return images of files, and of all files below folders whose names are those of images, in order.

    folder: that relative paths start from; None is the working folder. where: what names the places. Raises InputError,
    with the file, for what is no image, and for a folder without any.
    """
    files: list[str] = []
    for place in places:
        path = expanded(os.path.join(folder or "", place), where)
        if not path.is_dir():
            if "://" not in place and not path.exists():
                raise InputError(f"{path} does not exist", where=where)
            files.append(place if "://" in place else str(path))
            continue
        try:
            found = [
                one for one in _below(str(path), set()) if not _is_hidden(os.path.basename(one)) and _is_image(one)
            ]
        except OSError as error:
            raise InputError(f"{error.filename} is not readable: {error.strerror}", where=where) from error
        if not found:
            raise InputError(f"{path} has no images", where=where, hint="names of images end in .jpg or .png, say")
        files += found
    table = {"image": Column([pa.array(files, TEXT)])}
    source = str(places[0]) if len(places) == 1 else "the files given"
    return Column(read_images(table, "image", source, notes, where=where, by_row=False).chunks)


def read_image_folder(folder: Path, where: str, notes: list[str]) -> Columns:
    """Return the columns `image` and `label` of a folder of classes, in the order of their names.

    All images below a class's folder are of that class. Hidden files, and files whose names are not those of images,
    are passed over, and notes say so. Raises InputError where there are no classes, and for what is no image.
    """
    files: list[str] = []
    labels: list[str] = []
    passed: list[str] = []
    hidden = 0
    loose: list[str] = []
    empty: list[str] = []
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        for entry in entries:
            if _is_hidden(entry.name):
                hidden += 1
            elif not entry.is_dir():
                (loose if _is_image(entry.name) else passed).append(entry.name)
            else:
                before = len(files)
                for path in _below(entry.path, {os.path.realpath(folder)}):
                    name = os.path.basename(path)
                    if _is_hidden(name):
                        hidden += 1
                    elif _is_image(name):
                        files.append(os.path.abspath(path))
                        labels.append(entry.name)
                    else:
                        passed.append(os.path.relpath(path, folder))
                if len(files) == before:
                    empty.append(entry.name)
    except OSError as error:
        raise InputError(f"{error.filename} is not readable: {error.strerror}", where=where) from error
    tables = [name for name in passed if Path(name).suffix.lower() in READABLE and os.sep not in name]
    if loose or not files:
        said = f"{folder} has no images in folders of classes"
        if loose:
            said = f"{folder} has {counted(len(loose), 'image')} in no folder of a class (first: {loose[0]})"
        hint = "a folder for each class, with its images in it: FOLDER/CLASS/image.jpg"
        if tables:
            hint += f'; or the table of paths beside them: {where} = ".../{tables[0]}"'
        raise InputError(said, where=where, hint=hint)
    if empty:
        notes.append(f"{folder}: {counted(len(empty), 'folder')} without images, no class (first: {empty[0]})")
    if passed:
        notes.append(
            f"{folder}: {counted(len(passed), 'file')} passed over, no images by their names (first: {passed[0]})"
        )
    if hidden:
        notes.append(f"{folder}: {counted(hidden, 'hidden file')} passed over")
    table = {"image": Column([pa.array(files, TEXT)]), "label": Column([pa.array(labels, TEXT)])}
    images = read_images(table, "image", str(folder), notes, where=where, by_row=False)
    return {**table, "image": Column(images.chunks)}


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in JUNK


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in suffixes()


def _below(folder: str, seen: set[str]) -> Iterator[str]:
    """Yield all files below a folder in order, hidden ones among them. Links are followed, each folder once."""
    real = os.path.realpath(folder)
    if real in seen:
        return
    seen.add(real)
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        if entry.is_dir() and not _is_hidden(entry.name):
            yield from _below(entry.path, seen)
        else:
            yield entry.path


def _folders_of_splits(folder: Path, where: str) -> dict[str, Path]:
    """Return the folder of each split; none where the folders are classes.

    Raises InputError where it cannot be told, and where there is none of training rows.
    """
    names = sorted(path.name for path in folder.iterdir() if path.is_dir() and not _is_hidden(path.name))
    found: dict[str, list[str]] = {
        split: [name for name in names if name.lower() in words] for split, words in SPLITS.items()
    }
    known = [name for each in found.values() for name in each]
    others = [name for name in names if name not in known]
    if not known or (others and len(known) < 2):
        return {}
    hint = f'name the folders of the splits: task.train = ".../{known[0]}", task.validation = ".../NAME"'
    if others:
        raise InputError(
            f"{folder} has folders of splits ({', '.join(known)}) and others ({', '.join(others[:3])})",
            where=where,
            hint=hint,
        )
    if twice := next((each for each in found.values() if len(each) > 1), None):
        raise InputError(f"{folder} has {' and '.join(twice)} for one split", where=where, hint=hint)
    if not found["train"]:
        raise InputError(
            f"{folder} has no folder of training images; it has {', '.join(names)}", where=where, hint=hint
        )
    return {split: folder / each[0] for split, each in found.items() if each}


def _check_classes(splits: dict[str, Columns], section: "TaskSection", where: str, notes: list[str]) -> None:
    """Raise InputError for a folder of a class that the training images do not have; note those that a split lacks."""
    if section.fields.get("labels") is not None:
        return
    places = {name: path for name, (path, _) in files_of(section).items()} if section.data is None else {}
    folders = {name: rows for name, rows in splits.items() if _is_folder(rows)}
    if "train" not in folders:
        return
    known = _classes(folders["train"])
    if len(known) == 1:
        _check_depth(folders["train"], next(iter(known)), section)
    for name, rows in folders.items():
        own = _classes(rows)
        if more := sorted(own - known):
            raise InputError(
                f"the {name} images have {counted(len(more), 'class', 'classes')} that the training images do not have "
                f"(first: {more[0]})",
                where=f"task.{name}" if name in places else where,
                hint="the folders of all splits have the same names; or name all classes: task.labels = [...]",
            )
        if less := sorted(known - own):
            notes.append(f"{name}: no images of {counted(len(less), 'class', 'classes')} (first: {less[0]})")


def _check_depth(rows: Columns, name: str, section: "TaskSection") -> None:
    """Raise InputError where all images lie in folders of the only class: its name is that of a folder above."""
    paths = pc.struct_field(pa.chunked_array(rows["image"].parts, IMAGE), "path").to_pylist()
    folders = {os.path.dirname(path) for path in paths}
    if name not in {os.path.basename(folder) for folder in folders}:
        where, place = ("task.data", section.data) if section.data is not None else ("task.train", section.train)
        raise InputError(
            f"{place} has one folder of a class ({name}), and the images lie in folders of that one",
            where=where,
            hint=f'if those are the classes: {where} = "{os.path.join(place or "", name)}"',
        )


def _is_folder(rows: Columns) -> bool:
    return set(rows) == {"image", "label"} and getattr(rows["label"].parts[0], "type", None) == TEXT


def _classes(rows: Columns) -> set[Any]:
    return set(pc.unique(pa.chunked_array(rows["label"].parts)).to_pylist())


# Images that two splits share


def _note_shared(splits: dict[str, Columns], column: str | None, notes: list[str]) -> None:
    """Note images of other splits that are training images, too, where that is found without much reading."""
    held = {
        name: pa.chunked_array(columns[image_column(columns, column, name)].parts, IMAGE)
        for name, columns in splits.items()
    }
    contents = _contents(held)
    train = {content for content in contents.pop("train") if content is not None}
    for name, own in contents.items():
        shared = [row for row, content in enumerate(own, 1) if content in train]
        if shared:
            path = held[name][shared[0] - 1].as_py()["path"]
            are = f"image of {name} is a" if len(shared) == 1 else f"images of {name} are"
            notes.append(
                f"{len(shared):,} {are} training image{'s' * (len(shared) > 1)}, too (first: "
                f"{path or f'row {shared[0]}'}): scores on them are too high"
            )


def _contents(held: dict[str, pa.ChunkedArray]) -> dict[str, list[str | None]]:
    """Return a hash of the content of each image.

    None for a file of a size that no training image, or no other one, has; for all files where too much would be read.
    """
    found: dict[str, list[str | None]] = {}
    sizes: dict[str, list[int | None]] = {}
    for name, images in held.items():
        stamps = pc.struct_field(images, "stamp").to_pylist()
        of_file = pc.struct_field(images, "bytes").is_null().to_pylist()
        found[name] = [None if is_file else stamp for is_file, stamp in zip(of_file, stamps, strict=True)]
        sizes[name] = [
            int(stamp.partition("-")[0]) if is_file else None for is_file, stamp in zip(of_file, stamps, strict=True)
        ]
    others = set().union(*(each for name, each in sizes.items() if name != "train"))
    both = (others & set(sizes["train"])) - {None}
    if sum(size for each in sizes.values() for size in each if size is not None and size in both) > AT_MOST:
        return found
    with ThreadPoolExecutor(THREADS) as pool:
        for name, images in held.items():
            rows = [row for row, size in enumerate(sizes[name]) if size in both]
            paths = pc.struct_field(images, "path").take(pa.array(rows, pa.int64())).to_pylist()
            for row, content in zip(rows, pool.map(hash_of_file, paths), strict=True):
                found[name][row] = content
    return found
