"""How many processes a config starts, with which options; the files that come with the library."""

import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import psutil
import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser

from tuning import exit_codes
from tuning.distributed import launch
from tuning.distributed.launch import check_processes, choose_launch_options, explain_exit, launch_flags
from tuning.errors import UserError
from tuning.exit_codes import claim_error_output, claim_file

ROOT = Path(__file__).parents[3]
FIXTURES = sorted((ROOT / "fixtures").glob("*.yaml"))


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("launch_args", "gpus", "processes"),
    [
        ({}, 0, None),
        ({}, 1, None),
        ({}, 4, 4),
        ({"num_processes": 2}, 0, 2),
        ({"num_processes": 1}, 4, None),
        ({"fsdp_transformer_layer_cls_to_wrap": "GraniteDecoderLayer"}, 0, None),
        ({"fsdp_transformer_layer_cls_to_wrap": "GraniteDecoderLayer"}, 4, 4),
    ],
)
def test_as_many_processes_as_asked_for_else_one_a_gpu(launch_args, gpus, processes, monkeypatch):
    monkeypatch.setattr(launch, "count_gpus", lambda: gpus)
    wanted = choose_launch_options(launch_args, all_gpus=True)
    assert wanted.get("num_processes") == processes
    assert not wanted or launch_args.items() <= wanted.items()


def test_a_process_that_was_launched_launches_none(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # Kubeflow's; a launcher is still to be started
    assert choose_launch_options({"num_processes": 2}, all_gpus=True) == {"num_processes": 2}
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert choose_launch_options({"num_processes": 2}, all_gpus=True) == {}


def test_a_single_process_that_was_launched_launches_none(tmp_path):
    """accelerate starts it without any of the variables that torchrun sets."""
    (tmp_path / "settings.yaml").write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: 'NO'\nuse_cpu: true\n"
    )
    launch_args = {"config_file": str(tmp_path / "settings.yaml")}
    script = tmp_path / "script.py"
    script.write_text(
        "import json, sys\nfrom pathlib import Path\nfrom tuning.distributed.launch import choose_launch_options\n"
        f"Path(sys.argv[1]).write_text(json.dumps(choose_launch_options({launch_args}, all_gpus=True)))"
    )
    assert choose_launch_options(launch_args, all_gpus=True) == launch_args
    launch.launch(launch_args, [str(script), str(tmp_path / "wanted.json")])
    assert json.loads((tmp_path / "wanted.json").read_text()) == {}
    assert choose_launch_options(launch_args, all_gpus=True) == launch_args


def test_several_processes_with_use_cpu_of_the_launcher_are_refused():
    with pytest.raises(UserError, match="accelerate starts one process with it, not 2"):
        launch.launch({"num_processes": 2, "use_cpu": True}, ["script.py"])


def test_processes_that_do_not_know_each_other_are_refused(monkeypatch):
    check_processes(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_processes(2)
    with pytest.raises(UserError, match="WORLD_SIZE 2: the processes are not connected: this one knows of 1"):
        check_processes(1)


def test_several_gpus_are_used_by_the_command_only(monkeypatch):
    monkeypatch.setattr(launch, "count_gpus", lambda: 4)
    assert choose_launch_options({}, all_gpus=False) == {}


def parse(launch_args: dict):
    parser = launch_command_parser()
    return parser.parse_args([*launch_flags(launch_args, parser), "script.py"])


def test_options_of_accelerate_launch_become_its_flags():
    parsed = parse(
        {
            "num_processes": 4,
            "mixed_precision": "bf16",
            "multi_gpu": True,
            "tpu": False,
            "gpu_ids": [0, 2],
            "fsdp_transformer_layer_cls_to_wrap": "GraniteDecoderLayer",
        }
    )
    assert (parsed.num_processes, parsed.mixed_precision, parsed.multi_gpu, parsed.tpu) == (4, "bf16", True, False)
    assert parsed.gpu_ids == "0,2"
    assert parsed.fsdp_transformer_layer_cls_to_wrap == "GraniteDecoderLayer"
    assert parsed.config_file == str(launch.FSDP_SETTINGS)
    assert parsed.main_process_port == 0


def test_a_config_file_of_the_user_is_taken_as_it_is():
    parsed = parse({"config_file": "mine.yaml"})
    assert parsed.config_file == "mine.yaml"
    assert parsed.main_process_port is None


def test_an_unknown_option_is_answered_with_the_nearest():
    with pytest.raises(UserError, match="num_proceses: accelerate launch has no such option"):
        choose_launch_options({"num_proceses": 2}, all_gpus=True)


@pytest.mark.parametrize(
    ("code", "printed", "expected", "words"),
    [
        (1, True, 1, ""),
        (143, True, 143, ""),
        (203, True, 203, ""),
        (-9, True, 203, ""),
        (-9, False, 203, r"process 3 \(pid 7\) was ended by SIGKILL.* has run out of memory"),
        (7, False, 203, "ended with exit code 7"),
    ],
)
def test_how_a_launch_ends(code, printed, expected, words):
    file = claim_file(psutil.Process().pid)
    file.touch() if printed else file.unlink(missing_ok=True)
    end = explain_exit(code, "process 3 (pid 7)")
    assert end.exit_code == expected
    assert re.search(words, end.message) if words else end.message == ""
    assert not file.exists()


def test_a_signal_before_training_is_no_fault():
    end = explain_exit(-15, "process 0 (pid 7)", [15])
    assert (end.exit_code, end.message) == (143, "Stopped by SIGTERM before the first step.")


def test_only_the_first_failing_process_of_a_launch_prints_its_error(monkeypatch, tmp_path):
    monkeypatch.setattr(exit_codes.tempfile, "gettempdir", lambda: str(tmp_path))
    (tmp_path / "vlm-tuning-999999999-1.00").touch()  # of a launcher that is gone
    (tmp_path / "vlm-tuning-my-data").touch()  # somebody's own
    assert [claim_error_output(), claim_error_output()] == [True, True]
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert [claim_error_output(), claim_error_output()] == [True, False]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("file", FIXTURES, ids=lambda file: file.stem)
def test_every_fixture_is_read_by_accelerate_and_every_line_is_explained(file):
    config = load_config_from_file(str(file))
    assert config.distributed_type.value in file.read_text()
    if "fsdp" in file.stem:
        assert config.fsdp_config["fsdp_version"] == 2
        assert "fsdp_transformer_layer_cls_to_wrap" not in config.fsdp_config
    lines = file.read_text().splitlines()
    assert [line for line in lines if "#" not in line] == [
        line for line in lines if line in ("fsdp_config:", "deepspeed_config:")
    ]
    assert f"--config_file={'fixtures/' + file.name}" in file.read_text().replace("config_file ", "config_file=")


def test_the_cluster_examples_are_well_formed():
    subprocess.run(["bash", "-n", str(ROOT / "examples" / "slurm" / "train.sbatch")], check=True)
    service, job = yaml.safe_load_all((ROOT / "examples" / "kubernetes" / "job.yaml").read_text())
    container = job["spec"]["template"]["spec"]["containers"][0]
    words = container["args"][0].partition("--accelerate_launch_args ")[2].replace('\\"', '"').strip().strip('"')
    launch_args = json.loads(words.replace("$JOB_COMPLETION_INDEX", "0"))
    assert launch_args["main_process_ip"] == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert parse(launch_args).machine_rank == 0


def test_an_installed_package_brings_its_settings(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    packed = zipfile.ZipFile(wheel)
    place = launch.FSDP_SETTINGS.relative_to(Path(launch.__file__).parents[2])
    assert packed.read(str(place)) == (ROOT / "fixtures" / "accelerate_fsdp_defaults.yaml").read_bytes()
    templates = sorted((ROOT / "tuning" / "pages" / "templates").iterdir())
    assert {path.suffix for path in templates} == {".j2", ".css", ".js"}
    assert [path.name for path in templates if f"tuning/pages/templates/{path.name}" not in packed.namelist()] == []
