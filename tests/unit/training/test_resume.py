"""From which checkpoints a run can be resumed."""

import pytest

from tuning.errors import UserError
from tuning.training.resume import check_deepspeed_states


def test_deepspeed_resumes_what_as_many_of_its_processes_wrote(tmp_path):
    with pytest.raises(UserError, match=r"was not written under DeepSpeed, and 2 processes .* model_name_or_path"):
        check_deepspeed_states(tmp_path, 2)
    (tmp_path / "global_step3").mkdir()
    for rank in range(2):
        (tmp_path / "global_step3" / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    check_deepspeed_states(tmp_path, 2)
    with pytest.raises(UserError, match="holds DeepSpeed's states of 2 processes, and 4 processes"):
        check_deepspeed_states(tmp_path, 4)
