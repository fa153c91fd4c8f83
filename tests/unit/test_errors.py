import errno
import logging
import pickle
import sys

import pytest
import torch

from tuning.errors import RunEnded, UserError, describe_failure, first_line, try_optional, writing
from tuning.exit_codes import exit_code_of


@pytest.fixture(autouse=True)
def no_log_file(monkeypatch):
    monkeypatch.delenv("TERMINATION_LOG_FILE", raising=False)


def fail_by_user():
    raise UserError(where="rows.json, row 3", problem="is not JSON.", fix="Mend it.")


def fail_by_bug():
    raise ZeroDivisionError("counted nothing")


def interrupt():
    raise KeyboardInterrupt


def test_success_is_0_and_silent(capsys):
    assert exit_code_of(lambda: "anything") == 0
    assert capsys.readouterr() == ("", "")


def test_user_error_is_1_with_one_message_and_no_traceback(capsys):
    assert exit_code_of(fail_by_user) == 1
    assert capsys.readouterr() == ("", "Error: rows.json, row 3: is not JSON. Mend it.\n")


def test_any_other_error_is_203_with_its_traceback(capsys):
    assert exit_code_of(fail_by_bug) == 203
    shown = capsys.readouterr().err
    assert "Traceback (most recent call last)" in shown
    assert "in fail_by_bug" in shown
    assert shown.endswith("Internal error: ZeroDivisionError: counted nothing\n")


def test_interruption_is_130_without_traceback(capsys):
    assert exit_code_of(interrupt) == 130
    assert capsys.readouterr().err == "Interrupted.\n"


@pytest.mark.parametrize(("asked", "code"), [(2, 2), (0, 0), (None, 0)])
def test_exit_that_was_asked_for_keeps_its_code(asked, code):
    assert exit_code_of(lambda: sys.exit(asked)) == code


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (fail_by_user, "Error: rows.json, row 3: is not JSON. Mend it.\n"),
        (fail_by_bug, "Internal error: ZeroDivisionError: counted nothing\n"),
    ],
)
def test_message_is_written_to_the_termination_log(tmp_path, monkeypatch, command, message):
    monkeypatch.setenv("TERMINATION_LOG_FILE", str(tmp_path / "log"))
    assert exit_code_of(command) != 0
    assert (tmp_path / "log").read_text(encoding="utf-8") == message


def test_success_writes_no_termination_log(tmp_path, monkeypatch):
    monkeypatch.setenv("TERMINATION_LOG_FILE", str(tmp_path / "log"))
    assert exit_code_of(lambda: None) == 0
    assert not (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (UserError(problem="went wrong."), "went wrong."),
        (UserError(where="here", problem="went wrong."), "here: went wrong."),
        (UserError(problem="went wrong.", fix="Do so."), "went wrong. Do so."),
    ],
)
def test_message_has_only_what_is_known(error, shown):
    assert str(error) == shown


def test_user_error_survives_pickling():
    error = pickle.loads(pickle.dumps(UserError(where="rows.json", problem="is not JSON.", fix="Mend it.")))
    assert (error.problem, error.where, error.fix) == ("is not JSON.", "rows.json", "Mend it.")


def failing_with(error):
    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "line", "described"),
    [
        (ValueError("\n no such layer. \nThe rest."), "no such layer", "ValueError: no such layer"),
        (KeyError(), "KeyError", "KeyError"),
        (RuntimeError(" \n"), "RuntimeError", "RuntimeError"),
    ],
)
def test_a_failure_is_described_by_the_first_line_of_its_text(error, line, described):
    assert first_line(error) == line
    assert describe_failure(error) == described


def test_a_disk_that_cannot_be_written_is_a_user_error():
    with (
        pytest.raises(UserError, match=r"^out/log: cannot be written: No space left on device\. Make room"),
        writing("out/log"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with (
        pytest.raises(UserError, match=r"^out/log: cannot be written: disk gone\. Look\.$"),
        writing("out/log", "Look."),
    ):
        raise OSError("disk gone")


def test_an_optional_step_gives_its_value_or_its_error_with_a_trace(caplog):
    assert try_optional(lambda: 3).value == 3
    error = TypeError("odd")
    with caplog.at_level(logging.DEBUG, logger="tuning.errors"):
        assert try_optional(failing_with(error)).error is error
    assert "in action" in caplog.text


@pytest.mark.parametrize(
    "error",
    [
        UserError(problem="went wrong."),
        RunEnded("Stopped.", 143),
        KeyboardInterrupt(),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."),
        RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        torch.AcceleratorError("CUDA error: device-side assert triggered", 710),
        torch.distributed.DistBackendError("NCCL watchdog timeout"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    ],
)
def test_an_optional_step_does_not_hide_what_ends_a_run(error):
    with pytest.raises(type(error)):
        try_optional(failing_with(error))


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device", 209),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
    ],
)
def test_an_optional_step_may_ask_a_gpu_for_what_it_cannot_do(error):
    assert try_optional(failing_with(error)).error is error


def test_an_optional_step_may_report_user_errors_too():
    error = UserError(problem="went wrong.")
    assert try_optional(failing_with(error), catch_user_errors=True).error is error
