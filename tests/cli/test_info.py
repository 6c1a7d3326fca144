"""hfkit info."""

import json

from support.shell import assert_fails, call

from hfkit.cli import info


def test_info_json(tiny, capfdbinary):
    """--json prints the whole report."""
    result = call(capfdbinary, "info", "-m", tiny, "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 0
    assert report["versions"]["torch"] and report["machine"]["cores"]
    assert report["model"]["context"] == 64 and report["model"]["layers"] == 2


def test_info_hides_passwords(monkeypatch, capfdbinary):
    """The report does not show the password of a mirror."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://ann:secret@mirror.example:8443/hub")
    for line in ([], ["--json"]):
        out = call(capfdbinary, "info", *line).stdout
        assert b"https://mirror.example:8443/hub" in out and b"secret" not in out and b"ann:" not in out


def test_describe_model_counts_parameters(tiny):
    """Parameters are counted without loading the model."""
    import hfkit
    from hfkit.models.sources import find_model as find
    from hfkit.options import ModelOptions

    described = info.describe_model(find(ModelOptions(model=tiny)))
    assert described["parameters"] == hfkit.load(tiny).model.num_parameters()


def test_info_prints_problems(tiny, capfdbinary, monkeypatch):
    """The report for people names every problem."""
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    lines = call(capfdbinary, "info", "-m", tiny).stdout.decode().splitlines()
    assert any(line.startswith("problem: no C++ compiler") for line in lines)


def test_describe_machine_compiler(monkeypatch):
    """$CXX counts as a compiler, as it does for torch."""
    monkeypatch.setattr(info.shutil, "which", lambda name: f"/opt/{name}" if name == "icpx" else None)
    assert info.describe_machine()["machine"]["compiler"] is None
    monkeypatch.setenv("CXX", "icpx")
    assert info.describe_machine()["machine"]["compiler"] == "/opt/icpx"


def test_find_problems_versions():
    """A package outside its bounds is a problem."""
    report = {
        "versions": {"torch": "1.0"},
        "machine": {"compiler": "c++", "memory_free": 10**12},
        "devices": {"cuda": None, "gpus": []},
        "hub": {"cache": "/", "cache_free": 2**40, "offline": True, "reachable": False, "endpoint": ""},
        "model": {"name": "m", "file_bytes": 1},
    }
    assert [problem.split()[:2] for problem in info.find_problems(report)] == [["torch", "1.0"]]


def test_info_missing_model(capfdbinary):
    """A missing model is an error."""
    assert_fails(call(capfdbinary, "info", "-m", "./nowhere"), 1, "./nowhere")
