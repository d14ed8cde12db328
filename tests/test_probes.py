"""The folded probes against the literal one, their limits, and the independence of configurations from one another."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from literal import LiteralAttentive, LiteralLinear, copy_into
from tiers import examples
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mlfusion.probing.heads import HEADS, Attentive, HeadModule, HeadShape, Linear

F64 = torch.float64
SHAPE = HeadShape(tokens=5, width=13, classes=4, heads=3)  # 13 = 3 · 4 + 1: the head width must be floored
IMAGES = 9
TIGHT = {"rtol": 0, "atol": 1e-10}


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=F64, generator=torch.Generator().manual_seed(seed))


def shaken(probe: Attentive) -> Attentive:
    """The probe in float64 with no parameter or statistic at a value, such as 0 or 1, that would hide a mistake."""
    probe.double()
    with torch.no_grad():
        for i, value in enumerate(probe.state_dict().values()):
            value += 0.3 * random(*value.shape, seed=i)
        probe.running_var.abs_().add_(0.5)
    return probe


def attentive(k: int = 3, shape: HeadShape = SHAPE, dropout: float = 0.0) -> Attentive:
    return shaken(Attentive(shape, seeds=range(k), dropouts=[dropout] * k))


def literal(probe: Attentive, k: int, shape: HeadShape = SHAPE) -> LiteralAttentive:
    """Configuration k as the literal module in the same mode."""
    module = LiteralAttentive(shape.width, shape.heads, shape.classes).double().train(probe.training)
    return copy_into(module, {name: value[k] for name, value in probe.state_dict().items()})


def gradient(parameter: Tensor) -> Tensor:
    """None is zero: BatchNorm takes out what a bias before it adds."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def dropped(*size: int, rate: float = 0.4) -> Tensor:
    return (torch.rand(*size, dtype=F64, generator=torch.Generator().manual_seed(5)) > rate) / (1 - rate)


@pytest.mark.parametrize("shape", [SHAPE, HeadShape(tokens=7, width=8, classes=2, heads=8)], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "dropout"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_folded_equals_literal(shape: HeadShape, masked: bool, training: bool) -> None:
    probe = attentive(shape=shape).train(training)
    tokens = random(IMAGES, shape.tokens, shape.width, seed=99)
    keep = dropped(3, IMAGES, shape.heads, shape.tokens) if masked else None
    modules = [literal(probe, k, shape) for k in range(3)]
    pull = random(3, IMAGES, shape.classes, seed=98)  # an upstream gradient of no special form

    logits = probe(tokens, keep)
    (logits * pull).sum().backward()
    for k, module in enumerate(modules):
        expected = module(tokens, None if keep is None else keep[k])
        torch.testing.assert_close(logits[k], expected, **TIGHT)
        torch.testing.assert_close(probe.attention(tokens)[k], module.attention(tokens), **TIGHT)
        (expected * pull[k]).sum().backward()
        there = module.counterparts()
        for name, parameter in probe.named_parameters():
            expected_gradient = there[name].grad.view_as(parameter[k])
            torch.testing.assert_close(gradient(parameter)[k], expected_gradient, **TIGHT, msg=name)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(probe.state_dict()[name][k], there[name], **TIGHT, msg=name)
        # The one parameter that the folded probe leaves out has no effect in the literal one.
        torch.testing.assert_close(module.key_norm.bias.grad, torch.zeros(shape.width, dtype=F64), **TIGHT)


def test_linear_equals_torch() -> None:
    probe = Linear(SHAPE, seeds=range(3)).double()
    tokens = random(IMAGES, SHAPE.tokens, SHAPE.width)
    for k, logits in enumerate(probe(tokens)):
        module = LiteralLinear(SHAPE.tokens, SHAPE.width, SHAPE.classes).double()
        copy_into(module, {name: value[k] for name, value in probe.state_dict().items()})
        torch.testing.assert_close(logits, module(tokens), **TIGHT)


@pytest.mark.parametrize("head", HEADS)
def test_a_population_is_its_members(head: str) -> None:
    """Initialisation, dropout masks, logits and gradients do not depend on the company."""
    seeds, dropouts = [11, 2**64 - 1, 13, 14, 15, 16, 17], [0.0, 0.3, 0.1, 0.0, 0.9, 0.3, 0.1]
    tokens = random(IMAGES, SHAPE.tokens, SHAPE.width)
    together = HEADS[head](SHAPE, seeds=seeds, dropouts=dropouts).double()
    logits = [together(tokens) for _ in range(2)]  # twice: the streams must keep in step
    logits[1].square().sum().backward()
    for k, (seed, dropout) in enumerate(zip(seeds, dropouts, strict=True)):
        alone = HEADS[head](SHAPE, seeds=[seed], dropouts=[dropout]).double()
        own = [alone(tokens) for _ in range(2)]
        own[1].square().sum().backward()
        for a, b in zip(logits, own, strict=True):
            torch.testing.assert_close(a[k : k + 1], b, rtol=1e-9, atol=1e-9)
        for a, b in zip(together.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(gradient(a)[k : k + 1], gradient(b), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_and_buffer_has_the_population_in_front(head: str) -> None:
    state = HEADS[head](SHAPE, seeds=range(6), dropouts=[0.0] * 6).state_dict()
    assert state and all(len(value) == 6 for value in state.values())


def test_dropout_rates_are_each_configurations_own() -> None:
    probe = Attentive(SHAPE, seeds=range(3), dropouts=[0.0, 0.1, 0.3])
    masks = torch.stack(
        [mask for _ in range(2) if (mask := probe.draw_mask(torch.ones(600, 5, 10))) is not None]
    )  # [2, B, T, K·H]
    keep = masks.unflatten(3, (3, -1)).movedim(3, 1)
    assert (keep[:, 0] == 1).all()  # exactly: a rate of 0 is the identity
    for k, rate in ((1, 0.1), (2, 0.3)):
        values = keep[:, k].unique().tolist()
        assert values == pytest.approx([0, 1 / (1 - rate)], rel=1e-4)  # rates are kept to 1 part in 65,536
        assert (keep[:, k] == 0).double().mean().item() == pytest.approx(rate, abs=0.015)
    assert not torch.equal(keep[0, 1], keep[1, 1])  # a new mask in every step
    agree = ((keep[:, 1] == 0) & (keep[:, 2] == 0)).double().mean().item()
    assert agree == pytest.approx(0.1 * 0.3, abs=0.01)  # independent streams, not one mask for all


def test_what_batch_norm_takes_out_again_gets_no_gradient_from_rounding() -> None:
    """Float32, where AdamW would turn a gradient of 1e-9 into steps of the full learning rate."""
    probe = Attentive(SHAPE, seeds=range(2), dropouts=[0.0, 0.5])
    probe(torch.randn(IMAGES, SHAPE.tokens, SHAPE.width)).square().sum().backward()
    assert not gradient(probe.output_bias).any()
    assert not gradient(probe.value_shift)[0].any()
    assert gradient(probe.value_shift)[1].any()  # dropping moves the sum of the weights from image to image


def test_nothing_is_dropped_in_evaluation() -> None:
    probe, tokens = attentive(dropout=0.5).eval(), random(IMAGES, SHAPE.tokens, SHAPE.width)
    assert torch.equal(probe(tokens), probe(tokens))
    torch.testing.assert_close(probe(tokens)[1], literal(probe, 1)(tokens), **TIGHT)


@settings(max_examples=examples(20), deadline=None)
@given(st.permutations(range(SHAPE.tokens)))
def test_tokens_are_a_set_to_the_attentive_probe(order: list[int]) -> None:
    probe, tokens = attentive().eval(), random(IMAGES, SHAPE.tokens, SHAPE.width)
    torch.testing.assert_close(probe(tokens[:, order]), probe(tokens), **TIGHT)
    torch.testing.assert_close(probe.attention(tokens[:, order]), probe.attention(tokens)[..., order], **TIGHT)


def test_tokens_are_not_a_set_to_the_linear_probe() -> None:
    probe, tokens = Linear(SHAPE, seeds=[0]).double(), random(IMAGES, SHAPE.tokens, SHAPE.width)
    assert not torch.allclose(probe(tokens.flip(1)), probe(tokens))


def test_a_zero_query_attends_evenly() -> None:
    probe, tokens = attentive().eval(), random(IMAGES, SHAPE.tokens, SHAPE.width)
    with torch.no_grad():
        probe.query_scale.zero_()
        probe.query_shift.zero_()
    torch.testing.assert_close(probe.attention(tokens), torch.full((3, IMAGES, 3, 5), 0.2, dtype=F64), **TIGHT)


def test_a_query_that_matches_one_token_attends_to_it() -> None:
    probe = attentive(k=1, shape=HeadShape(tokens=4, width=4, classes=2, heads=1)).eval()
    tokens = torch.eye(4, dtype=F64)[None]
    with torch.no_grad():
        probe.key_scale.fill_(1)
        probe.query_scale.zero_()
        probe.query_shift.copy_(torch.tensor([[0, 0, 50.0, 0]]))
        for weight in (probe.to_query, probe.to_key):
            weight.zero_()[0, 0, :4] = torch.eye(4)
    assert probe.attention(tokens)[0, 0, 0].tolist() == pytest.approx([0, 0, 1, 0], abs=1e-9)


def test_attention_sums_to_one_and_has_the_axes_promised() -> None:
    weights = attentive(k=2).attention(random(IMAGES, SHAPE.tokens, SHAPE.width))
    assert weights.shape == (2, IMAGES, SHAPE.heads, SHAPE.tokens)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, IMAGES, SHAPE.heads, dtype=F64))


def test_initialisation_is_that_of_torch_and_the_study() -> None:
    shape = HeadShape(tokens=24, width=96, classes=10, heads=24)
    probe = Attentive(shape, seeds=range(20), dropouts=[0.0] * 20)
    assert probe.query.std().item() == pytest.approx(0.02, rel=0.05)
    assert probe.to_key.shape == (20, 24, 8, 96)  # e = 2 · ⌊96 / 24⌋
    for weight, fan_in in ((probe.to_query, 96), (probe.to_value, 96), (probe.to_output, 192), (probe.classifier, 96)):
        reference = torch.nn.Linear(fan_in, 4000).weight
        assert weight.std().item() == pytest.approx(reference.std().item(), rel=0.02)
        assert weight.abs().max().item() == pytest.approx(1 / math.sqrt(fan_in), rel=0.01)
    linear = Linear(shape, seeds=range(20))
    assert linear.weight.abs().max().item() == pytest.approx(1 / math.sqrt(24 * 96), rel=0.01)
    assert linear.bias.std().item() == pytest.approx(1 / math.sqrt(3 * 24 * 96), rel=0.1)


class Largest(TorchDispatchMode):
    """Keeps the size of the largest tensor that any operation returned."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def test_nothing_as_wide_as_the_heads_is_computed_per_token() -> None:
    shape = HeadShape(tokens=60, width=32, classes=3, heads=4)
    tokens = torch.randn(8, 60, 32)
    per_token = 8 * 60 * (2 * 32)  # B · T · H · e
    with Largest() as folded:
        Attentive(shape, seeds=[0], dropouts=[0.1])(tokens).sum().backward()
    with Largest() as projected:
        LiteralAttentive(32, 4, 3)(tokens).sum().backward()
    assert folded.elements <= per_token // 2 < per_token <= projected.elements


def test_the_registry_keeps_the_contract() -> None:
    for probe in HEADS.values():
        built: HeadModule = probe(SHAPE, seeds=[0], dropouts=[0.0])
        assert built(torch.randn(4, SHAPE.tokens, SHAPE.width)).shape == (1, 4, SHAPE.classes)
        if probe.has_attention:
            assert built.attention(torch.randn(4, SHAPE.tokens, SHAPE.width)).ndim == 4
        else:
            with pytest.raises(TypeError, match="no attention"):
                built.attention(torch.randn(4, SHAPE.tokens, SHAPE.width))
