"""hfkit info."""

import json

from support.shell import assert_fails, call

from hfkit.cli import info


def test_the_report_is_json(tiny, capfdbinary):
    result = call(capfdbinary, "info", "-m", tiny, "--json")
    report = json.loads(result.stdout)
    assert result.returncode == 0
    assert report["versions"]["torch"] and report["machine"]["cores"]
    assert report["model"]["context"] == 64 and report["model"]["layers"] == 2


def test_parameters_are_counted_without_loading(tiny):
    import hfkit
    from hfkit.models.sources import find_model as find
    from hfkit.options import ModelOptions

    described = info.describe_model(find(ModelOptions(model=tiny)))
    assert described["parameters"] == hfkit.load(tiny).model.num_parameters()


def test_the_report_for_people_names_every_problem(tiny, capfdbinary, monkeypatch):
    monkeypatch.setattr(info.shutil, "which", lambda name: None)
    lines = call(capfdbinary, "info", "-m", tiny).stdout.decode().splitlines()
    assert any(line.startswith("problem: no C++ compiler") for line in lines)


def test_a_package_out_of_bounds_is_a_problem():
    report = {
        "versions": {"torch": "1.0"},
        "machine": {"compiler": "c++", "memory_free": 10**12},
        "devices": {"cuda": None, "gpus": []},
        "hub": {"cache": "/", "cache_free": 2**40, "offline": True, "reachable": False, "endpoint": ""},
        "model": {"name": "m", "file_bytes": 1},
    }
    assert [problem.split()[:2] for problem in info.find_problems(report)] == [["torch", "1.0"]]


def test_a_model_that_is_not_there_fails(capfdbinary):
    assert_fails(call(capfdbinary, "info", "-m", "./nowhere"), 1, "./nowhere")
