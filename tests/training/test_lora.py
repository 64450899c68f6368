"""LoRA: only adapters train, are averaged and saved; a resumed run has the same bits; an export is the merged model."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from sparse_forcing.errors import ConfigError, WeightsError
from sparse_forcing.sampling.pipeline import SparseForcingPipeline
from sparse_forcing.training.engine.checkpoint import load_checkpoint, save_checkpoint
from sparse_forcing.training.engine.lora import LoraConfig
from sparse_forcing.training.engine.optim import OptimizerConfig
from sparse_forcing.training.recipes.forcing import ForcingConfig, ForcingRecipe
from tests.training.helpers import differences, largest_difference, losses, newest, run, small_config, state
from tests.training.test_recipes import DATA, LOOP, distill

pytest.importorskip("peft")
LORA = LoraConfig(rank=2, alpha=4.0)
FAST = OptimizerConfig(learning_rate=1e-2)


def forcing(folder: Path, **changes: Any) -> ForcingRecipe:
    config = ForcingConfig(loop=LOOP, model=str(folder), data=DATA, optimizer=FAST, **{"lora": LORA, **changes})
    return ForcingRecipe(config, Accelerator(cpu=True))


def snapshot(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def changed(model: torch.nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_adapters_change_nothing_before_they_are_trained(model_folder: Path) -> None:
    (adapted,), (plain,) = forcing(model_folder).losses(0, 0), forcing(model_folder, lora=None).losses(0, 0)
    assert torch.equal(adapted, plain)


def test_only_adapters_train_and_are_averaged(model_folder: Path) -> None:
    recipe = forcing(model_folder)
    before = snapshot(recipe.model)
    recipe.update(0)
    recipe.update(1)
    adapters = {name for name in before if ".lora_" in name}
    assert len(adapters) == 2 * 10 * 2  # A and B of four projections of both attentions and two of the feed-forward
    assert changed(recipe.model, before) == adapters == set(recipe.ema.shadow)


def test_generator_and_critic_have_adapters_of_their_own(model_folder: Path) -> None:
    recipe = distill(
        model_folder, lora=LORA, critic_lora=LoraConfig(rank=1, targets=("to_q",)), generator=FAST, critic=FAST
    )
    before = [snapshot(net) for net in (recipe.model, recipe.fake, recipe.real)]
    for step in range(3):
        recipe.update(step)
    for net, old in zip((recipe.model, recipe.fake, recipe.real), before):
        assert changed(net, old) == {name for name in old if ".lora_" in name}
    assert {name.split(".")[3] for name in changed(recipe.fake, before[1])} == {"to_q"}
    assert changed(recipe.real, before[2]) == set()


def test_a_learned_selector_trains_whole_beside_the_adapters(tmp_path: Path, selector_folder: Path) -> None:
    recipe = distill(selector_folder, lora=LORA, selector_weight=0.1, generator=FAST)
    before = snapshot(recipe.model)
    recipe.update(0)
    learned = {name for name in before if ".lora_" in name or ".selector." in name}
    assert {name.rsplit(".", 1)[1] for name in changed(recipe.model, before)} >= {"gate", "key_weights", "weight"}
    assert changed(recipe.model, before) <= learned == set(recipe.ema.shadow)
    folder = save_checkpoint(tmp_path, 1, recipe.parts, {})
    again = distill(selector_folder, lora=LORA)
    load_checkpoint(folder, again.parts)
    assert differences(snapshot(again.model), snapshot(recipe.model)) == []
    recipe.export(tmp_path / "pipeline")
    plain = SparseForcingPipeline.from_pretrained(str(tmp_path / "pipeline")).transformer.state_dict()
    gate = "blocks.0.selector.gate"
    assert torch.equal(plain[gate], recipe.ema.shadow[gate])


def test_full_training_of_one_network_beside_adapters_of_the_other(model_folder: Path) -> None:
    recipe = distill(model_folder, lora=LORA)
    recipe.update(0)
    assert all(p.requires_grad for p in recipe.fake.parameters())
    assert {p.requires_grad for n, p in recipe.model.named_parameters() if ".lora_" not in n} == {False}


def test_a_checkpoint_holds_adapters_alone_and_loads_into_the_same_base_only(
    tmp_path: Path, model_folder: Path, selector_folder: Path
) -> None:
    recipe = forcing(model_folder)
    recipe.update(0)
    folder = save_checkpoint(tmp_path, 1, recipe.parts, {})
    saved = torch.load(folder / "model.pt", weights_only=True)
    assert all(".lora_" in name or name == "__base__" for name in saved)
    again = forcing(model_folder)
    load_checkpoint(folder, again.parts)
    assert differences(snapshot(again.model), snapshot(recipe.model)) == []
    with pytest.raises(WeightsError, match="base weights"):
        load_checkpoint(folder, forcing(selector_folder).parts)
    with pytest.raises(WeightsError, match=r"model\.pt: does not fit"):
        load_checkpoint(folder, forcing(model_folder, lora=LoraConfig(rank=3)).parts)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["forcing", "distill"])
def test_killed_and_resumed_equals_undisturbed(tmp_path: Path, model_folder: Path, stage: str) -> None:
    config = small_config(model_folder, stage, steps=4)
    config["lora"] = {"rank": 2, "alpha": 4.0}
    assert run(tmp_path, config, tmp_path / "whole", stage=stage)[0] == 0
    writes = len(list(newest(tmp_path / "whole").glob("*.pt")))
    assert run(tmp_path, config, tmp_path / "out", stage=stage, kill_at_write=writes + 2)[0] != 0
    code, output = run(tmp_path, config, tmp_path / "out", stage=stage)
    assert code == 0, output
    assert differences(state(newest(tmp_path / "out")), state(newest(tmp_path / "whole"))) == []
    assert losses(tmp_path / "out") == losses(tmp_path / "whole")


def test_an_export_is_the_merged_model_and_the_adapter_beside_it(tmp_path: Path, model_folder: Path) -> None:
    from safetensors.torch import load_file

    recipe = forcing(model_folder)
    recipe.update(0)
    recipe.update(1)
    recipe.export(tmp_path / "pipeline")
    plain = SparseForcingPipeline.from_pretrained(str(tmp_path / "pipeline")).transformer
    assert not [name for name in plain.state_dict() if "lora" in name or "base_layer" in name]
    recipe.ema.exchange(recipe.model)
    torch.manual_seed(1)
    x, text = torch.randn(1, 6, 2, 4, 4), torch.randn(1, 16, 8)
    with torch.no_grad():
        expected, found = (net(x, torch.tensor([500.0]), text) for net in (recipe.model, plain))
        base = SparseForcingPipeline.from_pretrained(str(model_folder)).transformer(x, torch.tensor([500.0]), text)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base, rtol=1e-3, atol=1e-4)
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (2, 4.0)
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    averaged = dict(recipe.model.named_parameters())["blocks.0.attn1.to_q.lora_A.default.weight"]
    assert torch.equal(adapter["blocks.0.attn1.to_q.lora_A.weight"], averaged)
    assert len(adapter) == len(recipe.ema.shadow)


def test_a_target_without_a_layer_and_a_missing_package_are_named(
    model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigError, match=r"targets: no linear layer .*\.to_x"):
        forcing(model_folder, lora=LoraConfig(targets=("to_q", "to_x")))
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("diffusers.utils.import_utils._peft_available", False)  # diffusers looked when it was imported
    with pytest.raises(ConfigError, match=r"pip install .*sparse-forcing\[train\]"):
        forcing(model_folder)


def test_gradient_checkpointing_gives_the_same_gradients(model_folder: Path) -> None:
    gradients = []
    for checkpointing in (False, True):
        loop = replace(LOOP, gradient_checkpointing=checkpointing)
        recipe = distill(model_folder, loop=loop, lora=LORA)
        (loss,) = recipe.generator_losses(0, 0)
        loss.backward()
        gradients.append({n: p.grad for n, p in recipe.model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


@pytest.mark.slow
def test_sharded_adapters_equal_one_process(tmp_path: Path, model_folder: Path) -> None:
    """FSDP2 with two processes, text encoder sharded too; both networks have adapters; the export is whole."""
    for name, options in (("one", {}), ("fsdp", {"parallel": "fsdp"})):
        config = small_config(model_folder, "distill", steps=4, **options)
        config |= {"lora": {"rank": 2, "alpha": 4.0}, "critic_lora": {"rank": 1}}
        code, output = run(tmp_path, config, tmp_path / name, stage="distill", processes=1 + len(options))
        assert code == 0, output
    one, two = (state(newest(tmp_path / name)) for name in ("one", "fsdp"))
    for part in ("generator.pt", "critic.pt", "generator_ema.pt"):
        assert one[part].keys() == two[part].keys()
        assert largest_difference(one[part], two[part]) < 1e-5
    pipes = [SparseForcingPipeline.from_pretrained(str(tmp_path / name / "pipeline")) for name in ("one", "fsdp")]
    assert largest_difference(*(pipe.transformer.state_dict() for pipe in pipes)) < 1e-5
