"""Own products and passes over weights: each against the same in float64, at sizes that fill no register, on any threads."""

import ctypes
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from mlfusion.probing.heads import Attentive, HeadShape, kernels
from mlfusion.probing.losses import cross_entropy
from mlfusion.probing.training import population
from mlfusion.probing.training.batches import Schedule, Tokens, batches
from mlfusion.probing.training.optimizer import AdamW
from mlfusion.probing.training.population import Configuration, Population
from mlfusion.probing.training.precision import Numerics

pytestmark = pytest.mark.skipif(kernels.library() is None, reason=f"kernels: {kernels.why_unavailable()}")
NARROW = 2.0**-8  # of a bfloat16's size, half of its last place
SIZES = [  # images, tokens, heads, inner, width
    (1, 1, 1, 2, 32),
    (7, 5, 10, 6, 96),
    (25, 13, 13, 10, 224),
    (30, 24, 72, 64, 192),
    (49, 2, 5, 18, 64),
]


@pytest.fixture(params=[1, 3])
def threads(request, monkeypatch):
    monkeypatch.setattr(kernels, "NUMBERS_PER_THREAD", 1)
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def narrow(*size: int) -> torch.Tensor:
    return torch.randn(size).bfloat16()


def near(ours: torch.Tensor, exact: torch.Tensor, *, places: float = 1.0) -> bool:
    """Within so many halves of a last place, of each number or of what cancelled in it."""
    off = (ours.double() - exact).abs()
    return bool((off <= places * NARROW * exact.abs() + 1e-5 * exact.abs().max()).all())


@pytest.mark.parametrize("size", SIZES)
def test_products_of_few_tokens_and_many_heads(size, threads):
    b, t, h, e, d = size
    torch.manual_seed(0)
    x, weights = narrow(b, t, d), torch.rand(b, t, h)
    folded = narrow(h, d) / 4
    scores = torch.einsum("btd,hd->bth", x.double(), folded.double())
    torch.testing.assert_close(kernels.softmax(x, folded.float()).double(), scores.softmax(1), rtol=1e-5, atol=1e-37)

    averages = kernels.averages(weights, x)
    assert near(averages, torch.einsum("bth,btd->hbd", weights.bfloat16().double(), x.double()))

    weight, scale, shift, excess = torch.randn(1, h, e, d), torch.rand(1, d), torch.randn(1, d), torch.randn(h, b)
    project, packed, bias = kernels.fold_norm(weight, scale, shift)
    assert torch.equal(project, (weight * scale).bfloat16()[0])
    assert near(bias, (weight.double() @ shift[0].double())[0], places=0.01)

    exact = torch.einsum("hed,hbd->heb", project.double(), averages.double())
    plain, more = bias[..., None].double(), 1 + excess[:, None].double()
    assert near(kernels.values(project, averages, bias, excess), exact + plain * more)
    assert near(kernels.values(project, averages, bias, None), exact + plain)

    grad_values = narrow(h, e, b)
    grad_averages = torch.einsum("heb,hed->hbd", grad_values.double(), project.double()).bfloat16().double()
    # The averages' gradient is rounded, of sums in another order: where one falls to the other side, by a last place.
    assert near(
        kernels.attention_gradients(x, grad_values, packed),
        torch.einsum("btd,hbd->bth", x.double(), grad_averages),
        places=2,
    )


def test_what_a_head_gets_does_not_depend_on_the_others():
    torch.manual_seed(0)
    x, weights, weight, grad_values = (
        narrow(31, 9, 64),
        torch.rand(31, 9, 12),
        torch.randn(2, 6, 10, 64),
        narrow(12, 10, 31),
    )
    scale, shift = torch.rand(2, 64), torch.randn(2, 64)
    together, packed, bias = kernels.fold_norm(weight, scale, shift)
    alone, packed_alone, bias_alone = kernels.fold_norm(weight[1:], scale[1:], shift[1:])
    assert torch.equal(together[6:], alone)
    assert torch.equal(bias[6:], bias_alone)
    averages = kernels.averages(weights, x)
    assert torch.equal(averages[6:], kernels.averages(weights[:, :, 6:], x))
    values = kernels.values(together, averages, bias, None)
    assert torch.equal(values[6:], kernels.values(alone, averages[6:].contiguous(), bias_alone, None))
    assert torch.equal(
        kernels.attention_gradients(x, grad_values, packed)[:, :, 6:],
        kernels.attention_gradients(x, grad_values[6:], packed_alone),
    )


@pytest.mark.parametrize(("groups", "rows", "width"), [(1, 1, 32), (3, 7, 96), (2, 64, 768), (5, 10, 160)])
def test_passes_over_weights(groups, rows, width, threads):
    torch.manual_seed(0)
    weight, vectors, factors = torch.randn(groups, rows, width), torch.randn(groups, width), torch.randn(groups, rows)
    by = narrow(groups, rows, width)
    close = {"rtol": 1e-5, "atol": 1e-4}
    torch.testing.assert_close(
        kernels.row_products(weight, vectors).double(), (weight.double() @ vectors.double()[..., None])[..., 0], **close
    )
    summed, product = kernels.row_sums(weight, factors, by)
    torch.testing.assert_close(summed.double(), (factors.double()[:, None] @ weight.double())[:, 0], **close)
    assert product is not None
    torch.testing.assert_close(product.double(), (by.double() * weight.double()).sum(1), **close)
    assert kernels.row_sums(weight, factors)[1] is None


def factored(k: int, rows: int, width: int) -> list[kernels.FactoredGradient]:
    """Every way to keep one."""
    left, scale, heads = torch.randn(k, rows), torch.rand(k, width), 2
    common, own = torch.randn(k, 1, width), torch.randn(k, heads, width)
    shape = k, rows, width
    return [
        kernels.FactoredGradient(shape, narrow(*shape)),
        kernels.FactoredGradient(shape, narrow(*shape), scale),
        kernels.FactoredGradient(shape, left=left, right=common),
        kernels.FactoredGradient(shape, left=left, right=own),
        kernels.FactoredGradient(shape, narrow(*shape), scale, left, common),
    ]


def dense(gradient: kernels.FactoredGradient) -> torch.Tensor:
    """Written out, in float64."""
    made = torch.zeros(gradient.shape, dtype=torch.float64)
    if gradient.dense is not None:
        made += gradient.dense * (1 if gradient.scale is None else gradient.scale.double()[:, None])
    if gradient.left is not None:
        rows, groups = gradient.shape[1], gradient.right.shape[1]
        made += gradient.left.double()[..., None] * gradient.right.repeat_interleave(rows // groups, 1)
    return made


@pytest.mark.parametrize("which", range(5))
def test_a_factored_gradient_is_followed_and_clipped_like_a_dense_one(which, threads):
    """Five steps of torch's own AdamW in float64, whose gradients are clipped to a norm that some of them exceed."""
    torch.manual_seed(which)
    k, rows, width = 2, 10, 64
    lr, decay = [1e-2, 3e-3], [1e-2, 0.5]
    ours = torch.nn.Parameter(torch.randn(k, rows, width))
    theirs = [torch.nn.Parameter(each.clone().double()) for each in ours.detach()]
    optimizer = AdamW([ours], lr=lr, weight_decay=decay)
    references = [torch.optim.AdamW([p], lr=a, weight_decay=b) for p, a, b in zip(theirs, lr, decay, strict=True)]
    assert kernels.is_registered(ours)
    for step in range(5):
        gradient = factored(k, rows, width)[which]
        exact = dense(gradient)
        torch.testing.assert_close(gradient.norms().double(), exact.flatten(1).norm(dim=1), rtol=1e-6, atol=0)
        if step % 2:
            gradient = gradient.scaled(torch.tensor([0.01, 1.0]))
            exact *= torch.tensor([0.01, 1.0])[:, None, None]
        kernels.put_gradient(ours, gradient)
        optimizer.clip(5.0)
        optimizer.step()
        for p, g, reference in zip(theirs, exact, references, strict=True):
            p.grad = g.clone()
            torch.nn.utils.clip_grad_norm_([p], 5.0)
            reference.step()
    torch.testing.assert_close(ours.detach().double(), torch.stack(theirs).detach(), rtol=1e-5, atol=1e-6)


def test_a_gradient_that_nobody_took_is_not_lost():
    parameter = torch.nn.Parameter(torch.zeros(1, 2, 32))
    AdamW([parameter], lr=[0.1], weight_decay=[0.0])
    gradient = kernels.FactoredGradient((1, 2, 32), narrow(1, 2, 32))
    kernels.put_gradient(parameter, gradient)
    with pytest.raises(RuntimeError, match="step after each"):
        kernels.put_gradient(parameter, gradient)
    assert kernels.pop_gradient(parameter) is gradient
    assert kernels.pop_gradient(parameter) is None


def batch(images: int, shape: HeadShape) -> tuple[torch.Tensor, torch.Tensor]:
    values = np.random.default_rng(0).standard_normal((images, shape.tokens, shape.width), np.float32)
    tokens = Tokens(values.astype(np.float16), np.arange(images) % shape.classes)
    [(x, y), *_] = batches(tokens, np.arange(images), Schedule(images, 1, images, 1), seed=0, device="cpu")
    return x, y


def trained(shape: HeadShape, members: list[Configuration], *, bf16: bool = True) -> dict[str, torch.Tensor]:
    """Weights after some steps, all configurations in one block."""
    (x, y), steps = batch(33, shape), 6
    loss = partial(cross_entropy, weights=torch.ones(shape.classes))
    block = population._Block(Population("attentive", shape, members, seed=0), Numerics(bf16=bf16), loss)
    for step in range(steps):
        block.step(x, y, step, steps)
    return {name: each.detach().clone() for name, each in block.probe.state_dict().items()}


SHAPE = HeadShape(tokens=7, width=96, classes=4, heads=6)
MEMBERS = [Configuration(1e-2, 1e-2, 0.3), Configuration(1e-3, 0.1, 0.0), Configuration(3e-2, 1e-2, 0.0)]


@pytest.mark.parametrize("members", [MEMBERS, MEMBERS[1:]], ids=["with dropout", "without"])
def test_a_probe_trains_as_it_does_by_pytorch_alone(members):
    """What rounding to bfloat16 moves the weights away from those of float32 by is as much with either."""
    ours = trained(SHAPE, members)
    with kernels.off():
        theirs, exact = trained(SHAPE, members), trained(SHAPE, members, bf16=False)
    names = [name for name in exact if not name.startswith("running")]
    mine, other = (sum(float((w[n] - exact[n]).square().sum()) for n in names) ** 0.5 for w in (ours, theirs))
    assert mine <= 1.2 * other


def test_gradients_by_autograd_are_whole_for_whoever_does_not_take_factored_ones():
    """Another optimiser than ours finds what it looks for, next to PyTorch's own."""
    x, y = batch(33, SHAPE)
    found = []
    for how in (nullcontext(), kernels.off()):
        with how:
            probe = Attentive(SHAPE, seeds=[1, 2], dropouts=[0.0, 0.0])
            with torch.autocast("cpu", torch.bfloat16):
                logits = probe(x)
            cross_entropy(logits.float(), y, torch.ones(SHAPE.classes)).sum().backward()
        found.append({name: each.grad for name, each in probe.named_parameters()})
    for name, theirs in found[1].items():
        mine = found[0][name]
        if theirs is None:
            assert mine is None, name
        else:
            assert (mine - theirs).norm() <= 0.02 * theirs.norm(), name


def test_a_user_can_do_without():
    with kernels.off():
        assert kernels.library() is None
        assert kernels.why_unavailable() == "switched off"
        parameter = torch.nn.Parameter(torch.zeros(1, 2, 32))
        AdamW([parameter], lr=[0.1], weight_decay=[0.0])
        assert not kernels.is_registered(parameter)
    assert kernels.library() is not None
    said = subprocess.run(
        [
            sys.executable,
            "-c",
            "from mlfusion.probing.heads import kernels; print(kernels.why_unavailable(), kernels.library())",
        ],
        env=os.environ | {"MLFUSION_KERNELS": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout == "switched off None\n"


def test_the_library_needs_nothing_of_python():
    """It is loaded as plain C, so that a call lets other threads run."""
    names = Path(kernels.importlib.util.find_spec("mlfusion.probing.heads._kernels").origin).read_bytes()
    assert b"PyInit" not in names
    assert isinstance(kernels.library(), ctypes.CDLL)
