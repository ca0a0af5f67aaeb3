"""Uploads a finished output to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]


def require_repo_id(option: str, repo: str) -> None:
    """Raise ValueError, which names the option, unless ``repo`` can be the name of a repository."""
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise ValueError(f"{option}: {repo!r} is not the name of a repository, such as user/model") from error


def push(folder: Path, repo: str, message: str) -> str:
    """Upload every file of a folder in one commit; the repository is created if there is none.

    Returns:
        The address of the repository.

    Raises:
        RuntimeError: the Hub cannot be reached, or refuses the upload; it names the repository.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, repo_type="model", exist_ok=True)
        api.upload_folder(repo_id=repo, repo_type="model", folder_path=folder, commit_message=message)
    except Exception as error:  # the HTTP library's errors have another base class in each major version
        reason = " ".join(str(error).split()) or type(error).__name__
        raise RuntimeError(f"{repo} was not uploaded: {reason}") from error
    return str(address)
