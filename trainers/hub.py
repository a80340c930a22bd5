"""Repositories on the Hub: looked at before anything is made, and filled by one commit, so that none is half full."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatch
from json import JSONDecodeError
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import get_session, hf_raise_for_status, validate_repo_id

from trainers.errors import InputError, first_line

# what a new repository holds before anyone has put something there
_OF_THE_HUB = {".gitattributes"}
# what a model leaves at the root of a repository, and another one must not find there
_OF_A_MODEL = (
    "model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
    "adapter_config.json", "adapter_model.*", "*_cjepa.py", "*_sjea.py", "results.json",
    "curves.png", "masks.png", "views.png", "attention.png", "tsne.png",
)  # fmt: skip
# what comes of answers that are not JSON, or not what was asked for: those of a network that wants a log-in first
_NOT_OF_THE_HUB = JSONDecodeError | KeyError | TypeError
# seconds in which the Hub must do something; without it a call would wait for ever
_PATIENCE = 120
_NAMED = "write user/name, of letters, digits, '-', '_' and '.'"


@dataclass(frozen=True)
class Destination:
    """
    A repository, and what may be done to it.

    Args:
        repo (`str`): `user/name`.
        private (`bool`): Whether it is made private.
        revision (`str`, *optional*): The branch to fill, made if it is not there; `main` when not given.
        update (`bool`): Whether what it holds may be replaced.
        token (`str`, *optional*): The one signed in with when not given.

    Raises:
        InputError: There can be no repository of such a name.
    """

    repo: str
    private: bool = False
    revision: str | None = None
    update: bool = False
    token: str | None = None

    def __post_init__(self):
        check_name(self.repo, "--repo")
        if self.repo.count("/") != 1:
            raise InputError(f"--repo {self.repo!r} names no user; {_NAMED}.")


def check_name(repo: str, flag: str):
    """Raises `InputError` if there can be no repository of a name, which a flag has given."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise InputError(f"{flag} {repo!r} is no name of a repository ({first_line(error)}); {_NAMED}.") from error


def patient_api(token: str | None = None) -> HfApi:
    """The Hub, which does not wait for ever for an answer."""
    get_session().timeout = _PATIENCE
    return HfApi(token=token)


def check_destination(destination: Destination) -> str:
    """
    Whether a repository can be filled; nothing is made or changed.

    Args:
        destination ([`Destination`]): Which, and how.

    Returns:
        `str`: Who is signed in.

    Raises:
        InputError: Nobody is, the Hub cannot be reached, or the repository holds something, or is not private.
    """
    api = patient_api(destination.token)
    repo = destination.repo
    with refusals_named(f"{repo} cannot be published"):
        account = api.whoami()
        user, (owner, name) = account["name"], repo.split("/")
        if owner not in {user, *(organization["name"] for organization in account.get("orgs", []))}:
            raise InputError(f"{user} may not publish under {owner}; give --repo {user}/{name}.")
        if not api.repo_exists(repo):
            return user
        if destination.private:
            check_private(api, repo, "--private")
        num_files = 0 if destination.update else num_files_of(api, repo, destination.revision)
        if num_files:
            raise InputError(
                f"{repo} exists and holds {num_files} files; give --update to replace the model in it, or another "
                "--repo."
            )
    return user


def check_private(api: HfApi, repo: str, flag: str):
    """Raises `InputError` where a repository that exists is public, and a flag wants it private."""
    if not api.model_info(repo).private:
        raise InputError(
            f"{repo} is public, and {flag} was given; change its settings on the Hub, or leave {flag} out."
        )


def num_files_of(api: HfApi, repo: str, revision: str | None) -> int:
    """
    How many files someone has put into a branch of a repository; none of a branch that is not there, or that was made
    of `main` and not filled.
    """
    if revision not in (None, constants.DEFAULT_REVISION):
        heads = branches_of(api, repo)
        if heads.get(revision) in (None, heads.get(constants.DEFAULT_REVISION)):
            return 0
    return len(set(api.list_repo_files(repo, revision=revision)) - _OF_THE_HUB)


def branches_of(api: HfApi, repo: str) -> dict[str, str]:
    """The last commit of each of a repository's branches."""
    return {branch.name: branch.target_commit for branch in api.list_repo_refs(repo).branches}


def upload(folder: Path, destination: Destination, message: str) -> str:
    """
    Fills a repository by one commit; what it held of another model is removed in the same.

    Large files that an interrupted call has sent are not sent again.

    Args:
        folder (`Path`): Whose files to send.
        destination ([`Destination`]): Where to.
        message (`str`): Of the commit.

    Returns:
        `str`: The repository's address.

    Raises:
        InputError: The Hub refuses, or cannot be reached; the repository is as it was, or new and empty, unless the
            answer to the commit itself was lost.
    """
    api = patient_api(destination.token)
    repo, branch = destination.repo, destination.revision
    added = additions(folder)
    with refusals_named(f"{repo} was not published"):
        check_metadata(api, folder / "README.md", repo)
        is_new = not api.repo_exists(repo)
        url = str(api.create_repo(repo, private=destination.private or None, exist_ok=True))
    refused = f"{repo} was not published and is {'new and empty' if is_new else 'as it was'}"
    with refusals_named(refused):
        is_new_branch = branch is not None and branch not in branches_of(api, repo)
        # the long part, before a branch is made; files that the branch has, or will have of main, are not sent
        api.preupload_lfs_files(repo, added, revision=None if is_new_branch else branch)
        if is_new_branch:
            api.create_branch(repo, branch=branch)
    try:
        with refusals_named(refused):
            operations = added + removals(api, repo, branch, {file.path_in_repo for file in added})
        with answer_awaited(url), refusals_named(refused):
            api.create_commit(repo, operations, commit_message=message, revision=branch)
    except LostAnswerError:
        raise
    except InputError:
        if is_new_branch:
            with suppress(OSError, ValueError, HTTPError):  # the reason is told, and this would hide it
                api.delete_branch(repo, branch=branch)
        raise
    return url if branch is None else f"{url}/tree/{branch}"


def check_metadata(api: HfApi, card: Path, repo: str):
    """Has the Hub look at a card before it is sent; raises `InputError` where its metadata are refused."""
    content = {"repoType": constants.REPO_TYPE_MODEL, "content": card.read_text(encoding="utf-8")}
    answer = get_session().post(f"{api.endpoint}/api/validate-yaml", json=content)
    try:
        hf_raise_for_status(answer)
    except BadRequestError as error:
        said = (error.server_message or first_line(error)).strip().rstrip(".")
        raise InputError(
            f"{repo} was not published: the Hub refuses the metadata of its card ({said}); give a --license that it "
            "knows, or mend results.json."
        ) from error


def additions(folder: Path) -> list[CommitOperationAdd]:
    """A folder's files, to be added to a repository."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in files]


def removals(api: HfApi, repo: str, revision: str | None, kept: set[str]) -> list[CommitOperationDelete]:
    """What another model has left at the root of a repository, to be removed; folders and other files stay."""
    files = set(api.list_repo_files(repo, revision=revision)) - kept
    stale = [name for name in files if "/" not in name and any(fnmatch(name, pattern) for pattern in _OF_A_MODEL)]
    return [CommitOperationDelete(name) for name in sorted(stale)]


class UnreachableError(InputError):
    """The Hub cannot be reached, or cannot answer, now."""


class LostAnswerError(InputError):
    """The Hub was asked for a commit, and it is not known whether it has made it."""


@contextmanager
def answer_awaited(url: str) -> Iterator[None]:
    """Tells a commit of which no answer came from one that was refused, by the repository's address."""
    try:
        yield
    except UnreachableError as error:
        raise LostAnswerError(
            f"The Hub's answer to the commit was lost ({reason(error.__cause__)}), so look at {url}: if the model is "
            "not there, repeat the call with --update."
        ) from error


@contextmanager
def refusals_named(what: str) -> Iterator[None]:
    """
    Says in a sentence why the Hub did not do what was asked.

    Args:
        what (`str`): What has come of it, as in `someone/model was not published`.

    Raises:
        InputError: What was done inside was refused by the Hub, or failed on the way to it ([`UnreachableError`]).
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, RuntimeError, HTTPError, KeyError, TypeError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) and error.__cause__ else error
        kind = UnreachableError if _is_for_now(cause) else InputError
        raise kind(f"{what}: {reason(cause)}.") from error


def _is_for_now(error: Exception) -> bool:
    """Whether the Hub could not be reached, or says that it cannot answer at the moment."""
    response = getattr(error, "response", None)
    if response is not None:
        return response.status_code >= 500 or response.status_code == 429
    return isinstance(error, HTTPError | OfflineModeIsEnabled | _NOT_OF_THE_HUB)


def reason(error: Exception) -> str:
    """Why the Hub refused or could not be reached, and what to do, without a full stop."""
    if isinstance(error, LocalTokenNotFoundError):
        return "nobody is signed in; run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if isinstance(error, _NOT_OF_THE_HUB):
        return f"{constants.ENDPOINT} does not answer as the Hub does; look at your network, and at HF_ENDPOINT"
    if isinstance(error, UnicodeEncodeError):
        return "the token holds a character that no token has; sign in anew by `hf auth login`, or mend HF_TOKEN"
    said = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        said = (error.server_message or said).strip().rstrip(".")
        return f"the Hub answers {status}, {said}{_ADVICE.get(status, '')}"
    if isinstance(error, HTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({said or type(error).__name__}); repeat the call when it can"
    if "LFS" in said:
        # a line a file, each with what the Hub said after a backtick
        told = dict.fromkeys(line.partition("`")[2].rstrip("`") for line in str(error).splitlines() if "`" in line)
        said = ", ".join(told) or first_line(error)
        return f"the Hub does not take its large files ({said}); look at your quota there"
    return said


_ADVICE = {
    401: "; sign in with a valid token by `hf auth login`, or set HF_TOKEN",
    403: "; use a token that may write there",
    404: "; check the name, and that the token may see it",
    413: "; look at your quota there",
}
