"""The exported model on the Hugging Face hub."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import HfApi

from anchorvec.errors import AnchorvecError


def make_repository(repo: str) -> None:
    """Make the repository `repo` on the hub, if it is not there: whether that may be done is known before the work.

    It is private or public as the user's settings on the hub say. Raises AnchorvecError where it cannot be made.
    """
    with _reached(repo, "log in with `hf auth login`, or set HF_TOKEN to a token that may write"):
        HfApi().create_repo(repo, exist_ok=True)


def push_folder(folder: Path, repo: str) -> str:
    """Upload all that is in `folder` to the repository `repo`, as one commit; its address.

    Raises AnchorvecError where it cannot be uploaded; nothing is lost then.
    """
    with _reached(repo, f"the model is in {folder}; once more with --resume uploads it"):
        return str(HfApi().upload_folder(repo_id=repo, folder_path=folder, commit_message="An embedder by anchorvec"))


@contextmanager
def _reached(repo: str, help_: str) -> Iterator[None]:
    """A context in which the hub is asked for something; what it or the network says becomes an AnchorvecError."""
    try:
        yield
    except Exception as error:  # of the hub, of the http library, of the network
        said = " ".join(line.strip() for line in str(error).strip().splitlines()[:2])
        raise AnchorvecError(f"--push {repo}: {said.rstrip('.') or type(error).__name__}; {help_}") from error
