"""Reads WebDataset's archives: a .tar whose files with the same name up to the first dot are a row."""

import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from PIL import Image

from tuning.data.json_files import decode, parse_row
from tuning.errors import UserError

IMAGES = "images"  # the column of images
IMAGE_SUFFIXES = frozenset(Image.registered_extensions())

Members = Mapping[str, tarfile.TarInfo]


def read_tar(file: Path) -> Iterator[dict[str, Any]]:
    """The rows of an archive: the keys of `NAME.json`, the text of `NAME.txt` as `txt`, and the bytes of `images`.

    The images of a row are those that its .json names under `images` or `image`, or else those of its name: `NAME.jpg`,
    `NAME.1.png` and so on. Raises `UserError` for a row that cannot be read, and at the end where an image belongs to
    no row.
    """
    try:
        with tarfile.open(file, "r:") as archive:
            yield from _read_rows(archive, file)
    except tarfile.TarError as error:
        raise UserError(
            where=str(file), problem=f"the file cannot be read as tar: {error}.", fix="Repair the file."
        ) from error


def _read_rows(archive: tarfile.TarFile, file: Path) -> Iterator[dict[str, Any]]:
    samples, by_path = _group(archive, file)
    unused = {path for path in by_path if PurePosixPath(path).suffix.lower() in IMAGE_SUFFIXES}
    with_text = (sample for sample in samples.values() if "json" in sample or "txt" in sample)
    for number, sample in enumerate(with_text):
        where = f"{file}, row {number}"
        row = parse_row(_read(archive, sample["json"]), where) if "json" in sample else {}
        if "txt" in sample:
            row.setdefault("txt", decode(_read(archive, sample["txt"]), where))
        own = [member for kind, member in sample.items() if f".{kind.rpartition('.')[2]}" in IMAGE_SUFFIXES]
        named = row.pop("image", None) if row.get(IMAGES) is None else row[IMAGES]
        images = _find_images(named, own, sample, by_path, where)
        unused -= {_path(image) for image in (*images, *own) if not isinstance(image, str)}
        row[IMAGES] = [
            {"bytes": None, "path": image}
            if isinstance(image, str)
            else {"bytes": _read(archive, image), "path": image.name}
            for image in images
        ]
        yield row
    if unused:
        raise UserError(
            where=str(file),
            problem=f"the image {min(unused)} belongs to no row: no .json or .txt has its name.",
            fix="Give every image a text of the same name, or remove it.",
        )


def _group(archive: tarfile.TarFile, file: Path) -> tuple[dict[str, dict[str, tarfile.TarInfo]], Members]:
    """The files of each name by what follows its first dot, and all files by their path."""
    samples: dict[str, dict[str, tarfile.TarInfo]] = {}
    by_path: dict[str, tarfile.TarInfo] = {}
    for member in archive:
        path = PurePosixPath(_path(member))
        if member.isfile() and not path.name.startswith("."):  # macOS adds ._NAME
            name, _, kind = path.name.partition(".")
            sample = samples.setdefault(str(path.with_name(name)), {})
            if kind.lower() in sample or kind.lower().endswith((".json", ".txt")):
                twice = kind.lower() in sample
                what = "is in the archive twice" if twice else "has a dot in its name, so its row is not clear"
                raise UserError(
                    where=str(file),
                    problem=f"{path} {what}: the files of a row have the same name up to the first dot.",
                    fix="Remove one of them." if twice else "Rename it.",
                )
            sample[kind.lower()] = member
            by_path[str(path)] = member
    return samples, by_path


def _path(member: tarfile.TarInfo) -> str:
    return str(PurePosixPath(member.name))  # without a leading ./


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    content = archive.extractfile(member)
    assert content is not None  # it is a file
    return content.read()


def _find_images(
    named: Any, own: list[tarfile.TarInfo], sample: Members, by_path: Members, where: str
) -> list[tarfile.TarInfo | str]:
    """The images of a row: files of the archive, or what the .json says where none of it is in the archive."""
    names = [named] if isinstance(named, str) else named or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise UserError(
            where=f"{where}, field '{IMAGES}'",
            problem=f"expected names of files, found {str(named)[:60]}.",
            fix="Name files of the archive, or leave the key out.",
            field=IMAGES,
            kind="not an image",
        )
    folder = PurePosixPath(_path(next(iter(sample.values())))).parent
    found = [by_path.get(str(folder / name)) or by_path.get(str(PurePosixPath(name))) for name in names]
    if names and all(found):
        return [member for member in found if member]
    if any(found):
        missing = next(name for name, member in zip(names, found, strict=True) if not member)
        raise UserError(
            where=f"{where}, field '{IMAGES}'",
            problem=f"the archive has no file {missing}.",
            fix="Add it, or drop the row.",
            field=IMAGES,
            kind="missing image file",
        )
    return [*own] or names
