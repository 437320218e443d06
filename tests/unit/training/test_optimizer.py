"""The optimizers against their formulas, element by element on flat tensors, which is what ZeRO gives them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from llmscale.config.schema import Optimizer
from llmscale.errors import UsageError
from llmscale.training.optimizer import STATES, build_optimizer, moments

Moments = dict[str, torch.Tensor]
LR, B1, B2, EPS, DECAY, STEPS = 0.01, 0.9, 0.95, 1e-8, 0.1, 5
SIZE = 37
CPU = torch.device("cpu")


def gradients() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(SIZE, generator=generator, dtype=torch.float64) for _ in range(STEPS)]


def start() -> torch.Tensor:
    return torch.linspace(-1, 1, SIZE, dtype=torch.float64)


def adam(weight: torch.Tensor, gradient: torch.Tensor, state: Moments, step: int) -> torch.Tensor:
    m = state["m"] = B1 * state.get("m", torch.zeros(SIZE)) + (1 - B1) * gradient
    v = state["v"] = B2 * state.get("v", torch.zeros(SIZE)) + (1 - B2) * gradient**2
    return weight - LR * (m / (1 - B1**step)) / ((v / (1 - B2**step)).sqrt() + EPS)


def plain_adam(weight: torch.Tensor, gradient: torch.Tensor, state: Moments, step: int, decay: float) -> torch.Tensor:
    return adam(weight, gradient + decay * weight, state, step)


def adamw(weight: torch.Tensor, gradient: torch.Tensor, state: Moments, step: int, decay: float) -> torch.Tensor:
    return adam(weight * (1 - LR * decay), gradient, state, step)


def sgd(weight: torch.Tensor, gradient: torch.Tensor, state: Moments, step: int, decay: float) -> torch.Tensor:
    gradient = gradient + decay * weight
    state["m"] = gradient if step == 1 else B1 * state["m"] + gradient
    return weight - LR * state["m"]


def lion(weight: torch.Tensor, gradient: torch.Tensor, state: Moments, step: int, decay: float) -> torch.Tensor:
    m = state.get("m", torch.zeros(SIZE))
    state["m"] = B2 * m + (1 - B2) * gradient
    return weight * (1 - LR * decay) - LR * (B1 * m + (1 - B1) * gradient).sign()


FORMULAS: dict[str, Callable[..., torch.Tensor]] = {"adamw": adamw, "adam": plain_adam, "sgd": sgd, "lion": lion}


NAMES = [pytest.param(name, marks=pytest.mark.slow) if name == "lion" else name for name in FORMULAS]
"""Lion's kernel is compiled where it is first used, in a minute or two."""


def expected(name: str, decay: float) -> torch.Tensor:
    weight, state = start(), Moments()
    for step, gradient in enumerate(gradients(), 1):
        weight = FORMULAS[name](weight, gradient, state, step, decay)
    return weight


def config(name: str) -> Optimizer:
    return Optimizer.model_validate({"name": name, "lr": LR, "betas": (B1, B2), "eps": EPS, "weight_decay": DECAY})


def build(name: str) -> torch.optim.Optimizer:
    """One group that decays and one that does not, with a key of the engine's."""
    groups = [
        {"params": [torch.nn.Parameter(start().float())], "weight_decay": decay, "kind": kind}
        for decay, kind in ((DECAY, "decayed"), (0.0, "plain"))
    ]
    try:
        return build_optimizer(config(name), groups, CPU, offloaded=False)
    except UsageError as error:
        # Lion's kernel is built where it is first used: a machine without a compiler must say what to do.
        assert name == "lion"
        assert "install ninja and g++, or use adamw" in str(error)
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_the_steps_follow_the_formula_and_the_groups_own_decay(name: str) -> None:
    optimizer = build(name)
    for gradient in gradients():
        for group in optimizer.param_groups:
            group["params"][0].grad = gradient.float()
        optimizer.step()
    for group, decay in zip(optimizer.param_groups, (DECAY, 0.0), strict=True):
        torch.testing.assert_close(group["params"][0].detach().double(), expected(name, decay), rtol=3e-6, atol=3e-7)


@pytest.mark.parametrize("name", NAMES)
def test_keys_of_a_group_survive_and_the_states_are_the_ones_that_checkpoints_hold(name: str) -> None:
    optimizer = build(name)
    assert [group["kind"] for group in optimizer.param_groups] == ["decayed", "plain"]
    weight = optimizer.param_groups[0]["params"][0]
    weight.grad = torch.ones(SIZE)
    optimizer.step()
    kept = {key for key, value in optimizer.state[weight].items() if torch.is_tensor(value) and value.numel() == SIZE}
    assert kept == set(STATES[name])
    assert moments(config(name)) == len(kept)


def test_every_optimizer_of_the_schema_is_built_and_counted() -> None:
    names = Optimizer.model_json_schema()["properties"]["name"]["enum"]
    assert set(names) == set(STATES) == set(FORMULAS)


def test_a_kernel_that_cannot_be_built_is_an_error_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.ops.op_builder import CPULionBuilder

    def fail(*arguments: object, **settings: object) -> None:
        raise RuntimeError("Ninja is required to load C++ extensions\nand more")

    monkeypatch.setattr(CPULionBuilder, "load", fail)
    group = {"params": [torch.nn.Parameter(torch.zeros(4))], "weight_decay": 0.0}
    with pytest.raises(UsageError) as error:
        build_optimizer(config("lion"), [group], CPU, offloaded=False)
    assert str(error.value) == (
        "optimizer.name: lion is DeepSpeed's DeepSpeedCPULion, which could not be built here "
        "(Ninja is required to load C++ extensions); install ninja and g++, or use adamw"
    )
