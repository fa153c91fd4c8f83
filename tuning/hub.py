"""A repository on the Hugging Face Hub: uploads of an export, and of a run and its checkpoints."""

import json
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.errors import UserError, first_line, try_optional
from tuning.files import (
    CARD_FILE,
    CONFIG_FILE,
    FINGERPRINT_FILE,
    LOG_FILE,
    NOT_OF_A_MODEL,
    PROGRESS_FILE,
    REPORT_FILE,
    RUN_INFO_FILE,
    RUNS_FILE,
    SAMPLES_FILE,
    SHARDED_MODEL,
    SKIPPED_FILE,
    STATE_FILE,
    hide_paths,
)

OF_THE_RUN = (
    *(CONFIG_FILE, RUN_INFO_FILE, PROGRESS_FILE, REPORT_FILE, SAMPLES_FILE, SKIPPED_FILE, RUNS_FILE),
    *("check.*", "checkpoint-*", ".*"),
)
PRIVATE = (TRAINING_ARGS_NAME, FINGERPRINT_FILE)  # they name folders of this machine
NOT_OF_THE_MODEL = (*OF_THE_RUN, *PRIVATE, *NOT_OF_A_MODEL, LOG_FILE)  # in output_dir, or in a checkpoint
PATHS = {"adapter_config.json": "base_model_name_or_path", STATE_FILE: "best_model_checkpoint"}  # file → its field


class HubRepo:
    """A model repository. `token`: default the one of this machine's login. `private`: default the organisation's.

    Call `open` before you upload.
    """

    def __init__(
        self, repo_id: str, *, token: str | None = None, private: bool | None = None, revision: str | None = None
    ):
        self.api = HfApi(token=token)
        self.repo_id, self.private, self.revision = repo_id, private, revision

    def open(self) -> None:
        """Create the repository and its branch, if they are missing. Raises `UserError` where we may not write."""
        attempt = try_optional(self._create)
        if attempt.error:
            raise UserError(
                where="push_to_hub",
                problem=f"nothing can be uploaded to {self.repo_id}: {explain(attempt.error)}.",
                fix="Fix that, or leave push_to_hub out and upload the model later (hf upload).",
            ) from attempt.error
        if attempt.value == "read":
            raise UserError(
                where="push_to_hub",
                problem="the token may only read.",
                fix=f"Give one that may write to {self.repo_id}.",
            )

    def _create(self) -> str | None:
        """Create what is missing. Returns the role of the token."""
        account = self.api.whoami()
        self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
        if self.revision:
            self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        return account.get("auth", {}).get("accessToken", {}).get("role")

    def commit(self, files: Mapping[str, Path], message: str) -> None:
        """Upload files, by their names in the repository, in one commit. Local paths in them are shortened."""
        operations = [CommitOperationAdd(name, _content(file)) for name, file in files.items()]
        self.api.create_commit(self.repo_id, operations, commit_message=message, revision=self.revision)

    def upload(self, files: Mapping[str, Path], message: str, *, folder: Path, fix: str) -> None:
        """`commit` files of the model in `folder`. Raises `UserError` where that fails; `fix`: what to do then."""
        attempt = try_optional(lambda: self.commit(files, message))
        if attempt.error:
            reason = explain(attempt.error)
            raise UserError(
                where="push_to_hub",
                problem=f"the model is saved in {folder}, but was not uploaded to {self.repo_id}: {reason}.",
                fix=fix,
            ) from attempt.error
        print0(f"Uploaded to {self.api.endpoint}/{self.repo_id}.")

    def upload_folder(self, folder: Path) -> None:
        """Upload all files of an exported model. Raises `UserError` where that fails."""
        files = {file.relative_to(folder).as_posix(): file for file in sorted(folder.rglob("*")) if file.is_file()}
        self.upload(files, "Upload model", folder=folder, fix=f"Run hf upload {self.repo_id} {folder}")


class RunRepo(HubRepo):
    """The repository of a run: `hub_model_id`, else one named like the output folder.

    Only the first process uploads.
    """

    def __init__(self, training: TrainingArguments):
        name = training.hub_model_id or Path(training.output_dir).absolute().name
        super().__init__(
            name, token=training.hub_token, private=training.hub_private_repo, revision=training.hub_revision
        )
        self.strategy, self.always_push = HubStrategy(training.hub_strategy), training.hub_always_push
        self._upload: Future | None = None
        self._uploaded: Path | None = None

    @property
    def uploading(self) -> Path | None:
        """The checkpoint that is being uploaded, if any: it must not be deleted."""
        return self._uploaded if self._upload and not self._upload.done() else None

    def upload_checkpoint(self, checkpoint: Path, step: int) -> None:
        """Upload what `hub_strategy` asks for, while training continues.

        A checkpoint is left out while an earlier one is still being uploaded, unless `hub_always_push` is true.
        """
        if self.strategy == HubStrategy.END or (self.uploading and not self.always_push):
            return
        self.wait()
        files = {} if (checkpoint / SHARDED_MODEL).is_dir() else files_of_model(checkpoint)
        if self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            folder = "last-checkpoint" if self.strategy == HubStrategy.CHECKPOINT else checkpoint.name
            every = [file for file in checkpoint.rglob("*") if file.is_file()]
            files |= {f"{folder}/{file.relative_to(checkpoint).as_posix()}": file for file in every if is_public(file)}
        if files:
            uploader = ThreadPoolExecutor(1)  # its thread ends with the upload; one of HfApi would stay
            self._upload, self._uploaded = uploader.submit(self.commit, files, f"Step {step} of training"), checkpoint
            uploader.shutdown(wait=False)

    def wait(self) -> None:
        """Wait for the upload of a checkpoint. A failed upload is reported; the run continues."""
        if self._upload and (error := self._upload.exception()):
            print0(f"{self._uploaded} was not uploaded: {explain(error)}.")
        self._upload = None

    def upload_final(self, folder: Path, names: Sequence[str], output_dir: Path) -> None:
        """Upload the files `names` of the model in `folder`, its card, and the run's log. Raises `UserError`."""
        self.wait()
        files = {name: folder / name for name in [*names, CARD_FILE] if name not in PRIVATE}
        files[LOG_FILE] = output_dir / LOG_FILE
        left_out = " ".join(f"--exclude {name!r}" for name in (*PRIVATE, *OF_THE_RUN))
        fix = f"Run the same command again, which only uploads; or hf upload {self.repo_id} {folder} . {left_out}"
        self.upload({name: file for name, file in files.items() if file.is_file()}, "Trained", folder=folder, fix=fix)


def files_of_model(checkpoint: Path) -> dict[str, Path]:
    """The files of a checkpoint that a model or adapter consists of, by name."""
    files = (file for file in checkpoint.iterdir() if file.is_file() and file.name not in NOT_OF_A_MODEL)
    return {file.name: file for file in files if is_public(file)}


def is_public(file: Path) -> bool:
    """Whether to upload a checkpoint's file. PEFT's card in it contains only the path of the base model."""
    return file.name not in (*PRIVATE, CARD_FILE)


def _content(file: Path) -> str | bytes:
    """The path of a file to upload, or its text where a path of this machine had to be shortened."""
    if file.name not in PATHS:
        return str(file)
    values, field = json.loads(file.read_text(encoding="utf-8")), PATHS[file.name]
    values[field] = hide_paths(values.get(field))
    return (json.dumps(values, indent=2) + "\n").encode()


def explain(error: BaseException) -> str:
    """Why the Hub refuses or cannot be reached."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no token (hub_token, HF_TOKEN, or hf auth login)"
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set"
    if status == 401:
        return "the token is not accepted (hub_token, HF_TOKEN, or hf auth login)"
    if status == 403:
        return "the token may not write there"
    if isinstance(error, HTTPError) and not isinstance(error, HfHubHTTPError):
        return f"{constants.ENDPOINT} cannot be reached ({error})"
    return first_line(error)


def open_hub(config: RunConfig) -> RunRepo | None:
    """The repository to upload to, if there is one. Raises `UserError` before training where we may not write to it."""
    if not config.training.push_to_hub:
        return None
    hub = RunRepo(config.training)
    if os.environ.get("RANK", "0") == "0":
        hub.open()
    return hub


def upload_finished(config: RunConfig, files: Sequence[str]) -> None:
    """Upload the model of a finished run, whose own upload may have failed."""
    hub = open_hub(config)
    if hub and config.training.should_save:
        hub.upload_final(Path(config.save_model_dir), files, Path(config.training.output_dir))
