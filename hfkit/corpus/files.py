"""Which files a corpus is: those that were named, or found by folders and globs, and data sets on the Hub.

In a folder no file is read that is hidden, that hfkit wrote or that a model needs.
"""

import glob
import hashlib
import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from hfkit.console import counted, note_once
from hfkit.corpus.formats import TEXTS, kind_of
from hfkit.errors import HfkitError, first_line
from hfkit.options import CorpusOptions, DataOptions
from hfkit.storage import LIST

Corpora = str | Path | Sequence[str | Path]
PREPARED = "prepared.json"  # marks a folder made by `hfkit prepare`
_CONFIGS = ("config.json", "adapter_config.json", "hparams.json", "bert_config.json")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin", "adapter_model.bin", "*.gguf", "*.index", "tf_model.h5")
_SPLIT = re.compile(r"(train|test|validation|valid|val|dev|eval)([-_]\d.*)?", re.I)  # the name of a file
_DESCRIPTION = re.compile(
    r"(readme|licen[cs]e|copying|notice|changelog|changes|contributing|authors|citation)([-_.].*)?|.*\.(json|ya?ml|toml)",
    re.I,
)
_SUFFIX = re.compile(r"(\.(txt|md|csv|tsv|jsonl?|ndjson|parquet|arrow|ipynb))?(\.(gz|bz2|xz))?$", re.I)


class Source(NamedTuple):
    """A file of a corpus, or a data set on the Hub."""

    path: Path  # of a data set on the Hub: its name
    kind: str  # from `kind_of`, or "hub"
    in_folder: bool = False  # it was not named, but found in a folder or by a glob
    split: str | None = None  # in a DatasetDict that `datasets` saved

    def __str__(self) -> str:
        return f"hf://{self.path}" if self.kind == "hub" else str(self.path)

    @property
    def is_description(self) -> bool:
        """Whether it is in a folder and, by its name, describes what is there: a README, a licence, settings."""
        return self.in_folder and bool(_DESCRIPTION.fullmatch(self.path.name))


@dataclass(frozen=True)
class Corpus:
    """Files and Hub data sets, found but not yet read."""

    sources: tuple[Source, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        return tuple(source.path for source in self.sources if source.kind != "hub")

    @property
    def is_local(self) -> bool:
        """Whether no source is on the Hub, where it may change."""
        return len(self.files) == len(self.sources)

    @property
    def descriptions(self) -> tuple[Source, ...]:
        """The plain texts that only describe the rows beside them: a README, a licence, settings."""
        has_rows = any(source.kind not in TEXTS for source in self.sources)
        return tuple(source for source in self.sources if has_rows and source.kind in TEXTS and source.is_description)

    @property
    def has_texts(self) -> bool:
        """Whether there are plain texts, apart from those that describe the rows beside them."""
        return any(source.kind in TEXTS for source in {*self.sources} - {*self.descriptions})

    @property
    def size(self) -> int:
        """Bytes of the files."""
        return sum(path.stat().st_size for path in self.files)

    def fingerprint(self) -> str:
        """SHA-256 of the files' content; names, but for those of descriptions, and time stamps do not matter."""
        roles = [
            (source.kind, source.split, source.is_description, source.kind == "hub" and source.path)
            for source in self.sources
        ]
        return hash_files(self.files, roles)


def hash_files(paths: Iterable[Path], roles: object) -> str:
    """SHA-256 of the content of files, in this order, and of what they are for."""
    total = hashlib.sha256(repr(roles).encode())
    for path in paths:
        with path.open("rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


@dataclass
class _Listing:
    """The files that a name stands for, whatever they hold."""

    files: dict[Path, str | None] = field(default_factory=dict)  # each with its split, if it is in a DatasetDict
    unread: list[Path] = field(default_factory=list)  # folders with a run or a model, or without permission
    links: list[Path] = field(default_factory=list)
    seen: set[Path] = field(default_factory=set)  # folders that were read, or are not to be

    def walk(self, folder: Path, split: str | None = None) -> None:
        """Add all files below a folder. Links to folders are followed, but each folder is read only once."""
        if splits := _read_object(folder / "dataset_dict.json").get("splits"):
            for name in map(str, splits):
                self.walk(folder / name, name)
            return
        if parts := _read_object(folder / "state.json").get("_data_files"):
            paths = [folder / str(part["filename"]) for part in parts]
            if missing := [path for path in paths if not path.is_file()]:
                raise HfkitError(f"the saved data set lacks a file ({missing[0]}): save it again")
        else:
            try:
                paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
            except PermissionError:
                self.unread.append(folder)
                return
        for path in paths:
            if path.is_symlink() and path.exists():
                self.links.append(path)
            if path.is_file():
                self.files[path] = split
            elif path.is_dir() and (target := path.resolve()) not in self.seen:
                self.seen.add(target)
                if _output_kind(path):
                    self.unread.append(path)
                else:
                    self.walk(path, split)


def find_corpus(sources: Corpora | Corpus, options: CorpusOptions | None = None, output: Path | None = None) -> Corpus:
    """The files that `sources` name: files, folders, globs and `hf://NAME` data sets.

    A `Corpus` is returned as it is: finding one reads the start of every file, so find it once and pass it on.

    Args:
        options: files that match their `exclude`, or that their `eval_file` names, are left out.
        output: a folder that is not read although it is in a source: the one that the run writes.

    Raises:
        HfkitError: a file does not exist, is empty, or is not text; or a source is a model; or nothing is left.
    """
    if isinstance(sources, Corpus):
        return sources
    names = sources_of(sources)
    patterns = dict.fromkeys((options and options.exclude) or (), False)  # whether each matches a file
    by_name: dict[str, Source] = {}
    for name in names:
        for source in _find_sources(name, patterns, output):
            if not source.in_folder or str(source) not in by_name:
                by_name[str(source)] = source
    for pattern, has_match in patterns.items():
        if not has_match:
            note_once(f"--exclude {pattern!r} matches no file of the corpus")
    if not names:
        raise HfkitError("no corpus: name a file, a folder or hf://NAME")
    if not by_name:
        raise HfkitError(f"--exclude leaves no file of the corpus ({names[0]}): {', '.join(patterns)}")
    all_sources = list(by_name.values())
    return Corpus(tuple(_without_held_out(all_sources, options) if isinstance(options, DataOptions) else all_sources))


def _without_held_out(sources: list[Source], options: DataOptions) -> list[Source]:
    """The sources that --eval-file does not name, unless it names them all."""
    held_out = {Path(name).expanduser().resolve() for name in options.eval_file or []}
    named = [source for source in sources if held_out & {path := source.path.resolve(), *path.parents}]
    left = [source for source in sources if source not in named]
    if left and named:
        note_once(f"{named[0]} is held out by --eval-file, and not trained on")
    return left or sources


def _find_sources(name: str, patterns: dict[str, bool], output: Path | None) -> list[Source]:
    """The sources that a name stands for, without those that a pattern matches."""
    if name.startswith("hf://"):
        return [Source(Path(name.removeprefix("hf://")), "hub")]
    listing, folder = _list_files(name, output), Path(name).expanduser()
    is_named = len(listing.files) == 1 and not folder.is_dir()
    paths = [path for path in listing.files if not _is_excluded(path, folder, patterns)]
    kinds = {path: kind for path in paths if (kind := kind_of(path, is_named))}
    if not kinds and (paths or not listing.files):
        for path in paths:
            kind_of(path, chosen=True)  # says what it is, if it is a PDF or the like
        raise HfkitError(f"nothing to read ({name}): it has no text, CSV, JSON, Parquet or Arrow files")
    _note_surprises(name, listing, paths, without_text=len(paths) - len(kinds))
    return [Source(path, kind, not is_named, listing.files[path]) for path, kind in kinds.items()]


def _note_surprises(name: str, listing: _Listing, paths: list[Path], without_text: int) -> None:
    """Say what is left out of a folder, and what is read that one may not expect."""
    parts = [f"{counted(without_text, 'file')} without text"] if without_text else []
    if outputs := listing.unread:
        parts.append(f"{counted(len(outputs), 'folder')} with a run or a model, such as {outputs[0]}")
    if parts:
        note_once(f"{name}: left out {' and '.join(parts)}")
    root = Path(name).expanduser().resolve()
    if outside := [path for path in listing.links if not path.resolve().is_relative_to(root)]:
        note_once(f"{name} has links that lead out of it, which are read ({outside[0]} to {outside[0].resolve()})")
    matches = [_SPLIT.fullmatch(path.name.partition(".")[0]) for path in paths if not listing.files[path]]
    if len(splits := sorted({match[1].lower() for match in matches if match})) > 1:
        note_once(f"{name} has files called {' and '.join(splits)}: all are read; --exclude leaves some out")


def _is_excluded(path: Path, folder: Path, patterns: dict[str, bool]) -> bool:
    """Whether a pattern matches the name of a file, or that of a folder below `folder`; `patterns` notes which do.

    A pattern with a slash is compared with as many parts of the path, from any of them on.
    """
    path = path.relative_to(folder) if folder in path.parents else path
    matches = [
        pattern
        for pattern in patterns
        if any(fnmatch(f"/{part}", f"*/{pattern.strip('/')}") for part in (path, *path.parents))
    ]
    patterns.update(dict.fromkeys(matches, True))
    return bool(matches)


def _list_files(name: str, output: Path | None) -> _Listing:
    """The files that a name stands for."""
    if not name:  # Path("") would be the current folder
        raise HfkitError("no corpus '': name a file, a folder or hf://NAME")
    if address := re.match(r"https?://(?:huggingface\.co/datasets/([\w.-]+(?:/[\w.-]+)?))?", name):
        remedy = f"did you mean hf://{address[1]}?" if address[1] else f"download the file first (curl -LO {name})"
        raise HfkitError(f"{name} is a web address: {remedy}")
    try:
        path = Path(name).expanduser()
        if is_prepared(path):
            raise HfkitError(f"{name} was made by prepare: only finetune takes it, alone and without --streaming")
        if path.is_dir():
            if kind := _output_kind(path):
                raise HfkitError(f"{name} is {kind}: did you mean -m {name}?")
            listing = _Listing(seen={folder.resolve() for folder in (path, output) if folder})
            listing.walk(path)
            return listing
        if path.is_file():
            return _Listing({path: None})
        if path.exists():
            raise HfkitError(f"{name} is not a file or folder: save its output to a file first")
        paths = sorted(Path(match) for match in glob.glob(str(path), recursive=True) if os.path.isfile(match))
    except (OSError, ValueError, RuntimeError) as error:  # RuntimeError: ~ of an unknown user
        raise HfkitError(f"cannot read the corpus ({name}): {first_line(error)}") from error
    if not paths:
        raise HfkitError(f"no corpus {name!r}: no such file or folder")
    folders = dict.fromkeys(path.parent for path in paths)
    outputs = [
        folder for folder in folders if _output_kind(folder) or (output and folder.resolve() == output.resolve())
    ]
    files = dict.fromkeys(path for path in paths if path.parent not in outputs)
    if not files:
        raise HfkitError(f"{name} names files of {outputs[0]}, a run or a model: did you mean -m {outputs[0]}?")
    return _Listing(files, outputs)


def _output_kind(folder: Path) -> str | None:
    """What a folder holds that is not for a corpus: "a model" or "a run"; None if it may be a corpus."""
    if any((folder / name).is_file() for name in _CONFIGS) and any(any(folder.glob(name)) for name in _WEIGHTS):
        return "a model"
    is_run = (folder / LIST).is_file() or isinstance(_read_object(folder / "run.json").get("recipe"), dict)
    return "a run" if is_run else None


def is_prepared(folder: Path) -> bool:
    """Whether `hfkit prepare` made this folder."""
    return "fingerprint" in _read_object(folder / PREPARED)


def prepared_folder(corpus: Corpora | Corpus) -> Path | None:
    """The folder that `hfkit prepare` made, if the corpus is that alone."""
    names = [] if isinstance(corpus, Corpus) else sources_of(corpus)
    folder = Path(names[0]).expanduser() if len(names) == 1 else None
    return folder if folder and is_prepared(folder) else None


def sources_of(corpus: Corpora) -> list[str]:
    """The names that a corpus was given by."""
    return [str(name) for name in ([corpus] if isinstance(corpus, str | Path) else corpus)]


def _read_object(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an empty one if it has none."""
    try:
        value = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def name_of(sources: Corpora) -> str:
    """A short name for a corpus, from its first source: `runs/NAME`."""
    first = next(iter(sources_of(sources)), "")
    return re.sub(r"[^\w.-]+", "-", _SUFFIX.sub("", Path(first).name)).strip("-.") or "corpus"
