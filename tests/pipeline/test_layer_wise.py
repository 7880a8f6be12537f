"""LARS and LAMB under the engine, against their papers' updates by hand; what does not decay has no rate of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from pipeline import cli, config, deepspeed_keys
from pipeline.engine import Engine, World, deepspeed_config
from pipeline.plan import Plan
from shards.errors import UserError
from tests.conftest import fork_ranks
from tests.updates import N_MICRO, K, make_plan, micro_batch, network, physical_batches

UPDATES = 4
LARS = {"lr": 2.0, "momentum": 0.9, "nesterov": True, "weight_decay": 1e-2, "trust_coeff": 0.02}
LAMB = {"lr": 0.02, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.05}
BLOCKS = {"Lars": LARS, "Lamb": LAMB}


def changes_of(kind: str, **params: Any) -> dict[str, Any]:
    return {"optimizer": {"type": kind, "params": {**BLOCKS[kind], **params}}}


def train_rank(world: World, path: Path, changes: dict[str, Any], broken: bool = False) -> dict[str, torch.Tensor]:
    """Parameters after some updates; where they are broken off, by two engines, the second with the first's state."""
    folder = path / f"{world.size}-{world.rank}"
    folder.mkdir(parents=True)
    resolved = make_plan(folder / "c.json", world.size, **changes)
    engine = Engine(network(batch_norm=True), resolved, world)
    for update in range(UPDATES):
        if broken and update == 2:
            state, weights = engine.state(), engine.model.state_dict()
            model = network(batch_norm=True)
            model.load_state_dict(weights)
            torch.save(state, folder / "state.pt")  # as a checkpoint does, whose loading allows tensors alone
            engine = Engine(model, resolved, world)
            engine.restore(torch.load(folder / "state.pt", weights_only=True), samples=update * 32, step=update)
        engine.update(iter(physical_batches(update, world.rank, resolved.batch)), update * 32)
    return {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}


Update = Callable[[str, torch.Tensor, torch.Tensor, float, int], torch.Tensor]


def lars() -> Update:
    """You et al. 2017: λ = η·‖w‖ / (‖g‖ + β·‖w‖), and momentum of λ·(g + β·w)."""
    momenta: dict[str, torch.Tensor] = {}

    def step(name: str, w: torch.Tensor, g: torch.Tensor, lr: float, t: int) -> torch.Tensor:
        if w.ndim > 1:
            decay, norm = LARS["weight_decay"], w.norm()
            g = (g + decay * w) * LARS["trust_coeff"] * norm / (g.norm() + decay * norm)
        momenta[name] = g if t == 1 else 0.9 * momenta[name] + g
        return w - lr * (g + 0.9 * momenta[name])

    return step


def lamb() -> Update:
    """You et al. 2020, algorithm 2: r = m̂ / (√v̂ + ε); w ← w − η·‖w‖ / ‖r + λ·w‖ · (r + λ·w)."""
    moments: dict[str, tuple[Any, Any]] = {}
    first, second = LAMB["betas"]

    def step(name: str, w: torch.Tensor, g: torch.Tensor, lr: float, t: int) -> torch.Tensor:
        m, v = moments.get(name, (0.0, 0.0))
        m, v = first * m + (1 - first) * g, second * v + (1 - second) * g**2
        moments[name] = m, v
        r = m / (1 - first**t) / ((v / (1 - second**t)).sqrt() + LAMB["eps"])
        if w.ndim > 1:
            r = r + LAMB["weight_decay"] * w
            r = r * w.norm() / r.norm()
        return w - lr * r

    return step


def by_hand(resolved: Plan, step: Update) -> dict[str, torch.Tensor]:
    """In float64: the mean gradient over kn, and a rule's update of each parameter by itself."""
    model = network(batch_norm=True).double()
    transform = resolved.config.recipe.transform
    mean = torch.tensor(transform.mean).view(1, 3, 1, 1).double() * 255
    std = torch.tensor(transform.std).view(1, 3, 1, 1).double() * 255
    parameters = dict(model.named_parameters())
    for update in range(UPDATES):
        gradients = [torch.zeros_like(parameter) for parameter in parameters.values()]
        for worker in range(K):
            batch = micro_batch(update, worker)
            loss = F.cross_entropy(model((batch.images.double() - mean) / std), batch.labels, reduction="sum")
            for total, g in zip(gradients, torch.autograd.grad(loss, list(parameters.values())), strict=True):
                total += g / (K * N_MICRO)
        lr = resolved.schedule.lr(update * resolved.batch.train)
        with torch.no_grad():
            for (name, parameter), g in zip(parameters.items(), gradients, strict=True):
                parameter.copy_(step(name, parameter.clone(), g, lr, update + 1))
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize(("kind", "rule"), [("Lars", lars), ("Lamb", lamb)])
def test_the_updates_are_the_papers_on_any_number_of_ranks(tmp_path, kind, rule, world_size):
    answers = fork_ranks(train_rank, world_size, tmp_path, changes_of(kind))
    expected = by_hand(make_plan(tmp_path / "reference.json", world_size, **changes_of(kind)), rule())
    start = dict(network(batch_norm=True).named_parameters())
    for answer in answers:
        for name, tensor in expected.items():
            torch.testing.assert_close(answer[name].double(), tensor, rtol=1e-3, atol=1e-4, msg=name)
            assert not torch.allclose(answer[name], start[name], rtol=1e-3, atol=1e-3), f"{name}: hardly moved"


@pytest.mark.parametrize("kind", ["Lars", "Lamb"])
def test_a_resumed_run_is_the_unbroken_one(tmp_path, kind):
    """LAMB counts updates beside its tensors: begun anew, the third update would be corrected as a first one."""
    [unbroken] = fork_ranks(train_rank, 1, tmp_path / "unbroken", changes_of(kind))
    [broken] = fork_ranks(train_rank, 1, tmp_path / "broken", changes_of(kind), True)
    assert all(torch.equal(tensor, broken[name]) for name, tensor in unbroken.items())


@pytest.mark.parametrize("clipping", [0.0, 1e-3])
def test_timms_own_clipping_is_off_and_deepspeeds_is_on(tmp_path, clipping):
    """Adam's direction does not depend on the gradient's scale, but its ε then does."""
    changes = {**changes_of("Lamb", eps=1.0), "gradient_clipping": clipping}
    [answer] = fork_ranks(train_rank, 1, tmp_path, changes)
    resolved = make_plan(tmp_path / "reference.json", 1, **changes)
    previous = LAMB["eps"]
    LAMB["eps"] = 1.0
    try:
        expected = by_hand(resolved, lamb())
    finally:
        LAMB["eps"] = previous
    same = all(torch.allclose(answer[name].double(), w, rtol=1e-3, atol=1e-5) for name, w in expected.items())
    assert same == (clipping == 0)


def test_deepspeed_is_not_told_of_an_optimizer_that_it_does_not_make(tmp_path):
    assert "optimizer" not in deepspeed_config(make_plan(tmp_path / "c.json", 1, **changes_of("Lars")), "cpu")
    assert "optimizer" in deepspeed_config(make_plan(tmp_path / "c.json", 1), "cpu")


@pytest.mark.parametrize("kind", ["Lars", "Lamb"])
def test_the_parameters_that_are_allowed_are_timms(kind):
    import timm.optim

    known = set(deepspeed_keys.OPTIMIZER_PARAMS[kind].split())
    assert known <= set(inspect.signature(getattr(timm.optim, kind)).parameters)
    assert "max_grad_norm" not in known


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (changes_of("Lamb", max_grad_norm=1.0), 'unknown key "max_grad_norm"'),
        (changes_of("Lars", weight_decay=0), "weight_decay must be given with Lars"),
        (changes_of("Lars", trust_coeff="x"), "optimizer.params.trust_coeff must be a number"),
        (changes_of("Lars", momentum=0), "nesterov needs a positive momentum"),
        (changes_of("Lamb", trust_clip=1), "trust_clip must be true or false"),
        ({"optimizer.type": "LARS"}, 'did you mean "Lars"?'),
    ],
)
def test_what_timm_would_refuse_or_ignore_is_refused(write_config, changes, said):
    with pytest.raises(UserError) as error:
        config.load(write_config("refused", changes))
    assert said in str(error.value)


def test_rates_of_all_parameters_may_be_asked_for(write_config):
    changes = changes_of("Lars", weight_decay=0, always_adapt=True)
    assert config.load(write_config("all", changes)).layer_wise


def test_the_plan_says_what_has_no_rate_of_its_own(write_config, capsys):
    path = str(write_config("lars", changes_of("Lars")))
    assert cli.main(["plan", path, "--ranks", "1", "--build-model"]) == 0
    out = capsys.readouterr().out
    assert "LARS: of each weight by its norm and its update's" in out
    assert "0.01 on 14 weights; none on 27 biases and normalisation γ, β" in out
    assert cli.main(["plan", path, "--ranks", "1"]) == 0
    assert "0.01 on every weight, and no bias" in capsys.readouterr().out
