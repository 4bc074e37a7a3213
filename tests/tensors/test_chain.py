"""Contracting while training: right gradients, at the cost of the FLOPs, and never a stale weight."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from kdcli.tensors.chain import ChainCache, contract_cached, from_right
from kdcli.tensors.factors import MPOShape
from kdcli.tensors.mpo import contract, decompose
from kdcli.tensors.parametrization import MPOWeight, tensors_of

WIDE = MPOShape((6, 1, 1, 2), (4, 1, 1, 2))  # starts from the right: the small end
TALL = MPOShape((2, 1, 1, 6), (2, 1, 1, 4))  # starts from the left
SHAPES = [WIDE, TALL, MPOShape((4, 3), (3, 2)), MPOShape((2, 3, 2), (2, 2, 3)), MPOShape((2, 2, 1, 3), (3, 1, 2, 2))]


def make(shape: MPOShape, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for size in shape.shapes()
    ]


def layer(shape: MPOShape = WIDE) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(shape.matrix[1], shape.matrix[0])
    nn.utils.parametrize.register_parametrization(linear, "weight", MPOWeight(shape), unsafe=True)
    return linear


def fresh(linear: nn.Linear) -> Tensor:
    return contract([t.detach() for t in tensors_of(linear)])


def assert_fresh(linear: nn.Linear) -> None:
    torch.testing.assert_close(linear.weight.detach(), fresh(linear), atol=1e-6, rtol=1e-5)


def test_the_shapes_here_start_from_either_end():
    assert from_right(WIDE) and not from_right(TALL)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_numerical_differences(shape: MPOShape):
    chain = make(shape, torch.float64)
    assert torch.autograd.gradcheck(lambda *c: contract_cached(c, shape, ChainCache()), chain, fast_mode=True)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_are_those_of_plain_autograd(shape: MPOShape):
    ours, plain = make(shape), make(shape)
    direction = torch.randn(shape.matrix)
    (contract_cached(tuple(ours), shape, ChainCache()) * direction).sum().backward()
    (contract(plain) * direction).sum().backward()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_a_frozen_tensor_gets_no_gradient():
    chain = make(WIDE)
    chain[1].requires_grad_(False)
    contract_cached(tuple(chain), WIDE, ChainCache()).sum().backward()
    assert chain[1].grad is None and chain[0].grad is not None and chain[3].grad is not None


@pytest.mark.parametrize("length", [0, 1, 3, 5])
def test_the_cost_is_what_the_formula_says(length: int):
    # 2 (L r^3 + P r^2) forward for P >= Q = r, and twice as much backward: each product has two in its gradient.
    shape = MPOShape((6, *(1,) * length, 4), (5, *(1,) * length, 3))
    large, rank = 30, 12
    forward = 2 * (length * rank**3 + large * rank**2)
    chain = tuple(make(shape))
    with FlopCounterMode(display=False) as counter:
        weight = contract_cached(chain, shape, ChainCache())
    assert counter.get_total_flops() == forward
    with FlopCounterMode(display=False) as counter:
        weight.sum().backward()
    assert counter.get_total_flops() == 2 * forward


def flops(shape: MPOShape) -> int:
    chain = tuple(make(shape))
    with FlopCounterMode(display=False) as counter:
        contract_cached(chain, shape, ChainCache())
    return counter.get_total_flops()


def test_the_cheaper_end_is_chosen():
    assert flops(WIDE) == flops(MPOShape(WIDE.out_factors[::-1], WIDE.in_factors[::-1]))


def flops_of_reading(linear: nn.Linear) -> int:
    with FlopCounterMode(display=False) as counter:
        _ = linear.weight
    return counter.get_total_flops()


def test_reading_again_costs_nothing_until_a_step():
    linear = layer()
    optimizer = torch.optim.AdamW(linear.parameters(), fused=True)
    assert flops_of_reading(linear) == flops(WIDE)
    for _ in range(3):
        linear(torch.randn(2, 8)).sum().backward()
        assert flops_of_reading(linear) == 0
    optimizer.step()
    assert flops_of_reading(linear) == flops(WIDE)


@pytest.mark.parametrize("settings", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=lambda s: str(s))
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.SGD])
def test_every_kind_of_optimizer_step_is_seen(kind: type[torch.optim.Optimizer], settings: dict[str, bool]):
    linear = layer()
    optimizer = kind(linear.parameters(), lr=0.1, **settings)  # type: ignore[call-arg]
    for _ in range(3):
        before = linear.weight.detach().clone()
        linear(torch.randn(4, 8)).square().sum().backward()
        optimizer.step()
        assert not torch.equal(linear.weight, before)
        assert_fresh(linear)


def test_an_optimizer_that_writes_through_data_is_seen():
    class Old(torch.optim.Optimizer):
        def step(self, closure=None):  # type: ignore[no-untyped-def, override]
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad, alpha=-0.1)

    linear = layer()
    linear(torch.randn(4, 8)).square().sum().backward()
    Old(linear.parameters(), {}).step()
    assert_fresh(linear)


def test_a_broadcast_or_a_loaded_state_is_seen():
    linear, other = layer(), layer()
    with torch.no_grad():
        for tensor in tensors_of(other):
            tensor.mul_(1.1)
    for parameter, source in zip(linear.parameters(), other.parameters(), strict=True):
        _ = linear.weight
        parameter.detach().copy_(source.detach())  # as DistributedDataParallel does
        assert_fresh(linear)
    linear = layer()
    _ = linear.weight
    linear.load_state_dict(other.state_dict())
    assert torch.equal(linear.weight, other.weight)


def test_replaced_storage_is_seen_even_at_the_old_place():
    linear = layer()
    first = tensors_of(linear)[0]
    for _ in range(20):
        _ = linear.weight
        # The allocator likes to hand the place just freed out again.
        first.data = torch.randn(first.shape)
        assert_fresh(linear)


def test_changes_of_type_are_seen():
    linear = layer()
    _ = linear.weight
    assert linear.double().weight.dtype == torch.float64
    assert_fresh(linear)


def test_clear_forgets():
    linear = layer()
    _ = linear.weight
    for tensor in tensors_of(linear):
        tensor.data.mul_(1.5)
    chain = linear.parametrizations["weight"][0]  # type: ignore[index, union-attr]
    chain.cache.clear()
    assert_fresh(linear)


def test_writing_into_the_weight_changes_nothing():
    linear = layer()
    before = linear.weight.detach().clone()
    with torch.no_grad():
        linear.weight.zero_()
    assert torch.equal(linear.weight, before)


@pytest.mark.parametrize("first", ["no_grad", "inference_mode", "eval"])
def test_training_after_a_look_without_gradient(first: str):
    ours, plain = layer(), layer()
    x = torch.randn(4, 8)
    if first == "no_grad":
        with torch.no_grad():
            assert not ours(x).requires_grad
    elif first == "inference_mode":
        with torch.inference_mode():
            ours(x)
    else:
        ours.eval()
        ours(x)
        ours.train()
    ours(x).square().sum().backward()
    torch.nn.functional.linear(x, contract(tensors_of(plain)), plain.bias).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    with torch.inference_mode():
        torch.testing.assert_close(ours(x), torch.nn.functional.linear(x, fresh(ours), ours.bias))


def test_gradients_over_several_micro_batches_add_up():
    ours, plain = layer(), layer()
    batches = [torch.randn(4, 8) for _ in range(4)]
    for x in batches:
        ours(x).square().sum().backward()
        with torch.no_grad():
            ours(x)
    for x in batches:
        torch.nn.functional.linear(x, contract(tensors_of(plain)), plain.bias).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-4)


def test_backward_of_several_forward_passes_at_once():
    ours, plain = layer(), layer()
    batches = [torch.randn(4, 8) for _ in range(3)]
    torch.stack([ours(x).square().sum() for x in batches]).sum().backward()
    for x in batches:
        torch.nn.functional.linear(x, contract(tensors_of(plain)), plain.bias).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-3, rtol=1e-4)


def test_the_same_weights_after_training_as_without_a_cache():
    ours, plain = layer(), layer()
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01, fused=True) for m in (ours, plain)]
    for step in range(5):
        for micro in range(2):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + micro))
            ours(x).square().sum().backward()
            torch.nn.functional.linear(x, contract(tensors_of(plain)), plain.bias).square().sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(ours.weight, contract(tensors_of(plain)), atol=1e-4, rtol=1e-4)


def test_second_order_through_the_inputs():
    # Attribution methods differentiate a gradient with respect to the inputs.
    ours, plain = layer(), layer()
    for linear, weight in ((ours, ours.weight), (plain, contract(tensors_of(plain)))):
        x = torch.ones(2, 8, requires_grad=True)
        out = torch.nn.functional.linear(x, weight, linear.bias).tanh().sum()
        (grad,) = torch.autograd.grad(out, x, create_graph=True)
        grad.square().sum().backward()
    for a, b in zip(tensors_of(ours), tensors_of(plain), strict=True):
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_bf16_autocast_leaves_the_chain_in_fp32():
    ours, plain = layer(), layer()
    x = torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weight = ours.weight
        assert weight.dtype == torch.float32
        out = ours(x)
        assert out.dtype == torch.bfloat16
        loss = out.float().square().sum()
    torch.testing.assert_close(weight.detach(), fresh(ours), atol=1e-6, rtol=1e-5)
    loss.backward()
    weight = contract(tensors_of(plain))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = torch.nn.functional.linear(x, weight, plain.bias).float().square().sum()
    loss.backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert a.grad is not None and a.grad.dtype == torch.float32
        torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)


def test_half_precision_tensors_are_contracted_in_fp32():
    chain = make(WIDE, torch.bfloat16)
    weight = contract_cached(tuple(chain), WIDE, ChainCache())
    exact = contract([t.detach().float() for t in chain])
    assert weight.dtype == torch.bfloat16
    assert torch.equal(weight, exact.bfloat16())
    weight.float().sum().backward()
    assert {t.grad.dtype for t in chain if t.grad is not None} == {torch.bfloat16}


def test_a_copy_has_a_cache_of_its_own():
    linear = layer()
    _ = linear.weight
    twin = copy.deepcopy(linear)
    with torch.no_grad():
        for tensor in tensors_of(twin):
            tensor.mul_(2)
    assert_fresh(twin)
    assert_fresh(linear)
    assert not torch.equal(twin.weight, linear.weight)


def test_a_cache_is_never_written_to_disk():
    linear = layer()
    _ = linear.weight
    chain = linear.parametrizations["weight"][0]  # type: ignore[index, union-attr]
    assert len(pickle.dumps(chain.cache)) < 200


def test_assigning_a_weight_decomposes_it():
    linear = layer()
    value = torch.randn(linear.weight.shape)
    linear.weight = value  # type: ignore[assignment]
    torch.testing.assert_close(linear.weight.detach(), value, atol=1e-5, rtol=1e-5)
    for tensor, size in zip(tensors_of(linear), WIDE.shapes(), strict=True):
        assert tuple(tensor.shape) == size


def test_gradient_checkpointing_gives_the_same_gradients():
    from torch.utils.checkpoint import checkpoint

    ours, plain = layer(), layer()
    x = torch.randn(4, 8, requires_grad=True)
    checkpoint(ours, x, use_reentrant=False).square().sum().backward()
    plain(x).square().sum().backward()
    for a, b in zip(ours.parameters(), plain.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]


def _ranks(rank: int, path: str) -> None:
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=f"file://{path}/store", rank=rank, world_size=2)
    linear = layer()
    with torch.no_grad():
        for tensor in tensors_of(linear):
            tensor.add_(0.1 * rank)
    _ = linear.weight
    wrapped = DistributedDataParallel(linear)
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01, fused=True)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, 8, generator=generator).chunk(2)[rank]
        wrapped(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert_fresh(linear)
    torch.save(linear.weight.detach(), f"{path}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_train_the_same_weight_as_one(tmp_path):  # type: ignore[no-untyped-def]
    torch.multiprocessing.spawn(_ranks, (str(tmp_path),), nprocs=2)
    linear = layer()
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01, fused=True)
    for step in range(3):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        linear(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, linear.weight.detach(), atol=1e-5, rtol=1e-5)


def test_chains_of_decomposed_weights_read_back_exactly():
    weight = torch.randn(12, 8)
    chain = decompose(weight, WIDE)
    torch.testing.assert_close(contract_cached(chain, WIDE, ChainCache()), weight, atol=1e-5, rtol=1e-5)
