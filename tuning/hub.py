"""A repository on the Hugging Face Hub, to which a run uploads its model."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from transformers import TrainingArguments
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import HubStrategy

from tuning.config.options import RunConfig
from tuning.console import print0
from tuning.errors import UserError
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
KEPT_HERE = (TRAINING_ARGS_NAME, FINGERPRINT_FILE)  # they tell of this machine's folders
NOT_OF_THE_MODEL = (*OF_THE_RUN, *KEPT_HERE, *NOT_OF_A_MODEL, LOG_FILE)  # in output_dir, or in a checkpoint
PATHS = {"adapter_config.json": "base_model_name_or_path", STATE_FILE: "best_model_checkpoint"}  # file → its field
CANNOT_UPLOAD = (OSError, ValueError, RuntimeError, HTTPError)  # of the network, the Hub, and hf_xet


class HubRepo:
    """The repository that `hub_model_id` names, else one called like the output folder.

    `open` must come first. Only the first process uploads.
    """

    def __init__(self, training: TrainingArguments):
        self.api = HfApi(token=training.hub_token)
        self.repo_id = training.hub_model_id or Path(training.output_dir).absolute().name
        self.private, self.revision = training.hub_private_repo, training.hub_revision
        self.strategy, self.always = HubStrategy(training.hub_strategy), training.hub_always_push
        self._upload: Future | None = None
        self._uploaded: Path | None = None

    def open(self) -> None:
        """Make the repository, and its branch, unless they are there. Raises `UserError` where we may not write."""
        try:
            account = self.api.whoami()
            role = account.get("auth", {}).get("accessToken", {}).get("role")
            self.repo_id = self.api.create_repo(self.repo_id, private=self.private, exist_ok=True).repo_id
            if self.revision:
                self.api.create_branch(self.repo_id, branch=self.revision, exist_ok=True)
        except CANNOT_UPLOAD as error:
            raise UserError(
                where="push_to_hub",
                problem=f"nothing can be uploaded to {self.repo_id}: {explain(error)}.",
                fix="Mend that, or set push_to_hub false and upload the model later (hf upload).",
            ) from error
        if role == "read":
            raise UserError(
                where="push_to_hub",
                problem="the token may only read.",
                fix="Give one that may write to " + self.repo_id,
            )

    @property
    def uploading(self) -> Path | None:
        """The checkpoint that is being uploaded, if any: it must stay where it is."""
        return self._uploaded if self._upload and not self._upload.done() else None

    def upload_checkpoint(self, checkpoint: Path, step: int) -> None:
        """Upload what `hub_strategy` wants of a checkpoint, beside the training, unless an upload is still going on."""
        if self.strategy == HubStrategy.END or (self.uploading and not self.always):
            return
        self.wait()
        files = {} if (checkpoint / SHARDED_MODEL).is_dir() else files_of_model(checkpoint)
        if self.strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            folder = "last-checkpoint" if self.strategy == HubStrategy.CHECKPOINT else checkpoint.name
            every = [file for file in checkpoint.rglob("*") if file.is_file()]
            files |= {f"{folder}/{file.relative_to(checkpoint).as_posix()}": file for file in every if is_public(file)}
        if files:
            uploader = ThreadPoolExecutor(1)  # its thread ends with the upload; one of HfApi would stay
            self._upload, self._uploaded = uploader.submit(self._commit, files, f"Step {step} of training"), checkpoint
            uploader.shutdown(wait=False)

    def wait(self) -> None:
        """Wait for an upload that is going on. One that failed is told of: training goes on, a later one may work."""
        if self._upload and (error := self._upload.exception()):
            print0(f"{self._uploaded} was not uploaded: {explain(error)}.")
        self._upload = None

    def upload_final(self, folder: Path, names: Sequence[str], output_dir: Path) -> None:
        """Upload the files called `names` of the saved model, its card, and the log of the run.

        Raises `UserError` where that fails, which says how to do it later.
        """
        self.wait()
        files = {name: folder / name for name in [*names, CARD_FILE]}
        files[LOG_FILE] = output_dir / LOG_FILE
        try:
            self._commit({name: file for name, file in files.items() if file.is_file() and _may_go(file)}, "Trained")
        except CANNOT_UPLOAD as error:
            left = " ".join(f"--exclude {name!r}" for name in (*KEPT_HERE, *OF_THE_RUN))
            raise UserError(
                where="push_to_hub",
                problem=f"the model is saved in {folder}, but was not uploaded to {self.repo_id}: {explain(error)}.",
                fix=f"Run the same command again, which only uploads; or hf upload {self.repo_id} {folder} . {left}",
            ) from error
        print0(f"Uploaded to {self.api.endpoint}/{self.repo_id}.")

    def _commit(self, files: dict[str, Path], message: str) -> None:
        operations = [CommitOperationAdd(name, uploaded_content(file)) for name, file in files.items()]
        self.api.create_commit(self.repo_id, operations, commit_message=message, revision=self.revision)


def files_of_model(checkpoint: Path) -> dict[str, Path]:
    """The files of a checkpoint that a model or adapter consists of, by name."""
    files = (file for file in checkpoint.iterdir() if file.is_file() and file.name not in NOT_OF_A_MODEL)
    return {file.name: file for file in files if is_public(file)}


def is_public(file: Path) -> bool:
    """Whether a checkpoint's file may leave this machine; PEFT's card of it says nothing but where its base is."""
    return _may_go(file) and file.name != CARD_FILE


def _may_go(file: Path) -> bool:
    return file.name not in KEPT_HERE


def uploaded_content(file: Path) -> str | bytes:
    """What to upload of a file: the file, or its text where a path of this machine had to be shortened."""
    if file.name not in PATHS:
        return str(file)
    values, field = json.loads(file.read_text(encoding="utf-8")), PATHS[file.name]
    values[field] = hide_paths(values.get(field))
    return (json.dumps(values, indent=2) + "\n").encode()


def explain(error: BaseException) -> str:
    """What kept us from the Hub, in words."""
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
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")


def open_hub(config: RunConfig) -> HubRepo | None:
    """The repository to upload to, if any: whether we may is known before training."""
    if not config.training.push_to_hub:
        return None
    hub = HubRepo(config.training)
    if os.environ.get("RANK", "0") == "0":
        hub.open()
    return hub


def upload_finished(config: RunConfig, files: Sequence[str]) -> None:
    """Upload the model that an earlier run saved, if that could not."""
    hub = open_hub(config)
    if hub and config.training.should_save:
        hub.upload_final(Path(config.save_model_dir), files, Path(config.training.output_dir))
