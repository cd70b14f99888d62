"""What made a run: the name of its configuration, and the machine."""

import pytest
import torch

from cudlab.config import Config
from cudlab.provenance import describe_machine, get_provenance, run_name


@pytest.mark.parametrize(
    "config, name",
    [
        ({}, "digits-cud"),
        ({"args": {"aim": 8}, "seed": 2}, "digits-cud-aim8-seed2"),
        ({"args": {"coupling": True, "aim": 2.5}}, "digits-cud-aim2.5-coupling-True"),
        ({"save_every": 7, "keep": 5, "keep_every": 2, "log_every": 9}, "digits-cud"),
        ({"data": "folder:../my pictures@32", "classes": True}, "my-pictures-32-cud-classes"),
        ({"data": "folder:..", "method": "rf"}, "folder-rf"),
    ],
)
def test_a_name_says_what_was_chosen(config, name):
    assert run_name(Config(**config)) == name
    assert run_name(Config(**config | {"steps": 5})).startswith(name + "-")


def test_a_machine_is_described_by_process():
    assert describe_machine(torch.device("cpu"), 3).startswith("3 x ")


def test_what_a_number_was_made_with_is_recorded():
    found = get_provenance()
    assert found["versions"]["torch"] == torch.__version__ and "cores" in found["machine"]
    assert found["git"] == "" or len(found["git"]) == 40
