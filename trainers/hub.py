"""Repositories on the Hub: looked at before anything is made, and filled by one commit, so that none is half full."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id

from trainers.errors import InputError, first_line

# what a new repository holds before anyone has put something there
_OF_THE_HUB = {".gitattributes"}
# what another model would leave behind, if it were not removed: its weights, code and pictures
_REPLACED = ["*.safetensors", "*.safetensors.index.json", "*.py", "*.json", "*.png"]


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
        try:
            validate_repo_id(self.repo)
        except HFValidationError as error:
            raise InputError(
                f"--repo {self.repo!r} is no name of a repository ({first_line(error)}); {_NAMED}"
            ) from error
        if self.repo.count("/") != 1:
            raise InputError(f"--repo {self.repo!r} names no user; {_NAMED}")


_NAMED = "write user/name, of letters, digits, '-', '_' and '.'."


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
    api = HfApi(token=destination.token)
    repo = destination.repo
    with refusals_named(f"{repo} cannot be published"):
        account = api.whoami()
        user, owner = account["name"], repo.partition("/")[0]
        if owner not in {user, *(organization["name"] for organization in account.get("orgs", []))}:
            raise InputError(f"{user} may not publish under {owner}; give --repo {user}/{repo.partition('/')[2]}.")
        if not api.repo_exists(repo):
            return user
        if destination.private and not api.model_info(repo).private:
            raise InputError(
                f"{repo} is public, and --private was given; change its settings on the Hub, or leave --private out."
            )
        branches = {branch.name for branch in api.list_repo_refs(repo).branches}
        if destination.revision in branches | {None}:
            files = set(api.list_repo_files(repo, revision=destination.revision)) - _OF_THE_HUB
            if files and not destination.update:
                raise InputError(
                    f"{repo} exists and holds {len(files)} files; give --update to replace them, or another --repo."
                )
    return user


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
        InputError: The Hub refuses, or cannot be reached; the repository is as it was, or new and empty.
    """
    api = HfApi(token=destination.token)
    repo, branch = destination.repo, destination.revision
    with refusals_named(f"{repo} was not published and is as it was"):
        url = api.create_repo(repo, private=destination.private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(repo, branch=branch, exist_ok=True)
        api.upload_folder(
            repo_id=repo, folder_path=folder, revision=branch, commit_message=message, delete_patterns=_REPLACED
        )  # fmt: skip
    return str(url) if branch is None else f"{url}/tree/{branch}"


class UnreachableError(InputError):
    """The Hub cannot be reached now."""


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
    except (OSError, ValueError, HTTPError) as error:
        answered = getattr(error, "response", None) is not None
        lost = isinstance(error, HTTPError | OfflineModeIsEnabled) and not answered
        raise (UnreachableError if lost else InputError)(f"{what}: {reason(error)}.") from error


def reason(error: Exception) -> str:
    """Why the Hub refused or could not be reached, and what to do, without a full stop."""
    if isinstance(error, LocalTokenNotFoundError):
        return "nobody is signed in; run `hf auth login`, or set HF_TOKEN"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    said = " ".join(str(error).split()).rstrip(".")
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        status = error.response.status_code
        said = (error.server_message or said).strip().rstrip(".")
        return f"the Hub answers {status}, {said}{_ADVICE.get(status, '')}"
    if isinstance(error, HTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({said or type(error).__name__}); repeat the call when it can"
    return said


_ADVICE = {
    401: "; sign in with a valid token by `hf auth login`, or set HF_TOKEN",
    403: "; use a token that may write there",
    404: "; check the name, and that the token may see it",
    413: "; look at your quota there",
}
