"""Axes in signatures: refused where they disagree, under pytest; never a library that a user needs."""

import os
import subprocess
import sys

import jaxtyping
import pytest
import torch
from axes import modules_with_axes

from mlfusion.probing.heads import HeadShape, Linear
from mlfusion.probing.heads.pooling import linear


def test_axes_that_disagree_are_refused():
    x, weight, bias = torch.zeros(3, 7, 5), torch.zeros(3, 4, 5), torch.zeros(3, 4)
    assert linear(x, weight, bias).shape == (3, 7, 4)
    for wrong in ((x[:2], weight, bias), (x[..., :4], weight, bias), (x, weight, bias[0]), (x, weight, bias.long())):
        with pytest.raises(jaxtyping.TypeCheckError):
            linear(*wrong)


def test_a_head_is_checked_when_it_is_called():
    probe = Linear(HeadShape(tokens=5, width=6, classes=4), seeds=[0, 1])
    with pytest.raises(jaxtyping.TypeCheckError, match="B T D"):
        probe(torch.zeros(9, 30))


@pytest.mark.slow
def test_a_user_needs_neither_library():
    """Every module with axes is imported by a process that refuses both."""
    modules = modules_with_axes()
    assert "mlfusion.probing.heads.linear" in modules
    code = f"""
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("jaxtyping", "beartype"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
for name in {modules}:
    importlib.import_module(name)
import mlfusion, torch
from mlfusion.shapes import Float
assert Float[torch.Tensor, "B T D"] is torch.Tensor
assert not {{"jaxtyping", "beartype"}} & set(sys.modules)
"""
    subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {"PYTHONWARNINGS": "error::SyntaxWarning"}, check=True
    )
