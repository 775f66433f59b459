"""Files of a pretrained model that a pipeline's ranks write are those that transformers and PEFT write themselves, and
read; and the other way round."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import host_world
import pytest
import torch
from torch import Tensor, nn

import pipex
from pipex.errors import CheckpointError, InputError
from pipex.runtime.checkpoint import PREVIOUS
from pipex.state import Checkpoint

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

import resident_pretrained  # noqa: E402
from hf_stages import change, changed, names_of, pipeline_of  # noqa: E402
from hf_zoo import TWELVE, Example  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

LORA = "llama lora"
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Bit for bit, in order."""
    return one.keys() == other.keys() and all(
        one[n].dtype == other[n].dtype and torch.equal(one[n], other[n]) for n in one
    )


def tensors_in(directory: Path, stem: str = "model") -> dict[str, Tensor]:
    """Of all files that are there."""
    return {n: t for file in sorted(directory.glob(f"{stem}*.safetensors")) for n, t in load_file(file).items()}


def save(family: str, directory: Path, schedule: str = "1f1b", others: Path | None = None) -> bool:
    """Saves what a training has changed. Returns whether a load of ``others``, where the same model was saved by
    itself, puts it back."""
    example = Example(family)
    pipeline = pipeline_of(example, example.model(), schedule)
    change(names := names_of(pipeline))
    pipeline.save_pretrained(directory)
    saved = {name: tensor.detach().clone() for name, tensor in names.items()}
    with torch.no_grad():
        for tensor in names.values():
            if tensor.requires_grad:
                tensor.zero_()
    assert not equal(names, saved)
    if others is not None:
        pipeline.load_pretrained(others)
    return equal(names, saved)


def trained_alone(family: str, directory: Path, **shards: str) -> Any:
    model = changed(Example(family).model())
    model.save_pretrained(directory, **shards)
    return model


def settings_in(file: Path) -> dict[str, Any]:
    """PEFT writes the sets among its settings as lists, in the order of the process that does."""
    read = json.loads(file.read_text())
    return {key: sorted(value) if key == "target_modules" else value for key, value in read.items()}


def files_of(ranks: int) -> set[str]:
    """That hold a model's tensors."""
    names = {f"model-{number:05d}-of-{ranks:05d}.safetensors" for number in range(1, ranks + 1)}
    return {*names, "model.safetensors.index.json"} if ranks > 1 else {"model.safetensors"}


@pytest.mark.parametrize("family", TWELVE)
def test_a_pipeline_and_the_model_itself_save_the_same_and_read_each_other_s(family: str, tmp_path: Path) -> None:
    own, stem = tmp_path / "own", "adapter_model" if family == LORA else "model"
    model = trained_alone(family, own)
    expected = dict(sorted(tensors_in(own, stem).items()))
    trained_alone(family, tmp_path / "shards", max_shard_size="40KB")
    for ranks, schedule, others in ((1, "1f1b", "own"), (3, "1f1b", "shards"), (2, "zbv", "own")):
        found = tmp_path / f"{schedule} {ranks}"
        assert all(host_world.launch(save, ranks, args=(family, found, schedule, tmp_path / others)))
        assert equal(dict(sorted(tensors_in(found, stem).items())), expected)
        settings = {file.name for file in own.glob("*.json")}
        assert all(settings_in(found / name) == settings_in(own / name) for name in settings)
        weights = {"adapter_model.safetensors"} if family == LORA else files_of(ranks)
        assert {file.name for file in found.iterdir()} == settings | weights
        if family == LORA:
            read = peft.PeftModel.from_pretrained(Example(family).model().unload(), found)
        else:
            read, said = type(model).from_pretrained(found, output_loading_info=True)
            assert not any(said.values())
        assert equal(read.state_dict(), model.state_dict())


@pytest.mark.parametrize("schedule", ["chimera", "dualpipev"])
def test_what_several_ranks_hold_is_saved_once(schedule: str, tmp_path: Path) -> None:
    model = trained_alone("llama tied", tmp_path / "own")
    assert all(host_world.launch(save, 2, args=("llama tied", tmp_path / "ours", schedule, tmp_path / "own")))
    assert equal(type(model).from_pretrained(tmp_path / "ours").state_dict(), model.state_dict())
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    assert sum(len(load_file(tmp_path / "ours" / file)) for file in files_of(2) if "index" not in file) == len(
        index["weight_map"]
    )
    parameters = list(model.parameters())
    assert index["metadata"] == {
        "total_parameters": sum(p.numel() for p in parameters),
        "total_size": sum(p.nbytes for p in parameters),
    }


def test_a_save_takes_the_place_of_the_one_before_and_leaves_other_files(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    model = trained_alone("mixtral", tmp_path, max_shard_size="40KB")
    others = {"config.json", "generation_config.json", "tokenizer.json"}
    for ranks in (3, 2, 2, 1, 1, 3):
        for file in tmp_path.glob("*.safetensors*"):
            file.write_bytes(b"no longer of use")
        host_world.launch(save, ranks, args=("mixtral", tmp_path))
        assert {file.name for file in tmp_path.iterdir()} == others | files_of(ranks)
        assert equal(type(model).from_pretrained(tmp_path).state_dict(), model.state_dict())


def with_main_weights(directory: Path) -> None:
    model = Example("llama").model().bfloat16()
    pipeline = pipeline_of(Example("llama"), model, optimizer=torch.optim.SGD, main_weights=True)
    pipeline.load_pretrained(directory)
    assert pipeline.optimizer is not None
    main = [p for group in pipeline.optimizer.param_groups for p in group["params"]]
    read = changed(Example("llama").model()).bfloat16().state_dict()
    names = names_of(pipeline)
    assert all(torch.equal(tensor, read[name]) for name, tensor in names.items())
    assert {p.dtype for p in main} == {torch.float32}
    assert sorted(p.sum().item() for p in main) == sorted(read[name].float().sum().item() for name in names)


def test_main_weights_are_those_that_were_read(tmp_path: Path) -> None:
    trained_alone("llama", tmp_path)
    host_world.launch(with_main_weights, 2, args=(tmp_path,))


def asynchronous(directory: Path) -> list[float]:
    """Losses after a load: of a pipeline that has older weights from steps before, and of one that has not."""
    example, losses = Example("llama"), []
    batch = example.batch(example.model(), 1)
    for steps in (0, 2):
        model = example.model()
        plan = pipex.build("pipedream-2bw", 2, 4)
        stages = pipex.split_model(model, plan, sample=batch, verify=False)
        pipeline = pipex.Pipeline(stages, plan, mean_loss, optimizer=torch.optim.SGD)
        for _ in range(steps):
            pipeline.step(batch, batch["labels"])
        pipeline.load_pretrained(directory)
        pipeline.save(directory / "checkpoint")
        losses.append(pipeline.step(batch, batch["labels"]))
    assert not any(name.startswith(PREVIOUS) for name in Checkpoint.open(directory / "checkpoint").tensors)
    return losses


def test_a_plan_that_updates_within_a_step_goes_on_from_what_was_read(tmp_path: Path) -> None:
    trained_alone("llama", tmp_path)
    for fresh, after in host_world.launch(asynchronous, 2, args=(tmp_path,)):
        assert fresh == after


# A model that is never whole in any process.


def trained(directory: Path, out: Path, empty: bool) -> Any:
    example = Example("qwen3 moe")
    model = pipex.empty_model(directory) if empty else example.model()
    plan = pipex.build("zb-h1", pipex.current_world().ranks, 4)
    stages = pipex.split_model(model, plan, sample=example.batch(example.model(), 0), verify=False)
    pipeline = pipex.Pipeline(stages, plan, mean_loss, optimizer=torch.optim.SGD)
    if empty:
        with pytest.raises(InputError, match=r"no values yet; .*needed load or load_pretrained"):
            pipeline.save_pretrained(out)
    pipeline.load_pretrained(directory)
    batch = example.batch(example.model(), 1)
    losses = [pipeline.step(batch, batch["labels"]) for _ in range(2)]
    pipeline.save_pretrained(out)
    return losses


def mean_loss(output: Any, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), target[:, 1:].flatten())


def test_a_model_without_values_is_filled_by_stage_and_trains_as_one_with_values(tmp_path: Path) -> None:
    example = Example("qwen3 moe")
    changed(example.model()).save_pretrained(tmp_path / "from")
    results = [
        host_world.launch(trained, 2, args=(tmp_path / "from", tmp_path / str(empty), empty)) for empty in (0, 1)
    ]
    assert results[0] == results[1]
    assert equal(tensors_in(tmp_path / "0"), tensors_in(tmp_path / "1"))


def test_a_rank_s_memory_grows_by_its_own_stages() -> None:
    """All stages would be 4 times as much. Of the whole, some MB are what the cut is learnt with, however large the
    model is; pages of a file count beside what is read of them while they are mapped, as the kernel likes; and a save
    has the experts of a file twice, as they are converted."""
    command = [sys.executable, resident_pretrained.__file__]
    for whole, loaded, saved in json.loads(subprocess.run(command, capture_output=True, check=True).stdout):
        assert whole < 3.2
        assert loaded < 2.2
        assert saved < 2.2


@pytest.mark.parametrize("family", [family for family in TWELVE if family != LORA])
def test_an_empty_model_has_forms_and_buffers_as_from_pretrained(family: str, tmp_path: Path) -> None:
    model = Example(family).model().bfloat16()
    model.save_pretrained(tmp_path)
    read, empty = type(model).from_pretrained(tmp_path), pipex.empty_model(tmp_path)
    assert type(empty) is type(read)
    assert empty.config.to_dict() == read.config.to_dict()
    forms = [[(n, p.shape, p.dtype) for n, p in m.named_parameters(remove_duplicate=False)] for m in (read, empty)]
    assert forms[0] == forms[1]
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert equal(dict(empty.named_buffers()), dict(read.named_buffers()))
    assert [n for n, _ in empty.named_parameters()] == [n for n, _ in read.named_parameters()], "tied are tied"


def test_a_model_that_is_kept_in_part_in_float32_is_so_when_empty(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).half().save_pretrained(tmp_path)
    read = transformers.T5ForConditionalGeneration.from_pretrained(tmp_path)
    dtypes = {n: p.dtype for n, p in read.named_parameters()}
    assert len(set(dtypes.values())) == 2
    assert {n: p.dtype for n, p in pipex.empty_model(tmp_path).named_parameters()} == dtypes


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "No such file or directory"),
        ("{", "JSONDecodeError"),
        ('{"model_type": "unheard"}', "KeyError: 'unheard'"),
        ('{"model_type": "llama", "architectures": ["Mine"], "auto_map": {"AutoModel": "mine.Mine"}}', "got Mine;"),
    ],
)
def test_a_configuration_of_no_known_model_is_refused(content: str | None, words: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "config.json").write_text(content)
        (tmp_path / "mine.py").write_text("raise SystemExit")
    with pytest.raises(InputError, match=words):
        pipex.empty_model(tmp_path)


# Refusals.


def in_vain(family: str, directory: Path, call: str) -> str:
    """A call that fails, says the same on all ranks, has changed nothing, and after which the pipeline goes on."""
    example = Example(family)
    pipeline = pipeline_of(example, example.model(), optimizer=torch.optim.SGD)
    before = {name: tensor.detach().clone() for name, tensor in names_of(pipeline).items()}
    with pytest.raises(CheckpointError) as caught:
        getattr(pipeline, call)(directory)
    assert equal({n: t.detach() for n, t in names_of(pipeline).items()}, before)
    good = directory.parent / "good"
    pipeline.save_pretrained(good)
    pipeline.load_pretrained(good)
    return str(caught.value)


def refused(family: str, directory: Path, call: str = "load_pretrained") -> str:
    (said,) = set(host_world.launch(in_vain, 2, args=(family, directory, call)))
    return str(said)


def test_names_and_shapes_of_another_model_are_listed(tmp_path: Path) -> None:
    config = Example("llama").model().config
    config.num_hidden_layers, config.vocab_size = 3, 60
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "other")
    said = refused("llama", tmp_path / "other")
    assert "the files in" in said
    assert "are of another model; got missing: model.layers.3." in said
    assert "(9 in all)" in said
    assert "different: lm_head.weight is float32[60, 32], needed" in said
    config.num_hidden_layers = 5
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "deeper")
    assert "unexpected: model.layers.4." in refused("llama", tmp_path / "deeper")
    transformers.LlamaModel(Example("llama").model().config).save_pretrained(tmp_path / "headless")
    assert "missing: lm_head.weight; build" in refused("llama", tmp_path / "headless")


def untie(directory: Path) -> None:
    """As files of a model whose embeddings are two."""
    tensors = tensors_in(directory)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    from safetensors.torch import save_file

    save_file(tensors, directory / "model.safetensors")


def test_tied_tensors_that_differ_in_the_files_are_refused(tmp_path: Path) -> None:
    Example("llama tied").model().save_pretrained(tmp_path / "untied")
    untie(tmp_path / "untied")
    said = refused("llama tied", tmp_path / "untied")
    assert "lm_head.weight and model.embed_tokens.weight, which differ" in said


def test_pickles_pipes_and_what_is_not_there_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("pickle", "nothing", "pipe", "pipes"):
        (tmp_path / name).mkdir()
    torch.save(Example("llama").model().state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    assert "got pytorch_model.bin, which can run code when read" in refused("llama", tmp_path / "pickle")
    assert "there is no model.safetensors in" in refused("llama", tmp_path / "nothing")
    os.mkfifo(tmp_path / "pipe" / "model.safetensors.index.json")
    assert "a pipe, not a file" in refused("llama", tmp_path / "pipe")
    os.mkfifo(tmp_path / "pipes" / "a.safetensors")
    index = tmp_path / "pipes" / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"lm_head.weight": "a.safetensors"}}')
    assert "a.safetensors is damaged; got a pipe, not a file" in refused("llama", tmp_path / "pipes")


def save_to_two_places(root: Path) -> str:
    pipeline = pipeline_of(Example("llama"), Example("llama").model())
    rank = pipeline.world.rank
    with pytest.raises(CheckpointError) as caught:
        pipeline.save_pretrained(root / ("file/in" if rank else "good"))
    pipeline.save_pretrained(root / "good")
    with pytest.raises(CheckpointError, match=r"rank 0 does not find .*/0/\.pipex-model-rank0001-"):
        pipeline.save_pretrained(root / str(rank))
    assert not any(file.name.startswith("model") for file in (root / str(rank)).iterdir())
    return str(caught.value).partition("; ")[2]


def test_what_one_rank_cannot_write_is_said_by_all_and_nothing_is_left(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (said,) = set(host_world.launch(save_to_two_places, 2, args=(tmp_path,)))
    assert said.startswith("what was there stays: rank 1: cannot write")
    assert len(list((tmp_path / "good").iterdir())) == 5


def other_model() -> str:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    plan = pipex.build("1f1b", 2, 4)
    pipeline = pipex.Pipeline(pipex.split_model(model, 2), plan, nn.functional.mse_loss)
    with pytest.raises(CheckpointError, match=r"of no model of transformers or PEFT; .*use save and load") as caught:
        pipeline.save_pretrained("nowhere")
    return str(caught.value)


def test_stages_of_another_model_have_no_such_files() -> None:
    assert len(set(host_world.launch(other_model, 2))) == 1


def with_a_new_tensor(directory: Path) -> str:
    pipeline = pipeline_of(Example("llama"), Example("llama").model())
    if pipeline.world.rank:
        head = pipeline.local_stages[-1].layers[-1]
        next(m for m in head.modules() if isinstance(m, nn.Linear)).register_buffer("scale", torch.ones(1))
    with pytest.raises(CheckpointError) as caught:
        pipeline.save_pretrained(directory)
    return str(caught.value)


def test_tensors_that_came_after_the_split_are_named(tmp_path: Path) -> None:
    (said,) = set(host_world.launch(with_a_new_tensor, 2, args=(tmp_path,)))
    assert "the stages hold more than the model when it was split; got lm_head.scale" in said
    assert list(tmp_path.iterdir()) == []


# The model object of the user.


def stale(directory: Path, schedule: str) -> str:
    """What a save of the model itself, of its base or a copy is refused by."""
    example = Example(LORA)
    model: Any = example.model()
    pipeline = pipeline_of(example, model, schedule)
    said = set()
    for own in (model, model.get_base_model(), copy.deepcopy(model)):
        try:
            own.save_pretrained(directory)
            said.add("")
        except CheckpointError as error:
            said.add(str(error))
    gone = weakref.ref(model)
    del model, own
    gc.collect()
    assert gone() is None, "the pipeline keeps it in memory"
    pipeline.save_pretrained(directory)
    (text,) = said
    return text


def test_a_model_whose_stages_are_on_other_ranks_is_not_saved_in_silence(tmp_path: Path) -> None:
    for text in host_world.launch(stale, 2, args=(tmp_path / "two", "1f1b")):
        assert "call pipeline.save_pretrained(directory) on every rank" in text
    assert not (tmp_path / "two" / "config.json").exists()
    assert host_world.launch(stale, 1, args=(tmp_path / "one", "1f1b")) == [""]


# Adapters.


def two_adapters() -> Any:
    model: Any = Example(LORA).model()
    config = peft.LoraConfig(
        r=2, target_modules=["k_proj"], modules_to_save=["lm_head"], init_lora_weights=False, task_type="CAUSAL_LM"
    )
    model.add_adapter("other", config)
    return model


def save_two(directory: Path) -> None:
    pipeline = pipeline_of(Example(LORA), two_adapters())
    change(names_of(pipeline))
    pipeline.save_pretrained(directory)


def test_all_adapters_are_saved_each_in_its_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = changed(two_adapters())
    model.save_pretrained(tmp_path / "own")
    host_world.launch(save_two, 3, args=(tmp_path / "ours",))
    for folder in ("", "other"):
        own, ours = (tmp_path / kind / folder for kind in ("own", "ours"))
        expected = tensors_in(own, "adapter_model")
        assert any("lm_head" in name for name in expected) == bool(folder)
        assert equal(dict(sorted(tensors_in(ours, "adapter_model").items())), dict(sorted(expected.items())))
        assert settings_in(ours / "adapter_config.json") == settings_in(own / "adapter_config.json")


# What cannot be saved by stage.


def quantized(model: Any) -> None:
    model.hf_quantizer = object()


def tied_in_silence(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[0].mlp.gate_proj.weight


@pytest.mark.parametrize(
    ("spoil", "words"),
    [(quantized, "its weights are quantized"), (tied_in_silence, "the class does not say that two of its tensors")],
)
def test_models_whose_files_need_more_than_stages_are_refused(
    spoil: Callable[[Any], None], words: str, tmp_path: Path
) -> None:
    example = Example("llama")
    model = example.model()
    spoil(model)
    pipeline = pipeline_of(example, model)
    with pytest.raises(CheckpointError, match=f"LlamaForCausalLM has no files .*{words}.*use save and load"):
        pipeline.save_pretrained(tmp_path)
    pipeline.save(tmp_path)
