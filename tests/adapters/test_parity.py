"""What every adapter that brings tokens into another order says about them, held against stock diffusers."""

import pytest
import torch
from joint_models import FULL, ORDERS, sparse
from parity_families import FAMILIES, Case


def rows(choose):
    """Parameters for each family and each of what is chosen of it."""
    pairs = [(name, what) for name, family in FAMILIES.items() for what in choose(family)]
    return pytest.mark.parametrize(("name", "what"), pairs, ids=["-".join(pair) for pair in pairs])


def close(out, true):
    torch.testing.assert_close(out, true, rtol=1e-4, atol=1e-5)


def apart(out, true):
    return float((out - true).norm() / true.norm())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("batch", [1, 2])
@rows(lambda family: family.reordered)
def test_keeping_everything_is_stock_diffusers_in_every_order(name, what, batch, order):
    family, case = FAMILIES[name], FAMILIES[name].reordered[what]
    transformer, inputs = family.forward(case, batch=batch)
    true = family.run(transformer, inputs)
    processor = sparse(transformer, order=order)
    close(family.run(transformer, inputs), true)
    report = processor.report
    assert (
        report.sparse_calls == family.calls(case.config)
        and report.dense_calls == 0
        and report.keep_achieved == 1
    )
    assert set(report.token_orders) == {order}
    assert report.cross_attention_calls == family.cross(case.config), "they stay stock"


@pytest.mark.parametrize("method", FULL)
@rows(lambda family: family.methods)
def test_keeping_everything_is_stock_diffusers_with_every_method(name, what, method):
    family = FAMILIES[name]
    transformer, inputs = family.forward(family.methods[what], batch=2)
    true = family.run(transformer, inputs)
    processor = sparse(transformer, method)
    close(family.run(transformer, inputs), true)
    assert processor.report.dense_calls == 0


@rows(lambda family: family.parts)
def test_tokens_really_are_reordered(name, what):
    """Without one of the hooks the result is wrong, so the parity test can tell."""
    family = FAMILIES[name]
    transformer, inputs = family.forward(Case(inputs=family.parted))
    true = family.run(transformer, inputs)
    sparse(transformer, order="tiles")
    getattr(transformer, what)._forward_hooks.clear()
    assert apart(family.run(transformer, inputs), true) > 1e-3  # parity: 1e-7


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_row_is_the_same_in_other_company(name):
    family = FAMILIES[name]
    case = next(iter(family.methods.values()))
    transformer, pair = family.forward(case, batch=2)
    other = family.inputs(transformer, **case.inputs, batch=2, seed=1)
    sparse(transformer, keep=0.3)
    first, second = family.run(transformer, pair), family.run(transformer, family.mixed(pair, other))
    close(second[:1], first[:1])
    assert apart(second[1:], first[1:]) > 1e-2
