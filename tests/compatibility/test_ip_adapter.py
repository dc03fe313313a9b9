"""IP-Adapters: their processors have weights of their own, stand where ours would, and come and go."""

import copy

import pytest
import torch
from ip_adapters import HOSTS, STEPS, accelerate, differs, first, kinds


@pytest.fixture(params=HOSTS, ids=lambda host: host.name)
def host(request):
    return request.param


@pytest.fixture
def stock(host):
    """A pipeline with the adapter, and nothing of ours yet."""
    return host.loaded()


def test_loaded_before_and_after(host, stock, when):
    true = host.run(stock)
    assert differs(true, host.run(host.make(), image=False))
    for keep in (1.0, 0.3):
        pipe = host.make()
        if when == "before":
            host.load(pipe)
        with accelerate(pipe, keep) as handle:
            if when == "after":
                host.run(pipe, image=False)
                host.load(pipe)
                handle.report(clear=True)
            out = host.run(pipe)
            report = handle.report()
            assert (report.sparse_calls, report.dense_calls) == (host.layers * STEPS, 0)
            # the adapter's own attentions are found at the installation
            reads = host.reads + (host.projects if when == "before" else 0)
            assert report.cross_attention_calls == reads * STEPS, "the image prompt is read as it was"
        if keep == 1:
            host.close(out, true)
        else:
            assert differs(out, true)
        assert type(first(pipe)) is host.adapted and "_attention_backend" not in vars(first(pipe))
        host.close(host.run(pipe), true)


def test_removal_restores_the_adapters_processor_by_identity(host, stock):
    before = dict(stock.transformer.attn_processors)
    names = list(stock.transformer.state_dict())
    with accelerate(stock):
        assert list(stock.transformer.state_dict()) == names, "its weights are among the model's"
        handle = accelerate(stock)  # takes over
        host.run(stock)
        assert list(stock.transformer.state_dict()) == names
    handle.remove()
    assert all(stock.transformer.attn_processors[path] is processor for path, processor in before.items())


def test_the_scale_acts_at_once_and_stays(host, stock, when):
    plain = host.run(host.make(), image=False)
    pipe = host.loaded()
    if when == "before":
        pipe.set_ip_adapter_scale(host.scale)
    with accelerate(pipe):
        if when == "after":
            pipe.set_ip_adapter_scale(host.scale)
        whole = host.run(stock)
        stock.set_ip_adapter_scale(host.scale)
        assert differs(host.run(stock), whole)
        host.close(host.run(pipe), host.run(stock))
        pipe.set_ip_adapter_scale(0.0)
        host.close(host.run(pipe), plain)
        pipe.set_ip_adapter_scale(host.scale)
    host.close(host.run(pipe), host.run(stock))


def test_unloading_while_installed(host, when):
    """Loaded before the installation or after it; either way all is sparse again without it."""
    pipe = host.make()
    plain = host.run(pipe, image=False)
    if when == "before":
        host.load(pipe)
    with accelerate(pipe) as handle:
        if when == "after":
            host.load(pipe)
        with_image = host.run(pipe)
        pipe.unload_ip_adapter()
        handle.report(clear=True)
        host.close(host.run(pipe, image=False), plain)
        report = handle.report(clear=True)
        assert (report.sparse_calls, report.dense_calls, report.cross_attention_calls) == (
            host.layers * STEPS,
            0,
            0,
        )
        twin = copy.deepcopy(pipe)
        host.close(host.run(twin, image=False), plain)
        host.load(pipe)
        host.close(host.run(pipe), with_image)
        assert handle.report().sparse_calls == host.layers * STEPS
        pipe.unload_ip_adapter()
    host.close(host.run(pipe, image=False), plain)
    assert kinds(pipe) == {host.plain}


def test_another_adapter_in_its_place(host, stock):
    true, other = host.run(stock), host.run(host.loaded(seed=1))
    assert differs(other, true)
    with accelerate(stock):
        host.run(stock)
        host.load(stock, 1)
        host.close(host.run(stock), other)
    host.close(host.run(stock), other)


def test_its_weights_follow_the_model(host, stock):
    """To another dtype, as to another device."""
    with accelerate(stock) as handle:
        stock.transformer.to(torch.bfloat16)
        assert {p.dtype for p in first(stock).parameters()} == {torch.bfloat16}
        stock.transformer.to(torch.float32)
        host.run(stock)
        assert handle.report().dense_calls == 0


def test_a_deep_copy(host, stock):
    with accelerate(stock, 0.3) as handle:
        true = host.run(stock)
        twin = copy.deepcopy(stock)
        with torch.no_grad():
            for parameter in stock.transformer.parameters():
                parameter.zero_()
        assert torch.equal(host.run(twin), true)
        assert handle.report().sparse_calls == host.layers * STEPS


def test_with_a_lora(host, stock, when):
    """Both at once."""
    from peft import LoraConfig

    def add(pipe):
        torch.manual_seed(3)
        pipe.transformer.add_adapter(
            LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
        )
        pipe.transformer.requires_grad_(False)

    pipe = host.loaded()
    add(stock)
    if when == "before":
        add(pipe)
    with accelerate(pipe):
        if when == "after":
            add(pipe)
        host.close(host.run(pipe), host.run(stock))
