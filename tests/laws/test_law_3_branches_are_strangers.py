"""Law 3: cond never sees what uncond left, and a batch row never sees another row."""

import pytest
import torch


def test_the_table_says_which_classes_have_cache_contexts(model):
    assert model.contexts == hasattr(model.make(), "cache_context")


@pytest.mark.where("contexts")
def test_a_named_branch_is_the_same_with_and_without_the_other(model, method, install):
    _expect_strangers(model, method, install, named=True)


def test_a_nameless_branch_is_the_same_with_and_without_the_other(model, method, install):
    _expect_strangers(model, method, install, named=False)


def _expect_strangers(model, method, install, named):
    def run(branches):
        transformer = model.make()
        handle = install(transformer, method(0.4))
        inputs = {name: model.inputs(transformer, seed=seed) for seed, name in enumerate(("c", "u"))}
        outputs = []
        for step, time in enumerate(model.times):
            for name in branches:
                call = {**inputs[name], "timestep": inputs[name]["timestep"] * time, "return_dict": False}
                call["hidden_states"] = call["hidden_states"] * (1 + step)
                with torch.no_grad():
                    if named:
                        with transformer.cache_context(name):
                            out = transformer(**call)[0]
                    else:
                        out = transformer(**call)[0]
                if name == "c":
                    outputs.append(out)
        assert handle.report().runs == 1, "one run, in which a branch remembers"
        return torch.stack(outputs)

    assert torch.equal(run("cu"), run("c"))
    assert torch.equal(run("uc"), run("c"))


def test_a_pipeline_that_names_no_branch(method, install):
    """Wan video-to-video opens no cache context; the branches are told apart by their conditioning."""
    from diffusers import WanVideoToVideoPipeline
    from PIL import Image

    from dit_accel.testing import tiny_wan_pipeline

    t2v = tiny_wan_pipeline()
    parts = {
        name: getattr(t2v, name) for name in ("tokenizer", "text_encoder", "transformer", "vae", "scheduler")
    }
    pipe = WanVideoToVideoPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    handle = install(pipe, method(0.4))
    call = {
        "video": [Image.new("RGB", (112, 96), (20 * i, 90, 30)) for i in range(9)],
        "prompt": "a red star",
        "negative_prompt": "blurry",
        "height": 96,
        "width": 112,
        "num_inference_steps": 4,
        "strength": 0.7,
        "guidance_scale": 5.0,
        "output_type": "latent",
    }
    first = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    again = pipe(**call, generator=torch.Generator().manual_seed(0)).frames
    assert torch.equal(first, again)
    report = handle.report()
    assert report.runs == 2 and report.dense_calls == 0 and not report.stateless
    assert list(report.keep_per_step) == [0, 1]  # strength 0.7 leaves two of four steps


def test_a_batch_row_is_the_same_in_other_company(model, method, install, relative):
    transformer = model.make()
    install(transformer, method(0.4))
    pair, other = (model.inputs(transformer, batch=2, seed=seed) for seed in (0, 1))
    by_row = [name for name, x in pair.items() if isinstance(x, torch.Tensor) and len(x) == 2]
    mixed = pair | {name: torch.cat([pair[name][:1], other[name][1:]]) for name in by_row}
    with torch.no_grad():
        first = transformer(**pair, return_dict=False)[0]
        second = transformer(**mixed, return_dict=False)[0]
    assert relative(second[:1], first[:1]) < 1e-5
    assert relative(second[1:], first[1:]) > 1e-2
