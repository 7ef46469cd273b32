"""The Hugging Face hub: what a name stands for there, and fetching and sending files by huggingface_hub.

Only the named files of one folder are fetched, all of one commit, into huggingface_hub's own cache. Its settings hold here too: `HF_TOKEN` or
`hf auth login` for private repositories, `HF_HUB_OFFLINE` to use the cache alone, `HF_HOME` for its place.
"""

import glob
import json
import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from switch_sae.files import tell

SCHEME = "hf://"
CARD = "README.md"
_REPO = re.compile(r"(?!.*(--|\.\.))(\w|\w[\w.-]*\w)/(\w|\w[\w.-]*\w)", re.ASCII)
_LONGEST = 96
_FILES = (".safetensors", ".pt", ".json")
_CONFIGS = (".json", ".yaml")
_LANGUAGE_MODEL = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")
_SECONDS = 15
_LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token"


@dataclass(frozen=True)
class HubName:
    """A repository on the hub, and a folder or file in it."""

    repo: str
    """`user/name`."""
    path: str = ""
    """Empty for its top folder."""

    def __str__(self) -> str:
        return f"{self.repo}/{self.path}" if self.path else self.repo

    @classmethod
    def parse(cls, text: str) -> "HubName":
        """`user/repo`, `user/repo/folder` or `user/repo/folder/file`, with or without hf:// before it. Raises ValueError for anything else."""
        parts = text.removeprefix(SCHEME).rstrip("/").split("/")
        repo = "/".join(parts[:2])
        is_repo = _REPO.fullmatch(repo) and len(repo) <= _LONGEST and not repo.endswith((*_FILES, ".git"))
        if not is_repo or any(part in ("", ".", "..") or "\\" in part for part in parts[2:]):
            raise ValueError(f"{text!r} names nothing on the hub. Write user/repo or user/repo/folder, of letters, digits, single dots, _ and -.")
        return cls(repo, "/".join(parts[2:]))


def hub_name(path: str | Path) -> HubName | None:
    """What `path` names on the hub; None for what is on this machine, or can only be a path of it.

    What is here comes first, and so does a name whose first folder is here: then it is a path with a mistake. `hf://user/repo` is always the hub's.
    Raises ValueError for hf:// before something else.
    """
    if isinstance(path, Path):
        return None
    if path.startswith(SCHEME):
        return HubName.parse(path)
    if Path(path).expanduser().exists() or Path(path.split("/")[0]).is_dir():
        return None
    try:
        return HubName.parse(path)
    except ValueError:
        return None


def fetch(name: HubName, revision: str | None, names: Collection[str]) -> tuple[Path, dict[str, str]]:
    """(the folder or file in the local cache, what it is: `repo`, `path`, `revision` asked for, `commit`).

    Of a folder only files called one of `names` are fetched, and of the folder above it the configurations among these. `revision` is a branch, a tag
    or a commit; without one it is `main`. A commit that is in the cache needs no network. Where the hub cannot be reached the cache is used, and
    that is told. Raises FileNotFoundError where there is no such repository, folder or copy, ValueError for a revision that does not exist or what
    may not be read, ConnectionError without network.
    """
    hub = _library()
    cached = _cached(hub, name, revision, names)
    is_pinned, offline = re.fullmatch("[0-9a-f]{40}", revision or "") is not None, hub.constants.HF_HUB_OFFLINE
    if cached and (is_pinned or offline):
        return cached
    if offline:
        raise FileNotFoundError(
            f"{name} does not exist here, nor a copy from the hub{_at(revision)} in the cache ({hub.constants.HF_HUB_CACHE}), and HF_HUB_OFFLINE "
            "forbids to fetch one. Give the path of a run folder, or unset HF_HUB_OFFLINE."
        )
    try:
        with _one_message(name, revision):
            info = hub.HfApi().model_info(name.repo, revision=revision, timeout=_SECONDS)
    except ConnectionError as error:
        if cached is None:
            raise
        tell(f"{error} Going on with commit {cached[1]['commit'][:12]} of {name.repo}, which is in the cache.")
        return cached
    wanted = _wanted(name, [sibling.rfilename for sibling in info.siblings or ()], names)
    with _one_message(name, revision):
        folder = Path(hub.snapshot_download(name.repo, revision=revision, allow_patterns=[glob.escape(file) for file in wanted]))
    if missing := [file for file in wanted if not (folder / file).is_file()]:
        raise ConnectionError(f"{name}: {missing[0]} did not come along; the repository changed meanwhile, or the fetch was cut. Load it again.")
    return folder / name.path, _record(name, revision, folder.name)


def upload(folder: Path, name: HubName, *, private: bool, message: str, replace_card: bool) -> dict[str, str]:
    """Sends the files of `folder` into the repository's folder, in one commit, and makes the repository where there is none; gives what `fetch` does.

    Whatever else the repository holds stays, and so does a card (README.md) that is there, unless `replace_card`. Raises ValueError without a token
    or permission, and for `private` where a public repository exists; ConnectionError without network.
    """
    hub = _library()
    if hub.constants.HF_HUB_OFFLINE:
        raise ConnectionError(f"nothing can be sent to {name.repo}: HF_HUB_OFFLINE is set. Unset it.")
    if hub.get_token() is None:
        raise ValueError(f"nothing can be sent to {name.repo} without a token. {_LOG_IN} that may write.")
    api = hub.HfApi()
    with _one_message(name, None, "written"):
        api.create_repo(name.repo, private=private, exist_ok=True)
        if private and not api.model_info(name.repo, timeout=_SECONDS).private:
            raise ValueError(f"{name.repo} exists and is public, so nothing was sent as private. Change that on its page, or give another name.")
        card = str(PurePosixPath(name.path, CARD))
        kept = not replace_card and api.file_exists(name.repo, card)
        if kept:
            tell(f"{name.repo} has a {card} already: it stays as it is.")
        ignored = [CARD] if kept else None
        done = api.upload_folder(
            repo_id=name.repo, folder_path=folder, path_in_repo=name.path or None, commit_message=message, ignore_patterns=ignored
        )
    return _record(name, None, done.oid)


def _library() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.constants
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(f"the hub needs huggingface_hub, and importing it failed: {error}. pip install huggingface_hub") from error
    return huggingface_hub


def _record(name: HubName, revision: str | None, commit: str) -> dict[str, str]:
    return {"repo": name.repo, "path": name.path, "revision": revision or "main", "commit": commit}


def _at(revision: str | None) -> str:
    return f" at revision {revision!r}" if revision else ""


def _cached(hub: Any, name: HubName, revision: str | None, names: Collection[str]) -> tuple[Path, dict[str, str]] | None:
    """As `fetch`, from the cache alone, where it holds a file of tensors."""
    for file in ([name.path] if name.path else []) + [str(PurePosixPath(name.path, file)) for file in _tensors(names)]:
        found = hub.try_to_load_from_cache(name.repo, file, revision=revision)
        if isinstance(found, str) and Path(found).is_file():
            snapshot = Path(found).parents[file.count("/")]
            return snapshot / name.path, _record(name, revision, snapshot.name)
    return None


def _wanted(name: HubName, files: Sequence[str], names: Collection[str]) -> list[str]:
    """The files of a repository that make up what is named. Raises FileNotFoundError where none holds tensors."""
    place = PurePosixPath(name.path)
    is_file = name.path in files
    folder = place.parent if is_file else place
    in_folder = {file for file in map(PurePosixPath, files) if file.parent == folder}
    wanted = {file for file in in_folder if file.name in names and (not is_file or place.name in names or file.suffix in _CONFIGS)}
    wanted |= {place} if is_file else set()
    if all(file.suffix in _CONFIGS for file in wanted):
        others = sorted({file.parent for file in map(PurePosixPath, files) if file.name in names and file.suffix not in _CONFIGS})
        below = [folder for folder in others if place in folder.parents] or others
        advice = f"Folders with one: {_some([f'{name.repo}/{folder}' for folder in below])}." if below else "Is the name what you meant?"
        raise FileNotFoundError(f"{name} is on the hub no file and no folder that holds an SAE (a file called {_some(_tensors(names))}). {advice}")
    if not is_file and any(file.name in _LANGUAGE_MODEL for file in in_folder):
        raise ValueError(f"{name} is a language model on the hub (it holds a tokenizer), not an SAE. Is the name what you meant?")
    wanted |= {file for file in map(PurePosixPath, files) if file.parent == folder.parent and file.suffix in _CONFIGS and file.name in names}
    return sorted(map(str, wanted))


def _tensors(names: Collection[str]) -> list[str]:
    return [name for name in names if not name.endswith(_CONFIGS)]


def _some(items: Sequence[str]) -> str:
    return ", ".join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


@contextmanager
def _one_message(name: HubName, revision: str | None, done: str = "read") -> Iterator[None]:
    """Whatever huggingface_hub raises, as one message that names the repository."""
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ValueError(f"{name.repo} is gated. Accept its terms on its page. {_LOG_IN}.") from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(f"{name.repo} has no revision {revision or 'main'!r}. Give a branch, a tag or a commit of it.") from error
    except errors.RepositoryNotFoundError as error:
        if done != "read":
            raise ValueError(f"{name.repo} cannot be {done}: the hub knows no such account or repository. Check the name.") from error
        raise FileNotFoundError(
            f"{name} does not exist here, and the hub has no repository {name.repo} that you may see. Check the name; for a private one: {_LOG_IN}."
        ) from error
    except errors.HfHubHTTPError as error:
        status = getattr(error.response, "status_code", None)
        if status in (401, 403):
            reason = "your token is not valid" if status == 401 else "your account or its token has no right to do that"
            raise ValueError(f"{name.repo} cannot be {done}: {reason} (HTTP {status}). {_LOG_IN} that may.") from error
        raise ConnectionError(f"{name.repo} cannot be {done}: the hub answered HTTP {status} ({_first_line(error)}). Try again later.") from error
    except Exception as error:
        if isinstance(error, OSError) and error.errno is not None and error.filename is not None:
            raise  # a full disk, or a cache that cannot be written
        if not (isinstance(error, OSError | json.JSONDecodeError) or type(error).__module__.split(".")[0] in _HTTP):
            raise
        what, advice = (f"{name} does not exist here", "Give the path of a run folder, or try") if done == "read" else ("nothing was sent", "Try")
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise ConnectionError(f"{what}, and the hub cannot be reached ({reason}). {advice} again with network.") from error


_HTTP = ("httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3")
"""Which of them says "unreachable" depends on what huggingface_hub was built on."""


def _first_line(error: BaseException) -> str:
    return next((line.strip()[:200] for line in str(error).splitlines() if line.strip()), "no reason given")
