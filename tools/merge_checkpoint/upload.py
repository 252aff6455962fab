"""Uploads what a merge wrote to the Hugging Face hub. The token is in no message."""

import re
import shlex
import sys
from pathlib import Path

from huggingface_hub import HfApi, constants, get_token
from huggingface_hub.errors import RepositoryNotFoundError

REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)
# Weights in the repository that transformers or peft would read in place of the new ones, or beside them.
WEIGHTS = re.compile(r"(model|adapter_model|pytorch_model)[\w.-]*\.(safetensors|bin)(\.index\.json)?")
LOG_IN = "`hf auth login` stores a token, and HF_TOKEN in the environment is one"
MOST_CHARACTERS = 300  # of the hub's message


class Upload:
    """The upload to the repository `OWNER/NAME` of the hub, whose access is checked when this is made.

    Raises ValueError of one line where the name is none, the hub cannot be reached or HF_HUB_OFFLINE is set,
    there is no valid token, it may not write there, or the repository is public and should be private.
    """

    def __init__(self, repository: str, private: bool):
        self.repository, self._private, self._flag = repository, private, f"--push_to_hub {repository}"
        if not REPOSITORY.fullmatch(repository):
            raise ValueError(f"{self._flag}: OWNER/NAME was expected, the owner a user or an organization")
        if constants.HF_HUB_OFFLINE:
            raise ValueError(f"{self._flag}: HF_HUB_OFFLINE is set, and an upload needs the hub")
        self._token = self._read_token()
        self._api = HfApi(token=self._token)
        self._check_owner()
        if private:
            self._check_private()

    def run(self, directory: Path) -> str:
        """Upload the files of a directory, and return the address of the repository.

        Other weights at its top are deleted in the same upload; its history keeps them. Raises ValueError,
        which says how to upload again, where that fails.
        """
        try:
            url = self._api.create_repo(self.repository, private=self._private or None, exist_ok=True)
            names = {path.relative_to(directory).as_posix() for path in directory.rglob("*")}
            there = self._api.list_repo_files(self.repository)
            stale = [name for name in there if WEIGHTS.fullmatch(name) and name not in names]
            # Large files need no other function: upload_folder sends them in parts, and those that have
            # arrived are not sent again.
            self._api.upload_folder(
                repo_id=self.repository,
                folder_path=directory,
                commit_message="Upload by markstep",
                delete_patterns=stale or None,
            )
        except Exception as error:  # the hub's errors share no base class
            again = (
                f"hf upload {self.repository} {shlex.quote(str(directory))} ." + " --private" * self._private
            )
            print(file=sys.stderr)  # ends the line of a progress bar
            raise ValueError(
                f"{self._flag}: {self._say(error)}; {directory} is complete, and `{again}` uploads it"
            ) from None
        return str(url)

    def _read_token(self) -> str:
        """The user's token; raises ValueError where there is none that a request can carry."""
        try:
            token = get_token()
        except Exception:  # its message may have the token
            token = None
        if not token:
            raise ValueError(f"{self._flag}: there is no token: {LOG_IN}")
        if not re.fullmatch(r"[!-~]+", token):
            raise ValueError(f"{self._flag}: the token has characters that no token has: {LOG_IN}")
        return token

    def _check_owner(self) -> None:
        """Raise ValueError unless the token is valid, and may write to what the owner has."""
        try:
            who = self._api.whoami()
        except Exception as error:
            if getattr(getattr(error, "response", None), "status_code", None) == 401:
                raise ValueError(f"{self._flag}: the hub does not know the token: {LOG_IN}") from None
            raise ValueError(f"{self._flag}: the hub cannot be asked: {self._say(error)}") from None
        roles = {who["name"]: None} | {each["name"]: each.get("roleInOrg") for each in who.get("orgs") or ()}
        owner = self.repository.split("/")[0]
        if owner not in roles:
            raise ValueError(
                f"{self._flag}: the token is that of {who['name']}, who can upload to {', '.join(roles)} only"
            )
        token = (who.get("auth") or {}).get("accessToken") or {}
        if "read" in (token.get("role"), roles[owner]):
            raise ValueError(f"{self._flag}: the token may only read there: one that may write was expected")

    def _check_private(self) -> None:
        """Raise ValueError where the repository is there, and public."""
        try:
            private = self._api.model_info(self.repository).private
        except RepositoryNotFoundError:
            return
        except Exception as error:
            raise ValueError(f"{self._flag}: the hub cannot be asked: {self._say(error)}") from None
        if not private:
            raise ValueError(
                f"{self._flag}: the repository is there, and public: leave --private out, or choose another"
            )

    def _say(self, error: Exception) -> str:
        """An error's message in one line, without what could be the token."""
        causes = [each for each in (error, error.__cause__) if each]
        texts = [" ".join(str(each).split()) or type(each).__name__ for each in causes]
        text = ": ".join(dict.fromkeys(texts))
        text = text.replace(self._token, "[token]")
        return re.sub(r"hf_\w+|(?<=Bearer )\S+", "[token]", text)[:MOST_CHARACTERS]
