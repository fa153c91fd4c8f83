"""What a process may use of its machine."""

from tuning import machine


def test_a_containers_memory_is_what_is_free(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "CGROUP", tmp_path)
    of_machine = machine.free_memory()
    assert of_machine > 2**20
    for name, text in {"current": "700\n", "stat": "anon 5\ninactive_file 60\nslab 7\n", "max": "1000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert machine.free_memory() == 1000 - 700 + 60
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.free_memory() > 2**20
