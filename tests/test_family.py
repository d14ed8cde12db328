"""The contract that every probe keeps, and each probe of the family against a plain one that projects token by token."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from mlfusion.probing.heads import HEADS, HeadModule, HeadShape
from mlfusion.specs.names import HEAD_NAMES

F64 = torch.float64
SHAPE = HeadShape(tokens=5, width=13, classes=4, heads=3)
WIDE = HeadShape(tokens=4, width=130, classes=3, heads=2)  # two heads of 65 where heads are 64 wide
SET = sorted(HEADS.keys() - {"linear", "scalar-mix"})  # to these an image's tokens have no order
LITERAL = sorted(HEADS.keys() - {"linear", "attentive"})  # those two have tests of their own

State = dict[str, Tensor]


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, dtype=F64, generator=torch.Generator().manual_seed(seed))


def unit(images: int, shape: HeadShape, seed: int = 99) -> Tensor:
    return F.normalize(random(images, shape.tokens, shape.width, seed=seed), dim=-1)


def shaken(head: str, shape: HeadShape = SHAPE, k: int = 3) -> HeadModule:
    """In float64, with no parameter or statistic at a value, such as 0 or 1, that would hide a mistake."""
    probe = HEADS[head](shape, seeds=range(k), dropouts=[0.0] * k).double()
    with torch.no_grad():
        for i, (name, value) in enumerate(probe.state_dict().items()):
            value += 0.3 * random(*value.shape, seed=i)
            if name == "running_var":
                value.abs_().add_(0.5)
    return probe


# --- plain implementations -------------------------------------------------------------------------------------------
# Of one configuration, `p` its numbers by name: (logits [B, C], attention [B, H, T]).


def norm(x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], scale, shift)


def heads(x: Tensor, count: int) -> Tensor:
    """[B, T, D] → [B, H, T, e]."""
    return x.view(*x.shape[:2], count, -1).transpose(1, 2)


def attend(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """[B, H, Q, e] and twice [B, H, T, e] → what is gathered [B, Q, H·e], and the weights [B, H, Q, T]."""
    weights = (query @ key.mT / query.shape[-1] ** 0.5).softmax(-1)
    return (weights @ value).transpose(1, 2).flatten(2), weights


def classify(p: State, x: Tensor) -> Tensor:
    return F.linear(x, p["classifier"], p["classifier_bias"])


def scalar_mix(p: State, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    weights = p["scores"].exp() / p["scores"].exp().sum()
    mixed = p["scale"] * sum(weight * x[:, t] for t, weight in enumerate(weights))
    return classify(p, mixed), weights.expand(len(x), 1, -1)


def efficient(p: State, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    x = norm(x)
    queries = p["queries"]
    weights = (x @ queries.T / queries.shape[-1] ** 0.5).softmax(1).mT  # [B, M, T]
    values = [x @ p["to_value"][m].T for m in range(len(queries))]  # of every token [B, T, e]
    pooled = torch.cat([torch.einsum("bt,bte->be", weights[:, m], values[m]) for m in range(len(queries))], dim=1)
    normed = F.batch_norm(pooled, p["running_mean"], p["running_var"], training=training)
    return classify(p, normed), weights


def abmil(p: State, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    x = norm(x)
    hidden = F.linear(x, p["hidden"], p["hidden_bias"]).tanh() * F.linear(x, p["gate"], p["gate_bias"]).sigmoid()
    weights = (hidden @ p["score"]).softmax(1)
    return classify(p, (weights[..., None] * x).sum(1)), weights[:, None]


def simpool(p: State, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    x = norm(x)
    query, key = F.linear(x.mean(1, keepdim=True), p["to_query"]), F.linear(x, p["to_key"])
    weights = (query @ key.mT / x.shape[-1] ** 0.5).softmax(-1)
    smallest = x.flatten(1).min(1).values[:, None, None]
    pooled = (weights @ (x - smallest + 1e-6).pow(1.25)).pow(1 / 1.25)
    return classify(p, pooled[:, 0]), weights


def aim(p: State, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    images, _, width = x.shape
    count = len(p["query"])
    mean, var = p["running_mean"], p["running_var"]
    normed = F.batch_norm(x.transpose(1, 2), mean, var, training=training, eps=1e-6).transpose(1, 2)
    key, value = (heads(normed @ p[name].reshape(width, width).T, count) for name in ("to_key", "to_value"))
    gathered, weights = attend(p["query"][None, :, None].expand(images, -1, -1, -1), key, value)
    return classify(p, gathered[:, 0]), weights[:, :, 0]


def mlp(p: State, x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(norm(x, p["norm_scale"], p["norm_shift"]), p["widen"], p["widen_bias"]))
    return F.linear(hidden, p["narrow"], p["narrow_bias"])


def inside(p: State, prefix: str) -> State:
    return {name.removeprefix(prefix): value for name, value in p.items() if name.startswith(prefix)}


def vjepa(p: State, x: Tensor, training: bool) -> tuple[Tensor, Tensor]:
    images, _, width = x.shape
    count = len(p["to_key"])
    for rank in range(3 if "blocks.0.to_all" in p else 0):
        q = inside(p, f"blocks.{rank}.")
        both = F.linear(norm(x, q["norm_scale"], q["norm_shift"]), q["to_all"], q["all_bias"])
        mixed, _ = attend(*(heads(part, count) for part in both.split(width, dim=-1)))
        x = x + F.linear(mixed, q["to_output"], q["output_bias"])
        x = x + mlp(inside(q, "mlp."), x)
    normed = norm(x, p["norm_scale"], p["norm_shift"])
    flat = {name: p[name].reshape(width, width) for name in ("to_query", "to_key", "to_value")}
    query = F.linear(p["query"], flat["to_query"], p["query_bias"].flatten()).expand(images, 1, -1)
    key, value = F.linear(normed, flat["to_key"]), F.linear(normed, flat["to_value"], p["value_bias"])
    gathered, weights = attend(heads(query, count), heads(key, count), heads(value, count))
    pooled = p["query"] + F.linear(gathered[:, 0], p["to_output"], p["output_bias"])
    return classify(p, pooled + mlp(inside(p, "mlp."), pooled)), weights[:, :, 0]


PLAIN: dict[str, Callable[[State, Tensor, bool], tuple[Tensor, Tensor]]] = {
    "scalar-mix": scalar_mix,
    "efficient": efficient,
    "abmil": abmil,
    "simpool": simpool,
    "aim": aim,
    "v-jepa": vjepa,
    "v-jepa-4": vjepa,
}


@pytest.mark.parametrize("head", LITERAL)
@pytest.mark.parametrize("shape", [SHAPE, WIDE], ids=["narrow", "wide"])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_it_is_the_plain_function(head: str, shape: HeadShape, training: bool) -> None:
    """Logits, attention, gradients of all parameters and running statistics, each configuration by itself."""
    probe, tokens = shaken(head, shape).train(training), unit(9, shape)
    parameters = dict(probe.named_parameters())
    states = [{name: value[k].detach().clone() for name, value in probe.state_dict().items()} for k in range(3)]
    pull = random(3, 9, shape.classes, seed=98)  # an upstream gradient of no special form

    logits = probe(tokens)
    (logits * pull).sum().backward()
    for k, state in enumerate(states):
        for name in parameters:
            state[name].requires_grad_()
        expected, weights = PLAIN[head](state, tokens, training)
        torch.testing.assert_close(logits[k], expected, rtol=1e-9, atol=1e-10)
        (expected * pull[k]).sum().backward()
        for name, parameter in parameters.items():
            assert parameter.grad is not None and state[name].grad is not None
            torch.testing.assert_close(parameter.grad[k], state[name].grad, rtol=1e-8, atol=1e-10, msg=name)
        for name, value in probe.state_dict().items():
            torch.testing.assert_close(value[k], state[name].detach(), rtol=1e-9, atol=1e-10, msg=name)
        if not training:
            torch.testing.assert_close(probe.attention(tokens)[k], weights, rtol=1e-9, atol=1e-10)


# --- the contract ----------------------------------------------------------------------------------------------------


def test_every_head_that_is_trained_has_a_probe_and_every_probe_is_a_head() -> None:
    assert set(HEADS) <= set(HEAD_NAMES)
    assert PLAIN.keys() | {"linear", "attentive"} == HEADS.keys()


@pytest.mark.parametrize("head", HEADS)
def test_gradients_are_those_of_finite_differences(head: str) -> None:
    shape = HeadShape(tokens=3, width=6, classes=2, heads=2)
    probe, tokens = shaken(head, shape, k=2).eval(), unit(3, shape)
    names, values = zip(*((n, p.detach().clone().requires_grad_()) for n, p in probe.named_parameters()), strict=True)

    def function(*parameters: Tensor) -> Tensor:
        return functional_call(probe, dict(zip(names, parameters, strict=True)), (tokens,))

    assert torch.autograd.gradcheck(function, values, fast_mode=True)


@pytest.mark.parametrize("head", SET)
def test_the_order_of_tokens_does_not_matter_where_that_is_promised(head: str) -> None:
    probe, tokens = shaken(head).eval(), unit(6, SHAPE)
    order = torch.tensor([3, 0, 4, 2, 1])
    torch.testing.assert_close(probe(tokens[:, order]), probe(tokens), rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(probe.attention(tokens[:, order]), probe.attention(tokens)[..., order])


@pytest.mark.parametrize("head", sorted(HEADS.keys() - set(SET)))
def test_the_order_of_tokens_matters_elsewhere(head: str) -> None:
    probe, tokens = shaken(head).eval(), unit(6, SHAPE)
    assert not torch.allclose(probe(tokens.flip(1)), probe(tokens), atol=1e-3)


@pytest.mark.parametrize("head", HEADS)
def test_an_image_is_scored_by_itself(head: str) -> None:
    probe, tokens = shaken(head).eval(), unit(6, SHAPE)
    torch.testing.assert_close(probe(tokens[2:3]), probe(tokens)[:, 2:3], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("head", [head for head, probe in HEADS.items() if probe.has_attention])
def test_attention_sums_to_one(head: str) -> None:
    weights = shaken(head).eval().attention(unit(6, SHAPE))
    assert weights.shape[:2] == (3, 6) and weights.shape[3] == SHAPE.tokens
    torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:3], dtype=F64))


@pytest.mark.parametrize("width", [1, 13, 64, 192, 384, 768, 1000, 1024])
def test_heads_part_the_width(width: int) -> None:
    from mlfusion.probing.heads.pooling import head_count

    count = head_count(width)
    assert width % count == 0 and (count == 1 or width // count >= 64)
    assert count == width // 64 or width % 64
